package repo

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/internal/durable"
)

// Of several first runs at once one makes the repository, for all.
func TestCreatedOnce(t *testing.T) {
	for range 50 {
		dir := t.TempDir()
		const runs = 8
		ids, errs := make([]string, runs), make([]error, runs)
		var wg sync.WaitGroup
		for i := range runs {
			wg.Go(func() {
				r, err := OpenOrCreate(dir, durable.FS{})
				if errs[i] = err; err == nil {
					ids[i] = r.ID
					errs[i] = os.MkdirAll(filepath.Join(dir, "110"), 0o700) // it goes on
				}
			})
		}
		wg.Wait()
		for i := range runs {
			if errs[i] != nil || ids[i] != ids[0] {
				t.Errorf("run %d: %s and %s, %v", i, ids[i], ids[0], errs[i])
			}
		}
	}
}

func TestOpenOrCreate(t *testing.T) {
	t.Parallel()
	for what, test := range map[string]struct {
		prepare func(dir string) error
		ok      bool
	}{
		"an empty folder":         {func(string) error { return nil }, true},
		"a new ext4":              {func(dir string) error { return os.Mkdir(filepath.Join(dir, "lost+found"), 0o700) }, true},
		"our own making, cut off": {func(dir string) error { return os.WriteFile(filepath.Join(dir, ".tmp-qmchain.json-1"), nil, 0o600) }, true},
		"somebody's files":        {func(dir string) error { return os.WriteFile(filepath.Join(dir, "thesis.doc"), nil, 0o600) }, false},
		"a guest's folder":        {func(dir string) error { return os.Mkdir(filepath.Join(dir, "110"), 0o700) }, false},
		"a repository of a format": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, HeadFile), []byte(`{"format":2}`), 0o600)
		}, false},
		"a damaged repository": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, HeadFile), []byte(`{"format":1,"id":"`), 0o600)
		}, false},
		"no folder": {os.Remove, false},
	} {
		dir := t.TempDir()
		if err := test.prepare(dir); err != nil {
			t.Fatal(err)
		}
		r, err := OpenOrCreate(dir, durable.FS{})
		if (err == nil) != test.ok {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil {
			continue
		}
		again, err := OpenOrCreate(dir, durable.FS{})
		if err != nil || again.ID != r.ID || len(r.ShortID()) != 8 {
			t.Errorf("%s: opened again: %v, %v", what, again, err)
		}
		info, err := os.Stat(filepath.Join(dir, HeadFile))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", what, info, err)
		}
	}
}

func testGuest(t *testing.T, fsys durable.FS) *Guest {
	t.Helper()
	r, err := OpenOrCreate(t.TempDir(), fsys)
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Guest("web")
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func lock(t *testing.T, g *Guest) *Lock {
	t.Helper()
	l, err := g.Lock(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Unlock)
	return l
}

// point makes a point of one empty disk, up to its commit.
func point(t *testing.T, g *Guest, id chain.ID) (*Partial, *chain.Manifest) {
	t.Helper()
	p, err := g.Begin(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.CreateImage(t.Context(), "scsi0", 1<<20, nil, ImageOptions{}); err != nil {
		t.Fatal(err)
	}
	bytes, sums, err := p.Finish(t.Context(), "scsi0")
	if err != nil {
		t.Fatal(err)
	}
	return p, &chain.Manifest{
		Format: 1, ID: id, UUID: p.UUID, Time: time.Now().UTC(), Guest: chain.GuestIdentity{Name: g.Name}, Consistency: chain.Instant,
		Disks: []chain.Disk{{
			Name: "scsi0", Level: chain.Full, SourceFormat: "raw", VirtualSize: 1 << 20, File: chain.ImageFile(id, "scsi0"), Bytes: bytes, Sums: sums,
		}},
	}
}

const (
	first  chain.ID = "20261120T120000Z-0001"
	second chain.ID = "20261120T130000Z-0002"
)

func TestCommit(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	l := lock(t, g)
	p, m := point(t, g, first)
	if points, problems, err := g.Points(); len(points)+len(problems) != 0 || err != nil {
		t.Errorf("before the commit: %v, %v, %v", points, problems, err)
	}
	if err := p.Commit(l, "", m); err != nil {
		t.Fatal(err)
	}
	points, problems, err := g.Points()
	if err != nil || len(problems) > 0 || len(points) != 1 || points[0].UUID != p.UUID {
		t.Fatalf("%v, %v, %v", points, problems, err)
	}
	if err := g.CheckImages(points, points[0], "scsi0"); err != nil {
		t.Error(err)
	}
	err = filepath.WalkDir(g.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if want := map[bool]fs.FileMode{true: 0o700, false: 0o600}[d.IsDir()]; info.Mode().Perm() != want {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Nothing becomes a point while the guest's folder is not as it was when the run began.
func TestCommitChecks(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	l := lock(t, g)
	old, oldManifest := point(t, g, first)
	p, m := point(t, g, second)
	if err := old.Commit(l, "", oldManifest); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(l, "", m); !errors.Is(err, ErrMoved) {
		t.Errorf("with a newer point there: %v", err)
	}
	if err := os.Rename(filepath.Join(g.Dir, lockFile), filepath.Join(g.Dir, ".lock.old")); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(l, first, m); err == nil || !strings.Contains(err.Error(), "lock lost") {
		t.Errorf("with the lock's file gone: %v", err)
	}
	other := lock(t, g)
	if err := p.Commit(l, first, m); err == nil || !strings.Contains(err.Error(), "lock lost") {
		t.Errorf("with another lock: %v", err)
	}
	if tip, err := g.Tip(); tip != first || err != nil {
		t.Errorf("tip is %s, %v", tip, err)
	}
	// That the newest point was removed meanwhile is no harm to one that does not need it.
	if err := g.Hide(first); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(other, first, m); err != nil {
		t.Error(err)
	}
}

// Whatever step fails, there is no point, or a whole one.
func TestCommitFailsAtEveryStep(t *testing.T) {
	t.Parallel()
	for failAt := 1; ; failAt++ {
		steps, armed := 0, false
		g := testGuest(t, durable.FS{Before: func(string, string) error {
			if !armed {
				return nil
			}
			if steps++; steps == failAt {
				return syscall.EIO
			}
			return nil
		}})
		l := lock(t, g)
		p, m := point(t, g, first)
		armed = true
		err := p.Commit(l, "", m)
		points, problems, readErr := g.Points()
		if readErr != nil || len(problems) > 0 {
			t.Fatalf("step %d: %v, %v", failAt, problems, readErr)
		}
		if steps < failAt {
			if err != nil || failAt < 6 {
				t.Errorf("a commit of %d steps: %v", steps, err)
			}
			return
		}
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("step %d: %v", failAt, err)
		}
		if len(points) > 0 != p.Committed() {
			t.Errorf("step %d: %d points", failAt, len(points))
		}
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	l := lock(t, g)
	began := time.Now()
	if _, err := g.Lock(t.Context(), 300*time.Millisecond); !errors.Is(err, ErrLocked) || time.Since(began) < 300*time.Millisecond {
		t.Errorf("locked twice: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := g.Lock(ctx, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, l.Unlock)
	got, err := g.Lock(t.Context(), 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	got.Unlock()
}

func TestPartials(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	lock(t, g)
	p, _ := point(t, g, first)
	if err := os.Mkdir(filepath.Join(g.Dir, ".notes.partial"), 0o700); err != nil {
		t.Fatal(err)
	}
	ids, err := g.Partials()
	if err != nil || len(ids) != 1 || ids[0] != first {
		t.Errorf("%v, %v", ids, err)
	}
	for range 2 {
		if err := g.RemovePartial(first); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(p.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(g.Dir, ".notes.partial")); err != nil {
		t.Error(err)
	}
}

// A point's images go with its folder, those of others stay, and what belongs to no point is known.
func TestStrays(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	l := lock(t, g)
	if strays, err := g.Strays(); len(strays) > 0 || err != nil {
		t.Errorf("before any point: %q, %v", strays, err)
	}
	p, m := point(t, g, first)
	if err := p.Commit(l, "", m); err != nil {
		t.Fatal(err)
	}
	point(t, g, second)
	if strays, err := g.Strays(); len(strays) > 0 || err != nil {
		t.Errorf("%q, %v", strays, err)
	}
	if err := g.RemovePartial(second); err != nil {
		t.Error(err)
	}
	if exists(g.ImagePath(second, "scsi0")) || !exists(g.ImagePath(first, "scsi0")) {
		t.Error("not the unfinished point's image was removed")
	}
	// The folder of an unfinished point beside that of the point itself, as a copying administrator might leave it.
	if err := os.Mkdir(g.partialDir(first), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := g.RemovePartial(first); err != nil || exists(g.partialDir(first)) || !exists(g.ImagePath(first, "scsi0")) {
		t.Errorf("a finished point's image was removed, or not the folder: %v", err)
	}
	if err := os.RemoveAll(g.PointDir(first)); err != nil {
		t.Fatal(err)
	}
	if strays, err := g.Strays(); len(strays) != 1 || strays[0] != chain.ImageFile(first, "scsi0") || err != nil {
		t.Errorf("%q, %v", strays, err)
	}
}

// What is in a point's folder is taken for a file of ours only if it is one.
func TestPointsAreNotFollowedElsewhere(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	l := lock(t, g)
	p, m := point(t, g, first)
	if err := p.Commit(l, "", m); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(g.PointDir(first), chain.ManifestFile)
	for what, replace := range map[string]func() error{
		"a link":  func() error { return os.Symlink(manifest+".away", manifest) },
		"a pipe":  func() error { return syscall.Mkfifo(manifest, 0o600) },
		"huge":    func() error { _ = os.WriteFile(manifest, nil, 0o600); return os.Truncate(manifest, 1<<40) },
		"nothing": func() error { return nil },
	} {
		if err := os.Rename(manifest, manifest+".away"); err != nil {
			t.Fatal(err)
		}
		if err := replace(); err != nil {
			t.Fatal(err)
		}
		points, problems, err := g.Points()
		if err != nil || len(points) != 0 || len(problems) != 1 {
			t.Errorf("%s: %v, %v, %v", what, points, problems, err)
		}
		if tip, err := g.Tip(); tip != first || err != nil {
			t.Errorf("%s: tip is %s, %v", what, tip, err)
		}
		if err := os.Rename(manifest+".away", manifest); err != nil {
			t.Fatal(err)
		}
	}
	// A point that was moved to where it does not belong.
	if err := os.Rename(g.PointDir(first), g.PointDir(second)); err != nil {
		t.Fatal(err)
	}
	if _, problems, _ := g.Points(); len(problems) != 1 || !errors.Is(problems[0].Err, chain.ErrDamaged) {
		t.Errorf("moved: %v", problems)
	}
}

func TestSums(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, make([]byte, SumsBlock+3), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sums, err := ComputeSums(t.Context(), f, SumsBlock+3, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := parseSums(sums.Text()); err != nil || !reflect.DeepEqual(again, sums) {
		t.Errorf("read again: %v, %v", again, err)
	}
	for _, bad := range []string{"", "x", "qmchain-sums 1 sha256 4194304 5\n", "qmchain-sums 1 sha256 4194304 -5\n", "qmchain-sums 1 sha256 4194304 5\n" + strings.Repeat("g", 64) + "\n"} {
		if _, err := parseSums([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	lines := strings.Split(string(sums.Text()), "\n")
	if len(lines) != 4 || lines[0] != "qmchain-sums 1 sha256 4194304 4194307" ||
		lines[1] != "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8" || // of 4 MiB of zeroes
		lines[2] != "709e80c88487a2411e1ee4dfb9f22a861492d20c4765150c0c794abd70f8147c" { // of 3 zeroes
		t.Errorf("%q", lines)
	}
}
