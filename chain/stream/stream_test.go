package stream

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/retain"
	"qmchain/internal/durable"
)

var start = time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)

const size1, size2 = 5 << 20, 1<<20 + 512

// newGuest has n points of two disks, one of which grows; the third is a diff.
func newGuest(t repotest.TB, dir string, n int) *repotest.Guest {
	g := repotest.NewGuest(t, repotest.New(t, dir), "110", start)
	add(g, n)
	return g
}

func add(g *repotest.Guest, n int) {
	for range n {
		i := len(g.Points)
		g.SetFiles(map[string][]byte{"110.conf": []byte("memory: 512\n"), "110.fw": {}})
		g.Add(
			repotest.Disk{Name: "scsi0", Size: size1 + int64(i)<<16, Write: repotest.RandomWrites(uint64(i), 9, size1, byte(10+20*i)), Diff: i == 2},
			repotest.Disk{Name: "efidisk0", Size: size2, Write: repotest.RandomWrites(uint64(i)+99, 4, size2-512, byte(100+20*i))},
		)
	}
}

func quiet() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

// open opens a repository.
func open(t testing.TB, dir string, fsys durable.FS) *repo.Repo {
	t.Helper()
	r, err := repo.OpenOrCreate(dir, fsys)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// sendErr sends points of guest 110, all if none is named.
func sendErr(ctx context.Context, r *repo.Repo, w io.Writer, have *Have, names ...string) error {
	s, err := Prepare(ctx, r, []Want{{Guest: "110", Points: names, All: len(names) == 0}}, have, time.Second)
	if err != nil {
		return err
	}
	defer s.Close()
	return s.Send(ctx, w, nil)
}

func send(t testing.TB, r *repo.Repo, have *Have, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := sendErr(t.Context(), r, &b, have, names...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func receiver(dir string, fsys durable.FS) *Receiver {
	return &Receiver{Open: func() (*repo.Repo, error) { return repo.OpenOrCreate(dir, fsys) }, LockWait: time.Second, Log: quiet()}
}

// receive returns the ids of the points that were not there yet.
func receive(t testing.TB, dir string, stream []byte) []chain.ID {
	t.Helper()
	list, err := receiver(dir, durable.FS{}).Receive(t.Context(), bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	return fresh(list)
}

func fresh(list []Received) (ids []chain.ID) {
	for _, r := range list {
		if !r.There {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

func have(t testing.TB, dir string) *Have {
	t.Helper()
	h, problems, err := ListHave(open(t, dir, durable.FS{}))
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	var b bytes.Buffer
	if err := h.Write(&b); err != nil {
		t.Fatal(err)
	}
	if h, err = ReadHave(&b); err != nil {
		t.Fatal(err)
	}
	return h
}

func guestOf(t testing.TB, dir string) *repo.Guest {
	t.Helper()
	g, err := open(t, dir, durable.FS{}).Guest("110")
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// check makes sure that a repository has exactly these points of guest 110, that each disk of each reads as it did when it
// was made, and that nothing else is there.
func check(t testing.TB, dir string, made *repotest.Guest, want ...chain.ID) {
	t.Helper()
	g := guestOf(t, dir)
	points, problems, err := g.Points()
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	var got []chain.ID
	pool := image.NewPool(image.PoolOptions{})
	for _, m := range points {
		for _, d := range m.Disks {
			if err := g.CheckSums(t.Context(), m, d.Name); err != nil {
				t.Error(err)
			}
		}
		if m.Base {
			continue
		}
		got = append(got, m.ID)
		for _, d := range m.Disks {
			img, err := g.OpenDisk(pool, points, m, d.Name)
			if err != nil {
				t.Fatal(err)
			}
			data := make([]byte, img.Size())
			if _, err := img.ReadAt(data, 0); err != nil {
				t.Error(err)
			}
			_ = img.Close()
			if !bytes.Equal(data, made.Want(m.ID, d.Name)) {
				t.Errorf("%s/%s reads as something else", m.ID, d.Name)
			}
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("points are %v, want %v", got, want)
	}
	if strays, err := g.Strays(); len(strays) > 0 || err != nil {
		t.Errorf("strays %v, %v", strays, err)
	}
	if partials, err := g.Partials(); len(partials) > 0 || err != nil {
		t.Errorf("partials %v, %v", partials, err)
	}
}

func ids(g *repotest.Guest) (list []chain.ID) {
	for _, m := range g.Points {
		list = append(list, m.ID)
	}
	return list
}

// What arrives is what was sent, byte for byte, and both qemu-img and tar can do with it.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	from, to := t.TempDir(), t.TempDir()
	g := newGuest(t, from, 5)
	var last int64
	s, err := Prepare(t.Context(), g.Repo, []Want{{Guest: "110", All: true}}, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var b bytes.Buffer
	if err := s.Send(t.Context(), &b, func(done int64) { last = done }); err != nil {
		t.Fatal(err)
	}
	if s.Points() != 5 || last != s.Bytes() || int64(b.Len()) < last {
		t.Errorf("%d points, %d of %d bytes", s.Points(), last, s.Bytes())
	}
	r := receiver(to, durable.FS{})
	var done, total int64
	r.Progress = func(d, t int64) { done, total = d, t }
	list, err := r.Receive(t.Context(), bytes.NewReader(b.Bytes()))
	if err != nil || done != last || total != last {
		t.Errorf("%v; %d of %d bytes", err, done, total)
	}
	if got := fresh(list); !slices.Equal(got, ids(g)) {
		t.Errorf("received %v", got)
	}
	check(t, to, g, ids(g)...)
	equalTrees(t, filepath.Join(from, "110"), filepath.Join(to, "110"))
	if open(t, to, durable.FS{}).ID == g.Repo.ID {
		t.Error("two repositories have one id")
	}
	// Nothing is done twice.
	if got := receive(t, to, b.Bytes()); len(got) > 0 {
		t.Errorf("received again: %v", got)
	}
	equalTrees(t, filepath.Join(from, "110"), filepath.Join(to, "110"))

	dir := t.TempDir()
	tarx := exec.CommandContext(t.Context(), "tar", "-x", "-C", dir)
	tarx.Stdin = bytes.NewReader(b.Bytes())
	if out, err := tarx.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("tar: %v: %s", err, out)
	}
	m := g.Points.Latest()
	raw := filepath.Join(dir, "raw")
	repotest.Convert(t, filepath.Join(dir, imagePath("110", m.Disk("scsi0"))), raw)
	if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, g.Want(m.ID, "scsi0")) {
		t.Errorf("what tar unpacks reads as something else: %v", err)
	}
}

// equalTrees compares two guests' folders; empty files are locks.
func equalTrees(t testing.TB, a, b string) {
	t.Helper()
	list := func(dir string) map[string]string {
		files := map[string]string{}
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasSuffix(d.Name(), ".lock") {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			data, err := os.ReadFile(path)
			rel, _ := filepath.Rel(dir, path)
			files[rel] = string(data)
			if info.Mode() != 0o600 && info.Mode() != 0o700 {
				t.Errorf("%s has mode %s", path, info.Mode())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	want, got := list(a), list(b)
	for name, data := range want {
		if got[name] != data {
			t.Errorf("%s is not the same, or not there", name)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is there", name)
		}
	}
}

// sent lists the names of a stream's manifests.
func sent(t testing.TB, stream []byte) (folders []string) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(stream)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return folders
		}
		if err != nil {
			t.Fatal(err)
		}
		if folder, ok := strings.CutSuffix(h.Name, "/"+chain.ManifestFile); ok {
			folders = append(folders, folder)
		}
	}
}

// What the receiver has is left out, a point comes with all that it needs, and chains can be sent on from there.
func TestOnlyWhatIsMissing(t *testing.T) {
	t.Parallel()
	to := t.TempDir()
	g := newGuest(t, t.TempDir(), 4)
	p := ids(g)

	// Point 2 is a diff: the latest does without it for one disk, but not for the other.
	if got := sent(t, send(t, g.Repo, nil, string(p[1]))); !slices.Equal(got, []string{"110/" + string(p[0]), "110/" + string(p[1])}) {
		t.Errorf("sent %q", got)
	}
	receive(t, to, send(t, g.Repo, nil, string(p[1])))
	check(t, to, g, p[:2]...)
	stream := send(t, g.Repo, have(t, to), "latest")
	if got := sent(t, stream); !slices.Equal(got, []string{"110/" + string(p[2]), "110/" + string(p[3])}) {
		t.Errorf("sent %q", got)
	}
	receive(t, to, stream)
	check(t, to, g, p...)
	if got := sent(t, send(t, g.Repo, have(t, to))); len(got) > 0 {
		t.Errorf("sent %q though nothing is missing", got)
	}
	if got := receive(t, to, send(t, g.Repo, have(t, to))); len(got) > 0 {
		t.Errorf("received %v", got)
	}
	add(g, 1)
	receive(t, to, send(t, g.Repo, have(t, to)))
	check(t, to, g, ids(g)...)

	// Older points can come later.
	late := t.TempDir()
	g.Add(repotest.Disk{Name: "scsi0", Size: size1, Full: true, Write: repotest.RandomWrites(7, 9, size1, 3)})
	receive(t, late, send(t, g.Repo, nil, "latest"))
	check(t, late, g, ids(g)[5])
	receive(t, late, send(t, g.Repo, nil, string(p[0])))
	receive(t, late, send(t, g.Repo, have(t, late)))
	check(t, late, g, ids(g)...)
	// Copies of copies.
	third := t.TempDir()
	receive(t, third, send(t, guestOf(t, late).Repo, nil))
	check(t, third, g, ids(g)...)
}

// remove removes points by retention, and sweeps.
func remove(t testing.TB, g *repo.Guest, ids ...chain.ID) {
	t.Helper()
	lock, err := g.LockPrune(t.Context(), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	points, _, err := g.Points()
	if err != nil {
		t.Fatal(err)
	}
	r := &retain.Remover{Guest: g, Log: quiet()}
	if err := r.Remove(points, true, ids...); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Here and there points are removed and merged, each side in its own way, and transfers go on.
func TestRetentionOnBothSides(t *testing.T) {
	t.Parallel()
	to := t.TempDir()
	g := newGuest(t, t.TempDir(), 4)
	receive(t, to, send(t, g.Repo, nil))
	p := ids(g)
	remove(t, g.Guest, p[0], p[1]) // here the third is the full, of one disk and a base of the other
	remove(t, guestOf(t, to), p[2])
	check(t, to, g, p[0], p[1], p[3])
	add(g, 1)
	p = ids(g)
	receive(t, to, send(t, g.Repo, have(t, to), "latest"))
	check(t, to, g, p[0], p[1], p[3], p[4])
	remove(t, guestOf(t, to), p[3])
	check(t, to, g, p[0], p[1], p[4])
	add(g, 1)
	// The fourth is not in the list of what the receiver has, and becomes a point again.
	receive(t, to, send(t, g.Repo, have(t, to)))
	p = ids(g)
	if points, _, err := guestOf(t, to).Points(); err != nil || points.Find(p[3]) == nil || points.Find(p[5]) == nil {
		t.Errorf("%v, %v", points, err)
	}
	remove(t, guestOf(t, to))
	// A new receiver gets what is there now, merged images and all.
	third := t.TempDir()
	receive(t, third, send(t, g.Repo, nil))
	check(t, third, g, p[2:]...)
}

// Bases go with what needs them, and arrive as bases.
func TestBases(t *testing.T) {
	t.Parallel()
	to := t.TempDir()
	g := newGuest(t, t.TempDir(), 4)
	p := ids(g)
	for _, id := range p[:2] {
		if err := g.Hide(id); err != nil {
			t.Fatal(err)
		}
	}
	stream := send(t, g.Repo, nil, "latest")
	if got := sent(t, stream); len(got) != 4 || got[0] != "110/."+string(p[0])+".base" {
		t.Errorf("sent %q", got)
	}
	receive(t, to, stream)
	check(t, to, g, p[2:]...)
	// What is a base there stays one, whatever comes; and a point stays a point.
	if err := os.Rename(filepath.Join(g.Dir, "."+string(p[0])+".base"), g.PointDir(p[0])); err != nil {
		t.Fatal(err)
	}
	if err := g.Hide(p[3]); err != nil {
		t.Fatal(err)
	}
	list, err := receiver(to, durable.FS{}).Receive(t.Context(), bytes.NewReader(send(t, g.Repo, nil)))
	if err != nil || len(fresh(list)) > 0 || !list[0].Removed || list[0].ID != p[0] || list[len(list)-1].Removed {
		t.Errorf("%+v, %v", list, err)
	}
	check(t, to, g, p[2:]...)
	// Retention there does away with the first; two points are read through the second.
	remove(t, guestOf(t, to))
	check(t, to, g, p[2:]...)
	if points, _, _ := guestOf(t, to).Points(); len(points) != 3 || points[0].ID != p[1] {
		t.Errorf("%d points", len(points))
	}
	// What merges now is no base to send, or to build on.
	if _, err := os.Stat(filepath.Join(g.Dir, "."+string(p[1])+".base")); err != nil {
		t.Fatal(err)
	}
	ref := g.Points[2].Ref("efidisk0")
	merging := func(m *chain.Manifest) error { m.Disk("efidisk0").Merging = &ref; return nil }
	if err := g.Rewrite(repo.FolderOf(&chain.Manifest{ID: p[1], Base: true}), merging); err != nil {
		t.Fatal(err)
	}
	if err := sendErr(t.Context(), g.Repo, io.Discard, nil); !errors.Is(err, ErrUnsettled) {
		t.Errorf("sent a base that merges: %v", err)
	}
	if err := sendErr(t.Context(), g.Repo, io.Discard, nil, string(p[0])); err != nil {
		t.Errorf("what has nothing to do with it: %v", err)
	}
}

// A point whose parent is in the middle of a merge at the receiver's is refused.
func TestMergingParent(t *testing.T) {
	t.Parallel()
	to := t.TempDir()
	g := newGuest(t, t.TempDir(), 2)
	receive(t, to, send(t, g.Repo, nil))
	there := guestOf(t, to)
	p := ids(g)
	if err := there.Hide(p[1]); err != nil {
		t.Fatal(err)
	}
	add(g, 1)
	ref := g.Points[2].Ref("scsi0")
	base := repo.FolderOf(&chain.Manifest{ID: p[1], Base: true})
	set := func(to *chain.ImageRef) {
		if err := there.Rewrite(base, func(m *chain.Manifest) error { m.Disk("scsi0").Merging = to; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	set(&ref)
	stream := send(t, g.Repo, have(t, to))
	if _, err := receiver(to, durable.FS{}).Receive(t.Context(), bytes.NewReader(stream)); !errors.Is(err, ErrUnsettled) {
		t.Errorf("received: %v", err)
	}
	set(nil)
	receive(t, to, stream)
	check(t, to, g, p[0], ids(g)[2])
}

// A parent of which the receiver has merged one disk away, while two points are read through another, is refused as long as that
// is so; once it is gone as a whole, it is sent again.
func TestHalfMergedParent(t *testing.T) {
	t.Parallel()
	to := t.TempDir()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	disk := func(name string, i byte) repotest.Disk {
		return repotest.Disk{Name: name, Size: size2, Write: repotest.RandomWrites(uint64(i), 4, size2-512, 10*i)}
	}
	diff := func(d repotest.Disk) repotest.Disk { d.Diff = true; return d }
	g.Add(disk("scsi0", 1), disk("scsi1", 2))
	g.Add(diff(disk("scsi0", 3)), diff(disk("scsi1", 4)))
	g.Add(diff(disk("scsi1", 5)))
	g.Add(disk("scsi0", 6), disk("scsi1", 7))
	p := ids(g)
	receive(t, to, send(t, g.Repo, nil, string(p[2]), string(p[3])))
	there := guestOf(t, to)
	remove(t, there, p[0])
	if _, err := os.Stat(there.ImagePath(p[0], "scsi0")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("scsi0 was not merged: %v", err)
	}
	late := func() ([]Received, error) {
		return receiver(to, durable.FS{}).Receive(t.Context(), bytes.NewReader(send(t, g.Repo, have(t, to), string(p[1]))))
	}
	for range 2 {
		if list, err := late(); !errors.Is(err, ErrUnsettled) || len(list) > 0 {
			t.Errorf("received: %+v, %v", list, err)
		}
		check(t, to, g, p[2], p[3])
		remove(t, there) // which can't end it: two points need scsi1
	}
	remove(t, there, p[2])
	if _, err := late(); err != nil {
		t.Error(err)
	}
	check(t, to, g, p[0], p[1], p[3])
}

// What is damaged is not sent on.
func TestDamagedSender(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	p := ids(g)
	img := g.ImagePath(p[0], "scsi0")
	sums := filepath.Join(g.PointDir(p[0]), "scsi0.sums")
	keep := map[string][]byte{}
	for _, path := range []string{img, sums} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		keep[path] = data
	}
	for what, damage := range map[string]func() error{
		"a changed byte":   func() error { repotest.Flip(t, img, 300<<10); return nil },
		"a cut image":      func() error { return os.Truncate(img, 1000) },
		"no image":         func() error { return os.Remove(img) },
		"a link":           func() error { return errors.Join(os.Remove(img), os.Symlink("/etc/passwd", img)) },
		"a folder":         func() error { return errors.Join(os.Remove(img), os.Mkdir(img, 0o700)) },
		"changed sums":     func() error { repotest.Flip(t, sums, 60); return nil },
		"no sums":          func() error { return os.Remove(sums) },
		"sums of a folder": func() error { return errors.Join(os.Remove(sums), os.Mkdir(sums, 0o700)) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if err := sendErr(t.Context(), g.Repo, io.Discard, nil, "latest"); !errors.Is(err, chain.ErrDamaged) {
			t.Errorf("%s: %v", what, err)
		}
		for path, data := range keep {
			if err := errors.Join(os.RemoveAll(path), os.WriteFile(path, data, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Manifests: a parent's, and the latest's own.
	for _, id := range p {
		path := filepath.Join(g.PointDir(id), chain.ManifestFile)
		repotest.Flip(t, path, 100)
		if err := sendErr(t.Context(), g.Repo, io.Discard, nil, "latest"); !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), "seal") {
			t.Errorf("manifest of %s: %v", id, err)
		}
		repotest.Flip(t, path, 100)
	}
	repotest.Flip(t, filepath.Join(g.PointDir(p[1]), chain.ManifestFile), 100)
	s, err := Prepare(t.Context(), g.Repo, []Want{{Guest: "110", All: true}}, nil, 0)
	if err != nil || s.Points() != 1 || len(s.Problems) != 1 {
		t.Errorf("all: %+v, %v", s, err)
	} else {
		s.Close()
	}
	for _, names := range [][]string{{"2027"}, {"x"}} {
		if err := sendErr(t.Context(), g.Repo, io.Discard, nil, names...); !errors.Is(err, chain.ErrNoPoint) {
			t.Errorf("%q: %v", names, err)
		}
	}
	if _, err := Prepare(t.Context(), g.Repo, []Want{{Guest: "web", All: true}}, nil, 0); !errors.Is(err, chain.ErrNoPoint) {
		t.Error(err)
	}
}

// slow is a writer that calls f once, in the middle.
type slow struct {
	bytes.Buffer
	at int
	f  func()
}

func (s *slow) Write(p []byte) (int, error) {
	if s.f != nil && s.Len() > s.at {
		s.f()
		s.f = nil
	}
	return s.Buffer.Write(p)
}

// Points are removed while they are sent: what was begun arrives.
func TestPruneWhileSending(t *testing.T) {
	t.Parallel()
	g := newGuest(t, t.TempDir(), 4)
	p := ids(g)
	w := &slow{at: 1 << 20, f: func() { remove(t, g.Guest, p[0], p[1]) }}
	if err := sendErr(t.Context(), g.Repo, w, nil); err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	receive(t, to, w.Bytes())
	check(t, to, g, p...)
	if points, _, _ := g.Guest.Points(); len(points) != 4 || len(points.Kept()) != 2 {
		t.Errorf("%d points are left, of which %d are kept", len(points), len(points.Kept()))
	}
	// The receiver has them: their children must not change meanwhile either.
	add(g, 1)
	w = &slow{at: 1000, f: func() { remove(t, g.Guest, p[3]) }}
	if err := sendErr(t.Context(), g.Repo, w, have(t, to), "latest"); err != nil {
		t.Fatal(err)
	}
	receive(t, to, w.Bytes())
	check(t, to, g, ids(g)...)
	before, _, _ := g.Guest.Points()
	remove(t, g.Guest) // now it goes on
	if after, _, _ := g.Guest.Points(); before.Find(p[3]) == nil || after.Find(p[3]) != nil {
		t.Errorf("%d points before, %d after", len(before), len(after))
	}
}

// Somebody holds what is needed alone.
func TestSendWaits(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	release, err := g.Claim(repo.FolderOf(g.Points[0]))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(t.Context(), g.Repo, []Want{{Guest: "110", All: true}}, nil, 100*time.Millisecond); !errors.Is(err, repo.ErrLocked) {
		t.Error(err)
	}
	time.AfterFunc(100*time.Millisecond, release)
	s, err := Prepare(t.Context(), g.Repo, []Want{{Guest: "110", All: true}}, nil, 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if release, err = g.Claim(repo.FolderOf(g.Points[0])); err != nil {
		t.Errorf("still held: %v", err)
	} else {
		release()
	}
}

func TestBadHave(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"", "x", "{}", `{"format":2}`, `{"format":1,"points":[{}]}`, `{"format":1,"points":[{"guest":"110","id":"x","uuid":"y"}]}`,
		`{"format":1,"points":[{"guest":"../x","id":"20261120T101523Z-0000","uuid":"y"}]}`,
		`{"format":1,"points":[{"guest":"110","id":"20261120T101523Z-0000"}]}`,
	} {
		if h, err := ReadHave(strings.NewReader(text)); err == nil {
			t.Errorf("%q was taken for %+v", text, h)
		}
	}
	if h, _, err := ListHave(nil); err != nil || len(h.points) > 0 {
		t.Errorf("%v, %v", h, err)
	}
}

// A reader gets through anything, in bounded memory, and what it lets through is of the format.
func FuzzReader(f *testing.F) {
	// As small as can be, with the sizes that the format wants.
	var files []file
	put := func(name string, data []byte) {
		files = append(files, file{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600}, data})
	}
	put(headFile, []byte(`{"format":1,"points":2,"bytes":1}`))
	for _, folder := range []string{".20261120T101523Z-0000.base", "20261120T111523Z-0001"} {
		where, ok := repo.ParseFolder(folder)
		m := &chain.Manifest{
			Format: 1, ID: where.ID, UUID: strings.Repeat("0", 32), Guest: chain.GuestIdentity{Name: "a"}, Consistency: chain.Instant,
			Disks: []chain.Disk{{
				Name: "b", Level: chain.Full, VirtualSize: 512, File: chain.ImageFile(where.ID, "b"), Bytes: 1,
				Sums: chain.Sums{File: chain.SumsFile("b", 0), SHA256: strings.Repeat("0", 64)},
			}},
		}
		text, err := m.Encode()
		if err != nil || !ok {
			f.Fatal(err)
		}
		put(manifestPath("a", where), text)
		put(sumsPath("a", where, &m.Disks[0]), make([]byte, repo.SumsFileSize(1)))
		put(guestFilesPath("a", where)+"c", []byte("d"))
		put(imagePath("a", &m.Disks[0]), []byte{1})
	}
	stream := pack(f, files)
	if points := sent(f, stream); len(points) != 2 {
		f.Fatal(points)
	}
	f.Add(stream)
	f.Add(stream[:len(stream)/2])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := NewReader(bytes.NewReader(data))
		if err != nil {
			if !errors.Is(err, ErrStream) {
				t.Fatal(err)
			}
			return
		}
		for {
			p, err := r.Next()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				if !errors.Is(err, ErrStream) {
					t.Fatal(err)
				}
				return
			}
			if p.Manifest.Validate() != nil || chain.CheckGuestName(p.Guest) != nil || p.Manifest.ID != p.Folder.ID || p.Manifest.Guest.Name != p.Guest {
				t.Fatalf("%+v", p)
			}
			images := 0
			for {
				e, err := r.Entry()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					return
				}
				n, err := io.Copy(io.Discard, e.Body)
				if err == nil && n != e.Size {
					t.Fatalf("%d bytes of %d", n, e.Size)
				}
				switch e.Kind {
				case kindImage:
					images++
				case kindGuestFile:
					if filepath.Base(e.Name) != e.Name || e.Name == ".." || e.Name == "." {
						t.Fatal(e.Name)
					}
				}
			}
			if images != len(p.Manifest.Disks) {
				t.Fatalf("%d images of %d", images, len(p.Manifest.Disks))
			}
		}
	})
}
