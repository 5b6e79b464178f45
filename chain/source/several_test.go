package source_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Sets beside each other in a folder are one, as long as they are there.
func TestSeveral(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in := func(name ...string) string { return filepath.Join(append([]string{dir}, name...)...) }
	must(t, os.MkdirAll(in("lost+found", "deeper"), 0o700))
	if _, err := source.OpenAll(dir); !errors.Is(err, repo.ErrNotRepository) {
		t.Fatalf("a folder without sets: %v", err)
	}

	own, g := repository(t)
	must(t, os.Rename(own, in("repo")))
	const a = "qmpbackup/a-default"
	foreignSet := func(prefix, name string) {
		must(t, os.Rename(filepath.Join(foreigntest.Unpack(t, prefix+"/"), prefix), in(name)))
	}
	foreignSet(a, "alpha")
	must(t, os.Symlink(own, in("link"))) // not followed
	must(t, os.Rename(filepath.Join(foreigntest.Unpack(t, a+"/"), a), in(".hidden")))

	set, err := source.OpenAll(dir)
	must(t, err)
	t.Cleanup(func() { _ = set.Close() })
	guests := func(want ...string) {
		t.Helper()
		names, err := set.Guests()
		if err != nil || !slices.Equal(names, want) {
			t.Fatalf("guests %q, %v; want %q", names, err, want)
		}
	}
	guests("110", "alpha", "web")
	if set.Kind() != source.Several || set.Dir() != dir {
		t.Errorf("%s, %s", set.Kind(), set.Dir())
	}
	if one, err := source.OpenAll(in("repo")); err != nil || one.Kind() != source.Qmchain {
		t.Errorf("a repository: %v, %v", one, err)
	}

	from, points := look(t, set, "110")
	if from.Set().Kind() != source.Qmchain || !slices.EqualFunc(points.All, g.Points, func(a, b *chain.Manifest) bool { return a.ID == b.ID }) {
		t.Errorf("110 is of %s and has %d points", from.Set().Kind(), len(points.All))
	}
	before := read(t, points, points.All[1], "scsi0")
	if from, points := look(t, set, "alpha"); from.Set().Kind() != source.Qmpbackup || len(points.All) == 0 {
		t.Errorf("alpha is of %s and has %d points", from.Set().Kind(), len(points.All))
	}

	// One more that has a guest of the same name, and it goes again.
	must(t, os.Rename(in(".hidden"), in("hidden")))
	must(t, os.Mkdir(in("second"), 0o700))
	again, _ := repository(t)
	must(t, os.Rename(again, in("third")))
	guests("alpha", "hidden", "repo.110", "repo.web", "third.110", "third.web")
	if g, _ := look(t, set, "third.110"); g.Name() != "third.110" || g.Dir() != in("third", "110") {
		t.Errorf("%s in %s", g.Name(), g.Dir())
	}
	if _, err := set.Guest("110"); !errors.Is(err, chain.ErrNoPoint) {
		t.Errorf("a name that two have: %v", err)
	}
	must(t, os.RemoveAll(in("third")))
	guests("110", "alpha", "hidden", "web")

	// The place of one is there, and it is not, as where a share is unmounted: its guests stay, and can't be read.
	must(t, os.Rename(in("repo"), in(".away")))
	must(t, os.Mkdir(in("repo"), 0o700))
	guests("110", "alpha", "hidden", "web")
	if _, err := set.Guest("110"); !errors.Is(err, source.ErrAway) {
		t.Errorf("guest of a set that is away: %v", err)
	}
	look(t, set, "alpha")
	must(t, os.Remove(in("repo")))
	must(t, os.Rename(in(".away"), in("repo")))
	_, points = look(t, set, "110")
	if after := read(t, points, points.All[1], "scsi0"); !slices.Equal(before, after) {
		t.Error("a disk has other content when its set is back")
	}

	must(t, os.RemoveAll(in("alpha")))
	guests("110", "hidden", "web")
}

// No guest passes for another one, and no set for another: names that would be the same, a set that takes another's place, and
// one that can't be opened are errors.
func TestSeveralThatClash(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in := func(name ...string) string { return filepath.Join(append([]string{dir}, name...)...) }
	mk := func(folder string, guests ...string) {
		must(t, os.Mkdir(in(folder), 0o700))
		r := repotest.New(t, in(folder))
		for _, g := range guests {
			repotest.NewGuest(t, r, g, time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)).Add(repotest.Disk{Name: "vda", Size: size})
		}
	}
	mk("x", "110")
	mk("y", "110")
	mk("z", "x.110", "web")
	set, err := source.OpenAll(dir)
	must(t, err)
	t.Cleanup(func() { _ = set.Close() })
	for range 20 { // maps have no order
		names, err := set.Guests()
		if err != nil || !slices.Equal(names, []string{"web", "x.110", "y.110"}) {
			t.Fatalf("guests %q, %v", names, err)
		}
		if _, err := set.Guest("x.110"); !errors.Is(err, source.ErrAway) || !strings.Contains(err.Error(), "same name") {
			t.Fatalf("a name of two: %v", err)
		}
	}
	look(t, set, "y.110")

	must(t, os.Rename(in("y"), in(".y")))
	mk("y", "110", "other")
	for _, name := range []string{"y.110", "other"} {
		if _, err := set.Guest(name); err == nil {
			t.Errorf("%s is of a repository that has taken another's place", name)
		}
	}
	must(t, os.RemoveAll(in("y")))
	must(t, os.Rename(in(".y"), in("y")))
	look(t, set, "y.110")

	mk("new", "120")
	head := in("new", "qmchain.json")
	text, err := os.ReadFile(head)
	must(t, err)
	must(t, os.WriteFile(head, bytes.Replace(text, []byte(`"format": 1`), []byte(`"format": 99`), 1), 0o600))
	if names, err := set.Guests(); err != nil || !slices.Contains(names, "new") {
		t.Errorf("a set that can't be opened is not shown: %q, %v", names, err)
	}
	if _, err := set.Guest("new"); !errors.Is(err, source.ErrAway) || !strings.Contains(err.Error(), "99") {
		t.Errorf("a set that can't be opened: %v", err)
	}
	alone := t.TempDir()
	must(t, os.Rename(in("new"), filepath.Join(alone, "new")))
	if _, err := source.OpenAll(alone); err == nil || errors.Is(err, repo.ErrNotRepository) {
		t.Errorf("alone: %v", err)
	}
}
