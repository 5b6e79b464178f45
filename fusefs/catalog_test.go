package fusefs

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"

	"github.com/sirupsen/logrus/hooks/test"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
	"qmchain/fusefs/tree"
)

// Time stamps are coarse on many file systems: a point that is made right after a listing may leave the folder's as they
// are. It must still be found by name at once, and be listed a second later.
func TestCoarseTimestamps(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	log, _ := test.NewNullLogger()
	now := start
	set, err := source.Open(g.Repo.Dir)
	if err != nil {
		t.Fatal(err)
	}
	c := newCatalog(set, log, func() time.Time { return now })
	place := tree.Place{Guest: "110"}
	list := func(what string, want int) {
		t.Helper()
		nodes, err := c.list(place)
		if err != nil {
			t.Fatal(err)
		}
		if len(nodes) != want {
			t.Errorf("%s: %d nodes, want %d", what, len(nodes), want)
		}
	}
	list("first", 2)

	second := g.Add(repotest.Disk{Name: "scsi0"})
	info, err := os.Lstat(g.Dir)
	if err != nil {
		t.Fatal(err)
	}
	c.guests["110"].current.stamp = stampOf(info) // as if nothing had changed
	list("within the second", 2)
	n, err := c.find(place, string(second.ID))
	if err != nil || n.Place.UUID != second.UUID {
		t.Errorf("by name: %+v, %v", n, err)
	}

	third := g.Add(repotest.Disk{Name: "scsi0"})
	if info, err = os.Lstat(g.Dir); err != nil {
		t.Fatal(err)
	}
	c.guests["110"].current.stamp = stampOf(info)
	now = now.Add(listAge)
	list("after a second", 4)
	if n, err := c.find(place, tree.LatestName); err != nil || n.Target != string(third.ID) {
		t.Errorf("latest is %q, %v", n.Target, err)
	}

	for _, name := range []string{"nope", "20261120T101523Z", string(chain.NewID(start.AddDate(1, 0, 0), "", 1))} {
		if _, err := c.find(place, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A place whose point was removed is gone, and not merely without the name that is looked for.
	if err := os.RemoveAll(g.PointDir(third.ID)); err != nil {
		t.Fatal(err)
	}
	gone := tree.Place{Guest: "110", Point: third.ID, UUID: third.UUID}
	if _, err := c.find(gone, "scsi0.raw"); !errors.Is(err, errGone) {
		t.Errorf("removed point: %v", err)
	}
}
