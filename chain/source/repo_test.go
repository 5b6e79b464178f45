package source

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
)

// Who asks for one guest of many opens no other's files, and each manifest once. What is known is bounded, however many are
// asked for.
func TestManyGuests(t *testing.T) {
	t.Parallel()
	const guests, points = 8, 50
	dir := t.TempDir()
	set := newRepoSet(repotest.Many{
		Guests: guests, Points: points, Disks: 1, Size: 1 << 20, Name: func(i int) string { return fmt.Sprint(110 + i) },
		Start: time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC), Every: time.Hour,
	}.Make(t, dir))
	set.maxKnown = 3 * points
	opened := repotest.Watch(t, dir)
	names, err := set.Guests()
	if err != nil || len(names) != guests {
		t.Fatalf("%v, %v", names, err)
	}
	if files := opened(); len(files) > 0 {
		t.Errorf("to list guests, %v were opened", slices.Collect(maps.Keys(files)))
	}
	look := func(name string, reads int) {
		t.Helper()
		g, err := set.Guest(name)
		if err != nil {
			t.Fatal(err)
		}
		p, err := g.Points()
		if err != nil || len(p.All) != points || len(p.Problems) > 0 {
			t.Fatalf("guest %s: %d points, %v, %v", name, len(p.All), p.Problems, err)
		}
		files := opened()
		for file, n := range files {
			if n != 1 || !strings.HasPrefix(file, name+"/") || filepath.Base(file) != chain.ManifestFile {
				t.Errorf("guest %s: %s was opened %d times", name, file, n)
			}
		}
		if len(files) != reads {
			t.Errorf("guest %s: %d files were opened, not %d", name, len(files), reads)
		}
	}
	look("110", points)
	look("110", 0)
	look("111", points)
	look("112", points)
	look("110", 0) // and so it is the one that was looked at last
	look("113", points)
	look("110", 0)
	look("112", 0)
	look("111", points) // which was forgotten
	for _, name := range names {
		g, err := set.Guest(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := g.Points(); err != nil {
			t.Fatal(err)
		}
	}
	known := 0
	for _, g := range set.guests {
		if k := g.known.Load(); k != nil {
			known += k.Len()
		}
	}
	if known != set.maxKnown {
		t.Errorf("%d manifests are known, not %d", known, set.maxKnown)
	}
	// One that has more than may be known is known all the same.
	set.maxKnown = points - 1
	opened()
	look(names[0], points)
	look(names[0], 0)
}
