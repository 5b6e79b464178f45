package fusefs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
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
		nodes, err := c.list(t.Context(), place)
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
	c.guests["110"].current.Load().stamp = stampOf(info) // as if nothing had changed
	list("within the second", 2)
	n, err := c.find(t.Context(), place, string(second.ID))
	if err != nil || n.Place.UUID != second.UUID {
		t.Errorf("by name: %+v, %v", n, err)
	}

	third := g.Add(repotest.Disk{Name: "scsi0"})
	if info, err = os.Lstat(g.Dir); err != nil {
		t.Fatal(err)
	}
	c.guests["110"].current.Load().stamp = stampOf(info)
	now = now.Add(listAge)
	list("after a second", 4)
	if n, err := c.find(t.Context(), place, tree.LatestName); err != nil || n.Target != string(third.ID) {
		t.Errorf("latest is %q, %v", n.Target, err)
	}

	for _, name := range []string{"nope", "20261120T101523Z", string(chain.NewID(start.AddDate(1, 0, 0), "", 1))} {
		if _, err := c.find(t.Context(), place, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A place whose point was removed is gone, and not merely without the name that is looked for.
	if err := os.RemoveAll(g.PointDir(third.ID)); err != nil {
		t.Fatal(err)
	}
	gone := tree.Place{Guest: "110", Point: third.ID, UUID: third.UUID}
	if _, err := c.find(t.Context(), gone, "scsi0.raw"); !errors.Is(err, errGone) {
		t.Errorf("removed point: %v", err)
	}
}

// vanishing is a set that goes out of reach while it is looked at, as a share does that is unmounted: what is below it is a
// directory with nothing in it.
type vanishing struct {
	source.Set
	vanish func()
}

func (v vanishing) Guests() ([]string, error) {
	v.vanish()
	return nil, nil
}

func (v vanishing) Guest(name string) (source.Guest, error) {
	g, err := v.Set.Guest(name)
	return vanishingGuest{g, v.vanish}, err
}

type vanishingGuest struct {
	source.Guest
	vanish func()
}

func (v vanishingGuest) Points() (*source.Points, error) {
	p, err := v.Guest.Points()
	if v.vanish(); err == nil && !v.there() {
		p = &source.Points{Reader: p.Reader}
	}
	return p, err
}

func (v vanishingGuest) there() bool {
	_, err := os.Stat(v.Dir())
	return err == nil
}

// What is not there because the set is not must never pass for missing.
func TestVanishingSet(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)
	dir := filepath.Join(t.TempDir(), "repo")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	g := repotest.NewGuest(t, repotest.New(t, dir), "110", start)
	m := g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	set, err := source.Open(g.Repo.Dir)
	if err != nil {
		t.Fatal(err)
	}
	log, _ := test.NewNullLogger()
	vanishes := true
	c := newCatalog(vanishing{set, func() {
		if vanishes {
			_ = os.Rename(dir, dir+"x")
		}
	}}, log, func() time.Time { return start }) // so what is kept stays young
	for name, look := range map[string]func() error{
		"list of guests": func() error { _, err := c.list(t.Context(), tree.Place{}); return err },
		"list of points": func() error { _, err := c.list(t.Context(), tree.Place{Guest: "110"}); return err },
		"a guest":        func() error { _, err := c.find(t.Context(), tree.Place{Guest: "110"}, string(m.ID)); return err },
		"latest":         func() error { _, err := c.find(t.Context(), tree.Place{Guest: "110"}, tree.LatestName); return err },
		"a point": func() error {
			_, err := c.list(t.Context(), tree.Place{Guest: "110", Point: m.ID, UUID: m.UUID})
			return err
		},
	} {
		_ = os.Rename(dir+"x", dir)
		if err := look(); !errors.Is(err, source.ErrAway) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	} // Nor is it kept.
	_ = os.Rename(dir+"x", dir)
	vanishes = false
	if nodes, err := c.list(t.Context(), tree.Place{Guest: "110"}); err != nil || len(nodes) != 2 {
		t.Errorf("when it is back: %d nodes, %v", len(nodes), err)
	}
}
