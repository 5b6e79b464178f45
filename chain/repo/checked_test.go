package repo_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/internal/durable"
)

var checkedAt = time.Date(2026, 11, 21, 3, 0, 0, 0, time.UTC)

// checkedGuest has two points.
func checkedGuest(t *testing.T) *repotest.Guest {
	t.Helper()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", checkedAt.Add(-24*time.Hour))
	g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	g.Add(repotest.Disk{Name: "scsi0"})
	return g
}

func wantChecked(t *testing.T, g *repo.Guest, want repo.Checked) {
	t.Helper()
	got, err := g.Checked()
	if err != nil {
		t.Fatal(err)
	}
	want.Format = 1
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Errorf("recorded (-want +got):\n%s", diff)
	}
}

func TestChecked(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	a, b := g.Points[0].ID, g.Points[1].ID
	wantChecked(t, g.Guest, repo.Checked{})
	note := func(found repo.Checked) {
		t.Helper()
		if err := g.NoteChecked(t.Context(), found); err != nil {
			t.Fatal(err)
		}
	}
	note(repo.Checked{})
	if _, err := os.Stat(filepath.Join(g.Dir, ".checked.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing was found, and yet it is recorded: %v", err)
	}

	deepBad := repo.Verified{Point: a, Time: checkedAt, Tables: true, Deep: true, Why: "scsi0"}
	drill := repo.Drilled{Point: b, Time: checkedAt, Passed: true, Why: "login", Seconds: 12.5}
	note(repo.Checked{Verified: []repo.Verified{deepBad}, Drilled: []repo.Drilled{drill}})
	wantChecked(t, g.Guest, repo.Checked{Verified: []repo.Verified{deepBad}, Drilled: []repo.Drilled{drill}})

	// A look that does not go as far does not take back what a deeper one has found, whenever that was.
	shallow := repo.Verified{Point: a, Time: checkedAt.Add(time.Hour), Tables: true, Good: true}
	bare := repo.Verified{Point: b, Time: checkedAt.Add(time.Hour), Good: true}
	note(repo.Checked{Verified: []repo.Verified{shallow, bare}})
	wantChecked(t, g.Guest, repo.Checked{Verified: []repo.Verified{deepBad, shallow, bare}, Drilled: []repo.Drilled{drill}})

	deepGood := repo.Verified{Point: a, Time: checkedAt.Add(2 * time.Hour), Tables: true, Deep: true, Good: true}
	failed := repo.Drilled{Point: b, Time: checkedAt.Add(2 * time.Hour), Why: "no login"}
	gone := repo.Verified{Point: "20200101T000000Z-0000", Time: checkedAt, Good: true}
	note(repo.Checked{Verified: []repo.Verified{deepGood, gone}, Drilled: []repo.Drilled{failed}})
	wantChecked(t, g.Guest, repo.Checked{Verified: []repo.Verified{deepGood, bare}, Drilled: []repo.Drilled{failed}})

	// Of what is removed while others still need its images it stays known that these were found good, which says something of them.
	if err := g.Hide(a); err != nil {
		t.Fatal(err)
	}
	note(repo.Checked{Drilled: []repo.Drilled{drill}})
	wantChecked(t, g.Guest, repo.Checked{Verified: []repo.Verified{deepGood, bare}, Drilled: []repo.Drilled{drill}})

	info, err := os.Stat(filepath.Join(g.Dir, ".checked.json"))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info, err)
	}
	if points, problems, err := g.Guest.Points(); err != nil || len(points) != 2 || len(problems) > 0 {
		t.Errorf("the points are others now: %v %v %v", points, problems, err)
	}
	if strays, err := g.Strays(); err != nil || len(strays) > 0 {
		t.Errorf("strays %v, %v", strays, err)
	}
}

// Two looks at a point at the same time: what the one says that began later counts, whichever ends first.
func TestCheckedLate(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	early := repo.Verified{Point: g.Points[0].ID, Time: checkedAt, Tables: true, Deep: true, Good: true}
	late := repo.Verified{Point: g.Points[0].ID, Time: checkedAt.Add(time.Minute), Why: "scsi0"}
	later := late
	later.Time, later.Good, later.Why = checkedAt.Add(time.Hour), true, ""
	for _, step := range []struct{ note, want []repo.Verified }{
		{[]repo.Verified{late}, []repo.Verified{late}},
		{[]repo.Verified{early}, []repo.Verified{late, early}}, // it went further, but saw less of what was changed since
		{[]repo.Verified{later}, []repo.Verified{early, later}},
		{[]repo.Verified{late}, []repo.Verified{early, later}},
	} {
		if err := g.NoteChecked(t.Context(), repo.Checked{Verified: step.note}); err != nil {
			t.Fatal(err)
		}
		wantChecked(t, g.Guest, repo.Checked{Verified: step.want, Drilled: []repo.Drilled{}})
		if damaged, err := g.Damaged(g.Points); err != nil || (len(damaged) > 0) != slices.ContainsFunc(step.want, func(v repo.Verified) bool { return !v.Good }) {
			t.Errorf("damaged %v, %v", damaged, err)
		}
	}
}

// What could not be read again is not written: the record stays as it was.
func TestCheckedTooLarge(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	v := repo.Verified{Point: g.Points[1].ID, Time: checkedAt, Why: strings.Repeat("ü", 1<<20), Disks: []repo.DamagedDisk{{Name: "scsi0"}}}
	note := func() error { return g.NoteChecked(t.Context(), repo.Checked{Verified: []repo.Verified{v}}) }
	if err := note(); err != nil {
		t.Fatal(err)
	}
	c, err := g.Checked()
	if err != nil || len(c.Verified) != 1 || len(c.Verified[0].Why) > 1100 || !strings.HasPrefix(c.Verified[0].Why, "üüü") {
		t.Fatalf("%.2000v, %v", c, err)
	}
	v.Time, v.Disks[0].Images = checkedAt.Add(time.Hour), slices.Repeat([]chain.ImageRef{g.Points[0].Ref("scsi0")}, 200_000)
	if err := note(); err == nil || errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), "more than the") {
		t.Errorf("too large: %v", err)
	}
	wantChecked(t, g.Guest, repo.Checked{Verified: c.Verified, Drilled: []repo.Drilled{}})
}

// Those who check at the same time lose nothing of one another's.
func TestCheckedAtOnce(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	var wg sync.WaitGroup
	for i, id := range []chain.ID{g.Points[0].ID, g.Points[1].ID, g.Points[0].ID, g.Points[1].ID} {
		wg.Go(func() {
			found := repo.Checked{Verified: []repo.Verified{{Point: id, Time: checkedAt, Good: true}}}
			if i > 1 {
				found = repo.Checked{Drilled: []repo.Drilled{{Point: id, Time: checkedAt, Passed: true}}}
			}
			if err := g.NoteChecked(t.Context(), found); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if c, err := g.Checked(); err != nil || len(c.Verified) != 2 || len(c.Drilled) != 2 {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestCheckedRefused(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	path := filepath.Join(g.Dir, ".checked.json")
	found := repo.Checked{Drilled: []repo.Drilled{{Point: g.Points[0].ID, Time: checkedAt, Passed: true}}}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	write("{")
	if _, err := g.Checked(); !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), "guest 110") {
		t.Errorf("damaged: %v", err)
	}
	if err := g.NoteChecked(t.Context(), found); err != nil {
		t.Errorf("a damaged record is begun anew: %v", err)
	}
	wantChecked(t, g.Guest, repo.Checked{Verified: []repo.Verified{}, Drilled: found.Drilled})

	newer := `{"format": 2, "drilled": []}`
	write(newer)
	if _, err := g.Checked(); err == nil || errors.Is(err, chain.ErrDamaged) {
		t.Errorf("newer: %v", err)
	}
	if err := g.NoteChecked(t.Context(), found); err == nil {
		t.Error("a newer version's record was written over")
	}
	if text, _ := os.ReadFile(path); string(text) != newer {
		t.Errorf("it is %s now", text)
	}

	if err := errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)); err != nil {
		t.Fatal(err)
	}
	if err := g.NoteChecked(t.Context(), found); err == nil {
		t.Error("a link was followed or replaced")
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.NoteChecked(cancelled, found); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A writer that is killed before any step leaves the old record or the new one, and nothing that stays.
func TestCheckedCutOff(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	cut := errors.New("cut off")
	note := func(passed bool, before func(op, path string) error) error {
		r, err := repo.Open(g.Repo.Dir, durable.FS{Before: before})
		if err != nil {
			t.Fatal(err)
		}
		guest, err := r.Guest("110")
		if err != nil {
			t.Fatal(err)
		}
		return guest.NoteChecked(t.Context(), repo.Checked{Drilled: []repo.Drilled{{Point: g.Points[0].ID, Time: checkedAt, Passed: passed}}})
	}
	if err := note(false, nil); err != nil {
		t.Fatal(err)
	}
	for at := 1; ; at++ {
		steps := 0
		err := note(true, func(string, string) error {
			if steps++; steps == at {
				return cut
			}
			return nil
		})
		c, readErr := g.Checked()
		if readErr != nil || len(c.Drilled) != 1 {
			t.Fatalf("before step %d: %+v, %v", at, c, readErr)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, cut) {
			t.Fatalf("before step %d: %v", at, err)
		}
		if text, err := json.Marshal(c); err != nil || at <= 4 && strings.Contains(string(text), "true") {
			t.Fatalf("before step %d it is %s, %v", at, text, err)
		}
	}
	left := filepath.Join(g.Dir, ".tmp-.checked.json-123")
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := note(true, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a killed one has left is still there: %v", err)
	}
}
