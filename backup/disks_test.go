package backup_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
)

// Every kind of device.
func TestDevices(t *testing.T) {
	t.Parallel()
	each(t, testenv.Styles, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style, func(c *testenv.Config) {
			c.Disks = nil
			for _, id := range []string{"scsi0", "virtio1", "sata2", "ide0", "nvme0", "usb0"} {
				c.Disks = append(c.Disks, testenv.Disk{ID: id, Size: diskSize, Discard: "unmap"})
			}
		})
		r.write(60)
		for _, level := range []chain.Level{chain.Full, chain.Inc, chain.Inc} {
			p := r.run(level)
			if len(p.Disks) != 6 {
				t.Fatalf("disks: %+v", p.Disks)
			}
			r.clean(1)
			r.write(40)
		}
	})
}

// The variables of a UEFI firmware are a disk; the firmware's code, a CD-ROM and read-only disks are none.
func TestFirmwareAndMedia(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		cd := filepath.Join(t.TempDir(), "cd.iso")
		testenv.CreateDisk(t, q, cd, "raw", 1<<20)
		r := newRig(t, q, style, func(c *testenv.Config) {
			c.Disks = []testenv.Disk{
				{ID: "scsi0", Size: diskSize},
				{ID: "efidisk0", Size: 512 << 10},
				{ID: "ide2", Device: "ide-cd", Path: cd, Size: 1 << 20, Format: "raw", ReadOnly: true},
				{ID: "ide3", Device: "ide-cd"},
				{ID: "scsi3", Size: 1 << 20, ReadOnly: true},
			}
		})
		for _, level := range []chain.Level{chain.Full, chain.Inc} {
			result, err := r.runWith(func(*backup.Config) {})
			if err != nil {
				t.Fatal(err)
			}
			var names, left []string
			for _, d := range result.Point.Disks {
				names = append(names, d.Name)
			}
			for _, d := range result.Plan.Left {
				left = append(left, d.Name+": "+d.Left)
			}
			if fmt.Sprint(len(names)) != "2" || result.Point.Disk("efidisk0") == nil || result.Point.Level() != level || len(result.Warnings) > 0 {
				t.Errorf("disks %q, level %s, warnings %q", names, result.Point.Level(), result.Warnings)
			}
			if text := strings.Join(left, ", "); !strings.Contains(text, "ide2: removable") || !strings.Contains(text, "scsi3: read-only") {
				t.Errorf("left out: %s", text)
			}
		}
	})
}

// Images of every shape that a guest's can have.
func TestImages(t *testing.T) {
	t.Parallel()
	q := testenv.Host(t)
	size := fmt.Sprint(diskSize)
	create := func(t *testing.T, args ...string) {
		testenv.Output(t, q.Img, append([]string{"create", "-q", "-f", "qcow2"}, args...)...)
	}
	for what, test := range map[string]struct {
		make func(t *testing.T, path string)
		kind string
	}{
		"version 2":         {func(t *testing.T, path string) { create(t, "-o", "compat=0.10", path, size) }, chain.KindMemory},
		"2 MiB clusters":    {func(t *testing.T, path string) { create(t, "-o", "cluster_size=2M", path, size) }, chain.KindPersistent},
		"512 byte clusters": {func(t *testing.T, path string) { create(t, "-o", "cluster_size=512", path, size) }, chain.KindPersistent},
		"extended L2":       {func(t *testing.T, path string) { create(t, "-o", "extended_l2=on,cluster_size=128k", path, size) }, chain.KindPersistent},
		"a data file": {func(t *testing.T, path string) {
			create(t, "-o", "data_file="+filepath.Join(filepath.Dir(path), "data")+",data_file_raw=on", path, size)
		}, chain.KindPersistent},
		"a backing chain": {func(t *testing.T, path string) {
			create(t, path+".base", size)
			create(t, "-b", path+".base", "-F", "qcow2", path+".mid")
			create(t, "-b", path+".mid", "-F", "qcow2", path)
		}, chain.KindPersistent},
		"internal snapshots": {func(t *testing.T, path string) {
			create(t, path, size)
			testenv.Output(t, q.Img, "snapshot", "-c", "one", path)
		}, chain.KindMemory},
		"preallocation": {func(t *testing.T, path string) { create(t, "-o", "preallocation=metadata", path, size) }, chain.KindPersistent},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "a disk,with a name.qcow2")
			test.make(t, path)
			r := newRig(t, q, testenv.Throttle, func(c *testenv.Config) {
				c.Disks = []testenv.Disk{{ID: "scsi0", Path: path, Size: diskSize, Discard: "unmap"}}
			})
			r.ledger.NoDiscards = true // a discard of less than a cluster of the image does nothing
			r.write(30)
			p := r.run(chain.Full)
			if got := p.Disks[0].Tracking.Kind; got != test.kind {
				t.Errorf("tracked %s", got)
			}
			for range 3 {
				r.write(12)
				r.run(chain.Inc)
			}
			r.clean(1)
		})
	}
}

// Somebody takes an external snapshot between two points: the active image is another one, without a bitmap.
func TestExternalSnapshot(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive)
	r.write(20)
	r.run(chain.Full)
	r.vm.Execute("blockdev-snapshot-sync", map[string]any{
		"device": "drive-scsi0", "snapshot-file": filepath.Join(t.TempDir(), "overlay.qcow2"), "format": "qcow2",
	}, nil)
	r.write(20)
	result, err := r.runWith(func(*backup.Config) {})
	if err != nil {
		t.Fatal(err)
	}
	if d := result.Point.Disk("scsi0"); d.Level != chain.Full || d.Reason == "" {
		t.Errorf("scsi0: %+v", d)
	}
	if d := result.Point.Disk("virtio1"); d.Level != chain.Inc {
		t.Errorf("virtio1: %+v", d)
	}
	r.check(result.Point, r.ledger.Now(), r.ledger.Now())
	r.write(20)
	r.run(chain.Inc)
}
