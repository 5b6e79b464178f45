package report

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
)

var began = time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)

// usual looks two hours after the fourth point of a repository of repotest's.
var usual = Options{Now: began.Add(5 * time.Hour), MaxAge: 26 * time.Hour, Host: "pve1", Version: "1.0"}

func look(t *testing.T, dir string, o Options) *Report {
	t.Helper()
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	r, err := Look(t.Context(), set, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// fourPoints makes a repository with a guest of four points: a full, an increment, a diff and an increment.
func fourPoints(t *testing.T) (dir string, g *repotest.Guest) {
	t.Helper()
	dir = t.TempDir()
	g = repotest.NewGuest(t, repotest.New(t, dir), "110", began)
	for i := range 4 {
		g.Add(
			repotest.Disk{Name: "scsi0", Size: 1 << 20, Diff: i == 2, Write: repotest.RandomWrites(uint64(i), 4, 1<<20, 10)},
			repotest.Disk{Name: "scsi1", Size: 2 << 20, Diff: i == 2},
		)
	}
	return dir, g
}

func texts(g *Guest) string {
	var all []string
	for _, r := range g.Remarks {
		all = append(all, string(r.State)+": "+r.Text)
	}
	return strings.Join(all, "\n")
}

// Of a sound repository all figures are those of its manifests, and a browser shows as many points.
func TestLook(t *testing.T) {
	t.Parallel()
	dir, made := fourPoints(t)
	repotest.NewGuest(t, made.Repo, "web", began).Add(repotest.Disk{Name: "vda", Size: 1 << 20})
	r := look(t, dir, usual)
	if len(r.Guests) != 2 || r.State != Good || r.Points != 5 || r.Kind != source.Qmchain || r.Set != dir || r.Host != "pve1" || r.MaxAge != 26*3600 {
		t.Fatalf("%+v", r)
	}
	g := r.Guests[0]
	var stored int64
	for i, m := range made.Points {
		p := g.Points[i]
		var bytes int64
		for _, d := range m.Disks {
			bytes += d.Bytes
		}
		stored += bytes
		parents := map[int][]string{0: {}, 1: {string(made.Points[0].ID)}, 2: {string(made.Points[1].ID)}, 3: {string(made.Points[1].ID)}}[i]
		if p.ID != string(m.ID) || !p.Time.Equal(m.Time) || p.Bytes != bytes || p.Level != m.Level() || len(p.Disks) != 2 || len(p.Damage) > 0 || p.Removed || p.Unreadable || fmt.Sprint(p.Parents) != fmt.Sprint(parents) {
			t.Errorf("point %d: %+v", i, p)
		}
	}
	if g.Bytes != stored || g.Size != 3<<20 || g.Last == nil || !g.Last.Equal(made.Points[3].Time) || g.Verified != nil || g.Drilled != nil || len(g.Remarks) > 0 {
		t.Errorf("%+v", g)
	}
	b := browse(t, pageOf(t, r))
	for selector, want := range map[string]int{
		"article": 2, "g.place": 5, "#g-110 g.place": 4, "#g-110 rect.bar": 4, "#g-110 .link": 3, "#g-110 .points tbody tr": 4, ".attention": 0,
		`#g-110 use[href="#n-full"]`: 1, `#g-110 use[href="#n-inc"]`: 2, `#g-110 use[href="#n-diff"]`: 1,
	} {
		if got := b.count(selector); got != want {
			t.Errorf("%d of %s, not %d", got, selector, want)
		}
	}
	b.quiet()

	var again Report
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, &again); diff != "" {
		t.Errorf("JSON loses something: %s", diff)
	}
	if one := look(t, dir, Options{Now: usual.Now, MaxAge: time.Hour, Guests: []string{"web"}}); len(one.Guests) != 1 || one.State != Bad || one.Guests[0].Name != "web" {
		t.Errorf("%+v", one)
	}
}

// What is wrong with a guest is told, of the points that it concerns and of no others.
func TestLookDamage(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		harm    func(t *testing.T, g *repotest.Guest)
		damaged []int // points
		says    string
	}{
		"an image is missing": {
			func(t *testing.T, g *repotest.Guest) { remove(t, g.ImagePath(g.Points[2].ID, "scsi0")) },
			[]int{2},
			"its image 110/images/.* is missing",
		},
		"the full is missing": {
			func(t *testing.T, g *repotest.Guest) { remove(t, g.ImagePath(g.Points[0].ID, "scsi1")) },
			[]int{0, 1, 2, 3},
			"is not whole",
		},
		"an image is cut off": {
			func(t *testing.T, g *repotest.Guest) {
				if err := os.Truncate(g.ImagePath(g.Points[3].ID, "scsi0"), 1000); err != nil {
					t.Fatal(err)
				}
			},
			[]int{3},
			"has 1000 bytes, not ",
		},
		"an image is a link": {
			func(t *testing.T, g *repotest.Guest) {
				remove(t, g.ImagePath(g.Points[3].ID, "scsi0"))
				if err := os.Symlink("/etc/passwd", g.ImagePath(g.Points[3].ID, "scsi0")); err != nil {
					t.Fatal(err)
				}
			},
			[]int{3},
			"is no regular file",
		},
		"a point's folder is missing": {
			func(t *testing.T, g *repotest.Guest) {
				if err := os.RemoveAll(g.PointDir(g.Points[0].ID)); err != nil {
					t.Fatal(err)
				}
			},
			[]int{1, 2, 3},
			"the point 20261120T101523Z-.* that it was made on is missing",
		},
		"a manifest is changed": {
			func(t *testing.T, g *repotest.Guest) {
				repotest.Flip(t, filepath.Join(g.PointDir(g.Points[1].ID), chain.ManifestFile), 60)
			},
			[]int{1, 2, 3},
			"manifest",
		},
		"verify has found it": {
			func(t *testing.T, g *repotest.Guest) {
				checked(t, g, repo.Checked{Verified: []repo.Verified{{Point: g.Points[1].ID, Time: began, Why: "scsi0 (a file)"}}})
			},
			[]int{1, 2, 3},
			"(?s)disk scsi0: verify found on 2026-11-20 10:15 UTC, at 20261120T1.*: scsi0 .a file.\ndisk scsi1: verify found",
		},
		"verify has found it, in the full": {
			func(t *testing.T, g *repotest.Guest) {
				why := "scsi0 (110/images/" + string(g.Points[0].ID) + ".scsi0.qcow2)"
				disks := []repo.DamagedDisk{{Name: "scsi0", Images: []chain.ImageRef{g.Points[0].Ref("scsi0")}}}
				checked(t, g, repo.Checked{Verified: []repo.Verified{{Point: g.Points[3].ID, Time: began, Why: why, Disks: disks}}})
			},
			[]int{0, 1, 2, 3},
			`^(disk scsi0: verify found on .*, at .*: scsi0 \(110/images/.*\n){4}$`,
		},
		"verify has found it, and others of the chain to be good": {
			func(t *testing.T, g *repotest.Guest) {
				checked(t, g, repo.Checked{Verified: []repo.Verified{
					{Point: g.Points[1].ID, Time: began, Why: "scsi0 (a file)"},
					{Point: g.Points[0].ID, Time: began, Good: true},
					{Point: g.Points[3].ID, Time: began.Add(time.Hour), Good: true},
					{Point: g.Points[2].ID, Time: began.Add(-time.Hour), Good: true}, // before
				}})
			},
			[]int{1, 2},
			"verify found on 2026-11-20 10:15 UTC, at ",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, made := fourPoints(t)
			c.harm(t, made)
			r := look(t, dir, usual)
			g := r.Guests[0]
			var damaged []int
			said := ""
			for i, m := range made.Points {
				for _, p := range g.Points {
					if p.ID == string(m.ID) && len(p.Damage) > 0 {
						damaged = append(damaged, i)
						said += strings.Join(p.Damage, "\n") + "\n"
					}
				}
			}
			if fmt.Sprint(damaged) != fmt.Sprint(c.damaged) || !matches(c.says, said) {
				t.Errorf("points %v are damaged: %s", damaged, said)
			}
			if r.State != Bad || !strings.Contains(texts(g), "not whole") {
				t.Errorf("%s: %s", r.State, texts(g))
			}
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func checked(t *testing.T, g *repotest.Guest, c repo.Checked) {
	t.Helper()
	if err := g.NoteChecked(t.Context(), c); err != nil {
		t.Fatal(err)
	}
}

// What was mended is whole, also in points that came later and that nobody has verified yet: as for all others who read points.
func TestLookMended(t *testing.T) {
	t.Parallel()
	dir, made := fourPoints(t)
	mended, good := made.Points[0], made.Points[1]
	disks := []repo.DamagedDisk{{Name: "scsi0", Images: []chain.ImageRef{mended.Ref("scsi0")}}}
	why := "scsi0 (110/images/" + string(mended.ID) + ".scsi0.qcow2)"
	checked(t, made, repo.Checked{Verified: []repo.Verified{{Point: mended.ID, Time: began, Why: why, Disks: disks}}})
	if err := made.Hide(mended.ID); err != nil {
		t.Fatal(err)
	}
	if g := look(t, dir, usual).Guests[0]; g.State != Bad || !strings.Contains(texts(g), "3 of 3 points are not whole") {
		t.Errorf("before: %s", texts(g))
	}
	checked(t, made, repo.Checked{Verified: []repo.Verified{{Point: good.ID, Time: began.Add(time.Hour), Good: true}}})
	if g := look(t, dir, usual).Guests[0]; g.State != Good || len(g.Remarks) > 0 {
		t.Errorf("after: %s: %s: %+v", g.State, texts(g), g.Points)
	}
}

// A removed point that others need is told of as such, also if it can't be read.
func TestLookRemoved(t *testing.T) {
	t.Parallel()
	dir, made := fourPoints(t)
	if err := made.Hide(made.Points[0].ID); err != nil {
		t.Fatal(err)
	}
	r := look(t, dir, usual)
	g := r.Guests[0]
	if len(g.Points) != 4 || !g.Points[0].Removed || g.Points[1].Removed || r.Points != 3 || r.State != Good {
		t.Fatalf("%+v", r)
	}
	if picture := draw(g.Points, r.Created, mostPlaces); len(picture.Places) != 4 || !picture.Places[0].Removed || len(picture.Links) != 3 {
		t.Errorf("%+v", picture)
	}
	base := repo.FolderOf(&chain.Manifest{ID: made.Points[0].ID, Base: true})
	repotest.Flip(t, filepath.Join(made.FolderDir(base), chain.ManifestFile), 60)
	r = look(t, dir, usual)
	g = r.Guests[0]
	if len(g.Points) != 4 || !g.Points[0].Removed || g.Points[0].Time.IsZero() || len(g.Points[1].Damage) == 0 || r.Points != 3 {
		t.Errorf("%+v", g.Points)
	}
}

// What was verified and drilled is told of the point and of its guest, the last of each.
func TestLookChecked(t *testing.T) {
	t.Parallel()
	dir, made := fourPoints(t)
	p := made.Points
	at := func(minutes int) time.Time { return began.Add(time.Duration(minutes) * time.Minute) }
	checked(t, made, repo.Checked{
		Verified: []repo.Verified{{Point: p[0].ID, Time: at(1), Deep: true, Good: true}, {Point: p[1].ID, Time: at(3), Good: true}, {Point: p[2].ID, Time: at(2), Good: true}},
		Drilled:  []repo.Drilled{{Point: p[2].ID, Time: at(4), Why: "no login"}, {Point: p[1].ID, Time: at(5), Passed: true, Why: "a login"}},
	})
	g := look(t, dir, usual).Guests[0]
	if g.Verified == nil || g.Verified.Point != p[1].ID || !g.Verified.Good || g.Drilled == nil || g.Drilled.Point != p[1].ID || !g.Drilled.Passed {
		t.Errorf("%+v, %+v", g.Verified, g.Drilled)
	}
	if v := g.Points[0].Verified; v == nil || !v.Deep || g.Points[3].Verified != nil || g.Points[2].Drilled == nil || g.Points[2].Drilled.Passed {
		t.Errorf("%+v", g.Points)
	}
	if g.State != Good { // a later drill has passed
		t.Errorf("%s: %s", g.State, texts(g))
	}

	// Damage that a deep look has found stays, until another one finds none.
	checked(t, made, repo.Checked{Verified: []repo.Verified{{Point: p[3].ID, Time: at(5), Deep: true, Why: "scsi0", Disks: []repo.DamagedDisk{{Name: "scsi0"}}}}})
	checked(t, made, repo.Checked{Verified: []repo.Verified{{Point: p[3].ID, Time: at(6), Good: true}}})
	if g := look(t, dir, usual).Guests[0]; g.State != Bad || g.Points[3].Verified.Good || len(g.Points[3].Damage) != 1 {
		t.Errorf("%s: %+v", texts(g), g.Points[3])
	}
	checked(t, made, repo.Checked{Verified: []repo.Verified{{Point: p[3].ID, Time: at(7), Deep: true, Good: true}}})
	if g := look(t, dir, usual).Guests[0]; g.State != Good || !g.Points[3].Verified.Good {
		t.Errorf("%s: %+v", texts(g), g.Points[3])
	}

	checked(t, made, repo.Checked{Drilled: []repo.Drilled{{Point: p[3].ID, Time: at(6), Why: "no login"}}})
	if g := look(t, dir, usual).Guests[0]; g.State != Bad || !strings.Contains(texts(g), "the last drill failed: "+string(p[3].ID)+": no login") {
		t.Errorf("%s: %s", g.State, texts(g))
	}
	if err := os.WriteFile(filepath.Join(made.Dir, ".checked.json"), []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	if g := look(t, dir, usual).Guests[0]; g.State != Warning || !strings.Contains(texts(g), "can't be told") {
		t.Errorf("%s: %s", g.State, texts(g))
	}
}

// Guests that nothing is wrong with but that there is no new point.
func TestLookAges(t *testing.T) {
	t.Parallel()
	dir, made := fourPoints(t)
	for _, c := range []struct {
		now   time.Time
		state State
		says  string
	}{
		{made.Points[3].Time.Add(25 * time.Hour), Good, ""},
		{made.Points[3].Time.Add(27 * time.Hour), Bad, "the newest point that is whole is 27 h old, more than 26 h"},
		{made.Points[3].Time.Add(-time.Hour), Warning, "of the future"},
	} {
		g := look(t, dir, Options{Now: c.now, MaxAge: usual.MaxAge}).Guests[0]
		if g.State != c.state || !strings.Contains(texts(g), c.says) {
			t.Errorf("at %s: %s: %s", c.now, g.State, texts(g))
		}
	}
	// A damaged newest point is no success.
	remove(t, made.ImagePath(made.Points[3].ID, "scsi0"))
	if g := look(t, dir, usual).Guests[0]; g.Last == nil || !g.Last.Equal(made.Points[2].Time) {
		t.Errorf("the last is %v", g.Last)
	}
	if _, err := made.Begin("20261120T200000Z-0000"); err != nil {
		t.Fatal(err)
	}
	if g := look(t, dir, usual).Guests[0]; !strings.Contains(texts(g), "a run that began on 2026-11-20 20:00 UTC is under way, or was cut off") {
		t.Errorf("%s", texts(g))
	}
	if err := os.Mkdir(filepath.Join(dir, "120"), 0o700); err != nil {
		t.Fatal(err)
	}
	r := look(t, dir, usual)
	if g := r.Guests[1]; g.State != Bad || g.Last != nil || !strings.Contains(texts(g), "no point") {
		t.Errorf("an empty guest: %+v", g)
	}
	pageOf(t, r)
}

// What can't be read just now is no damage, nor is what was made on it.
func TestLookUnreadable(t *testing.T) {
	t.Parallel()
	dir, made := fourPoints(t)
	manifest := filepath.Join(made.PointDir(made.Points[1].ID), chain.ManifestFile)
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	newer := bytes.Replace(text, []byte(`"format": 1`), []byte(`"format": 9`), 1)
	if err := os.WriteFile(manifest, newer, 0o600); err != nil {
		t.Fatal(err)
	}
	r := look(t, dir, usual)
	g := r.Guests[0]
	for i, unreadable := range []bool{false, true, true, true} {
		if p := g.Points[i]; p.Unreadable != unreadable || len(p.Damage) > 0 {
			t.Errorf("point %d: %+v", i, p)
		}
	}
	if g.State != Bad || !g.Unreadable || strings.Count(texts(g), "can't be read just now") != 1 || !g.Last.Equal(made.Points[0].Time) {
		t.Errorf("%+v", g)
	}
}

// A point that is removed while it is looked at is not missing, and nothing is told twice.
func TestLookAgain(t *testing.T) {
	t.Parallel()
	dir, made := fourPoints(t)
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	last := made.Points[3].ID
	r, err := Look(t.Context(), removing{set, func() {
		for _, d := range []string{"scsi0", "scsi1"} {
			remove(t, made.ImagePath(last, d))
		}
	}, func() {
		if err := os.RemoveAll(made.PointDir(last)); err != nil {
			t.Fatal(err)
		}
	}}, usual)
	if err != nil {
		t.Fatal(err)
	}
	if g := r.Guests[0]; len(g.Points) != 3 || g.State != Good || len(g.Remarks) > 0 {
		t.Errorf("%d points, %s", len(g.Points), texts(g))
	}
}

// removing is a set of which a point goes: part of it after the first look, and the rest of it after that.
type removing struct {
	source.Set
	first, second func()
}

func (s removing) Guest(name string) (source.Guest, error) {
	g, err := s.Set.Guest(name)
	return &removingGuest{Guest: g, steps: []func(){s.first, s.second}}, err
}

type removingGuest struct {
	source.Guest
	steps []func()
}

func (g *removingGuest) Points() (*source.Points, error) {
	if len(g.steps) == 1 {
		g.steps[0]()
		g.steps = nil
	}
	p, err := g.Guest.Points()
	if len(g.steps) == 2 {
		g.steps[0]()
		g.steps = g.steps[1:]
	}
	return p, err
}

func TestLookErrors(t *testing.T) {
	t.Parallel()
	dir, _ := fourPoints(t)
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if _, err := Look(t.Context(), set, Options{Now: usual.Now, Guests: []string{"nobody"}}); !errors.Is(err, chain.ErrNoPoint) {
		t.Errorf("no such guest: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Look(cancelled, set, usual); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	r := look(t, dir, usual)
	if err := r.Page(full{}); err == nil || !strings.Contains(err.Error(), "page") {
		t.Errorf("a full disk: %v", err)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space left") }

// Others' sets are reported as far as they are understood.
func TestLookForeign(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"qmpbackup/f-drive-style", "virtnbdbackup/v1-chain"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			r := look(t, filepath.Join(foreigntest.Unpack(t, path+"/"), path), usual)
			kind, _, _ := strings.Cut(path, "/")
			if string(r.Kind) != kind || len(r.Guests) != 1 || r.Points == 0 || r.Bytes == 0 || r.Guests[0].Size == 0 {
				t.Fatalf("%+v", r)
			}
			if page := pageOf(t, r); !bytes.Contains(page, []byte("Backups of "+kind)) {
				t.Error("the page does not say whose they are")
			}
		})
	}
}
