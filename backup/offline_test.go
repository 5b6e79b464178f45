package backup_test

import (
	"errors"
	"strings"
	"testing"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
)

// runOffline takes a point of the stopped guest, which must be of this level.
func (r *rig) runOffline(level chain.Level) *backup.Result {
	r.t.Helper()
	result, err := r.offline()
	if err != nil {
		r.t.Fatal(err)
	}
	if got := result.Point.Level(); got != level {
		r.t.Fatalf("level is %s: %+v", got, result.Point.Disks)
	}
	r.check(result.Point, r.ledger.Now(), r.ledger.Now())
	return result
}

func (r *rig) offline() (*backup.Result, error) {
	r.t.Helper()
	return r.runWith(func(c *backup.Config) {
		c.Addr = ""
		for _, d := range r.vm.Config().Disks {
			d = r.vm.Disk(d.ID)
			c.Offline = append(c.Offline, backup.OfflineImage{Disk: d.ID, Format: d.Format, Path: d.Path})
		}
	})
}

// One chain goes on while the guest runs and while it does not.
func TestOffline(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.write(30)
	if _, err := r.offline(); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("the guest runs: %v", err)
	}
	r.run(chain.Full)
	r.write(5)
	r.vm.Quit()
	r.runOffline(chain.Inc)
	r.vm.Restart()
	r.write(5)
	r.run(chain.Inc)
	r.write(5)
	r.vm.Quit()
	r.runOffline(chain.Inc)
	r.runOffline(chain.Inc)

	// A failing run leaves the images' bitmaps as they were.
	r.fs.Before = func(op, path string) error {
		if op == "sync" && strings.HasSuffix(path, ".qcow2") {
			return errors.New("made-up failure")
		}
		return nil
	}
	if _, err := r.offline(); err == nil {
		t.Error("no failure")
	}
	r.fs.Before = nil
	r.runOffline(chain.Inc)
	r.vm.Restart()
	r.run(chain.Inc)
	r.clean(1)
}

func TestOfflineFirst(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive, func(c *testenv.Config) { c.Disks[1].Format = "raw" })
	r.write(30)
	r.vm.Quit()
	r.runOffline(chain.Full)
	result, err := r.offline()
	if err != nil {
		t.Fatal(err)
	}
	for name, level := range map[string]chain.Level{"scsi0": chain.Inc, "virtio1": chain.Full} {
		if d := result.Point.Disk(name); d.Level != level || (d.Tracking != nil) != (level == chain.Inc) {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if len(result.Warnings) > 0 {
		t.Errorf("warnings: %q", result.Warnings)
	}
	r.vm.Restart() // now it is known who the guest is, and its qcow2 disk goes on
	r.write(5)
	if result, err = r.runWith(func(*backup.Config) {}); err != nil || result.Point.Disk("scsi0").Level != chain.Inc {
		t.Errorf("the guest runs: %+v, %v", result, err)
	}
	for _, bad := range []string{"", "scsi0", "scsi0=/a", "scsi0=vmdk:/a", "scsi0=qcow2:", "a/b=raw:/a"} {
		if _, err := backup.ParseOfflineImage(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// A bitmap in an image keeps QEMU from going back to its internal snapshots, so a stopped guest's image gets none, and one that
// it has goes.
func TestOfflineSnapshots(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.write(20)
	r.vm.Quit()
	q, path := testenv.Host(t), r.vm.Disk("scsi0").Path
	r.runOffline(chain.Full)
	testenv.Output(t, q.Img, "snapshot", "-c", "before", path)
	if info := testenv.Output(t, q.Img, "info", path); !strings.Contains(info, "qmchain:") {
		t.Fatalf("the image has no bitmap: %s", info)
	}
	for _, level := range []chain.Level{chain.Inc, chain.Full} {
		result, err := r.offline()
		if err != nil {
			t.Fatal(err)
		}
		if d := result.Point.Disk("scsi0"); d.Level != level || d.Tracking != nil {
			t.Errorf("scsi0: %+v", d)
		}
		if d := result.Point.Disk("virtio1"); d.Level != chain.Inc || d.Tracking == nil {
			t.Errorf("virtio1: %+v", d)
		}
		if len(result.Warnings) > 0 {
			t.Errorf("warnings: %q", result.Warnings)
		}
		r.check(result.Point, r.ledger.Now(), r.ledger.Now())
		testenv.Output(t, q.Img, "snapshot", "-a", "before", path)
	}
	r.vm.Restart()
	if result, err := r.runWith(func(*backup.Config) {}); err != nil || result.Point.Disk("virtio1").Level != chain.Inc {
		t.Errorf("the guest runs: %+v, %v", result, err)
	}
}
