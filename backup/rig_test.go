package backup_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
)

const diskSize = 4 << 20

// rig is a guest with two disks, a repository, and an account of what the disks held when.
type rig struct {
	t      *testing.T
	qemu   testenv.QEMU
	vm     *testenv.VM
	ledger *ledger.Ledger
	repo   string
	fleece string
	log    *logrus.Logger
	fs     durable.FS
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func newRig(t *testing.T, q testenv.QEMU, style testenv.Style, change ...func(*testenv.Config)) *rig {
	t.Helper()
	r := &rig{t: t, qemu: q, repo: t.TempDir(), fleece: t.TempDir(), log: logrus.New()}
	r.log.SetOutput(testLog{t})
	r.log.SetLevel(logrus.DebugLevel)
	cfg := testenv.Config{QEMU: q, Style: style, Disks: []testenv.Disk{
		{ID: "scsi0", Size: diskSize, Discard: "unmap"},
		{ID: "virtio1", Size: diskSize, Discard: "unmap"},
	}}
	for _, c := range change {
		c(&cfg)
	}
	r.vm = testenv.Start(t, cfg)
	r.ledger = ledger.New(t, r.vm, rand.Uint64(), cfg.Disks...)
	return r
}

// each runs a test on every QEMU, in every style where styles matter.
func each(t *testing.T, styles []testenv.Style, f func(*testing.T, testenv.QEMU, testenv.Style)) {
	for _, q := range testenv.QEMUs(t) {
		for _, style := range styles {
			t.Run(fmt.Sprintf("%s/%s", q.Name, style), func(t *testing.T) {
				t.Parallel()
				f(t, q, style)
			})
		}
	}
}

// eachInOneStyle runs a test on every QEMU in the style that goes with it: Proxmox VE 8's with the old ones, 9's with the
// others.
func eachInOneStyle(t *testing.T, f func(*testing.T, testenv.QEMU, testenv.Style)) {
	for _, q := range testenv.QEMUs(t) {
		style := testenv.Drive
		if q.AtLeast(10, 0) {
			style = testenv.Throttle
		}
		t.Run(q.Name+"/"+style.String(), func(t *testing.T) {
			t.Parallel()
			f(t, q, style)
		})
	}
}

type silent struct{}

func (silent) Disk(string, int64, int64, int64) {}

func (r *rig) config(level chain.Level) backup.Config {
	return backup.Config{
		Request: backup.Request{Level: level},
		Guest:   "web", Addr: r.vm.Socket,
		Repo:     func() (*repo.Repo, error) { return repo.OpenOrCreate(r.repo, r.fs) },
		Fleecing: backup.Fleecing{Dir: r.fleece}, LockWait: 2 * time.Second,
		Log: r.log, Progress: silent{}, Now: time.Now,
	}
}

// run takes a point that must succeed at exactly this level.
func (r *rig) run(level chain.Level) *chain.Manifest {
	r.t.Helper()
	from := r.ledger.Now()
	result, err := backup.Run(r.t.Context(), r.config(backup.Auto))
	if err != nil {
		r.t.Fatal(err)
	}
	if got := result.Point.Level(); got != level {
		r.t.Fatalf("level is %s (%s), not %s", got, result.Point.Disks[0].Reason, level)
	}
	r.check(result.Point, from, r.ledger.Now())
	return result.Point
}

// check makes sure that a point's disks are those of one instant in that part of the history.
func (r *rig) check(point *chain.Manifest, from, to int) {
	r.t.Helper()
	disks := ledger.ReadPoint(r.t, r.qemu, r.repo, "web", point.ID)
	if _, err := r.ledger.Instant(disks, from, to); err != nil {
		r.t.Fatalf("point %s: %v", point.ID, err)
	}
}

func (r *rig) write(n int) {
	r.t.Helper()
	for range n {
		if err := r.ledger.Random(); err != nil {
			r.t.Fatal(err)
		}
	}
}

// flush brings what the disks hold to where a crash of QEMU can't take it.
func (r *rig) flush() {
	r.t.Helper()
	for _, d := range r.vm.Config().Disks {
		r.vm.IO(d.ID, "flush")
	}
}

// clean makes sure that nothing of ours is in the guest but count bitmaps of each disk, and no unfinished point or
// fleece image outside of it.
func (r *rig) clean(count int) {
	r.t.Helper()
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Name string `json:"name"`
		} `json:"dirty-bitmaps"`
	}
	r.vm.Execute("query-named-block-nodes", map[string]any{"flat": true}, &nodes)
	bitmaps := 0
	for _, n := range nodes {
		if strings.HasPrefix(n.Name, "qmchain") {
			r.t.Errorf("node %s is left", n.Name)
		}
		for _, b := range n.Bitmaps {
			if strings.HasPrefix(b.Name, "qmchain:") {
				bitmaps++
			}
		}
	}
	if disks := len(r.vm.Config().Disks); bitmaps != count*disks {
		r.t.Errorf("%d bitmaps of ours on %d disks, not %d on each: %+v", bitmaps, disks, count, nodes)
	}
	var objects []struct{ Name string }
	if err := r.vm.Try("qom-list", map[string]any{"path": "/objects"}, &objects); err == nil {
		for _, o := range objects {
			if strings.HasPrefix(o.Name, "qmchain") {
				r.t.Errorf("object %s is left", o.Name)
			}
		}
	}
	var jobs []struct{ ID string }
	r.vm.Execute("query-jobs", nil, &jobs)
	if len(jobs) > 0 {
		r.t.Errorf("jobs are left: %v", jobs)
	}
	for _, pattern := range []string{filepath.Join(r.fleece, "*"), filepath.Join(r.repo, "*", ".*.partial"), filepath.Join(r.repo, "*", ".tmp*")} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			r.t.Errorf("left behind: %v", left)
		}
	}
}

func TestChain(t *testing.T) {
	t.Parallel()
	each(t, testenv.Styles, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(40)
		first := r.run(chain.Full)
		r.clean(1)
		var points []*chain.Manifest
		var instants []int
		for range 5 {
			r.write(15)
			points = append(points, r.run(chain.Inc))
			instants = append(instants, r.ledger.Now())
			r.clean(1)
		}
		// Nothing has changed the older points.
		for i, p := range points {
			r.check(p, instants[i], instants[i])
		}
		if p := points[4].Disks[0]; p.Parent.Point != points[3].ID || first.Disks[0].Parent != nil {
			t.Errorf("parent of the last is %v", p.Parent)
		}
		// An idle guest's increment holds no data.
		for _, d := range r.run(chain.Inc).Disks {
			if d.Bytes > 256<<10 {
				t.Errorf("disk %s: an increment without changes has %d bytes", d.Name, d.Bytes)
			}
		}
	})
}

// The guest writes all the time, from another connection, while points are taken.
func TestWritesGoOn(t *testing.T) {
	t.Parallel()
	each(t, testenv.Styles, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(60)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			for ctx.Err() == nil {
				if err := r.ledger.Random(); err != nil {
					done <- err
					return
				}
				time.Sleep(time.Millisecond)
			}
			done <- nil
		}()
		r.run(chain.Full)
		for range 6 {
			r.ledger.Forget()
			r.run(chain.Inc)
		}
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		last := r.run(chain.Inc)
		r.check(last, r.ledger.Now(), r.ledger.Now())
		r.clean(1)
	})
}

func TestRunState(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style, func(c *testenv.Config) { c.Prelaunch = true })
		status := func(want string) {
			t.Helper()
			if got := r.vm.Status(); got != want {
				t.Fatalf("the guest is %s, not %s", got, want)
			}
		}
		status("prelaunch")
		r.run(chain.Full)
		r.run(chain.Inc)
		status("prelaunch")
		r.vm.Execute("cont", nil, nil)
		r.write(5)
		r.run(chain.Inc)
		status("running")
		r.vm.Execute("stop", nil, nil)
		r.run(chain.Inc)
		status("paused")
	})
}

func TestRestart(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(20)
		r.run(chain.Full)
		r.write(5)
		r.vm.Restart() // the bitmaps are in the images
		r.write(5)
		r.run(chain.Inc)
		r.vm.Terminate()
		r.vm.Restart()
		r.write(5)
		r.run(chain.Inc)

		r.vm.Restart()
		r.write(5)
		r.flush()
		r.vm.Kill() // the bitmaps come back inconsistent, as what was written since is in none
		r.vm.Restart()
		result, err := backup.Run(t.Context(), r.config(backup.Auto))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range result.Point.Disks {
			if d.Level != chain.Full || !strings.Contains(d.Reason, "inconsistent") {
				t.Errorf("disk %s: %s, %q", d.Name, d.Level, d.Reason)
			}
		}
		if len(result.Warnings) != 2 {
			t.Errorf("warnings: %q", result.Warnings)
		}
		r.clean(1)
		r.write(5)
		r.run(chain.Inc)
		r.flush()

		r.vm.Kill() // bitmaps of this session are lost
		r.vm.Restart()
		if result, err = backup.Run(t.Context(), r.config(backup.Auto)); err != nil {
			t.Fatal(err)
		}
		if d := result.Point.Disks[0]; d.Level != chain.Full || !strings.Contains(d.Reason, "no bitmap") {
			t.Errorf("disk %s: %s, %q", d.Name, d.Level, d.Reason)
		}
	})
}

func TestRawDiskIsTrackedInMemory(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style, func(c *testenv.Config) { c.Disks[0].Format = "raw" })
		r.write(20)
		p := r.run(chain.Full)
		if d := p.Disk("scsi0"); d.SourceFormat != "raw" || d.Tracking.Kind != chain.KindMemory {
			t.Errorf("disk: %+v", d)
		}
		r.write(20)
		r.run(chain.Inc)
		r.vm.Restart()
		result, err := backup.Run(t.Context(), r.config(backup.Auto))
		if err != nil {
			t.Fatal(err)
		}
		if raw, qcow2 := result.Point.Disk("scsi0"), result.Point.Disk("virtio1"); raw.Level != chain.Full || qcow2.Level != chain.Inc {
			t.Errorf("after a restart: %+v, %+v", raw, qcow2)
		}
	})
}

func TestIOThread(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"scsi0", "virtio1"} {
		each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
			r := newRig(t, q, style, func(c *testenv.Config) {
				c.SeaBIOS = true
				for i := range c.Disks {
					c.Disks[i].IOThread = c.Disks[i].ID == id
				}
			})
			time.Sleep(500 * time.Millisecond) // the firmware starts the devices, and with them their iothreads
			if q.AtLeast(9, 0) {
				r.write(20)
				r.run(chain.Full)
				r.write(20)
				r.run(chain.Inc)
				r.clean(1)
				return
			}
			_, err := backup.Run(t.Context(), r.config(backup.Auto))
			if err == nil || !strings.Contains(err.Error(), "iothread") || !strings.Contains(err.Error(), id) {
				t.Errorf("error is %v", err)
			}
			r.clean(0)
			if !r.vm.Alive() {
				t.Error("the guest is dead")
			}
		})
	}
}

func TestRunsExcludeEachOther(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive)
	r.write(10)
	other := r.config(backup.Auto)
	other.Addr = r.vm.Spare
	other.LockWait = 0
	other2 := other
	elsewhere := t.TempDir()
	other2.Repo = func() (*repo.Repo, error) { return repo.OpenOrCreate(elsewhere, durable.FS{}) }

	cfg := r.config(backup.Auto)
	cfg.Repo = func() (*repo.Repo, error) { return repo.OpenOrCreate(r.repo, durable.FS{Before: r.fs.Before}) }
	tried := false
	r.fs.Before = func(op, path string) error {
		if op != "rename" || !strings.HasSuffix(path, ".sums") || tried {
			return nil
		}
		tried = true
		if _, err := backup.Run(t.Context(), other); !errors.Is(err, repo.ErrLocked) {
			t.Errorf("the same repository: %v", err)
		}
		if _, err := backup.Run(t.Context(), other2); !errors.Is(err, backup.ErrBusy) {
			t.Errorf("another repository: %v", err)
		}
		return nil
	}
	if _, err := backup.Run(t.Context(), r.config(backup.Auto)); err != nil {
		t.Fatal(err)
	}
	if !tried {
		t.Error("nothing was tried")
	}
	r.fs.Before = nil
	r.clean(1)

	// One after the other, two repositories keep their own increments.
	if _, err := backup.Run(t.Context(), other2); err != nil {
		t.Fatal(err)
	}
	r.write(10)
	r.run(chain.Inc)
	result, err := backup.Run(t.Context(), other2)
	if err != nil || result.Point.Level() != chain.Inc {
		t.Errorf("the other repository: %v, %v", result, err)
	}
}

func TestForeignBitmapsAreLeftAlone(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	node := r.formatNode("scsi0")
	names := []string{"pbs-incremental-dirty-bitmap", "qmpbackup-x", "qmchain:76543210:20261120T120000Z-0001:scsi0"}
	for _, name := range names {
		r.vm.Execute("block-dirty-bitmap-add", map[string]any{"node": node, "name": name}, nil)
	}
	r.write(10)
	if _, err := backup.Run(t.Context(), r.config(backup.Auto)); err != nil {
		t.Fatal(err)
	}
	r.write(10)
	r.run(chain.Inc)
	for _, name := range names {
		r.vm.Execute("block-dirty-bitmap-remove", map[string]any{"node": node, "name": name}, nil)
	}
	r.clean(1)
}

// formatNode is the node of a disk's image.
func (r *rig) formatNode(disk string) string {
	r.t.Helper()
	var nodes []struct {
		Name   string `json:"node-name"`
		Driver string `json:"drv"`
		Image  struct {
			Filename string `json:"filename"`
		} `json:"image"`
	}
	r.vm.Execute("query-named-block-nodes", map[string]any{"flat": true}, &nodes)
	for _, n := range nodes {
		if n.Driver == "qcow2" && n.Image.Filename == r.vm.Disk(disk).Path {
			return n.Name
		}
	}
	r.t.Fatalf("no node of disk %s", disk)
	return ""
}

func TestSwappedAndRenamedDisks(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive)
	r.write(30)
	r.run(chain.Full)
	r.write(10)
	// What the ledger calls scsi0 is virtio1 from now on, and the other way round.
	r.vm.Reconfigure(func(c *testenv.Config) {
		c.Disks[0].Path, c.Disks[1].Path = r.vm.Disk("virtio1").Path, r.vm.Disk("scsi0").Path
	})
	for range 2 {
		result, err := backup.Run(t.Context(), r.config(backup.Auto))
		if err != nil {
			t.Fatal(err)
		}
		if result.Point.Level() != chain.Inc {
			t.Errorf("level %s: %s", result.Point.Level(), result.Point.Disks[0].Reason)
		}
		disks := ledger.ReadPoint(t, r.qemu, r.repo, "web", result.Point.ID)
		disks["scsi0"], disks["virtio1"] = disks["virtio1"], disks["scsi0"]
		if _, err := r.ledger.Instant(disks, r.ledger.Now(), r.ledger.Now()); err != nil {
			t.Fatal(err)
		}
	}
}

// A repository on a file system that fills up: the guest notices nothing, the run fails, and with more space the next
// one is an increment.
func TestTargetFull(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		mount(t, r.repo, "8m")
		r.write(5)
		r.run(chain.Full)
		if err := r.ledger.Fill("scsi0", 0, diskSize, 0x5a); err != nil {
			t.Fatal(err)
		}
		hog := filepath.Join(r.repo, "web", "hog")
		if err := os.WriteFile(hog, make([]byte, 5<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := backup.Run(t.Context(), r.config(backup.Auto)); err == nil || errors.Is(err, backup.ErrUndo) {
			t.Fatalf("with a full target: %v", err)
		}
		r.clean(1)
		if got := r.vm.Status(); got != "running" {
			t.Errorf("the guest is %s", got)
		}
		r.write(5)
		if err := os.Remove(hog); err != nil {
			t.Fatal(err)
		}
		r.run(chain.Inc)
	})
}

// A fleece that fills up breaks the backup, not the guest.
func TestFleeceFull(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		if err := r.ledger.Fill("scsi0", 0, diskSize, 0x11); err != nil {
			t.Fatal(err)
		}
		mount(t, r.fleece, "1m")
		r.run(chain.Full)
		if err := r.ledger.Fill("scsi0", 0, diskSize, 0x22); err != nil {
			t.Fatal(err)
		}
		overwritten := false
		cfg := r.config(backup.Auto)
		cfg.Addr = r.proxyAfter("blockdev-reopen", func() {
			if !overwritten {
				overwritten = true
				if err := r.ledger.Fill("scsi0", 0, diskSize, 0x33); err != nil {
					t.Error(err)
				}
			}
		})
		if _, err := backup.Run(t.Context(), cfg); err == nil || errors.Is(err, backup.ErrUndo) {
			t.Fatalf("with a full fleece: %v", err)
		}
		r.clean(1)
		r.run(chain.Inc)
	})
}

// mount puts a small file system on a folder.
func mount(t *testing.T, dir, size string) {
	t.Helper()
	testenv.Output(t, "mount", "-t", "tmpfs", "-o", "mode=0755,size="+size, "tmpfs", dir)
	t.Cleanup(func() { testenv.Output(t, "umount", "-l", dir) })
}
