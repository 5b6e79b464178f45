package repo_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
)

var many = repotest.Many{
	Guests: 1, Points: 120, Disks: 1, Size: 1 << 20, Name: func(i int) string { return fmt.Sprint(110 + i) },
	Start: time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC), Every: time.Hour,
}

func makeMany(t *testing.T, m repotest.Many) *repo.Guest {
	t.Helper()
	g, err := m.Make(t, t.TempDir()).Guest(m.Name(0))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// What makes many points quickly makes those that a backup would.
func TestMany(t *testing.T) {
	t.Parallel()
	few := many
	few.Points, few.Disks = 3, 2
	g := makeMany(t, few)
	points, problems, err := g.Points()
	if err != nil || len(problems) > 0 || len(points) != few.Points {
		t.Fatalf("%d points, %v, %v", len(points), problems, err)
	}
	for i, m := range points {
		for _, d := range m.Disks {
			if err := g.CheckImages(points, m, d.Name); err != nil {
				t.Error(err)
			}
			if err := g.CheckSums(t.Context(), m, d.Name); err != nil {
				t.Error(err)
			}
			repotest.Convert(t, g.ImagePath(m.ID, d.Name), filepath.Join(t.TempDir(), "raw"))
			if layers, err := points.Layers(m, d.Name); err != nil || len(layers) != i+1 {
				t.Errorf("%s: %d layers, %v", m.ID, len(layers), err)
			}
		}
	}
}

// Each look reads what is new or has changed, and opens nothing else.
func TestLookReadsOnce(t *testing.T) {
	t.Parallel()
	g := makeMany(t, many)
	opened := repotest.Watch(t, g.Dir)
	var known repo.Known
	look := func(what string, reads int, problems int) chain.Points {
		t.Helper()
		points, bad, err := g.Look(&known)
		if err != nil || len(points)+len(bad) != many.Points || len(bad) != problems {
			t.Fatalf("%s: %d points, %v, %v", what, len(points), bad, err)
		}
		files := opened()
		for name, n := range files {
			if filepath.Base(name) != chain.ManifestFile || n != 1 {
				t.Errorf("%s: %s was opened %d times", what, name, n)
			}
		}
		if len(files) != reads {
			t.Errorf("%s: %d files were opened, not %d", what, len(files), reads)
		}
		return points
	}
	first := look("first", many.Points, 0)
	second := look("second", 0, 0)
	for i := range first {
		if first[i] != second[i] {
			t.Fatalf("%s was made twice", first[i].ID)
		}
	}
	manifest := filepath.Join(g.PointDir(first[7].ID), chain.ManifestFile)
	repotest.Flip(t, manifest, 40)
	opened()
	look("one is damaged", 1, 1)
	look("and looked at again", 0, 1)
	repotest.Flip(t, manifest, 40)
	opened()
	look("it is as before", 1, 0)
	if known.Len() != many.Points {
		t.Errorf("%d points are known", known.Len())
	}
}

// While points become bases and bases go, who looks finds each point that stays, and no fault.
func TestPointsWhileTheyGo(t *testing.T) {
	t.Parallel()
	g := makeMany(t, many)
	all, _, err := g.Points()
	if err != nil {
		t.Fatal(err)
	}
	const stays = 60
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			var known repo.Known
			for last := false; !last; {
				select {
				case <-done:
					last = true
				default:
				}
				points, problems, err := g.Look(&known)
				if err != nil || len(problems) > 0 {
					t.Errorf("%v, %v", problems, err)
				}
				for _, m := range all[stays:] {
					if found := points.Find(m.ID); found == nil || found.UUID != m.UUID || found.Base {
						t.Errorf("%s is missing, or is %+v", m.ID, found)
						return
					}
				}
				if last && len(points) != many.Points-stays {
					t.Errorf("%d points are left", len(points))
				}
			}
		})
	}
	for _, m := range all[:stays] {
		if err := errors.Join(g.Hide(m.ID), g.DropBase(m.ID)); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
}

// What is wrong with manifests is said as before they were read several at a time: of which point, and what.
func TestPointsProblems(t *testing.T) {
	t.Parallel()
	few := many
	few.Points = 4
	g := makeMany(t, few)
	points, _, err := g.Points()
	if err != nil {
		t.Fatal(err)
	}
	// Copied to another's place, and gone.
	manifest := func(i int) string { return filepath.Join(g.PointDir(points[i].ID), chain.ManifestFile) }
	text, err := os.ReadFile(manifest(0))
	if err := errors.Join(err, os.WriteFile(manifest(1), text, 0o600), os.Remove(manifest(2))); err != nil {
		t.Fatal(err)
	}
	left, problems, err := g.Points()
	if err != nil || len(left) != 2 || len(problems) != 2 {
		t.Fatalf("%d points, %v, %v", len(left), problems, err)
	}
	for i, says := range []string{"its manifest is that of 110/" + string(points[0].ID), "no such file"} {
		p := problems[i]
		if p.Point != string(points[1+i].ID) || !errors.Is(p.Err, chain.ErrDamaged) || !strings.Contains(p.Err.Error(), says) {
			t.Errorf("%s: %v", p.Point, p.Err)
		}
	}
	if _, err := left.Layers(left[1], "scsi0"); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("made on what is damaged: %v", err)
	}
}
