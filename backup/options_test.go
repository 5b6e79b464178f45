package backup_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/testenv"
	"qmchain/qmp/qmptest"
)

func TestDirect(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.ledger.NoDiscards = true
		r.write(60)
		level := chain.Full
		for range 8 {
			from := r.ledger.Now()
			result, err := r.runWith(func(c *backup.Config) {
				c.Fleecing = backup.Fleecing{Off: true}
				c.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
					After: func(_ int, cmd qmptest.CommandSeen, _ json.RawMessage) { r.write(1) },
				}).Addr()
			})
			if err != nil {
				t.Fatal(err)
			}
			if result.Point.Level() != level {
				t.Fatalf("level %s: %s", result.Point.Level(), result.Point.Disks[0].Reason)
			}
			r.check(result.Point, from, r.ledger.Now())
			r.clean(1)
			level = chain.Inc
		}
	})
}

// With iothreads it is the only way on old QEMUs. The harness's own requests would crash those, so here the disks are idle.
func TestDirectWithIOThread(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style, func(c *testenv.Config) {
			c.SeaBIOS = true
			for i := range c.Disks {
				c.Disks[i].IOThread = true
			}
		})
		time.Sleep(500 * time.Millisecond) // the firmware starts the devices, and with them their iothreads
		for _, level := range []chain.Level{chain.Full, chain.Inc, chain.Inc} {
			result, err := r.runWith(func(c *backup.Config) { c.Fleecing = backup.Fleecing{Off: true} })
			if err != nil || result.Point.Level() != level {
				t.Fatalf("%+v, %v", result, err)
			}
			r.check(result.Point, 0, 0)
			r.clean(1)
		}
		_, err := r.runWith(func(*backup.Config) {})
		if q.AtLeast(9, 0) != (err == nil) || err != nil && !errors.Is(err, backup.ErrIOThread) {
			t.Errorf("with fleecing: %v", err)
		}
	})
}

func TestCompressed(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	if err := r.ledger.Fill("scsi0", 0, diskSize, 0x42); err != nil {
		t.Fatal(err)
	}
	for i, kind := range []string{"zstd", "zlib", ""} {
		from := r.ledger.Now()
		result, err := r.runWith(func(c *backup.Config) { c.Copying = backup.Copying{Compress: kind, Jobs: 1, Direct: i == 1} })
		if err != nil {
			t.Fatal(err)
		}
		if d := result.Point.Disk("scsi0"); kind != "" && d.Bytes > diskSize/4 {
			t.Errorf("%s: %d bytes", kind, d.Bytes)
		}
		r.check(result.Point, from, r.ledger.Now())
		info := testenv.Output(t, r.qemu.Img, "info", "--output=json", filepath.Join(r.repo, "web", repo.ImagesFolder, result.Point.Disk("scsi0").File))
		if kind != "" && !strings.Contains(info, `"compression-type": "`+kind+`"`) {
			t.Errorf("%s: %s", kind, info)
		}
		r.write(20)
	}
}

func TestSpeedLimitAndClusterSize(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive)
	if err := r.ledger.Fill("scsi0", 0, diskSize, 0x42); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	result, err := r.runWith(func(c *backup.Config) { c.Copying = backup.Copying{Speed: 2 << 20, ClusterSize: 4096} })
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < time.Second {
		t.Errorf("4 MiB at 2 MiB/s took %s", took)
	}
	r.check(result.Point, r.ledger.Now(), r.ledger.Now())
	if !strings.Contains(testenv.Output(t, r.qemu.Img, "info", filepath.Join(r.repo, "web", repo.ImagesFolder, result.Point.Disk("scsi0").File)), "cluster_size: 4096") {
		t.Error("not the cluster size that was asked for")
	}
	r.write(10)
	r.run(chain.Inc) // of other clusters, on the same chain
}

// overwrites changes a whole disk right after the switch, before anything of it is copied.
func (r *rig) overwrites(pattern byte) string {
	return r.proxyAfter("blockdev-reopen", func() {
		if err := r.ledger.Fill("scsi0", 0, diskSize, pattern); err != nil {
			r.t.Error(err)
		}
	})
}

func TestFleeceLimit(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(10)
		r.run(chain.Full)
		if err := r.ledger.Fill("scsi0", 0, diskSize, 1); err != nil {
			t.Fatal(err)
		}
		_, err := r.runWith(func(c *backup.Config) {
			c.Fleecing.Limit = 2 << 20
			c.Addr = r.overwrites(2)
		})
		if err == nil || errors.Is(err, backup.ErrUndo) {
			t.Fatalf("with a limit that is too low: %v", err)
		}
		r.clean(1)
		result, err := r.runWith(func(c *backup.Config) {
			c.Fleecing.Limit = 16 << 20
			c.Addr = r.overwrites(3)
		})
		if err != nil || result.Point.Level() != chain.Inc {
			t.Fatalf("with a limit that is high enough: %v", err)
		}
		r.check(result.Point, r.ledger.Now()-1, r.ledger.Now())
	})
}

// peaks notes the most that fleece images were seen to hold.
type peaks struct {
	mu     sync.Mutex
	fleece map[string]int64
}

func (p *peaks) Disk(name string, _, _, fleece int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fleece[name] = max(p.fleece[name], fleece)
}

func TestFleeceUse(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive)
	for _, disk := range []string{"scsi0", "virtio1"} {
		if err := r.ledger.Fill(disk, 0, diskSize, 1); err != nil {
			t.Fatal(err)
		}
	}
	seen := &peaks{fleece: make(map[string]int64)}
	if _, err := r.runWith(func(c *backup.Config) { c.Progress, c.Addr = seen, r.overwrites(2) }); err != nil {
		t.Fatal(err)
	}
	if seen.fleece["scsi0"] < diskSize || seen.fleece["virtio1"] > 1<<20 {
		t.Errorf("%+v, while all of scsi0 was overwritten and nothing of virtio1", seen.fleece)
	}
}

// What the guest writes waits for the fleece no longer than it may. The backup fails then, as what was overwritten is lost
// to it.
func TestFleeceTooSlow(t *testing.T) {
	t.Parallel()
	eachInOneStyle(t, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		if err := r.ledger.Fill("scsi0", 0, diskSize, 1); err != nil {
			t.Fatal(err)
		}
		disk := filepath.Join(t.TempDir(), "disk")
		testenv.Output(t, "truncate", "--size=32M", disk)
		testenv.Output(t, "mkfs.ext4", "-q", disk)
		testenv.Output(t, "mount", "-o", "loop", disk, r.fleece)
		if err := os.Remove(filepath.Join(r.fleece, "lost+found")); err != nil {
			t.Fatal(err)
		}
		frozen := false
		freeze := func(what string, want bool) {
			if frozen == want {
				testenv.Output(t, "fsfreeze", what, r.fleece)
				frozen = !frozen
			}
		}
		t.Cleanup(func() {
			freeze("--unfreeze", true)
			testenv.Output(t, "umount", "-l", r.fleece)
		})
		r.run(chain.Full)
		r.write(5)
		took := time.Duration(0)
		_, err := r.runWith(func(c *backup.Config) {
			c.Fleecing.Timeout = 2 * time.Second
			c.Addr = r.proxyAfter("blockdev-reopen", func() {
				if took > 0 {
					return
				}
				freeze("--freeze", false)
				began := time.Now()
				if err := r.ledger.Fill("scsi0", 0, 64<<10, 2); err != nil {
					t.Errorf("the guest's write: %v", err)
				}
				took = time.Since(began)
				freeze("--unfreeze", true)
			})
		})
		if err == nil || errors.Is(err, backup.ErrUndo) {
			t.Errorf("with a fleece that hangs: %v", err)
		}
		if took < 2*time.Second || took > 14*time.Second {
			t.Errorf("the guest's write took %s, with 2s as the limit", took)
		}
		r.clean(1)
		r.run(chain.Inc)
	})
}

func TestDiffAndCopy(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.write(30)
	full := r.run(chain.Full)
	take := func(level chain.Level) *chain.Manifest {
		t.Helper()
		r.write(8)
		result, err := r.runWith(func(c *backup.Config) { c.Level = level })
		if err != nil {
			t.Fatal(err)
		}
		r.check(result.Point, r.ledger.Now(), r.ledger.Now())
		r.clean(1)
		return result.Point
	}
	for _, level := range []chain.Level{chain.Diff, chain.Copy, chain.Diff, chain.Inc, chain.Copy} {
		p := take(level)
		if p.Level() != level || (p.Disks[0].Tracking != nil) != level.Tracked() {
			t.Errorf("%s: %+v", level, p.Disks[0])
		}
		if level.Overlay() && p.Disks[0].Parent.Point != full.ID {
			t.Errorf("%s: its parent is %s", level, p.Disks[0].Parent.Point)
		}
	}
	r.run(chain.Inc)
	result, err := r.runWith(func(c *backup.Config) { c.Threshold = 1 << 20 })
	if err != nil || result.Point != nil {
		t.Errorf("below the threshold: %+v, %v", result, err)
	}
	r.clean(1)
	if _, err := os.Stat(filepath.Join(r.repo, "web")); err != nil {
		t.Error(err)
	}
}
