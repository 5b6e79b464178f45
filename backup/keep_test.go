package backup_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

// keepRig is a guest with a raw disk, scsi0, and a qcow2 disk that is tracked in memory, virtio1.
type keepRig struct {
	*rig
	kept backup.Kept
}

func newKeepRig(t *testing.T, q testenv.QEMU, style testenv.Style, change ...func(*testenv.Config)) *keepRig {
	t.Helper()
	change = append([]func(*testenv.Config){func(c *testenv.Config) {
		c.NoShutdown = true
		c.Disks[0].Format = "raw"
	}}, change...)
	return &keepRig{newRig(t, q, style, change...), backup.Kept{Dir: t.TempDir()}}
}

func (r *keepRig) keeper() *backup.Keeper {
	return &backup.Keeper{
		Guest: "web", Addr: r.vm.Socket, Kept: r.kept, QemuImg: r.qemu.Img, Limit: time.Minute, Log: r.log, Now: time.Now,
	}
}

func (r *keepRig) config() backup.Config {
	cfg := r.rig.config(backup.Auto)
	cfg.Bitmaps, cfg.Kept = chain.KindMemory, r.kept
	return cfg
}

// point takes a point that must hold what the disks do now.
func (r *keepRig) point() *chain.Manifest {
	r.t.Helper()
	result, err := backup.Run(r.t.Context(), r.config())
	if err != nil {
		r.t.Fatal(err)
	}
	r.check(result.Point, r.ledger.Now(), r.ledger.Now())
	r.clean(1)
	for _, d := range result.Point.Disks {
		if d.Tracking == nil || d.Tracking.Kind != chain.KindMemory {
			r.t.Errorf("disk %s: tracking is %+v", d.Name, d.Tracking)
		}
	}
	return result.Point
}

// expect takes a point of an increment of each disk but one, which must be a full for that reason.
func (r *keepRig) expect(full, reason string) {
	r.t.Helper()
	for _, d := range r.point().Disks {
		switch {
		case d.Name != full && d.Level != chain.Inc:
			r.t.Errorf("disk %s: %s: %s", d.Name, d.Level, d.Reason)
		case d.Name == full && (d.Level != chain.Full || !strings.Contains(d.Reason, reason)):
			r.t.Errorf("disk %s: %s: %q, not for the reason %q", d.Name, d.Level, d.Reason, reason)
		}
	}
	r.empty()
}

// empty makes sure that nothing is kept any more.
func (r *keepRig) empty() {
	r.t.Helper()
	entries, err := os.ReadDir(filepath.Join(r.kept.Dir, "web"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "refused.json" {
			r.t.Errorf("%s is left", e.Name())
		}
	}
}

// powerOff powers the guest off from within, and waits until it has.
func (r *keepRig) powerOff() {
	r.t.Helper()
	r.vm.PowerOff()
	r.wait("the guest has powered off", func() bool { return r.vm.Status() == "shutdown" })
}

func (r *keepRig) do(f func(context.Context) error) {
	r.t.Helper()
	if err := f(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// Increments go on over a power off, of a raw disk and of a qcow2 disk that is tracked in memory.
func TestKeepOverRestart(t *testing.T) {
	t.Parallel()
	each(t, testenv.Styles, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newKeepRig(t, q, style)
		r.write(30)
		r.point()
		for range 3 {
			r.write(10)
			r.powerOff()
			r.do(r.keeper().Save)
			r.vm.Quit()
			r.vm.Restart()
			r.do(r.keeper().Restore)
			r.write(10)
			r.expect("", "")
		}
		// What was saved is used once: after a kill it is not there again.
		r.write(3)
		r.flush()
		r.vm.Kill()
		r.vm.Restart()
		r.do(r.keeper().Restore)
		for _, d := range r.point().Disks {
			if d.Level != chain.Full || !strings.Contains(d.Reason, "no bitmap records") {
				t.Errorf("disk %s: %s: %s", d.Name, d.Level, d.Reason)
			}
		}
		r.write(3)
		r.expect("", "")
	})
}

// What is asked before bitmaps are merged back is counted whatever QEMU is told of statistics: its options are about their times.
func TestCountersCountAlways(t *testing.T) {
	t.Parallel()
	for _, q := range testenv.QEMUs(t) {
		t.Run(q.Name, func(t *testing.T) {
			t.Parallel()
			vm := testenv.Start(t, testenv.Config{QEMU: q, Style: testenv.Drive, Disks: []testenv.Disk{{ID: "scsi0", Size: diskSize, Format: "raw"}}, Args: []string{
				"-set", "drive.drive-scsi0.stats-account-failed=off", "-set", "drive.drive-scsi0.stats-account-invalid=off",
				"-set", "drive.drive-scsi0.stats-intervals.0=1",
			}})
			for _, command := range []string{"aio_write -P 9 0 64k", "aio_flush", "aio_write -P 9 1T 64k", "aio_flush"} {
				if _, err := vm.TryIO("scsi0", command); err != nil && !strings.Contains(command, "1T") && !strings.Contains(err.Error(), "aio_write failed") {
					t.Errorf("%s: %v", command, err)
				}
			}
			var devices []struct {
				Stats struct {
					Writes  int64 `json:"wr_operations"`
					Failed  int64 `json:"failed_wr_operations"`
					Highest int64 `json:"wr_highest_offset"`
				}
			}
			vm.Execute("query-blockstats", nil, &devices)
			if len(devices) != 1 || devices[0].Stats.Writes != 1 || devices[0].Stats.Failed != 1 || devices[0].Stats.Highest != 64<<10 {
				t.Errorf("counted: %+v", devices)
			}
		})
	}
}

// An overlay that is committed into its backing image while the guest is stopped changes both.
func TestKeepBackingImage(t *testing.T) {
	t.Parallel()
	q := testenv.Host(t)
	dir := t.TempDir()
	base, overlay := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "overlay.qcow2")
	testenv.CreateDisk(t, q, base, "qcow2", diskSize)
	testenv.Output(t, q.Img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
	r := newKeepRig(t, q, testenv.Drive, func(c *testenv.Config) { c.Disks[1].Path = overlay })
	r.write(20)
	r.point()
	r.write(5)
	r.stopAndStart(func() {})
	r.do(r.keeper().Restore)
	r.write(5)
	r.expect("", "")
	r.stopAndStart(func() { testenv.Output(t, q.Img, "commit", "-q", "-f", "qcow2", "-d", overlay) })
	r.do(r.keeper().Restore)
	r.expect("virtio1", "written to or replaced")
}

// A block device's proof is its instance and what that has counted.
func TestKeepBlockDevice(t *testing.T) {
	t.Parallel()
	q := testenv.Host(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "volume")
	testenv.CreateDisk(t, q, file, "raw", diskSize)
	attach := func(args ...string) string {
		t.Helper()
		return strings.TrimSpace(testenv.Output(t, "losetup", append(args, "--show", file)...))
	}
	loop := attach("-f")
	t.Cleanup(func() { testenv.Output(t, "losetup", "-d", loop) })
	r := newKeepRig(t, q, testenv.Drive, func(c *testenv.Config) { c.Disks[0].Path = loop })
	r.write(20)
	r.point()
	var other *os.File
	for _, test := range []struct {
		what, reason string
		meanwhile    func()
	}{
		{"nothing", "", func() {}},
		{"a write that changes nothing", "written to or replaced", func() {
			testenv.Output(t, "dd", "if="+loop, "of="+loop, "bs=4096", "count=1", "conv=notrunc,fsync")
		}},
		{"nothing", "", func() {}},
		{"a write to the file behind it", "written to or replaced", func() {
			testenv.Output(t, "dd", "if="+file, "of="+file, "bs=4096", "count=1", "conv=notrunc,fsync")
		}},
		{"a write that the page cache alone has, as somebody else has the device open", "written to or replaced", func() {
			var err error
			if other, err = os.Open(loop); err != nil {
				t.Fatal(err)
			}
			testenv.Output(t, "dd", "if="+loop, "of="+loop, "bs=4096", "count=1", "conv=notrunc")
		}},
		{"nothing", "", func() { _ = other.Close() }},
		{"another instance", "its device was taken away", func() {
			testenv.Output(t, "losetup", "-d", loop)
			attach(loop)
		}},
		{"nothing", "", func() {}},
	} {
		r.write(5)
		r.stopAndStart(test.meanwhile)
		r.do(r.keeper().Restore)
		full := ""
		if test.reason != "" {
			full = "scsi0"
		}
		r.expect(full, test.reason)
		if t.Failed() {
			t.Fatalf("after %s", test.what)
		}
	}
}

// stopAndStart saves what the guest has, has something happen while it is stopped, and starts it again.
func (r *keepRig) stopAndStart(meanwhile func()) {
	r.t.Helper()
	r.powerOff()
	r.do(r.keeper().Save)
	r.vm.Quit()
	meanwhile()
	r.vm.Restart()
}

// Whatever casts doubt on what was saved makes a full, with the reason, of the disk that it concerns and of no other.
func TestKeepRefuses(t *testing.T) {
	t.Parallel()
	const stopped = "written to or replaced while the guest was stopped"
	overwrite := func(t *testing.T, path string, off int64) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("x"), off); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		what     string
		stopped  func(*keepRig) // while the guest is stopped
		started  func(*keepRig) // before what was saved is merged back
		full     string
		reason   string
		unsynced bool // the ledger does not know what the disk holds
	}{
		{what: "nothing happens"},
		{
			what: "a write to the raw volume, with its time put back", full: "scsi0", reason: stopped, unsynced: true,
			stopped: func(r *keepRig) {
				path := r.vm.Disk("scsi0").Path
				info, err := os.Stat(path)
				if err != nil {
					r.t.Fatal(err)
				}
				overwrite(r.t, path, 12345)
				if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
					r.t.Fatal(err)
				}
			},
		},
		{
			what: "the volume is exchanged for a copy", full: "scsi0", reason: stopped,
			stopped: func(r *keepRig) {
				path := r.vm.Disk("scsi0").Path
				testenv.Output(r.t, "cp", "-a", path, path+".new")
				testenv.Output(r.t, "mv", path+".new", path)
			},
		},
		{
			what: "a write to the qcow2 image", full: "virtio1", reason: stopped, unsynced: true,
			stopped: func(r *keepRig) {
				testenv.Output(r.t, r.qemu.IO, "-f", "qcow2", "-c", "write -P 7 64k 512", r.vm.Disk("virtio1").Path)
			},
		},
		{
			what: "the raw volume grows", full: "scsi0", reason: stopped, unsynced: true,
			stopped: func(r *keepRig) {
				if err := os.Truncate(r.vm.Disk("scsi0").Path, diskSize+512); err != nil {
					r.t.Fatal(err)
				}
			},
		},
		{
			what: "the guest writes before the merging", full: "scsi0", reason: "had written to it before",
			started: func(r *keepRig) {
				if err := r.ledger.Fill("scsi0", 0, 512, 9); err != nil {
					r.t.Fatal(err)
				}
			},
		},
		{
			what: "the guest writes zeroes before the merging", full: "virtio1", reason: "had written to it before",
			started: func(r *keepRig) {
				if err := r.ledger.Fill("virtio1", 1<<20, 1<<20, 0); err != nil {
					r.t.Fatal(err)
				}
			},
		},
		{
			what: "the sidecar is cut", full: "scsi0", reason: "is not what was saved",
			stopped: func(r *keepRig) {
				// Which of the two it is depends on the names that QEMU gives the nodes.
				for i := range 2 {
					path := filepath.Join(r.kept.Dir, "web", fmt.Sprintf("%d.qcow2", i))
					text, err := os.ReadFile(filepath.Join(r.kept.Dir, "web", "saved.json"))
					if err != nil {
						r.t.Fatal(err)
					}
					_, rest, _ := strings.Cut(string(text), fmt.Sprintf("%d.qcow2", i))
					if name, _, _ := strings.Cut(rest, "granularity"); strings.Contains(name, "scsi0") {
						overwrite(r.t, path, 70000)
					}
				}
			},
		},
	} {
		t.Run(test.what, func(t *testing.T) {
			t.Parallel()
			r := newKeepRig(t, testenv.Host(t), testenv.Drive)
			r.write(20)
			r.point()
			r.write(5)
			r.stopAndStart(func() {
				if test.stopped != nil {
					test.stopped(r)
				}
			})
			if test.started != nil {
				test.started(r)
			}
			r.do(r.keeper().Restore)
			if !test.unsynced {
				r.expect(test.full, test.reason)
				return
			}
			result, err := backup.Run(t.Context(), r.config())
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range result.Point.Disks {
				if full := d.Level == chain.Full && strings.Contains(d.Reason, test.reason); full != (d.Name == test.full) {
					t.Errorf("disk %s: %s: %q", d.Name, d.Level, d.Reason)
				}
			}
		})
	}
}

// Neither disk goes on where the guest itself is in doubt.
func TestKeepRefusesAll(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		what   string
		reason string
		do     func(*keepRig)
	}{
		{"another vmgenid", "vmgenid", func(r *keepRig) {
			r.stopAndStart(func() {
				r.vm.Restart()
				r.vm.Reconfigure(func(c *testenv.Config) { c.VMGenID = testenv.RandomUUID() })
			})
		}},
		{"started and stopped without a keeper", "written to or replaced", func(r *keepRig) {
			r.stopAndStart(func() {
				r.vm.Restart()
				for _, disk := range []string{"scsi0", "virtio1"} {
					if err := r.ledger.Fill(disk, 0, 4096, 3); err != nil {
						r.t.Fatal(err)
					}
				}
			})
		}},
		{"reset after it was saved, and killed", "written to or replaced", func(r *keepRig) {
			r.powerOff()
			r.do(r.keeper().Save)
			r.vm.Execute("system_reset", nil, nil)
			r.vm.Execute("cont", nil, nil)
			for _, disk := range []string{"scsi0", "virtio1"} {
				if err := r.ledger.Fill(disk, 8192, 4096, 3); err != nil {
					r.t.Fatal(err)
				}
			}
			r.flush()
			r.vm.Kill()
			r.vm.Restart()
		}},
		{"merging back cut off", "was cut off", func(r *keepRig) {
			r.stopAndStart(func() {})
			// A keeper that dies right after it has claimed what was saved does nothing any more.
			k, dead := r.keeper(), false
			k.Kept.FS.Before = func(op, path string) error {
				if dead {
					return errors.New("killed")
				}
				dead = op == "rename" && strings.HasSuffix(path, "claimed.json")
				return nil
			}
			if err := k.Restore(r.t.Context()); err == nil || !dead {
				r.t.Fatalf("not killed: %v", err)
			}
		}},
		{"an edited record", "no bitmap records", func(r *keepRig) {
			r.stopAndStart(func() {
				path := filepath.Join(r.kept.Dir, "web", "saved.json")
				text, err := os.ReadFile(path)
				if err != nil {
					r.t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(strings.Replace(string(text), `"size": 4`, `"size": 5`, 1)), 0o600); err != nil {
					r.t.Fatal(err)
				}
			})
		}},
	} {
		t.Run(test.what, func(t *testing.T) {
			t.Parallel()
			r := newKeepRig(t, testenv.Host(t), testenv.Drive)
			r.write(20)
			r.point()
			r.write(5)
			test.do(r)
			r.do(r.keeper().Restore)
			for _, d := range r.point().Disks {
				if d.Level != chain.Full || !strings.Contains(d.Reason, test.reason) {
					t.Errorf("disk %s: %s: %q", d.Name, d.Level, d.Reason)
				}
			}
			r.write(3)
			r.stopAndStart(func() {})
			r.do(r.keeper().Restore)
			r.expect("", "")
		})
	}
}

// A guest that is reset after its bitmaps were saved has them still: what was saved is not merged twice.
func TestKeepGuestGoesOn(t *testing.T) {
	t.Parallel()
	r := newKeepRig(t, testenv.Host(t), testenv.Throttle)
	r.write(20)
	r.point()
	r.write(5)
	r.powerOff()
	r.do(r.keeper().Save)
	r.vm.Execute("system_reset", nil, nil)
	r.vm.Execute("cont", nil, nil)
	r.write(5)
	r.do(r.keeper().Restore)
	r.expect("", "")
}

// Bitmaps of a disk that an iothread serves are carried over as well; points of it need QEMU 9.0.
func TestKeepIOThread(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newKeepRig(t, q, style, func(c *testenv.Config) {
			c.SeaBIOS = true
			for i := range c.Disks {
				c.Disks[i].IOThread = true
			}
		})
		time.Sleep(500 * time.Millisecond) // the firmware starts the devices, and with them their iothreads
		write := func(n int) {
			if q.AtLeast(9, 0) {
				r.write(n) // QEMU 7.2's monitor crashes when it writes to such a disk
			}
		}
		run := func() *chain.Manifest {
			t.Helper()
			cfg := r.config()
			cfg.Fleecing.Off = !q.AtLeast(9, 0)
			result, err := backup.Run(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			r.check(result.Point, r.ledger.Now(), r.ledger.Now())
			return result.Point
		}
		write(20)
		run()
		write(5)
		k := r.keeper()
		k.Quit = true
		r.do(k.Stop)
		if err := r.vm.Wait(time.Minute); err != nil {
			t.Error(err)
		}
		r.vm.Restart()
		time.Sleep(500 * time.Millisecond)
		r.do(r.keeper().Restore)
		write(5)
		if p := run(); p.Level() != chain.Inc {
			t.Errorf("%s: %s", p.Level(), p.Disks[0].Reason)
		}
	})
}

// What is kept under a name is not another guest's that has the same.
func TestKeepOtherGuest(t *testing.T) {
	t.Parallel()
	r := newKeepRig(t, testenv.Host(t), testenv.Drive)
	r.write(20)
	r.point()
	uuid := r.vm.Config().UUID
	r.stopAndStart(func() {
		r.vm.Reconfigure(func(c *testenv.Config) { c.UUID = testenv.RandomUUID() })
	})
	if err := r.keeper().Restore(t.Context()); !errors.Is(err, backup.ErrOtherGuest) {
		t.Errorf("error is %v", err)
	}
	r.vm.Reconfigure(func(c *testenv.Config) { c.UUID = uuid })
	r.do(r.keeper().Restore)
	r.expect("", "")
}

// A disk whose volume proves nothing, or is written to while it is saved, does not cost the others their increments.
func TestKeepSavesTheOthers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	testenv.Output(t, "mount", "-t", "tmpfs", "-o", "lazytime,size=16m", "none", dir)
	t.Cleanup(func() { testenv.Output(t, "umount", "-l", dir) })
	r := newKeepRig(t, testenv.Host(t), testenv.Blockdev, func(c *testenv.Config) {
		c.Disks[0].Path = filepath.Join(dir, "disk.raw")
	})
	r.write(20)
	r.point()
	r.stopAndStart(func() {})
	r.do(r.keeper().Restore)
	r.expect("scsi0", "lazytime")

	r = newKeepRig(t, testenv.Host(t), testenv.Blockdev)
	r.write(20)
	r.point()
	r.powerOff()
	k := r.keeper()
	k.Kept.FS.Before = func(op, path string) error {
		if op == "create" && filepath.Base(path) == "1.qcow2" { // scsi0 is read, and comes first
			path := r.vm.Disk("scsi0").Path
			testenv.Output(t, "dd", "if="+path, "of="+path, "bs=512", "count=1", "conv=notrunc")
		}
		return nil
	}
	r.do(k.Save)
	r.vm.Restart()
	r.do(r.keeper().Restore)
	r.expect("scsi0", "somebody writes to it")
}

// Two disks that are parts of one file are not taken for one another.
func TestKeepWindows(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "both.raw")
	testenv.CreateDisk(t, testenv.Host(t), path, "raw", 2*diskSize)
	window := func(name string, offset int) []string {
		return []string{
			"-blockdev", fmt.Sprintf("driver=raw,node-name=%s,offset=%d,size=%d,file.driver=file,file.filename=%s,file.locking=off", name, offset, diskSize, path),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,id=%s,share-rw=on", name, name),
		}
	}
	r := newKeepRig(t, testenv.Host(t), testenv.Blockdev, func(c *testenv.Config) {
		c.Args = append(window("low", 0), window("high", diskSize)...)
	})
	run := func() *chain.Manifest {
		t.Helper()
		result, err := backup.Run(t.Context(), r.config())
		if err != nil {
			t.Fatal(err)
		}
		return result.Point
	}
	run()
	r.vm.NodeIO("high", "write -P 5 0 64k")
	r.stopAndStart(func() {})
	r.do(r.keeper().Restore)
	// No proof tells the two apart, so that the increments of both would be doubtful.
	for _, d := range run().Disks {
		if part := d.Name == "low" || d.Name == "high"; part != (d.Level == chain.Full) || part && !strings.Contains(d.Reason, "several disks") {
			t.Errorf("disk %s: %s: %s", d.Name, d.Level, d.Reason)
		}
	}
	// One alone goes on, but not in another place of the file.
	r.vm.Reconfigure(func(c *testenv.Config) { c.Args = window("low", 0) })
	run()
	r.stopAndStart(func() {})
	r.do(r.keeper().Restore)
	if d := run().Disk("low"); d.Level != chain.Inc {
		t.Errorf("%s: %s", d.Level, d.Reason)
	}
	r.stopAndStart(func() {
		r.vm.Reconfigure(func(c *testenv.Config) { c.Args = window("low", diskSize) })
	})
	r.do(r.keeper().Restore)
	if d := run().Disk("low"); d.Level != chain.Full || !strings.Contains(d.Reason, "in another way") {
		t.Errorf("%s: %s", d.Level, d.Reason)
	}
}

// A run merges back what was saved, where no keeper has.
func TestRunMergesBack(t *testing.T) {
	t.Parallel()
	r := newKeepRig(t, testenv.Host(t), testenv.Drive)
	r.write(20)
	r.point()
	r.write(5)
	r.stopAndStart(func() {})
	r.expect("", "")
	r.write(5)
	// The guest powers off during a run, which has the socket: the run saves.
	cfg := r.config()
	cfg.Now = func() time.Time {
		if r.vm.Status() == "running" {
			r.powerOff()
		}
		return time.Now()
	}
	if _, err := backup.Run(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	r.vm.Restart()
	r.expect("", "")
}

// keep runs a keeper until the test ends, or stop is called.
func (r *keepRig) keep(k *backup.Keeper) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.Keep(ctx) }()
	stopped := false
	stop = func() {
		if cancel(); stopped {
			return
		}
		stopped = true
		select {
		case err := <-done:
			if err != nil {
				r.t.Errorf("keeper: %v", err)
			}
		case <-time.After(time.Minute):
			r.t.Error("the keeper did not end")
		}
	}
	r.t.Cleanup(stop)
	return stop
}

// wait waits until something is so.
func (r *keepRig) wait(what string, is func() bool) {
	r.t.Helper()
	for range 3000 {
		if is() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	r.t.Fatalf("waited in vain until %s", what)
}

// held is a KeepAlive that knows whether it is held, and how often that was said.
type held struct {
	held   atomic.Bool
	said   atomic.Int64
	needed atomic.Value // a string
	status atomic.Value // a string
}

func (h *held) Hold(context.Context) error {
	h.held.Store(true)
	h.said.Add(1)
	return nil
}

func (h *held) Release() { h.held.Store(false) }

func (h *held) Needed(context.Context) (string, error) {
	who, _ := h.needed.Load().(string)
	return who, nil
}

func (h *held) Status(context.Context) (string, error) {
	status, _ := h.status.Load().(string)
	return status, nil
}

func (r *keepRig) saved() bool {
	_, err := os.Stat(filepath.Join(r.kept.Dir, "web", "saved.json"))
	return err == nil
}

// merged waits until all bitmaps are merged back.
func (r *keepRig) merged() {
	r.t.Helper()
	r.wait("the bitmaps are merged back", func() bool {
		left, err := filepath.Glob(filepath.Join(r.kept.Dir, "web", "*"))
		return err == nil && len(left) == 0
	})
}

// The keeper shares its only socket with runs, saves, lets QEMU go, and merges back.
func TestKeeper(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newKeepRig(t, q, style)
		alive := new(held)
		k := r.keeper()
		k.KeepAlive = alive
		stop := r.keep(k)
		r.wait("QEMU is kept alive", alive.held.Load)
		r.write(20)
		r.point()
		for range 2 {
			r.write(5)
			r.powerOff()
			r.wait("QEMU is let go", func() bool { return !alive.held.Load() })
			if !r.saved() {
				t.Fatal("QEMU was let go before its bitmaps were saved")
			}
			r.vm.Restart()
			r.merged()
			r.write(5)
			r.expect("", "")
		}
		stop()
		if alive.held.Load() {
			t.Error("QEMU is not let go at the end")
		}

		// One that ends QEMU itself, and itself with it.
		k = r.keeper()
		k.Quit, k.Once = true, true
		done := make(chan error, 1)
		go func() { done <- k.Keep(t.Context()) }()
		r.write(5)
		r.powerOff()
		if err := r.vm.Wait(time.Minute); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		r.vm.Restart()
		r.expect("", "")
	})
}

// between is a KeepAlive that stops the keeper between two looks.
type between struct {
	held
	looked, goOn chan struct{}
}

func (b *between) Hold(ctx context.Context) error {
	select {
	case b.looked <- struct{}{}:
		<-b.goOn
	default: // nobody waits for it
	}
	return b.held.Hold(ctx)
}

// A guest that is stopped and started between two looks is seen to be another one.
func TestKeeperMissesARestart(t *testing.T) {
	t.Parallel()
	r := newKeepRig(t, testenv.Host(t), testenv.Drive)
	r.write(20)
	r.point()
	alive := &between{looked: make(chan struct{}), goOn: make(chan struct{})}
	k := r.keeper()
	k.KeepAlive = alive
	r.keep(k)
	for range 2 {
		r.write(5)
		<-alive.looked
		other := r.keeper()
		other.Quit = true
		r.do(other.Stop)
		if err := r.vm.Wait(time.Minute); err != nil {
			t.Fatal(err)
		}
		r.vm.Restart()
		alive.goOn <- struct{}{}
		r.merged()
		r.write(5)
		r.expect("", "")
	}
}

// busy takes the guest's only socket, until it is given back.
func (r *keepRig) busy() (free func()) {
	r.t.Helper()
	var client *qmp.Client
	r.wait("the socket is free", func() bool {
		var err error
		client, err = qmp.Dial(r.t.Context(), r.vm.Socket, qmp.WithHandshakeTimeout(time.Second))
		return err == nil
	})
	return func() { _ = client.Close() }
}

// again waits until the keep-alive is said again.
func (r *keepRig) again(alive *held) {
	r.t.Helper()
	said := alive.said.Load()
	r.wait("it is said again", func() bool { return alive.said.Load() > said+1 })
}

// absent is a manager that can be away: then it neither answers nor lets anybody prove who the guest is.
type absent struct {
	held
	backup.Guard // of which only Check is called
	away         atomic.Bool
}

var errManager = errors.New("the manager does not answer")

func (a *absent) error() error {
	if a.away.Load() {
		return errManager
	}
	return nil
}

func (a *absent) Check(backup.Peer) error { return a.error() }

func (a *absent) Needed(context.Context) (string, error) { return "", a.error() }

func (a *absent) Status(context.Context) (string, error) { return "running", a.error() }

// A QEMU whose guest has powered off is let go also while its manager does not answer; one whose guest runs is not.
func TestKeeperWithoutItsManager(t *testing.T) {
	t.Parallel()
	r := newKeepRig(t, testenv.Host(t), testenv.Drive)
	r.write(5)
	r.point()
	manager := new(absent)
	k := r.keeper()
	k.KeepAlive, k.Guard, k.Limit = manager, manager, time.Second
	stop := r.keep(k)
	defer stop()
	r.wait("QEMU is kept alive", manager.held.held.Load)
	manager.away.Store(true)
	time.Sleep(3 * k.Limit)
	if !manager.held.held.Load() {
		t.Error("QEMU was let go while its guest runs")
	}
	r.powerOff()
	r.wait("QEMU is let go", func() bool { return !manager.held.held.Load() })
}

// QEMU is let go when that harms nobody, and only then.
func TestKeeperLetsGo(t *testing.T) {
	t.Parallel()
	r := newKeepRig(t, testenv.Host(t), testenv.Drive)
	r.write(5)
	r.point()
	alive := new(held)
	alive.status.Store("running")
	k := r.keeper()
	k.KeepAlive, k.Limit = alive, 2*time.Second
	reset := func() {
		t.Helper()
		r.vm.Execute("stop", nil, nil)
		r.vm.Execute("system_reset", nil, nil)
		r.wait("the reset is done", func() bool { return r.vm.Status() == "prelaunch" })
	}
	stays := func(when string, d time.Duration) {
		t.Helper()
		for until := time.Now().Add(d); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
			if !alive.held.Load() {
				t.Fatalf("QEMU was let go: %s", when)
			}
		}
	}

	reset()
	stop := r.keep(k)
	time.Sleep(2 * lookInterval)
	if alive.said.Load() > 0 {
		t.Error("it is held in a state in which it could not be let go")
	}
	r.vm.Execute("cont", nil, nil)
	r.wait("QEMU is kept alive", alive.held.Load)
	r.again(alive)

	free := r.busy()
	r.again(alive)
	stays("others have its socket", k.Limit+lookInterval)
	reset()
	free()
	r.again(alive)
	stays("its guest is reset", 0)

	// The keeper's own end waits, too.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		stop()
	}()
	stays("the keeper is to end", 2*lookInterval)
	r.vm.Execute("cont", nil, nil)
	<-ended
	if alive.held.Load() {
		t.Error("QEMU is not let go at the end")
	}

	stop = r.keep(k)
	r.wait("QEMU is kept alive", alive.held.Load)
	alive.needed.Store("a backup")
	r.powerOff()
	r.wait("it is saved", r.saved)
	stays("a backup needs it", 2*lookInterval)
	alive.needed.Store("")
	r.wait("QEMU is let go", func() bool { return !alive.held.Load() })
	r.vm.Quit()
	r.vm.Restart()

	// Where the guest does not answer any more, nor anybody needs it, QEMU is let go all the same.
	r.wait("QEMU is kept alive", alive.held.Load)
	free = r.busy()
	r.powerOff()
	stays("others have its socket", lookInterval)
	alive.status.Store("shutdown") // as the manager has found out
	r.wait("QEMU is let go", func() bool { return !alive.held.Load() })
	free()
	stop()
}

// Jobs and exports write although the guest has stopped: what is saved beside them would lack that.
func TestSaveBesideOthers(t *testing.T) {
	t.Parallel()
	r := newKeepRig(t, testenv.Host(t), testenv.Drive)
	r.write(5)
	r.point()
	refused := func(reason string) {
		t.Helper()
		if err := r.keeper().Save(t.Context()); !errors.Is(err, backup.ErrBusy) || !strings.Contains(err.Error(), reason) || r.saved() {
			t.Errorf("error is %v, saved: %v", err, r.saved())
		}
	}
	var nodes []struct {
		Inserted struct {
			NodeName string `json:"node-name"`
		}
	}
	r.vm.Execute("query-block", nil, &nodes)
	node := nodes[0].Inserted.NodeName
	r.powerOff()
	r.vm.Execute("nbd-server-start", map[string]any{
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": filepath.Join(r.kept.Dir, "nbd")}},
	}, nil)
	r.vm.Execute("block-export-add", map[string]any{"type": "nbd", "id": "foreign", "node-name": node}, nil)
	refused("exports disks to others (foreign)")
	r.vm.Execute("block-export-del", map[string]any{"id": "foreign"}, nil)
	r.wait("the export has gone", func() bool {
		var exports []struct{}
		r.vm.Execute("query-block-exports", nil, &exports)
		return len(exports) == 0
	})
	r.vm.Execute("blockdev-add", map[string]any{"driver": "null-co", "node-name": "nowhere", "size": diskSize, "read-zeroes": true}, nil)
	r.vm.Execute("blockdev-backup", map[string]any{"job-id": "foreign", "device": node, "target": "nowhere", "sync": "full", "speed": 1}, nil)
	refused("job foreign (backup)")

	// A keeper waits, and saves when the job has ended.
	alive := new(held)
	k := r.keeper()
	k.KeepAlive = alive
	k.Quit = true
	r.keep(k)
	time.Sleep(3 * lookInterval)
	if status := r.vm.Status(); status != "shutdown" || r.saved() {
		t.Errorf("the guest is %s; saved: %v", status, r.saved())
	}
	r.vm.Execute("block-job-cancel", map[string]any{"device": "foreign", "force": true}, nil)
	if err := r.vm.Wait(time.Minute); err != nil {
		t.Error(err)
	}
	if !r.saved() {
		t.Error("it is not saved")
	}
	r.vm.Restart()
	r.expect("", "")
}

// A hard stop: the guest is paused, saved, and ended. One that nobody ends goes on.
func TestKeepStop(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newKeepRig(t, q, style)
		r.write(20)
		r.point()
		r.write(5)
		k := r.keeper()
		k.Limit = 4 * time.Second
		if err := k.Stop(t.Context()); err == nil || !strings.Contains(err.Error(), "goes on") {
			t.Errorf("error is %v", err)
		}
		if status := r.vm.Status(); status != "running" || r.saved() {
			t.Errorf("the guest is %s; still saved: %v", status, r.saved())
		}
		r.write(5)
		k = r.keeper()
		k.Quit = true
		r.do(k.Stop)
		if err := r.vm.Wait(time.Minute); err != nil {
			t.Error(err)
		}
		r.vm.Restart()
		r.do(r.keeper().Restore)
		r.write(5)
		r.expect("", "")
		// A guest that runs is not saved: it would go on writing.
		if err := r.keeper().Save(t.Context()); !errors.Is(err, backup.ErrBusy) {
			t.Errorf("error is %v", err)
		}
	})
}

// The bitmap of a disk with internal snapshots is in memory, so that QEMU can go back to them; one that was persistent goes.
func TestSnapshotsAndRollback(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newKeepRig(t, q, style)
		kinds := func(point *chain.Manifest, want string) {
			t.Helper()
			if kind := point.Disk("virtio1").Tracking.Kind; kind != want {
				t.Errorf("tracking is %s, not %s", kind, want)
			}
		}
		auto := func() *chain.Manifest {
			t.Helper()
			cfg := r.config()
			cfg.Bitmaps = ""
			result, err := backup.Run(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			r.check(result.Point, r.ledger.Now(), r.ledger.Now())
			return result.Point
		}
		r.write(20)
		kinds(auto(), chain.KindPersistent)
		r.stopAndStart(func() {
			testenv.Output(t, q.Img, "snapshot", "-c", "before", r.vm.Disk("virtio1").Path)
		})
		r.do(r.keeper().Restore)
		r.write(10)
		p := auto()
		kinds(p, chain.KindMemory)
		if p.Level() != chain.Inc {
			t.Errorf("level is %s", p.Level())
		}
		r.clean(1)
		r.write(5)
		r.stopAndStart(func() {})
		r.do(r.keeper().Restore)
		r.expect("", "")

		// The rollback is not hindered by a bitmap, and seen by the image alone: this guest's vmgenid stays.
		r.stopAndStart(func() {
			testenv.Output(t, q.Img, "snapshot", "-a", "before", r.vm.Disk("virtio1").Path)
		})
		r.do(r.keeper().Restore)
		cfg := r.config()
		result, err := backup.Run(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if d := result.Point.Disk("virtio1"); d.Level != chain.Full || !strings.Contains(d.Reason, "replaced while the guest was stopped") {
			t.Errorf("%s: %s", d.Level, d.Reason)
		}
		if d := result.Point.Disk("scsi0"); d.Level != chain.Inc {
			t.Errorf("%s: %s", d.Level, d.Reason)
		}
	})
}

// A real system on a raw disk: it is shut down from inside and by its power button, and started again. It is not slow to write,
// and its keeper is there before it.
func TestKeepARealGuest(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newKeepRig(t, q, style, func(c *testenv.Config) {
			c.Guest = true
			c.Disks = []testenv.Disk{{ID: "scsi0", Size: 32 << 20, Format: "raw", Discard: "unmap"}}
		})
		k := r.keeper()
		k.Quit = true
		r.keep(k)
		ctx := t.Context()
		point := func() chain.Disk {
			t.Helper()
			result, err := backup.Run(ctx, r.config())
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(r.vm.Disk("scsi0").Path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(ledger.ReadPoint(t, q, r.repo, "web", result.Point.ID)["scsi0"], want) {
				t.Fatal("the point is not what the disk holds")
			}
			return result.Point.Disks[0]
		}
		fill := func(name string) {
			t.Helper()
			r.vm.Run(ctx, "mkdir -p /data && mount /dev/disk/scsi0 /data && dd if=/dev/urandom of=/data/"+name+" bs=64k count=20 2>/dev/null && umount /data")
		}
		r.vm.Run(ctx, "mkfs.ext4 -q /dev/disk/scsi0")
		fill("first")
		point()
		way := "button"
		if q.AtLeast(10, 0) {
			way = "inside"
		}
		fill(way)
		if way == "inside" {
			_, _ = r.vm.TryRun(ctx, "mount /dev/disk/scsi0 /data && rm /data/first && shutdown") // it does not answer any more
		} else {
			r.vm.Execute("system_powerdown", nil, nil)
		}
		if err := r.vm.Wait(time.Minute); err != nil {
			t.Fatal(err)
		}
		r.vm.Restart()
		fill(way + "-again")
		if d := point(); d.Level != chain.Inc || d.Bytes > 16<<20 {
			t.Errorf("%s: %s of %d bytes: %s", way, d.Level, d.Bytes, d.Reason)
		}
	})
}

// lookInterval is how often a keeper looks in.
const lookInterval = 500 * time.Millisecond

var keepSteps = flag.Int("keep-steps", 15, "TestKeepCutOff cuts off at every so many steps; 1: all")

// A keeper that dies at any command, or at any step in the file system, leaves no gap and nothing that the next one can't do away with.
func TestKeepCutOff(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newKeepRig(t, q, style)
		r.write(20)
		r.point()
		// The keeper takes this process, which stands between, for QEMU: it has the disks open, too.
		for _, d := range r.vm.Config().Disks {
			f, err := os.Open(d.Path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
		}
		levels := make(map[chain.Level]int)
		cutOff := func(action func(*backup.Keeper) func(context.Context) error) func(at int) bool {
			return func(at int) bool {
				k := r.keeper()
				var steps atomic.Int64
				dead := func() bool { return int(steps.Add(1)) > at }
				k.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
					Before: func(int, []qmptest.CommandSeen) qmptest.Verdict { return qmptest.Verdict{Drop: dead()} },
				}).Addr()
				k.Kept.FS.Before = func(string, string) error {
					if dead() {
						return errors.New("killed")
					}
					return nil
				}
				_ = action(k)(t.Context())
				return int(steps.Load()) > at
			}
		}
		saving := cutOff(func(k *backup.Keeper) func(context.Context) error { return k.Save })
		merging := cutOff(func(k *backup.Keeper) func(context.Context) error { return k.Restore })
		first := rand.IntN(*keepSteps)
		for at, more := first, true; more && !t.Failed(); at += *keepSteps {
			r.ledger.Forget()
			r.write(3)
			r.powerOff()
			more = saving(at)
			r.vm.Quit()
			r.vm.Restart()
			r.do(r.keeper().Restore)
			r.write(3)
			for _, d := range r.point().Disks {
				levels[d.Level]++
			}
		}
		for at, more := first, true; more && !t.Failed(); at += *keepSteps {
			r.ledger.Forget()
			r.write(3)
			r.stopAndStart(func() {})
			more = merging(at)
			// Its lock counts while its process lives, and that is the test's.
			var objects []struct{ Name string }
			if r.vm.Try("qom-list", map[string]any{"path": "/objects"}, &objects) == nil {
				for _, o := range objects {
					if strings.HasPrefix(o.Name, "qmchain-run-") {
						r.vm.Execute("object-del", map[string]any{"id": o.Name}, nil)
					}
				}
			}
			r.write(3)
			for _, d := range r.point().Disks {
				levels[d.Level]++
			}
		}
		if levels[chain.Inc] < 4 || levels[chain.Full] == 0 {
			t.Errorf("levels: %v", levels)
		}
		t.Logf("levels: %v", levels)
	})
}
