package repo_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
)

// TestDamaged takes records as verify writes them, and tells which disks of which points they cost.
func TestDamaged(t *testing.T) {
	t.Parallel()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", checkedAt.Add(-24*time.Hour))
	for range 4 {
		g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20}, repotest.Disk{Name: "scsi1", Size: 1 << 20})
	}
	g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20, Full: true}, repotest.Disk{Name: "scsi1"})
	at := func(minutes int) time.Time { return checkedAt.Add(time.Duration(minutes) * time.Minute) }
	good := func(minutes, point int) repo.Verified {
		return repo.Verified{Point: g.Points[point].ID, Time: at(minutes), Tables: true, Good: true}
	}
	// bad is scsi0 of a point, because of those of others.
	bad := func(minutes, point int, of ...int) repo.Verified {
		d := repo.DamagedDisk{Name: "scsi0"}
		for _, i := range of {
			d.Images = append(d.Images, g.Points[i].Ref("scsi0"))
		}
		return repo.Verified{Point: g.Points[point].ID, Time: at(minutes), Tables: true, Why: fmt.Sprint("at ", minutes), Disks: []repo.DamagedDisk{d}}
	}
	deep := func(v repo.Verified) repo.Verified { v.Deep = true; return v }
	unsaid := func(v repo.Verified) repo.Verified { v.Disks = nil; return v }

	for name, test := range map[string]struct {
		found []repo.Verified
		want  []string // the point, the disk, and when what is told was found
	}{
		"nothing":                       {nil, nil},
		"good":                          {[]repo.Verified{good(0, 0)}, nil},
		"the full, and all is verified": {[]repo.Verified{bad(0, 0, 0), bad(0, 1, 0), bad(0, 2, 0), bad(0, 3, 0), good(0, 4)}, []string{"0 scsi0 0", "1 scsi0 0", "2 scsi0 0", "3 scsi0 0"}},
		"points that came later":        {[]repo.Verified{bad(0, 1, 1)}, []string{"1 scsi0 0", "2 scsi0 0", "3 scsi0 0"}},
		"an image below":                {[]repo.Verified{bad(0, 2, 1)}, []string{"1 scsi0 0", "2 scsi0 0", "3 scsi0 0"}},
		"disks that are not named":      {[]repo.Verified{unsaid(bad(0, 2))}, []string{"2 scsi0 0", "2 scsi1 0", "3 scsi0 0", "3 scsi1 0", "4 scsi1 0"}},
		"good since, higher up":         {[]repo.Verified{bad(0, 0, 0), good(1, 2)}, []string{"0 scsi0 0", "1 scsi0 0"}},
		"good since, but below":         {[]repo.Verified{bad(0, 1, 1), good(1, 0)}, []string{"1 scsi0 0", "2 scsi0 0", "3 scsi0 0"}},
		"good before":                   {[]repo.Verified{bad(1, 1, 1), good(0, 2)}, []string{"1 scsi0 1", "2 scsi0 1", "3 scsi0 1"}},
		"good at the same moment":       {[]repo.Verified{bad(0, 1, 1), good(0, 2)}, []string{"1 scsi0 0"}},
		"its images are not named":      {[]repo.Verified{bad(0, 0, 0), bad(0, 1), bad(0, 2)}, []string{"0 scsi0 0", "1 scsi0 0", "2 scsi0 0", "3 scsi0 0"}},
		"good since, less thoroughly":   {[]repo.Verified{deep(bad(0, 1, 1)), good(1, 1)}, []string{"1 scsi0 0", "2 scsi0 0", "3 scsi0 0"}},
		"good since, more thoroughly":   {[]repo.Verified{bad(0, 1, 1), deep(good(1, 1))}, nil},
		"two looks":                     {[]repo.Verified{deep(bad(0, 1, 1)), bad(2, 2, 2), good(3, 2)}, []string{"1 scsi0 0", "2 scsi0 0", "3 scsi0 0"}},
		"the newer of two":              {[]repo.Verified{bad(0, 1, 1), bad(2, 2, 2)}, []string{"1 scsi0 0", "2 scsi0 2", "3 scsi0 2"}},
		"a point that is not there":     {[]repo.Verified{{Point: "20200101T000000Z-0000", Time: at(0), Why: "gone"}}, nil},
	} {
		c := &repo.Checked{Verified: test.found}
		var got []string
		for ref, v := range c.Damaged(g.Points) {
			i := slices.IndexFunc(g.Points, func(m *chain.Manifest) bool { return m.ID == ref.Point && m.UUID == ref.UUID })
			got = append(got, fmt.Sprintf("%d %s %d", i, ref.Disk, int(v.Time.Sub(checkedAt).Minutes())))
		}
		slices.Sort(got)
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: (-want +got):\n%s", name, diff)
		}
	}
}

// Whatever the file is, what is not understood is an error, and bounded.
func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	path := filepath.Join(g.Dir, ".checked.json")
	found := repo.Verified{Point: g.Points[0].ID, Time: checkedAt, Why: "a\x1b[2J" + strings.Repeat("ü", 1<<10)}
	if err := g.NoteChecked(t.Context(), repo.Checked{Verified: []repo.Verified{found}}); err != nil {
		t.Fatal(err)
	}
	damaged, err := g.Damaged(g.Points)
	if err != nil || len(damaged) != 2 {
		t.Fatal(damaged, err)
	}
	text := damaged[g.Points[1].Ref("scsi0")].Err()
	if !errors.Is(text, chain.ErrDamaged) || len(text.Error()) > 400 || strings.ContainsRune(text.Error(), 0x1b) {
		t.Errorf("%q", text)
	}
	for _, text := range []string{"", "{", `{"format":1,"verified":"x"}`, `{"format":99}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if damaged, err := g.Damaged(g.Points); err == nil || len(damaged) > 0 {
			t.Errorf("%q: %v, %v", text, damaged, err)
		}
	}
	if err := os.Truncate(path, 17<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Damaged(g.Points); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("a record that is too large: %v", err)
	}
}

// A point that was removed is forgotten, but not its damage while points that are kept are read through it.
func TestDamagedBase(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	base, kept := g.Points[0], g.Points[1]
	found := repo.Verified{Point: base.ID, Time: checkedAt, Why: "scsi0", Disks: []repo.DamagedDisk{{Name: "scsi0", Images: []chain.ImageRef{base.Ref("scsi0")}}}}
	note := func(found repo.Checked) repo.Damaged {
		t.Helper()
		if err := g.NoteChecked(t.Context(), found); err != nil {
			t.Fatal(err)
		}
		points, _, err := g.Guest.Points()
		if err != nil {
			t.Fatal(err)
		}
		damaged, err := g.Damaged(points)
		if err != nil {
			t.Fatal(err)
		}
		return damaged
	}
	note(repo.Checked{Verified: []repo.Verified{found}})
	if err := g.Hide(base.ID); err != nil {
		t.Fatal(err)
	}
	drilled := repo.Checked{Drilled: []repo.Drilled{{Point: kept.ID, Time: checkedAt, Passed: true}}}
	if damaged := note(drilled); damaged[kept.Ref("scsi0")].Why != "scsi0" {
		t.Errorf("forgotten: %v", damaged)
	}
	if damaged := note(repo.Checked{Verified: []repo.Verified{{Point: kept.ID, Time: checkedAt.Add(time.Minute), Good: true}}}); len(damaged) != 1 {
		t.Errorf("all but the base is good since: %v", damaged)
	}
}

// That an image was found damaged through a point which has gone since is not forgotten, as long as the image's own is there.
func TestDamagedThroughGonePoint(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	full, gone := g.Points[0], g.Points[1]
	found := repo.Verified{Point: gone.ID, Time: checkedAt, Why: "scsi0", Disks: []repo.DamagedDisk{{Name: "scsi0", Images: []chain.ImageRef{full.Ref("scsi0")}}}}
	if err := g.NoteChecked(t.Context(), repo.Checked{Verified: []repo.Verified{found}}); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(g.PointDir(gone.ID)); err != nil {
		t.Fatal(err)
	}
	drilled := repo.Checked{Drilled: []repo.Drilled{{Point: full.ID, Time: checkedAt, Passed: true}}}
	if err := g.NoteChecked(t.Context(), drilled); err != nil {
		t.Fatal(err)
	}
	damaged, err := g.Damaged(g.Points[:1])
	if _, ok := damaged[full.Ref("scsi0")]; !ok || err != nil {
		t.Errorf("forgotten: %v, %v", damaged, err)
	}
	if err := os.RemoveAll(g.PointDir(full.ID)); err != nil {
		t.Fatal(err)
	}
	next := g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20, Full: true})
	drilled.Drilled[0].Point = next.ID
	if err := g.NoteChecked(t.Context(), drilled); err != nil {
		t.Fatal(err)
	}
	wantChecked(t, g.Guest, repo.Checked{Verified: []repo.Verified{}, Drilled: drilled.Drilled})
}
