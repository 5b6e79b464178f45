package repo_test

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain/repo/repotest"
)

// A guest's folder can be a file system of its own, a ZFS data set for one: nothing goes from one guest's folder to another's, or
// to the repository's.
func TestGuestOnItsOwnFileSystem(t *testing.T) {
	t.Parallel()
	r := repotest.New(t, t.TempDir())
	g := repotest.NewGuest(t, r, "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	if err := os.Mkdir(g.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", g.Dir, "tmpfs", 0, "size=64m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(g.Dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	first := g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20, Write: repotest.RandomWrites(1, 4, 1<<20, 10)})
	second := g.Add(repotest.Disk{Name: "scsi0", Write: repotest.RandomWrites(2, 4, 1<<20, 90)})
	if err := g.Hide(first.ID); err != nil {
		t.Fatal(err)
	}
	points, problems, err := g.Guest.Points()
	if err != nil || len(problems) > 0 || len(points) != 2 || len(points.Kept()) != 1 {
		t.Fatalf("%v, %v, %v", points, problems, err)
	}
	if err := g.CheckImages(points, points.Find(second.ID), "scsi0"); err != nil {
		t.Error(err)
	}
	if err := g.DropImage(first.ID, "scsi0"); err != nil {
		t.Error(err)
	}
	if err := g.DropBase(first.ID); err != nil {
		t.Error(err)
	}
}
