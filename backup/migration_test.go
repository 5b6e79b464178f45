package backup_test

import (
	"path/filepath"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
)

// A guest moves to another QEMU process on the same images, in the middle of a chain. What QEMU does with the bitmaps is its
// own affair: the next points are right, be they increments or, with the reason, fulls.
func TestMigration(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(30)
		r.run(chain.Full)
		r.write(5)
		r.run(chain.Inc)
		for range 2 {
			r.write(5)
			r.migrate()
			r.write(5)
			result, err := r.runWith(func(*backup.Config) {})
			if err != nil {
				t.Fatal(err)
			}
			r.check(result.Point, r.ledger.Now(), r.ledger.Now())
			for _, d := range result.Point.Disks {
				t.Logf("after a migration, %s: %s %s", d.Name, d.Level, d.Reason)
				if d.Level == chain.Full && d.Reason == "" {
					t.Errorf("disk %s: a full without a reason", d.Name)
				}
			}
			r.clean(1)
			r.write(5)
			r.run(chain.Inc)
		}
	})
}

// migrate moves the guest to a new QEMU process.
func (r *rig) migrate() {
	r.t.Helper()
	target := r.startTarget()
	r.vm.Quit()
	r.vm = target
	r.ledger.Follow(target)
}

// startTarget migrates the guest to a new QEMU process, and leaves the old one, which has no guest any more, as it is.
func (r *rig) startTarget() *testenv.VM {
	r.t.Helper()
	cfg := r.vm.Config()
	for i := range cfg.Disks {
		cfg.Disks[i] = r.vm.Disk(cfg.Disks[i].ID)
	}
	socket := filepath.Join(r.t.TempDir(), "migrate")
	cfg.Args = []string{"-incoming", "unix:" + socket}
	target := testenv.Start(r.t, cfg)
	r.vm.Execute("migrate", map[string]any{"uri": "unix:" + socket}, nil)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		var status struct {
			Status string
			Error  string `json:"error-desc"`
		}
		r.vm.Execute("query-migrate", nil, &status)
		if status.Status == "completed" && target.Status() == "running" {
			return target
		}
		if status.Status == "failed" || time.Now().After(deadline) {
			r.t.Fatalf("migration: %+v; the target is %s", status, target.Status())
		}
	}
}
