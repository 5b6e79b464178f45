package backup_test

import (
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
	"qmchain/qmp/qmptest"
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

// Points of a guest whose agent freezes its file systems need no replay of a journal, and hold all that was written before.
// An agent that is gone, or dies while the guest is frozen, costs a warning.
func TestFreezeOfARealGuest(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style, func(c *testenv.Config) {
			c.Guest = true
			c.Disks = []testenv.Disk{{ID: "virtio1", Size: 32 << 20, Discard: "unmap"}}
		})
		ctx := t.Context()
		r.vm.Run(ctx, "mkfs.ext4 -q /dev/disk/virtio1 && mkdir -p /data && mount /dev/disk/virtio1 /data")
		take := func(change func(*backup.Config)) *backup.Result {
			t.Helper()
			result, err := r.runWith(func(c *backup.Config) {
				c.Agent, c.FreezeLimit = backup.SocketAgent{Addr: r.vm.AgentSocket}, 20*time.Second
				change(c)
			})
			if err != nil {
				t.Fatal(err)
			}
			return result
		}
		for n := range 3 {
			// Nothing of this is synced: the freeze does that.
			r.vm.Run(ctx, fmt.Sprintf("dd if=/dev/urandom of=/data/file%d bs=64k count=16 2>/dev/null; echo %d >/data/last", n, n))
			sums := r.vm.Run(ctx, "cd /data && sha256sum file* last")
			point := take(func(*backup.Config) {}).Point
			if point.Consistency != chain.Frozen {
				t.Fatalf("consistency is %s", point.Consistency)
			}
			raw := filepath.Join(t.TempDir(), "raw")
			if err := os.WriteFile(raw, ledger.ReadPoint(t, q, r.repo, "web", point.ID)["virtio1"], 0o600); err != nil {
				t.Fatal(err)
			}
			if got := sumsInside(t, raw); got != sums {
				t.Fatalf("point %d holds\n%swhich was\n%s", n, got, sums)
			}
			r.vm.Run(ctx, "echo more >>/data/last; sync") // the guest is thawed
		}

		result := take(func(c *backup.Config) {
			c.Agent = backup.SocketAgent{Addr: r.vm.AgentSocket, Mountpoints: []string{"/data"}}
		})
		if result.Point.Consistency != chain.Frozen {
			t.Errorf("only /data: %s, %q", result.Point.Consistency, result.Warnings)
		}

		// The agent dies while the guest is frozen. The point is good; the guest stays frozen for the time being, and the next
		// run that finds an agent thaws it.
		died := false
		result = take(func(c *backup.Config) {
			c.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
				Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
					if cmds[0].Name == "blockdev-reopen" && !died {
						died = true
						r.vm.Run(ctx, "tr '\\0' ' ' </proc/$(cat /run/agent0/pid)/cmdline >/run/agent0/command; kill -9 $(cat /run/agent0/pid); rm /run/agent0/pid")
					}
					return qmptest.Verdict{}
				},
			}).Addr()
		})
		if !result.StillFrozen || result.Point.Consistency != chain.Frozen || len(result.Warnings) == 0 {
			t.Errorf("the agent died: still frozen %v, %s, warnings %q", result.StillFrozen, result.Point.Consistency, result.Warnings)
		}
		r.vm.Run(ctx, "sh /run/agent0/command")
		if result = take(func(*backup.Config) {}); result.StillFrozen || len(result.Warnings) > 0 {
			t.Errorf("the agent is back: still frozen %v, warnings %q", result.StillFrozen, result.Warnings)
		}
		r.vm.Run(ctx, "echo more >>/data/last; sync")
		r.clean(1)
	})
}

// sumsInside are the check sums of the files in a file system's image, which is mounted as it is, without replay of its journal.
func sumsInside(t *testing.T, image string) string {
	t.Helper()
	dir := t.TempDir()
	testenv.Output(t, "mount", "-o", "ro,loop,noload", image, dir)
	defer testenv.Output(t, "umount", dir)
	return testenv.Output(t, "sh", "-c", "cd "+dir+" && sha256sum file* last")
}
