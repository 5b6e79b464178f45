package retain_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/retain"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

var start = time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)

const size = 4 << 20

// guest is one with a repository of its own, whose steps the test can see.
type guest struct {
	*repotest.Guest
	t      *testing.T
	before func(op, path string) error
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	g := &guest{t: t}
	r, err := repo.OpenOrCreate(t.TempDir(), durable.FS{Before: func(op, path string) error {
		if g.before == nil {
			return nil
		}
		return g.before(op, path)
	}})
	if err != nil {
		t.Fatal(err)
	}
	g.Guest = repotest.NewGuest(t, r, "110", start)
	return g
}

// fill makes n points of two disks. One of them grows now and then.
func (g *guest) fill(n int) {
	g.t.Helper()
	defer g.check("made")
	grown := int64(size)
	for i := range n {
		if i%3 == 2 {
			grown += 3 << 16
		}
		g.Add(
			repotest.Disk{Name: "scsi0", Size: size, Write: repotest.RandomWrites(rand.Uint64(), 12, size, byte(10*i+1))},
			repotest.Disk{Name: "scsi1", Size: grown, Write: repotest.RandomWrites(rand.Uint64(), 6, grown, byte(10*i+5))},
		)
	}
}

func (g *guest) remover() *retain.Remover {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return &retain.Remover{Guest: g.Guest.Guest, Log: log}
}

func (g *guest) points() chain.Points {
	g.t.Helper()
	points, problems, err := g.Guest.Guest.Points()
	if err != nil || len(problems) > 0 {
		g.t.Fatal(err, problems)
	}
	return points
}

// remove removes points and sweeps, under the lock.
func (g *guest) remove(ctx context.Context, ids ...chain.ID) ([]retain.Left, error) {
	lock, err := g.LockPrune(ctx, time.Second)
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	if err := g.remover().Remove(g.points(), false, ids...); err != nil {
		return nil, err
	}
	return g.remover().Sweep(ctx)
}

func (g *guest) sweep() ([]retain.Left, error) {
	return g.remove(context.Background())
}

// check reads every disk of every point that is kept, and compares it with what was written: natively, and the newest by
// qemu-img, which reads it through all that are left of its chain.
func (g *guest) check(what string) {
	g.t.Helper()
	points := g.points()
	pool := image.NewPool(image.PoolOptions{})
	for _, m := range points.Kept() {
		for _, d := range m.Disks {
			want := g.Want(m.ID, d.Name)
			img, err := g.OpenDisk(pool, points, m, d.Name)
			if err != nil {
				g.t.Fatalf("%s: %v", what, err)
			}
			got := make([]byte, img.Size())
			if _, err := img.ReadAt(got, 0); err != nil {
				g.t.Errorf("%s: %v", what, err)
			}
			if err := img.Close(); err != nil {
				g.t.Error(err)
			}
			if !bytes.Equal(got, want) {
				g.t.Errorf("%s: %s/%s: what was read natively differs", what, m.ID, d.Name)
			}
			if err := g.CheckSums(g.t.Context(), m, d.Name); err != nil {
				g.t.Errorf("%s: %v", what, err)
			}
			if m != points.Latest() {
				continue
			}
			out := filepath.Join(g.t.TempDir(), "out.raw")
			repotest.Convert(g.t, g.ImagePath(m.ID, d.Name), out)
			if got, err = os.ReadFile(out); err != nil {
				g.t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				g.t.Errorf("%s: %s/%s: what qemu-img read differs", what, m.ID, d.Name)
			}
			_ = os.Remove(out)
		}
	}
}

// done makes sure that nothing is left of what was removed.
func (g *guest) done(left []retain.Left, err error, kept int) {
	g.t.Helper()
	if err != nil || len(left) > 0 {
		g.t.Fatalf("left: %v, %v", left, err)
	}
	points := g.points()
	if len(points) != kept {
		g.t.Errorf("%d points and bases, not %d", len(points), kept)
	}
	images := 0
	for _, m := range points {
		images += len(m.Disks)
		entries, err := os.ReadDir(g.PointDir(m.ID))
		if err != nil {
			g.t.Fatal(err)
		}
		if len(entries) != len(m.Disks)+2 { // their sums, the manifest, the lock
			g.t.Errorf("%s has %v", m.ID, entries)
		}
	}
	entries, err := os.ReadDir(g.ImagesDir())
	if err != nil || len(entries) != images {
		g.t.Errorf("%d images, not %d: %v", len(entries), images, err)
	}
}

func TestOldestGo(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(7)
	for range 2 {
		oldest := g.points()[0]
		left, err := g.remove(t.Context(), oldest.ID)
		g.done(left, err, len(g.points()))
		g.check("one removed")
	}
	m := g.points()[0]
	for _, d := range m.Disks {
		if d.Level != chain.Full || d.Parent != nil || d.Generation != 1 {
			t.Errorf("%+v", d)
		}
	}
	left, err := g.remove(t.Context(), g.points()[0].ID, g.points()[2].ID, g.points()[3].ID)
	g.done(left, err, 2)
	g.check("all but two removed")
	g.fill(3)
	g.check("the chain goes on")
}

func TestMiddleGoes(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(6)
	all := g.points()
	left, err := g.remove(t.Context(), all[1].ID, all[3].ID, all[4].ID)
	g.done(left, err, 3)
	g.check("middle removed")
	for i, m := range g.points() {
		for _, d := range m.Disks {
			if level := map[bool]chain.Level{true: chain.Full, false: chain.Inc}[i == 0]; d.Level != level {
				t.Errorf("%d: %+v", i, d)
			}
		}
	}
}

// Random removals, a rotation in between, diffs and points that leave a disk out.
func TestRandomRemovals(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 7))
			g := newGuest(t)
			for i := range 14 {
				disk := repotest.Disk{
					Name: "scsi0", Size: size, Full: random.IntN(6) == 0, Diff: i > 0 && random.IntN(5) == 0,
					Write: repotest.RandomWrites(random.Uint64(), 6, size, byte(i+1)),
				}
				if disk.Full {
					disk.Diff = false
				}
				disks := []repotest.Disk{disk}
				if i == 0 || random.IntN(3) > 0 {
					disks = append(disks, repotest.Disk{Name: "scsi1", Size: size, Write: repotest.RandomWrites(random.Uint64(), 4, size, byte(i+100))})
				}
				g.Add(disks...)
				if i%4 != 3 {
					continue
				}
				points := g.points()
				var ids []chain.ID
				for _, v := range (retain.Policy{Last: 1}).Apply(points) {
					if !v.Keep && random.IntN(2) == 0 {
						ids = append(ids, v.Point.ID)
					}
				}
				if _, err := g.remove(t.Context(), ids...); err != nil {
					t.Fatal(err)
				}
				g.check(fmt.Sprintf("after %d points", i+1))
			}
			var ids []chain.ID
			for _, v := range (retain.Policy{Last: 1}).Apply(g.points()) {
				if !v.Keep {
					ids = append(ids, v.Point.ID)
				}
			}
			left, err := g.remove(t.Context(), ids...)
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range left {
				t.Log(l)
			}
			g.check("at the end")
		})
	}
}

var errDied = errors.New("died")

// A death before any step loses nothing, whoever reads then, and the next sweep ends what was begun.
func TestDeathAtEveryStep(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(3)
	all := g.points()
	saved := filepath.Join(t.TempDir(), "110")
	testenv.Output(t, "cp", "-a", g.Dir, saved)
	var steps int
	for at := 1; ; at++ {
		testenv.Output(t, "rm", "-r", g.Dir)
		testenv.Output(t, "cp", "-a", saved, g.Dir)
		n := 0
		g.before = func(string, string) error {
			if n++; n >= at {
				return errDied
			}
			return nil
		}
		_, err := g.remove(t.Context(), all[0].ID, all[1].ID)
		g.before = nil
		if err != nil && !errors.Is(err, errDied) {
			t.Fatalf("step %d: %v", at, err)
		}
		g.check(fmt.Sprintf("step %d", at))
		if err == nil {
			steps = n
			break
		}
		// What was not hidden yet stays; the rest goes.
		left, err := g.sweep()
		g.done(left, err, len(g.points().Kept()))
		g.check(fmt.Sprintf("step %d, swept", at))
	}
	if steps < 60 {
		t.Errorf("only %d steps", steps)
	}
}

// qemu-img is killed in the middle of its work.
func TestCommitIsCutOff(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.Add(repotest.Disk{Name: "scsi0", Size: size, Write: []repotest.Write{{Len: size, Fill: 1}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Len: size, Fill: 2}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Len: 1 << 20, Fill: 3}}})
	lock, err := g.LockPrune(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	r := g.remover()
	r.RateLimit = 256 << 10
	if err := r.Remove(g.points(), false, g.points()[0].ID); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 1200*time.Millisecond)
	defer cancel()
	if _, err := r.Sweep(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("not cut off: %v", err)
	}
	g.check("cut off")
	r.RateLimit = 0
	left, err := r.Sweep(t.Context())
	g.done(left, err, 2)
	g.check("swept")
}

// A point that is being read stays until it is not, and those that descend from it are read on through all changes, even
// where their files are closed and opened again.
func TestInUse(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(5)
	all := g.points()
	pool := image.NewPool(image.PoolOptions{MaxFiles: 1})
	open := func(i int) image.Image {
		img, err := g.OpenDisk(pool, all, all[i], "scsi1")
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	read := func(img image.Image, i int) {
		t.Helper()
		got := make([]byte, img.Size())
		if _, err := img.ReadAt(got, 0); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got, g.Want(all[i].ID, "scsi1")) {
			t.Errorf("point %d reads as something else", i)
		}
	}
	removed, last := open(1), open(4)
	read(last, 4)
	left, err := g.remove(t.Context(), all[0].ID, all[1].ID)
	if err != nil || len(left) == 0 {
		t.Fatalf("left: %v, %v", left, err)
	}
	read(removed, 1)
	read(last, 4)
	g.check("in use")
	if err := removed.Close(); err != nil {
		t.Error(err)
	}
	// Its disk grows on the way, for which nobody may read what descends from it.
	if left, err = g.sweep(); err != nil || len(left) == 0 {
		t.Fatalf("left: %v, %v", left, err)
	}
	read(last, 4)
	if err := last.Close(); err != nil {
		t.Error(err)
	}
	left, err = g.sweep()
	g.done(left, err, 3)
	g.check("free")

	// Without growth, reading goes on.
	last = open(4)
	left, err = g.remove(t.Context(), all[3].ID)
	g.done(left, err, 2)
	read(last, 4)
	if err := last.Close(); err != nil {
		t.Error(err)
	}
}

func TestKept(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(3)
	all := g.points()
	if _, err := g.remove(t.Context(), all[0].ID, all[2].ID); !errors.Is(err, retain.ErrKept) {
		t.Errorf("the tracking parent: %v", err)
	}
	if err := g.Rewrite(repo.FolderOf(all[0]), func(m *chain.Manifest) error { m.Protected = true; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := g.remove(t.Context(), all[0].ID); !errors.Is(err, retain.ErrKept) {
		t.Errorf("a protected point: %v", err)
	}
	if _, err := g.remove(t.Context(), "20200101T000000Z-0000"); !errors.Is(err, chain.ErrNoPoint) {
		t.Errorf("no point: %v", err)
	}
	if len(g.points().Kept()) != 3 {
		t.Error("something was removed")
	}
	g.check("nothing removed")
}

// Damage that was there before a merge is not sealed as sound by it.
func TestDamageIsNotSealed(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	const large = 64 << 20
	g.Add(repotest.Disk{Name: "scsi0", Size: large, Write: []repotest.Write{{Len: large, Fill: 1}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 1 << 20, Len: 1 << 20, Fill: 2}}})
	all := g.points()
	repotest.Flip(t, g.ImagePath(all[0].ID, "scsi0"), 40<<20)
	left, err := g.remove(t.Context(), all[0].ID)
	g.done(left, err, 1)
	if err := g.CheckSums(t.Context(), g.points()[0], "scsi0"); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("the flipped bit is not found any more: %v", err)
	}
}

// Damage that a merge does not touch goes along into the next point, and what is known of it does, too, until that is found good.
func TestKnownDamageGoesAlong(t *testing.T) {
	t.Parallel()
	const large = 64 << 20
	for name, crash := range map[string]string{"no crash": "", "a crash before the rename": "rename", "a crash after it": "syncdir"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t)
			g.Add(repotest.Disk{Name: "scsi0", Size: large, Write: []repotest.Write{{Len: large, Fill: 1}}}, repotest.Disk{Name: "scsi1", Size: size})
			repotest.Flip(t, g.ImagePath(g.points()[0].ID, "scsi0"), 40<<20)
			// note records a look at the points that are kept, as verify does.
			note := func(at time.Time) {
				t.Helper()
				points := g.points()
				var found repo.Checked
				for _, m := range points.Kept() {
					v := repo.Verified{Point: m.ID, Time: at, Good: true}
					layers, err := points.Layers(m, "scsi0")
					if err != nil {
						t.Fatal(err)
					}
					for _, l := range layers {
						if err := g.CheckSums(t.Context(), l.Point, "scsi0"); err != nil {
							v.Good, v.Why = false, err.Error()
							v.Disks = []repo.DamagedDisk{{Name: "scsi0", Images: []chain.ImageRef{l.Point.Ref("scsi0")}}}
						}
					}
					found.Verified = append(found.Verified, v)
				}
				if err := g.NoteChecked(t.Context(), found); err != nil {
					t.Fatal(err)
				}
			}
			// want makes sure that scsi0 of all kept points is known to be damaged, or that nothing is.
			want := func(what string, bad bool) {
				t.Helper()
				points := g.points()
				damaged, err := g.Damaged(points)
				if err != nil {
					t.Fatal(err)
				}
				for _, m := range points.Kept() {
					if _, ok := damaged[m.Ref("scsi0")]; ok != bad {
						t.Errorf("%s: %s: damaged: %v", what, m.ID, ok)
					}
					if v, ok := damaged[m.Ref("scsi1")]; ok {
						t.Errorf("%s: the other disk of %s: %s", what, m.ID, v)
					}
				}
			}
			note(start)
			// Points come and go, and nobody verifies.
			for i := range 2 {
				g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 1 << 20, Len: 1 << 20, Fill: byte(i + 2)}}}, repotest.Disk{Name: "scsi1"})
			}
			all := g.points()
			want("verified", true)
			drilled := repo.Checked{Drilled: []repo.Drilled{{Point: all[2].ID, Time: start, Passed: true}}}
			for i := range 2 {
				child := g.ImagePath(all[i+1].ID, "scsi0")
				renamed := false
				g.before = func(op, path string) error {
					renamed = renamed || op == "rename" && path == child
					if renamed && op == crash {
						return errDied
					}
					return nil
				}
				left, err := g.remove(t.Context(), all[i].ID)
				if crash != "" {
					if !errors.Is(err, errDied) {
						t.Fatalf("no crash: %v, %v", left, err)
					}
					want("after the crash", true)
					g.before = nil
					left, err = g.sweep()
				}
				g.done(left, err, 2-i)
				if err := g.NoteChecked(t.Context(), drilled); err != nil {
					t.Fatal(err)
				}
				want("merged", true)
			}
			if err := g.CheckSums(t.Context(), g.points()[0], "scsi0"); !errors.Is(err, chain.ErrDamaged) {
				t.Errorf("the flipped bit is not found any more: %v", err)
			}
			repotest.Flip(t, g.ImagePath(all[2].ID, "scsi0"), 40<<20)
			note(start.Add(time.Hour))
			want("mended", false)
		})
	}
}

// Who finds a point in a list and opens it when it was removed meanwhile is told so: nobody would know that it is being read,
// and its image takes in others.
func TestOpenedAfterRemoval(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(3)
	all := g.points()
	lock, err := g.LockPrune(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	if err := g.remover().Remove(all, false, all[0].ID); err != nil {
		t.Fatal(err)
	}
	if img, err := g.OpenDisk(image.NewPool(image.PoolOptions{}), all, all[0], "scsi0"); !errors.Is(err, chain.ErrNoPoint) {
		t.Errorf("opened: %v, %v", img, err)
	}
	left, err := g.remover().Sweep(t.Context())
	g.done(left, err, 2)
}

// A base that one disk keeps has given another one's image away already: nothing lies on what that was made on any more.
func TestHalfMergedBase(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	disk := func(name string, fill byte) repotest.Disk {
		return repotest.Disk{Name: name, Size: size, Write: []repotest.Write{{Off: int64(fill) << 16, Len: 1 << 16, Fill: fill}}}
	}
	g.Add(disk("scsi0", 1), disk("scsi1", 2))
	g.Add(disk("scsi0", 3), disk("scsi1", 4))
	diff := disk("scsi0", 5)
	diff.Diff = true
	g.Add(diff)
	g.Add(disk("scsi0", 6), disk("scsi1", 7))
	full0, full1 := disk("scsi0", 8), disk("scsi1", 9)
	full0.Full, full1.Full = true, true
	g.Add(full0, full1)
	all := g.points()
	left, err := g.remove(t.Context(), all[1].ID)
	if err != nil || len(left) != 1 {
		t.Fatalf("two lie on scsi0: %v, %v", left, err)
	}
	g.check("half merged")
	left, err = g.remove(t.Context(), all[0].ID, all[3].ID)
	g.done(left, err, 2)
	g.check("merged")
}

// A chain of which nothing is kept goes as it is: nothing of it is merged before.
func TestWholeChainGoes(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	for range 4 {
		g.Add(repotest.Disk{Name: "scsi0", Size: size}, repotest.Disk{Name: "scsi1", Size: size})
	}
	g.Add(repotest.Disk{Name: "scsi0", Full: true, Size: size}, repotest.Disk{Name: "scsi1", Full: true, Size: size})
	g.before = func(op, path string) error {
		if op == "commit" {
			t.Errorf("%s is merged", path)
		}
		return nil
	}
	all := g.points()
	left, err := g.remove(t.Context(), all[0].ID, all[1].ID, all[2].ID, all[3].ID)
	g.done(left, err, 1)
}
