package source_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
)

func open(t testing.TB, dir string) source.Set {
	t.Helper()
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = set.Close() })
	return set
}

func look(t testing.TB, set source.Set, guest string) (source.Guest, *source.Points) {
	t.Helper()
	g, err := set.Guest(guest)
	if err != nil {
		t.Fatal(err)
	}
	p, err := g.Points()
	if err != nil {
		t.Fatal(err)
	}
	return g, p
}

func read(t testing.TB, p *source.Points, m *chain.Manifest, disk string) []byte {
	t.Helper()
	img, err := p.OpenDisk(image.NewPool(image.PoolOptions{}), m, disk)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	b, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const size = 1 << 20

// repository makes one with two guests, and returns the points of the first.
func repository(t testing.TB) (dir string, g *repotest.Guest) {
	t.Helper()
	dir = t.TempDir()
	r := repotest.New(t, dir)
	start := time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)
	g = repotest.NewGuest(t, r, "110", start)
	g.SetFiles(map[string][]byte{"110.conf": []byte("memory: 1\n")})
	g.Add(repotest.Disk{Name: "scsi0", Size: size, Write: repotest.RandomWrites(1, 8, size, 10)})
	g.SetFiles(nil)
	g.Add(repotest.Disk{Name: "scsi0", Write: repotest.RandomWrites(2, 8, size, 90)})
	repotest.NewGuest(t, r, "web", start).Add(repotest.Disk{Name: "vda", Size: size})
	return dir, g
}

func TestRepository(t *testing.T) {
	t.Parallel()
	dir, made := repository(t)
	set := open(t, dir)
	if names, err := set.Guests(); err != nil || fmt.Sprint(names) != "[110 web]" || set.Kind() != source.Qmchain || set.Dir() != dir {
		t.Errorf("guests %v, %v, kind %s, directory %s", names, err, set.Kind(), set.Dir())
	}
	if r := source.Repository(set); r == nil || r.Dir != dir {
		t.Errorf("repository %+v", r)
	}
	g, points := look(t, set, "110")
	if len(points.All) != 2 || len(points.Problems)+len(points.Warnings) > 0 || g.Name() != "110" || g.Dir() != made.Dir {
		t.Fatalf("%+v", points)
	}
	for i, m := range points.All {
		if !bytes.Equal(read(t, points, m, "scsi0"), made.Want(m.ID, "scsi0")) {
			t.Errorf("%s: other content", m.ID)
		}
		l, ok := points.Image(chain.Layer{Point: m, Disk: &m.Disks[0]})
		if info, err := os.Stat(l.Path); !ok || err != nil || info.Size() != l.Bytes || l.Path != filepath.Join(dir, l.Name) || l.Format != image.Qcow2 {
			t.Errorf("%+v, %v", l, err)
		}
		files, err := points.Files(m)
		if want := []string{"[point.json guest/110.conf]", "[point.json]"}[i]; err != nil || fmt.Sprint(files) != want {
			t.Errorf("files %v, %v", files, err)
		}
		for _, f := range files {
			if _, err := os.Stat(filepath.Join(points.Folder(m), f)); err != nil {
				t.Error(err)
			}
		}
		if err := points.CheckSums(t.Context(), m, "scsi0"); err != nil {
			t.Error(err)
		}
	}
	if again, _ := set.Guest("110"); again != g {
		t.Error("the guest is another one each time")
	}
	if _, p := look(t, set, "nobody"); len(p.All)+len(p.Problems) > 0 {
		t.Errorf("%+v", p)
	}
	if _, err := set.Guest("../x"); err == nil {
		t.Error("a path was taken for a guest")
	}
}

// Points come, go and break, and each look sees it; what has not changed is kept.
func TestRepositoryChanges(t *testing.T) {
	t.Parallel()
	dir, made := repository(t)
	set := open(t, dir)
	g, before := look(t, set, "110")
	made.Add(repotest.Disk{Name: "scsi0"})
	_, after := look(t, set, "110")
	if len(before.All) != 2 || len(after.All) != 3 || after.All[0] != before.All[0] {
		t.Fatalf("%d and %d points, or a manifest was read twice", len(before.All), len(after.All))
	}
	middle := made.Points[1].ID
	manifest := filepath.Join(made.PointDir(middle), chain.ManifestFile)
	repotest.Flip(t, manifest, 40)
	for range 2 {
		p, err := g.Points()
		if err != nil || len(p.All) != 2 || len(p.Problems) != 1 || p.Problems[0].Point != string(middle) || !errors.Is(p.Problems[0].Err, chain.ErrDamaged) {
			t.Fatalf("%+v, %v", p, err)
		}
		if _, err := p.OpenDisk(image.NewPool(image.PoolOptions{}), p.All[1], "scsi0"); !errors.Is(err, chain.ErrDamaged) {
			t.Errorf("made on a damaged point: %v", err)
		}
	}
	repotest.Flip(t, manifest, 40)
	if p, err := g.Points(); err != nil || len(p.All) != 3 {
		t.Errorf("%+v, %v", p, err)
	}
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(manifest); err != nil {
		t.Fatal(err)
	}
	if p, err := g.Points(); err != nil || len(p.All) != 2 || len(p.Problems) != 1 {
		t.Errorf("%+v, %v", p, err)
	}
	if err := os.WriteFile(manifest, text, 0o600); err != nil {
		t.Fatal(err)
	}
	// Removed, but needed by the next.
	if err := made.Hide(middle); err != nil {
		t.Fatal(err)
	}
	p, err := g.Points()
	if err != nil || len(p.All) != 3 || len(p.All.Kept()) != 2 || len(p.Problems) != 0 {
		t.Fatalf("%+v, %v", p, err)
	}
	last := p.All[2]
	if !bytes.Equal(read(t, p, last, "scsi0"), made.Want(last.ID, "scsi0")) {
		t.Error("other content")
	}
	base := p.Folder(p.All[1])
	if _, err := os.Stat(filepath.Join(base, chain.ManifestFile)); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(base); err != nil {
		t.Fatal(err)
	}
	if p, err := g.Points(); err != nil || len(p.All) != 2 || len(p.Problems) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
}

// Check sums find what has changed, and say where.
func TestRepositorySums(t *testing.T) {
	t.Parallel()
	dir, made := repository(t)
	_, points := look(t, open(t, dir), "110")
	m := points.All[0]
	if err := points.CheckSums(t.Context(), m, "scsi1"); !errors.Is(err, chain.ErrNoPoint) {
		t.Errorf("no such disk: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := points.CheckSums(cancelled, m, "scsi0"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	path := made.ImagePath(m.ID, "scsi0")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	repotest.Flip(t, path, info.Size()/2)
	if err := points.CheckSums(t.Context(), m, "scsi0"); !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), "bytes 0 to") {
		t.Errorf("changed: %v", err)
	}
	if err := os.Truncate(path, info.Size()-1); err != nil {
		t.Fatal(err)
	}
	if err := points.CheckSums(t.Context(), m, "scsi0"); !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), fmt.Sprint(info.Size())) {
		t.Errorf("cut off: %v", err)
	}
	if err := errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)); err != nil {
		t.Fatal(err)
	}
	if err := points.CheckSums(t.Context(), m, "scsi0"); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("a link: %v", err)
	}
	sums := filepath.Join(made.PointDir(m.ID), m.Disks[0].Sums.File)
	repotest.Flip(t, sums, 30)
	if err := points.CheckSums(t.Context(), m, "scsi0"); !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), "check sums") {
		t.Errorf("changed sums: %v", err)
	}
	if err := os.Remove(sums); err != nil {
		t.Fatal(err)
	}
	if err := points.CheckSums(t.Context(), m, "scsi0"); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("no sums: %v", err)
	}
}

func TestForeign(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		kind        source.Kind
		name, guest string
		files       string // of the first point
		sums        error
	}{
		{source.Qmpbackup, "f-drive-style", "f-drive-style", "[]", foreign.ErrNoSum},
		{source.Virtnbdbackup, "v3-compress", "lab-v3-compress", "[vmconfig.virtnbdbackup.0.xml]", nil},
		{source.Virtnbdbackup, "v1-compress", "lab-v1-compress", "[vmconfig.virtnbdbackup.0.xml]", foreign.ErrNoSum},
	} {
		path := string(c.kind) + "/" + c.name
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(foreigntest.Unpack(t, path+"/"), path)
			set := open(t, dir)
			names, err := set.Guests()
			if err != nil || fmt.Sprint(names) != "["+c.guest+"]" || set.Kind() != c.kind || set.Dir() != dir || source.Repository(set) != nil {
				t.Fatalf("guests %v, %v, kind %s, directory %s", names, err, set.Kind(), set.Dir())
			}
			if _, err := set.Guest("nobody"); !errors.Is(err, chain.ErrNoPoint) {
				t.Errorf("another guest: %v", err)
			}
			g, points := look(t, set, c.guest)
			if g.Name() != c.guest || g.Dir() != dir || len(points.All) != 2 || len(points.Problems) > 0 {
				t.Fatalf("%+v", points)
			}
			cases := foreigntest.Cases(t)
			of := cases[slices.IndexFunc(cases, func(k foreigntest.Case) bool { return k.Path() == path })]
			for _, w := range of.Points {
				m := points.All[w.Run]
				sum := sha256.Sum256(read(t, points, m, w.Disk))
				if hex.EncodeToString(sum[:]) != w.SHA256 {
					t.Errorf("%s: other content", w.File)
				}
				l, ok := points.Image(chain.Layer{Point: m, Disk: m.Disk(w.Disk)})
				if !ok || l.Name != w.File || l.Path != filepath.Join(dir, w.File) {
					t.Errorf("%+v", l)
				}
				if err := points.CheckSums(t.Context(), m, w.Disk); !errors.Is(err, c.sums) {
					t.Errorf("check sums: %v", err)
				}
			}
			files, err := points.Files(points.All[0])
			if err != nil || fmt.Sprint(files) != c.files || points.Folder(points.All[0]) != dir {
				t.Errorf("files %v of %s, %v", files, points.Folder(points.All[0]), err)
			}
		})
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	empty := t.TempDir()
	if _, err := source.Open(empty); !errors.Is(err, repo.ErrNotRepository) || !strings.Contains(err.Error(), "neither") {
		t.Errorf("an empty folder: %v", err)
	}
	if _, err := source.Open(filepath.Join(empty, "gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	file := filepath.Join(empty, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := source.Open(file); err == nil {
		t.Error("a file was opened")
	}
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "qmchain.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := source.Open(broken); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("a damaged repository: %v", err)
	}
	// A repository is one, whatever else is in it.
	dir, _ := repository(t)
	for name, text := range map[string]string{"uuid": "6a6e2b3c-0000-4000-8000-000000000001", "a.config": "{}"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if set := open(t, dir); set.Kind() != source.Qmchain {
		t.Errorf("kind %s", set.Kind())
	}
}
