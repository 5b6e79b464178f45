package verify_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/retain"
	"qmchain/chain/source"
	"qmchain/chain/verify"
	"qmchain/internal/durable"
)

var start = time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)

const size = 2 << 20

// fill makes n points of two disks, of which one is compressed in the first.
func fill(t testing.TB, g *repotest.Guest, n int) {
	t.Helper()
	for i := range n {
		g.Add(
			repotest.Disk{Name: "scsi0", Size: size, Write: []repotest.Write{{Off: int64(i) << 16, Len: 2 << 16, Fill: byte(i + 1)}}},
			repotest.Disk{Name: "scsi1", Size: size, Write: []repotest.Write{{Off: int64(i) << 16, Len: 1 << 16, Fill: byte(i + 101), Compress: true}}},
		)
	}
}

func newGuest(t testing.TB, n int) *repotest.Guest {
	t.Helper()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	fill(t, g, n)
	return g
}

func open(t testing.TB, dir string) source.Set {
	t.Helper()
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = set.Close() })
	return set
}

func check(t testing.TB, dir string, deep bool, points ...string) *verify.Guest {
	t.Helper()
	set := open(t, dir)
	names, err := set.Guests()
	if err != nil {
		t.Fatal(err)
	}
	var done, total int64
	c := verify.Checker{Set: set, Deep: deep, QemuImg: "qemu-img", Progress: func(d, all int64) {
		if d < done && all == total || d > all {
			t.Errorf("%d of %d after %d of %d", d, all, done, total)
		}
		done, total = d, all
	}}
	g, err := c.Guest(t.Context(), names[0], points...)
	if err != nil {
		t.Fatal(err)
	}
	if done != total {
		t.Errorf("%d of %d in the end", done, total)
	}
	return g
}

// state returns that of a disk, and the files that are the reason.
func state(t testing.TB, g *verify.Guest, id chain.ID, disk string) (verify.State, []string) {
	t.Helper()
	for _, p := range g.Points {
		for _, d := range p.Disks {
			if p.ID == string(id) && d.Name == disk {
				return d.State, d.Files
			}
		}
	}
	t.Fatalf("no disk %s of %s in %+v", disk, id, g.Points)
	return "", nil
}

func finding(t testing.TB, g *verify.Guest, k verify.Kind) verify.Finding {
	t.Helper()
	i := slices.IndexFunc(g.Findings, func(f verify.Finding) bool { return f.Kind == k })
	if i < 0 {
		t.Fatalf("no %s: %+v", k, g.Findings)
	}
	return g.Findings[i]
}

// Each file is read once, however many need it, and no more of them than those that are asked for do.
func TestGood(t *testing.T) {
	t.Parallel()
	g := newGuest(t, 4)
	var bytes int64
	for _, m := range g.Points {
		for _, d := range m.Disks {
			bytes += d.Bytes
		}
	}
	for _, deep := range []bool{false, true} {
		got := check(t, g.Repo.Dir, deep)
		if got.State != verify.Good || len(got.Points) != 4 || got.Files != 8 || got.Bytes != bytes || len(got.Findings) > 0 {
			t.Errorf("%+v", got)
		}
	}
	if got := check(t, g.Repo.Dir, false, string(g.Points[1].ID)); got.Files != 4 || len(got.Points) != 1 {
		t.Errorf("%+v", got)
	}
}

func TestWhatIsAskedFor(t *testing.T) {
	t.Parallel()
	g := newGuest(t, 3)
	a, b, c := string(g.Points[0].ID), string(g.Points[1].ID), string(g.Points[2].ID)
	repotest.Flip(t, filepath.Join(g.PointDir(g.Points[2].ID), chain.ManifestFile), 30)
	checker := verify.Checker{Set: open(t, g.Repo.Dir)}
	for _, test := range []struct {
		points []string
		want   string // of their ids
		state  verify.State
	}{
		{[]string{a}, a, verify.Good},
		{[]string{b, a}, a + b, verify.Good},
		{[]string{b[:14]}, b, verify.Good},
		// One that can't be read is the latest all the same.
		{[]string{"latest"}, c, verify.Damaged},
		{[]string{c[:14]}, c, verify.Damaged},
		{nil, a + b + c, verify.Damaged},
	} {
		got, err := checker.Guest(t.Context(), "110", test.points...)
		if err != nil {
			t.Errorf("%v: %v", test.points, err)
			continue
		}
		ids := ""
		for _, p := range got.Points {
			ids += p.ID
		}
		if ids != test.want || got.State != test.state {
			t.Errorf("%v: %+v", test.points, got)
		}
	}
	for _, points := range [][]string{{"2025"}, {a[:8]}, {a, "x"}} {
		if got, err := checker.Guest(t.Context(), "110", points...); !errors.Is(err, chain.ErrNoPoint) {
			t.Errorf("%v: %+v, %v", points, got, err)
		}
	}
	if _, err := checker.Guest(t.Context(), "111", "latest"); !errors.Is(err, chain.ErrNoPoint) {
		t.Errorf("no guest: %v", err)
	}
	if got, err := checker.Guest(t.Context(), "111"); err != nil || len(got.Points)+len(got.Findings) > 0 {
		t.Errorf("no guest: %+v, %v", got, err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := checker.Guest(cancelled, "110"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %+v, %v", got, err)
	}
}

// reseal makes the check sums and the manifest of an image those of what it is now, as if it had been written so.
func reseal(t *testing.T, g *repotest.Guest, point int, disk string) {
	t.Helper()
	m := g.Points[point]
	f, err := os.Open(g.ImagePath(m.ID, disk))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	sums, err := repo.ComputeSums(t.Context(), f, info.Size(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	written, err := g.WriteSums(repo.FolderOf(m), disk, 0, sums.Text())
	if err != nil {
		t.Fatal(err)
	}
	err = g.Rewrite(repo.FolderOf(m), func(m *chain.Manifest) error {
		m.Disk(disk).Bytes, m.Disk(disk).Sums = info.Size(), written
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// edit changes an image by hand; word reads one of its tables' entries.
func edit(t *testing.T, g *repotest.Guest, point int, disk string, change func(image []byte, word func(off uint64) uint64) []byte) {
	t.Helper()
	path := g.ImagePath(g.Points[point].ID, disk)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b = change(b, func(off uint64) uint64 { return binary.BigEndian.Uint64(b[off:]) & 0x00fffffffffffe00 })
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	reseal(t, g, point, disk)
}

// foundBy makes sure by what all damage was found.
func foundBy(t testing.TB, g *verify.Guest, tables, deep bool) {
	t.Helper()
	for _, p := range g.Points {
		for _, d := range p.Disks {
			bad := d.State == verify.Damaged
			if d.Tables != (tables && bad) || d.Deep != (deep && bad) {
				t.Errorf("%s: %+v", p.ID, d)
			}
		}
	}
}

// What was wrong with an image when it was made is found by qemu-img, as far as the tables can tell,
func TestTables(t *testing.T) {
	t.Parallel()
	g := newGuest(t, 3)
	edit(t, g, 0, "scsi0", func(b []byte, word func(uint64) uint64) []byte {
		block := word(word(48))
		binary.BigEndian.PutUint16(b[block+2*(word(word(word(40)))>>16):], 0) // of the first cluster with data
		return b
	})
	edit(t, g, 1, "scsi1", func(b []byte, word func(uint64) uint64) []byte {
		end := (uint64(len(b)) + 1<<16 - 1) &^ (1<<16 - 1)
		binary.BigEndian.PutUint16(b[word(word(48))+2*(end>>16):], 1) // of a cluster that nothing is in
		return append(b, make([]byte, int(end)+1<<16-len(b))...)
	})
	got := check(t, g.Repo.Dir, false)
	if f := finding(t, got, verify.Damage); f.File != "110/images/"+g.Points[0].Disks[0].File || !strings.Contains(f.Text, "refcount") || len(f.Affects) != 3 {
		t.Errorf("%+v", f)
	}
	if f := finding(t, got, verify.Leak); f.File != "110/images/"+g.Points[1].Disks[1].File || !strings.HasPrefix(f.Text, "1 cluster") || len(f.Affects) != 2 {
		t.Errorf("%+v", f)
	}
	foundBy(t, got, true, false)
	for _, m := range g.Points {
		if s, files := state(t, got, m.ID, "scsi0"); s != verify.Damaged || len(files) != 1 {
			t.Errorf("%s, %v", s, files)
		}
		if s, _ := state(t, got, m.ID, "scsi1"); s != verify.Good {
			t.Errorf("%s", s)
		}
	}
	// Without it nobody knows.
	c := verify.Checker{Set: open(t, g.Repo.Dir)}
	if got, err := c.Guest(t.Context(), "110"); err != nil || got.State != verify.Good {
		t.Errorf("%+v, %v", got, err)
	}
}

// and by reading, as far as the data can tell.
func TestDeep(t *testing.T) {
	t.Parallel()
	g := newGuest(t, 3)
	edit(t, g, 1, "scsi1", func(b []byte, word func(uint64) uint64) []byte {
		entry := binary.BigEndian.Uint64(b[word(word(40))+8:])
		at := entry & (1<<54 - 1)
		for i := range uint64(8) {
			b[at+i] ^= 0xff
		}
		return b
	})
	if got := check(t, g.Repo.Dir, false); got.State != verify.Good {
		t.Errorf("not deep: %+v", got)
	}
	got := check(t, g.Repo.Dir, true)
	f := finding(t, got, verify.Damage)
	if f.File != "110/images/"+g.Points[1].Disks[1].File || len(f.Affects) != 2 {
		t.Errorf("%+v", f)
	}
	foundBy(t, got, false, true)
	if s, _ := state(t, got, g.Points[0].ID, "scsi1"); s != verify.Good {
		t.Errorf("the full: %s", s)
	}

	// What every look finds is not put down to this one.
	repotest.Flip(t, g.ImagePath(g.Points[0].ID, "scsi1"), 1<<16)
	foundBy(t, check(t, g.Repo.Dir, true, string(g.Points[0].ID)), false, false)
}

func remover(g *repo.Guest) *retain.Remover {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return &retain.Remover{Guest: g, Log: log}
}

// prune removes points and sweeps.
func prune(g *repo.Guest, choose func(chain.Points) []chain.ID) error {
	lock, err := g.LockPrune(context.Background(), time.Second)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	points, _, err := g.Points()
	if err != nil {
		return err
	}
	if err := remover(g).Remove(points, false, choose(points)...); err != nil {
		return err
	}
	_, err = remover(g).Sweep(context.Background())
	return err
}

// A merge that died is no damage, at whatever step it did, and what it leaves is told; so is an unfinished point.
func TestUnfinished(t *testing.T) {
	t.Parallel()
	errDied := errors.New("died")
	dir := filepath.Join(t.TempDir(), "repo")
	made := newGuest(t, 3)
	merging, unfinished := 0, 0
	for at := 1; ; at += 3 {
		if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(made.Repo.Dir))); err != nil {
			t.Fatal(err)
		}
		n := 0
		r, err := repo.Open(dir, durable.FS{Before: func(string, string) error {
			if n++; n >= at {
				return errDied
			}
			return nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		g, err := r.Guest("110")
		if err != nil {
			t.Fatal(err)
		}
		err = prune(g, func(points chain.Points) []chain.ID { return []chain.ID{points[0].ID} })
		if err != nil && !errors.Is(err, errDied) {
			t.Fatal(err)
		}
		done := err == nil
		got := check(t, dir, false)
		for _, f := range got.Findings {
			switch f.Kind {
			case verify.BeingMerged:
				merging++
				if s, files := state(t, got, made.Points[2].ID, "scsi0"); got.State != verify.Merging || s == verify.Good && len(files) > 0 {
					t.Errorf("step %d: %+v", at, got)
				}
			case verify.Unfinished:
				unfinished++
			case verify.Leak: // until the merge is begun again
			default:
				t.Errorf("step %d: %+v", at, f)
			}
		}
		if got.State != verify.Good && got.State != verify.Merging {
			t.Errorf("step %d: %+v", at, got)
		}
		if done {
			break
		}
	}
	if merging < 5 {
		t.Errorf("only %d merges were seen", merging)
	}
	g, err := repo.Open(dir, durable.FS{})
	if err != nil {
		t.Fatal(err)
	}
	guest, err := g.Guest("110")
	if err != nil {
		t.Fatal(err)
	}
	p, err := guest.Begin(chain.NewID(start.AddDate(1, 0, 0), "", 1))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.CreateImage(t.Context(), "scsi0", size, nil, repo.ImageOptions{}); err != nil {
		t.Fatal(err)
	}
	got := check(t, dir, false)
	if f := finding(t, got, verify.Unfinished); got.State != verify.Good || !strings.Contains(f.File, string(p.ID)) {
		t.Errorf("%+v", got)
	}
}

// While points come, go and are merged nothing is taken for damage.
func TestWhileOthersWrite(t *testing.T) {
	t.Parallel()
	g := newGuest(t, 5)
	stop := make(chan struct{})
	var verifier sync.WaitGroup
	looks := 0
	for deep := range 2 {
		verifier.Go(func() {
			c := verify.Checker{Set: open(t, g.Repo.Dir), Deep: deep == 1, QemuImg: "qemu-img", Jobs: 2}
			for {
				select {
				case <-stop:
					return
				default:
				}
				got, err := c.Guest(t.Context(), "110")
				if err != nil {
					t.Error(err)
					return
				}
				if got.State == verify.Damaged || got.State == verify.Unknown {
					t.Errorf("%+v", got.Findings)
					return
				}
				if deep == 1 {
					looks++
				}
			}
		})
	}
	r := rand.New(rand.NewPCG(4, 4))
	for range 6 {
		err := prune(g.Guest, func(points chain.Points) (ids []chain.ID) {
			kept := points.Kept()
			for _, p := range kept[:len(kept)-1] {
				if len(kept)-len(ids) > 3 && r.IntN(2) == 0 {
					ids = append(ids, p.ID)
				}
			}
			return ids
		})
		if err != nil {
			t.Error(err)
		}
		fill(t, g, 1)
	}
	close(stop)
	verifier.Wait()
	if looks < 3 {
		t.Errorf("only %d looks", looks)
	}
}

// broken is a file system that passes a folder through, and can't read some files.
type broken struct {
	*fs.LoopbackNode
	bad func(path string) bool
}

var (
	_ fs.NodeReader      = (*broken)(nil)
	_ fs.NodeWrapChilder = (*broken)(nil)
)

func (b *broken) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &broken{ops.(*fs.LoopbackNode), b.bad}
}

func (b *broken) Read(ctx context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if b.bad(b.Path(nil)) {
		return nil, syscall.EIO
	}
	return f.(fs.FileReader).Read(ctx, dest, off)
}

// What can't be read just now is no damage; the rest is verified.
func TestUnreadable(t *testing.T) {
	t.Parallel()
	g := newGuest(t, 3)
	middle := g.Points[1]
	for name, bad := range map[string]func(string) bool{
		"image":      func(path string) bool { return strings.HasSuffix(path, middle.Disks[0].File) },
		"check sums": func(path string) bool { return strings.HasSuffix(path, string(middle.ID)+"/scsi0.sums") },
	} {
		mnt := t.TempDir()
		root, err := fs.NewLoopbackRoot(g.Repo.Dir)
		if err != nil {
			t.Fatal(err)
		}
		server, err := fs.Mount(mnt, &broken{root.(*fs.LoopbackNode), bad}, &fs.Options{MountOptions: fuse.MountOptions{DisabledCapabilities: fuse.CAP_PASSTHROUGH}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = unix.Unmount(mnt, unix.MNT_FORCE|unix.MNT_DETACH)
			server.Wait()
		})
		got := check(t, mnt, false)
		f := finding(t, got, verify.Unreadable)
		if got.State != verify.Unknown || !bad(filepath.Join(mnt, f.File)) || got.Has(verify.Damage) {
			t.Errorf("%s: %+v", name, got)
		}
		for i, m := range g.Points {
			want := map[bool]verify.State{true: verify.Good, false: verify.Unknown}[i == 0]
			if s, _ := state(t, got, m.ID, "scsi0"); s != want {
				t.Errorf("%s: %s is %s", name, m.ID, s)
			}
			if s, _ := state(t, got, m.ID, "scsi1"); s != verify.Good {
				t.Errorf("%s: the other disk of %s is %s", name, m.ID, s)
			}
		}
		if got.Files < 5 {
			t.Errorf("%s: only %d files were read", name, got.Files)
		}
	}
}

// A share that is away for a moment costs no point; what stays away is lost.
func TestMissingForAMoment(t *testing.T) {
	t.Parallel()
	g := newGuest(t, 2)
	image, away := g.ImagePath(g.Points[0].ID, "scsi0"), filepath.Join(t.TempDir(), "away")
	if err := os.Rename(image, away); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	c := verify.Checker{Set: open(t, g.Repo.Dir), Progress: func(int64, int64) {
		once.Do(func() { // when it has been missed
			if err := os.Rename(away, image); err != nil {
				t.Error(err)
			}
		})
	}}
	got, err := c.Guest(t.Context(), "110")
	if err != nil || got.State != verify.Good || got.Files != 4 || len(got.Findings) > 0 {
		t.Errorf("%+v, %v", got, err)
	}

	if err := os.Remove(image); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c.Progress = func(int64, int64) { cancel() }
	if _, err := c.Guest(ctx, "110"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	c.Progress = nil
	if got, err = c.Guest(t.Context(), "110"); err != nil || got.State != verify.Damaged || finding(t, got, verify.Damage).Text != "it is missing" {
		t.Errorf("%+v, %v", got, err)
	}
}

// Every set that other programs have written: what is refused is damaged, what is doubtful is warned of, all else is good.
func TestForeign(t *testing.T) {
	t.Parallel()
	root := map[string]string{"qmpbackup": foreigntest.Unpack(t, "qmpbackup/"), "virtnbdbackup": foreigntest.Unpack(t, "virtnbdbackup/")}
	for _, c := range foreigntest.Cases(t) {
		t.Run(c.Path(), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(root[c.Tool], c.Path())
			got := check(t, dir, c.Name == "v3-compress" || c.Name == "b-compress")
			want := verify.Good
			refused, damaged, doubtful := 0, 0, c.Tool == "virtnbdbackup" && c.Name[:2] != "v1" && len(c.Points) > 1
			for _, w := range c.Points {
				if w.Refuse {
					want = verify.Damaged
					refused++
				}
				doubtful = doubtful || w.Warn || w.RefuseOrWarn
			}
			if got.State != want || got.Has(verify.Warning) != doubtful {
				t.Errorf("%+v", got)
			}
			noSums := len(c.Points) > 0 && (c.Tool == "qmpbackup" || c.Name[:2] == "v1")
			if got.Has(verify.NoSums) != noSums || got.Has(verify.Unreadable) || got.Has(verify.Unfinished) {
				t.Errorf("%+v", got.Findings)
			}
			for _, f := range got.Findings {
				if f.Kind == verify.Damage && len(f.Affects) == 0 {
					t.Errorf("%+v", f)
				}
			}
			for _, p := range got.Points {
				for _, d := range p.Disks {
					if d.State == verify.Damaged {
						damaged++
					}
				}
			}
			if refused != damaged {
				t.Errorf("%d are damaged, not %d: %+v", damaged, refused, got.Findings)
			}
		})
	}
}

// Damage in a foreign set.
func TestForeignDamage(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		set, file, disk string
		offset          int64
		text            string
		damaged         []int // points
	}{
		{"virtnbdbackup/v3-chain", "vda.inc.virtnbdbackup.1.data", "vda", 5000, "check sum", []int{1, 2, 3}},
		{"virtnbdbackup/v3-chain", "vda.full.data", "vda", 20, "", []int{0, 1, 2, 3}},
		{"virtnbdbackup/v3-chain", "vda.inc.virtnbdbackup.2.data.chksum", "vda", 2, "", []int{2, 3}},
		{"qmpbackup/f-drive-style", "", "", 3, "", []int{0, 1}},
	} {
		t.Run(test.set+"/"+test.file, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(foreigntest.Unpack(t, test.set+"/"), test.set)
			file, disk := test.file, test.disk
			if file == "" {
				cases := foreigntest.Cases(t)
				c := cases[slices.IndexFunc(cases, func(c foreigntest.Case) bool { return c.Path() == test.set })]
				file, disk = c.Points[0].File, c.Points[0].Disk
			}
			repotest.Flip(t, filepath.Join(dir, file), test.offset)
			got := check(t, dir, false)
			f := finding(t, got, verify.Damage)
			if !strings.HasPrefix(file, f.File) || !strings.Contains(f.Text, test.text) {
				t.Errorf("%+v", f)
			}
			for i, p := range got.Points {
				want := verify.Good
				if slices.Contains(test.damaged, i) {
					want = verify.Damaged
				}
				if s, _ := state(t, got, chain.ID(p.ID), disk); s != want {
					t.Errorf("point %d: %s, not %s: %+v", i, s, want, got.Findings)
				}
			}
			others := 0
			for _, p := range got.Points {
				for _, d := range p.Disks {
					if d.Name != disk {
						others++
						if d.State != verify.Good {
							t.Errorf("%s of %s is %s", d.Name, p.ID, d.State)
						}
					}
				}
			}
			if others == 0 {
				t.Error("there is no other disk")
			}
		})
	}
}

func ExampleWorse() {
	fmt.Println(verify.Worse(verify.Good, verify.Merging), verify.Worse(verify.Damaged, verify.Unknown))
	// Output: merging damaged
}
