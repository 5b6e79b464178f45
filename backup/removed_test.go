package backup_test

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/retain"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

// removeInMidRun takes a point, and removes others when its images are made.
func (r *rig) removeInMidRun(force bool, ids ...chain.ID) (point *chain.Manifest, runErr, removeErr error) {
	r.t.Helper()
	removed := false
	r.fs.Before = func(op, path string) error {
		if removed || op != "sync" || filepath.Ext(path) != ".qcow2" {
			return nil
		}
		removed = true
		removeErr = r.remove(force, ids...)
		return nil
	}
	defer func() { r.fs.Before = nil }()
	result, runErr := r.runWith(func(*backup.Config) {})
	if !removed {
		r.t.Fatal("nothing was removed")
	}
	if runErr == nil {
		point = result.Point
	}
	return point, runErr, removeErr
}

func (r *rig) remove(force bool, ids ...chain.ID) error {
	g := r.guest()
	lock, err := g.LockPrune(r.t.Context(), time.Second)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	points, _, err := g.Points()
	if err != nil {
		return err
	}
	remover := &retain.Remover{Guest: g, Log: r.log}
	if err := remover.Remove(points, force, ids...); err != nil {
		return err
	}
	left, err := remover.Sweep(r.t.Context())
	for _, l := range left {
		r.t.Errorf("left is %s: %s", l.ID, l.Why)
	}
	return err
}

func (r *rig) guest() *repo.Guest {
	r.t.Helper()
	rep, err := repo.Open(r.repo, durable.FS{})
	if err != nil {
		r.t.Fatal(err)
	}
	g, err := rep.Guest("web")
	if err != nil {
		r.t.Fatal(err)
	}
	return g
}

// The newest point, and all that the parent of the run's point was made on, can be removed while it is under way.
func TestRemovedInMidRun(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.write(20)
	first := r.run(chain.Full)
	r.write(5)
	second := r.run(chain.Inc)
	r.write(5)
	parent := r.run(chain.Inc)
	r.write(5)
	diff, err := r.runWith(func(c *backup.Config) { c.Level = chain.Diff })
	if err != nil {
		t.Fatal(err)
	}
	r.write(5)
	point, runErr, removeErr := r.removeInMidRun(false, diff.Point.ID, second.ID, first.ID)
	if runErr != nil || removeErr != nil {
		t.Fatalf("run: %v; remove: %v", runErr, removeErr)
	}
	if d := point.Disks[0]; d.Level != chain.Inc || d.Parent.Point != parent.ID {
		t.Errorf("%+v", d)
	}
	r.check(point, r.ledger.Now(), r.ledger.Now())
	points, problems, err := r.guest().Points()
	if err != nil || len(problems) > 0 || len(points) != 2 || points[0].Disks[0].Level != chain.Full || points[0].ID != parent.ID {
		t.Errorf("points: %v, %v, %v", points, problems, err)
	}
	r.clean(1)
	r.write(5)
	r.run(chain.Inc)
}

// The parent itself is kept. Where it is removed all the same the run fails, and costs nothing but a full.
func TestParentRemovedInMidRun(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.write(20)
	first := r.run(chain.Full)
	r.write(5)
	parent := r.run(chain.Inc)
	r.write(5)
	point, runErr, removeErr := r.removeInMidRun(false, parent.ID)
	if runErr != nil || !errors.Is(removeErr, retain.ErrKept) {
		t.Fatalf("run: %v; remove: %v", runErr, removeErr)
	}
	r.check(point, r.ledger.Now(), r.ledger.Now())
	r.write(5)
	failed, runErr, removeErr := r.removeInMidRun(true, point.ID)
	if !errors.Is(runErr, repo.ErrMoved) || errors.Is(runErr, backup.ErrUndo) || removeErr != nil {
		t.Fatalf("%v; run: %v; remove: %v", failed, runErr, removeErr)
	}
	points, problems, err := r.guest().Points()
	if err != nil || len(problems) > 0 || len(points) != 2 || points[0].ID != first.ID || points[1].ID != parent.ID {
		t.Errorf("points: %v, %v, %v", points, problems, err)
	}
	r.write(5)
	time.Sleep(time.Until(point.ID.Time().Add(time.Second))) // ids of one second are in no order, once the first is forgotten
	r.run(chain.Full)
	r.clean(1)
}
