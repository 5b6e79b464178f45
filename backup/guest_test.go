package backup_test

import (
	"encoding/binary"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
)

var orderRuns = flag.Int("order-runs", 20, "how many points TestOrderOfWrites takes of each guest")

// program builds a Go program for the guest and returns it as the image of a disk.
func program(t *testing.T, dir string) (path string, size int64) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "program")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", path, dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	size = (info.Size() + 0xfffff) &^ 0xfffff
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path, size
}

// A program in the guest writes to one disk, awaits that, and writes to the other. No point may hold the second write
// without the first.
func TestOrderOfWrites(t *testing.T) {
	t.Parallel()
	path, size := program(t, "./testdata/counter")
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style, func(c *testenv.Config) {
			c.Guest = true
			c.Disks = append(c.Disks, testenv.Disk{ID: "virtio2", Path: path, Format: "raw", Size: size, ReadOnly: true})
		})
		r.vm.Run(t.Context(), "cat /dev/disk/virtio2 >/tmp/counter && chmod +x /tmp/counter")
		r.vm.Run(t.Context(), "/tmp/counter /dev/disk/scsi0 /dev/disk/virtio1 >/dev/console 2>&1 &")
		last := uint64(0)
		for n := range *orderRuns {
			result, err := backup.Run(t.Context(), r.config(backup.Auto))
			if err != nil {
				t.Fatal(err)
			}
			if n > 0 && result.Point.Level() != chain.Inc {
				t.Fatalf("level %s: %s", result.Point.Level(), result.Point.Disks[0].Reason)
			}
			disks := ledger.ReadPoint(t, q, r.repo, "web", result.Point.ID)
			first := binary.LittleEndian.Uint64(disks["scsi0"])
			second := binary.LittleEndian.Uint64(disks["virtio1"])
			if second != first && second != first+1 {
				t.Fatalf("point %d: the first disk has %d, the second %d", n, first, second)
			}
			if n > 0 && first == last {
				t.Errorf("point %d: nothing was written since the one before", n)
			}
			last = first
		}
		t.Logf("the last of %d points has %d", *orderRuns, last)
	})
}
