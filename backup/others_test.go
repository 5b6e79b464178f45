package backup_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
	"qmchain/qmp/qmptest"
)

// The target fails when the copying is done and only the image's tables are still to be written. QEMU says nothing of that
// when it closes an image: such a point would be damaged.
func TestTargetFailsAtTheEnd(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		mount(t, r.repo, "32m")
		r.write(20)
		r.run(chain.Full)
		r.write(20)
		hog := filepath.Join(r.repo, "hog")
		var filled atomic.Bool
		_, err := r.runWith(func(c *backup.Config) {
			c.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
				Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
					if cmds[0].Name == "blockdev-reopen" && strings.Contains(string(cmds[0].Args), "qmchain-tgt0") && filled.CompareAndSwap(false, true) {
						_ = os.WriteFile(hog, make([]byte, 40<<20), 0o600) // as much as there is room
					}
					return qmptest.Verdict{}
				},
			}).Addr()
		})
		if err == nil || errors.Is(err, backup.ErrUndo) || !filled.Load() {
			t.Fatalf("with a target that fails at the end: %v", err)
		}
		r.clean(1)
		if err := os.Remove(hog); err != nil {
			t.Fatal(err)
		}
		r.run(chain.Inc)
	})
}

// mirror starts somebody else's job on a disk, which goes on until it is cancelled.
func (r *rig) mirror(disk string) (cancel func()) {
	r.t.Helper()
	node := r.topNode(disk)
	target := filepath.Join(r.t.TempDir(), "mirror.raw")
	if err := os.WriteFile(target, nil, 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Truncate(target, diskSize); err != nil {
		r.t.Fatal(err)
	}
	r.vm.Execute("blockdev-add", map[string]any{"driver": "file", "node-name": "mirror-target", "filename": target}, nil)
	r.vm.Execute("blockdev-mirror", map[string]any{"job-id": "mirror-" + disk, "device": node, "target": "mirror-target", "sync": "full", "filter-node-name": "mirror-filter"}, nil)
	return func() {
		r.vm.Execute("block-job-cancel", map[string]any{"device": "mirror-" + disk, "force": true}, nil)
		r.vm.WaitEvent("BLOCK_JOB_CANCELLED", 30e9)
		r.vm.Execute("blockdev-del", map[string]any{"node-name": "mirror-target"}, nil)
	}
}

// topNode is the node that a disk's device uses.
func (r *rig) topNode(disk string) string {
	r.t.Helper()
	var devices []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted struct {
			Node string `json:"node-name"`
		} `json:"inserted"`
	}
	r.vm.Execute("query-block", nil, &devices)
	for _, d := range devices {
		if strings.Contains(d.Device+d.QDev, disk) {
			return d.Inserted.Node
		}
	}
	r.t.Fatalf("no device %s", disk)
	return ""
}

// A disk with somebody else's mirror job on it is left alone.
func TestMirrorUnderWay(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Blockdev}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(20)
		r.run(chain.Full)
		cancel := r.mirror("scsi0")
		if _, err := r.runWith(func(*backup.Config) {}); !errors.Is(err, backup.ErrBusy) {
			t.Errorf("with a mirror on the disk: %v", err)
		}
		result, err := r.runWith(func(c *backup.Config) { c.Exclude = []string{"scsi0"} })
		if err != nil || result.Point.Level() != chain.Inc {
			t.Errorf("without that disk: %+v, %v", result, err)
		}
		cancel()
		r.write(5)
		r.run(chain.Inc)
		r.clean(1)
	})
}

// Somebody begins a mirror job in mid-run, on top of our filter: the point is good, the fleecing ends, and only the filter on
// top stays until the job has ended.
func TestMirrorBeginsInMidRun(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.ledger.NoDiscards = true // a mirror job drops them
		r.write(20)
		r.run(chain.Full)
		r.write(5)
		from := r.ledger.Now()
		cancel := make(chan func(), 1)
		result, err := r.runWith(func(c *backup.Config) {
			c.Addr = r.proxyAfter("blockdev-reopen", func() { cancel <- r.mirror("scsi0") })
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(result.Warnings) == 0 || !strings.Contains(strings.Join(result.Warnings, " "), "qmchain-top") {
			t.Errorf("warnings %q", result.Warnings)
		}
		r.check(result.Point, from, r.ledger.Now())
		if _, err := r.runWith(func(*backup.Config) {}); !errors.Is(err, backup.ErrBusy) {
			t.Errorf("while the job goes on: %v", err)
		}
		r.write(5)
		(<-cancel)()
		r.write(5)
		r.run(chain.Inc)
		r.clean(1)
	})
}

// A guest that has moved away is another process's now.
func TestMigratedAway(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive, func(c *testenv.Config) { c.NoLocking = true })
	r.write(10)
	r.run(chain.Full)
	source := r.vm
	target := r.startTarget()
	if _, err := backup.Run(t.Context(), r.config(backup.Auto)); !errors.Is(err, backup.ErrBusy) || source.Status() != "postmigrate" {
		t.Errorf("on the source, which is %s: %v", source.Status(), err)
	}
	source.Quit()
	r.vm = target
	r.ledger.Follow(target)
	r.run(chain.Inc)
}

// A folder where the share should be is no place for a new repository.
func TestShareNotMounted(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.run(chain.Full)
	empty := t.TempDir()
	change := func(init bool) func(*backup.Config) {
		return func(c *backup.Config) {
			c.Repo = func() (*repo.Repo, error) { return repo.Open(empty, durable.FS{}) }
			c.Create = func() (*repo.Repo, error) { return repo.OpenOrCreate(empty, durable.FS{}) }
			c.Init = init
		}
	}
	if _, err := r.runWith(change(false)); !errors.Is(err, backup.ErrElsewhere) {
		t.Errorf("error is %v", err)
	}
	if entries, err := os.ReadDir(empty); err != nil || len(entries) > 0 {
		t.Errorf("%v, %v", entries, err)
	}
	if result, err := r.runWith(change(true)); err != nil || result.Point.Level() != chain.Full {
		t.Errorf("asked for: %+v, %v", result, err)
	}
	r.run(chain.Inc)
}

// Two hosts that back up guests of one name to a share on which locks reach no further than the host: whoever comes second
// to the commit fails, and no chain has a wrong link.
func TestTwoHostsWithoutLocks(t *testing.T) {
	t.Parallel()
	same := func(c *testenv.Config) { c.UUID = "7f3c0a52-6a0b-4d0e-9d53-0d1f8d1b7c11" }
	a, b := newRig(t, testenv.Host(t), testenv.Throttle, same), newRig(t, testenv.Host(t), testenv.Drive, same)
	b.repo = a.repo
	a.write(10)
	b.write(10)
	a.run(chain.Full)
	other := false
	a.fs.Before = func(op, path string) error {
		if other || op != "write" || filepath.Base(path) != chain.ManifestFile {
			return nil
		}
		other = true
		// What this host has locked is not locked on the other one.
		if err := os.Rename(filepath.Join(a.repo, "web", ".lock"), filepath.Join(a.repo, "web", ".lock-of-another-host")); err != nil {
			return err
		}
		b.run(chain.Full)
		return nil
	}
	if _, err := a.runWith(func(*backup.Config) {}); err == nil || errors.Is(err, backup.ErrUndo) {
		t.Errorf("with another host's point in between: %v", err)
	}
	a.fs.Before = nil
	a.clean(0) // its bitmaps did not record from the newest point
	a.write(5)
	a.run(chain.Full)
	b.write(5)
	b.run(chain.Full)
}
