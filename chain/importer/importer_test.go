package importer_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
	"qmchain/chain/importer"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
	"qmchain/chain/virtnbd/streamtest"
	"qmchain/internal/durable"
)

func openSet(t testing.TB, dir string) (source.Set, *source.Points) {
	t.Helper()
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = set.Close() })
	names, err := set.Guests()
	if err != nil {
		t.Fatal(err)
	}
	g, err := set.Guest(names[0])
	if err != nil {
		t.Fatal(err)
	}
	points, err := g.Points()
	if err != nil {
		t.Fatal(err)
	}
	return set, points
}

func config(set source.Set, dir string, fsys durable.FS) importer.Config {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return importer.Config{
		Set: set, Guest: "web", Log: log, LockWait: time.Second,
		Open: func() (*repo.Repo, error) { return repo.OpenOrCreate(dir, fsys) },
	}
}

func guest(t testing.TB, dir string) (*repo.Guest, chain.Points) {
	t.Helper()
	r, err := repo.OpenOrCreate(dir, durable.FS{})
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Guest("web")
	if err != nil {
		t.Fatal(err)
	}
	points, problems, err := g.Points()
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	return g, points
}

func digestOf(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// imported makes sure that each disk of each point that was imported reads as the set's, as qemu-img reads it, and returns what the disks are: by file in the set, their digests.
func imported(t testing.TB, dir string, from *source.Points) map[string]string {
	t.Helper()
	g, points := guest(t, dir)
	pool := image.NewPool(image.PoolOptions{})
	raw := filepath.Join(t.TempDir(), "raw")
	digests := map[string]string{}
	for _, m := range points {
		theirs := from.All.Find(m.ID)
		if theirs == nil || theirs.UUID != m.UUID || !theirs.Time.Equal(m.Time) {
			t.Fatalf("%s is no point of the set", m.ID)
		}
		for _, d := range m.Disks {
			if err := g.CheckSums(t.Context(), m, d.Name); err != nil {
				t.Error(err)
			}
			want, err := from.OpenDisk(pool, theirs, d.Name)
			if err != nil {
				t.Fatal(err)
			}
			sum := digestOf(t, io.NewSectionReader(want, 0, d.VirtualSize))
			_ = want.Close()
			repotest.Convert(t, g.ImagePath(m.ID, d.Name), raw)
			f, err := os.Open(raw)
			if err != nil {
				t.Fatal(err)
			}
			if digestOf(t, f) != sum {
				t.Errorf("%s/%s: by qemu-img it reads as something else", m.ID, d.Name)
			}
			_ = f.Close()
			if !strings.HasPrefix(m.Note, "imported from ") && !strings.Contains(m.Note, "; imported from ") {
				t.Errorf("note %q", m.Note)
			}
			if m.Consistency != chain.Unknown || m.QEMU != "" {
				t.Errorf("%s is said to be %q and made by QEMU %q, of which the set says nothing", m.ID, m.Consistency, m.QEMU)
			}
			digests[theirs.Disk(d.Name).File] = sum // of a file with snapshots, the newest
		}
	}
	if strays, err := g.Strays(); len(strays) > 0 || err != nil {
		t.Errorf("strays %v, %v", strays, err)
	}
	if partials, err := g.Partials(); len(partials) > 0 || err != nil {
		t.Errorf("partials %v, %v", partials, err)
	}
	return digests
}

// Every point of every real set is imported as it must be read, is one increment after a full for each disk, and what must
// be refused is not imported.
func TestSets(t *testing.T) {
	t.Parallel()
	root := map[string]string{}
	for _, tool := range []string{"qmpbackup", "virtnbdbackup"} {
		root[tool] = foreigntest.Unpack(t, tool)
	}
	for _, c := range foreigntest.Cases(t) {
		t.Run(c.Path(), func(t *testing.T) {
			t.Parallel()
			set, points := openSet(t, filepath.Join(root[c.Tool], c.Path()))
			if len(points.All) == 0 {
				if _, err := importer.Import(t.Context(), config(set, t.TempDir(), durable.FS{})); !errors.Is(err, chain.ErrNoPoint) {
					t.Error(err)
				}
				return
			}
			dir := t.TempDir()
			cfg := config(set, dir, durable.FS{})
			list, err := importer.Import(t.Context(), cfg)
			if err != nil || len(list) != len(points.All) {
				t.Fatalf("%d points of %d: %v", len(list), len(points.All), err)
			}
			digests := imported(t, dir, points)
			for _, w := range c.Points {
				got, ok := digests[w.File]
				switch {
				case w.Refuse && ok:
					t.Errorf("%s was imported", w.File)
				case !w.Refuse && !ok:
					t.Errorf("%s was not imported", w.File)
				case ok && got != w.SHA256 && !w.RefuseOrWarn:
					t.Errorf("%s has other content", w.File)
				}
			}
			_, now := guest(t, dir)
			fulls := map[string]bool{}
			for _, m := range now {
				for _, d := range m.Disks {
					if fulls[d.Name] != (d.Level == chain.Inc) {
						t.Errorf("%s/%s: level %s", m.ID, d.Name, d.Level)
					}
					fulls[d.Name] = true
				}
			}
			for i, p := range list {
				problems := 0
				for _, about := range slices.Concat(points.Problems, points.Warnings) {
					if about.Point == string(points.All[i].ID) {
						problems++
					}
				}
				if m := now.Find(p.ID); len(p.Problems) != problems || p.Skipped != (m == nil) || p.There {
					t.Errorf("%+v; %d problems", p, problems)
				} else if m != nil && problems > 0 && !strings.Contains(m.Note, p.Problems[0]) {
					t.Errorf("note %q says nothing of %q", m.Note, p.Problems)
				}
			}
			// Once more: nothing is done.
			list, err = importer.Import(t.Context(), cfg)
			if err != nil {
				t.Error(err)
			}
			for _, p := range list {
				if !p.There && !p.Skipped {
					t.Errorf("imported again: %+v", p)
				}
			}
		})
	}
}

// A set's increments become ones that are no larger, and so do fulls.
func TestSizes(t *testing.T) {
	t.Parallel()
	dir := foreigntest.Unpack(t, "qmpbackup/")
	set, points := openSet(t, filepath.Join(dir, "qmpbackup/d-monthly-auto"))
	to := t.TempDir()
	if _, err := importer.Import(t.Context(), config(set, to, durable.FS{})); err != nil {
		t.Fatal(err)
	}
	_, now := guest(t, to)
	for _, m := range now {
		for _, d := range m.Disks {
			theirs := points.All.Find(m.ID).Disk(d.Name)
			if d.Level == chain.Inc && d.Bytes > theirs.Bytes+4*65536 {
				t.Errorf("%s/%s has %d bytes, in the set %d", m.ID, d.Name, d.Bytes, theirs.Bytes)
			}
		}
	}
}

// Chosen points are imported alone, in any order, and are what they are.
func TestChosenPoints(t *testing.T) {
	t.Parallel()
	dir := foreigntest.Unpack(t, "virtnbdbackup/")
	set, points := openSet(t, filepath.Join(dir, "virtnbdbackup/v2-chain"))
	to := t.TempDir()
	cfg := config(set, to, durable.FS{})
	ids := func(list ...int) (names []string) {
		for _, i := range list {
			names = append(names, string(points.All[i].ID))
		}
		return names
	}
	guests, err := set.Guests()
	if err != nil {
		t.Fatal(err)
	}
	for _, names := range [][]string{ids(2), {guests[0] + "/" + ids(1)[0][:18], ids(1)[0]}, {"latest"}, nil} {
		cfg.Points = names
		if _, err := importer.Import(t.Context(), cfg); err != nil {
			t.Fatalf("%q: %v", names, err)
		}
	}
	imported(t, to, points)
	if _, now := guest(t, to); len(now) != len(points.All) {
		t.Errorf("%d points", len(now))
	}
	for _, names := range [][]string{{"2019"}, {"other/latest"}} {
		cfg.Points = names
		if _, err := importer.Import(t.Context(), cfg); !errors.Is(err, chain.ErrNoPoint) {
			t.Errorf("%q: %v", names, err)
		}
	}
	g, now := guest(t, to)
	if data, err := os.ReadFile(filepath.Join(g.PointDir(now[0].ID), repo.GuestFilesFolder, "vmconfig.virtnbdbackup.0.xml")); err != nil || !bytes.Contains(data, []byte("<domain")) {
		t.Errorf("the guest's configuration: %v", err)
	}
	if now[0].Guest.UUID == "" || now[0].Guest.Name != "web" {
		t.Errorf("%+v", now[0].Guest)
	}
}

// writeSet makes a set of qmpbackup: images of one disk, each with what qemu-io is told to do.
func writeSet(t testing.TB, disk string, size string, images ...string) string {
	t.Helper()
	dir := t.TempDir()
	mkdir := func(path string) {
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mkdir(filepath.Join(dir, disk))
	put := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("uuid", "0b5c9c5e-3f4e-4a1e-9d8b-0123456789ab")
	put(disk+".config", `{"format":"qcow2","virtual-size":1}`)
	for i, script := range images {
		level := "INC"
		if i == 0 {
			level = "FULL"
		}
		if rest, ok := strings.CutPrefix(script, "FULL "); ok {
			level, script = "FULL", rest
		}
		if m := regexp.MustCompile(`^SIZE ([0-9]+[KM]?) `).FindStringSubmatch(script); m != nil {
			size, script = m[1], script[len(m[0]):]
		}
		path := filepath.Join(dir, disk, fmt.Sprintf("%s-%d-%s", level, 1700000000+i*60, disk))
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, size)
		args := []string{"-f", "qcow2"}
		for _, cmd := range strings.Split(script, ";") {
			args = append(args, "-c", cmd)
		}
		run(t, "qemu-io", append(args, path)...)
	}
	return dir
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// Disks that grow and shrink, zeroes that hide data, clusters at the very end, and a second full of the same data.
func TestShapes(t *testing.T) {
	t.Parallel()
	dir := writeSet(t, "a b.img", "1000K",
		"write -P 1 0 1000K",
		"write -z 64k 128k;write -P 2 960K 40K",
		"write -z 960K 40K",
		"SIZE 3M write -P 3 2900K 100K",
		"SIZE 2M write -P 4 100K 4K",
		"SIZE 4M write -P 4 128K 64K",
		"FULL SIZE 4M write -P 4 128K 64K;write -P 9 3M 1M",
		"write -P 9 3M 1M;write -z 128K 64K",
		"discard 0 4M",
	)
	set, points := openSet(t, dir)
	if len(points.Problems) > 0 {
		t.Fatal(points.Problems)
	}
	to := t.TempDir()
	cfg := config(set, to, durable.FS{})
	cfg.Verify = true
	list, err := importer.Import(t.Context(), cfg)
	if err != nil || len(list) != 9 {
		t.Fatal(list, err)
	}
	g, now := guest(t, to)
	raw := filepath.Join(t.TempDir(), "raw")
	pool := image.NewPool(image.PoolOptions{})
	var levels []chain.Level
	some := config(set, t.TempDir(), durable.FS{})
	for _, i := range []int{0, 3, 5, 8} { // the fifth, which is left out, hid a part of the fourth
		some.Points = append(some.Points, string(points.All[i].ID))
	}
	some.Verify = true
	var done, total int64
	some.Progress = func(_ string, d, t int64) {
		if d < done || d > t {
			t = -1
		}
		done, total = d, t
	}
	if _, err := importer.Import(t.Context(), some); err != nil || done != total || total < 10<<20 {
		t.Errorf("%v; %d of %d bytes", err, done, total)
	}
	for i, m := range now {
		d := m.Disks[0]
		levels = append(levels, d.Level)
		if d.Name != "a_b.img" {
			t.Errorf("disk %q", d.Name)
		}
		img, err := points.OpenDisk(pool, points.All[i], "a b.img")
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, img.Size())
		if _, err := img.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		_ = img.Close()
		repotest.Convert(t, g.ImagePath(m.ID, d.Name), raw)
		if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s reads as something else, %v", m.ID, err)
		}
	}
	if want := "[full inc inc inc full inc inc inc inc]"; fmt.Sprint(levels) != want {
		t.Errorf("levels %v, want %s", levels, want)
	}
	// The seventh is a full of 1 MiB more than the sixth; the eighth writes the same again.
	if now[7].Disks[0].Bytes > now[6].Disks[0].Bytes-900<<10 {
		t.Errorf("%d and %d bytes", now[6].Disks[0].Bytes, now[7].Disks[0].Bytes)
	}
}

// Increments and diffs of every descent, on disks of several regions that grow, chosen and imported in any order, read as what
// was written.
func TestRandom(t *testing.T) {
	t.Parallel()
	for seed := range uint64(2) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		dir := t.TempDir()
		size := 129<<20 + 512*rnd.Int64N(9)
		put := func(name string, s streamtest.Stream) {
			if err := os.WriteFile(filepath.Join(dir, name), s.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var want [][]byte
		base := make([]byte, size) // of the newest checkpoint
		checkpoint := 0
		for n := range 6 {
			disk := bytes.Clone(base)
			if n > 0 && rnd.IntN(3) == 0 {
				disk = append(disk, make([]byte, 40<<10)...)
			}
			s := streamtest.Stream{Size: int64(len(disk)), Disk: "vda", Date: fmt.Sprintf("2026-11-20T11:17:%02d.5", n), Compress: rnd.IntN(2) == 0}
			for at := int64(0); at < s.Size; {
				// Often the same again, or zeroes; mostly little, and far from the last.
				data := bytes.Repeat([]byte{byte(rnd.IntN(3))}, int(min(512*(1+rnd.Int64N(300)), s.Size-at)))
				s.Frames = append(s.Frames, streamtest.Frame{Off: at, Data: data})
				copy(disk[at:], data)
				at += int64(len(data)) + 512*(1+rnd.Int64N(30000))
			}
			switch {
			case n == 0:
				s.Checkpoint = "virtnbdbackup.0"
				put("vda.full.data", s)
			case rnd.IntN(2) == 0:
				s.Checkpoint, s.Parent = fmt.Sprint("virtnbdbackup.", checkpoint+1), fmt.Sprint("virtnbdbackup.", checkpoint)
				put(fmt.Sprintf("vda.diff.%d.data", 1795173420+n), s)
			default:
				s.Checkpoint, s.Parent = fmt.Sprint("virtnbdbackup.", checkpoint+1), fmt.Sprint("virtnbdbackup.", checkpoint)
				checkpoint++
				put("vda.inc."+s.Checkpoint+".data", s)
			}
			if s.Checkpoint == fmt.Sprint("virtnbdbackup.", checkpoint) {
				base = disk
			}
			want = append(want, disk)
		}
		set, points := openSet(t, dir)
		if len(points.All) != len(want) || len(points.Problems) > 0 {
			t.Fatal(len(points.All), points.Problems)
		}
		byTime := map[time.Time][]byte{} // diffs have their second from their name
		for n, disk := range want {
			byTime[time.Date(2026, 11, 20, 11, 17, n, 0, time.UTC)] = disk
		}
		to := t.TempDir()
		cfg := config(set, to, durable.FS{})
		for _, n := range rnd.Perm(len(want))[:3] {
			cfg.Points = []string{string(points.All[n].ID)}
			if _, err := importer.Import(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
		}
		cfg.Points = nil
		if _, err := importer.Import(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		g, now := guest(t, to)
		pool := image.NewPool(image.PoolOptions{})
		for _, m := range now {
			img, err := g.OpenDisk(pool, now, m, "vda")
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, img.Size())
			if _, err := img.ReadAt(got, 0); err != nil {
				t.Error(err)
			}
			_ = img.Close()
			if disk, ok := byTime[m.Time]; !ok || !bytes.Equal(got, disk) {
				t.Errorf("seed %d: %s of %s, %s: it reads as something else", seed, m.ID, m.Time, m.Disks[0].Reason)
			}
		}
	}
}

// What is damaged is left out, and what comes after it needs it no more.
func TestDamage(t *testing.T) {
	t.Parallel()
	unpacked := foreigntest.Unpack(t, "virtnbdbackup/v2-compress")
	dir := filepath.Join(unpacked, "virtnbdbackup/v2-compress")
	_, points := openSet(t, dir)
	disk := points.All[1].Disks[0]
	other := len(points.All[1].Disks) - 1
	repotest.Flip(t, filepath.Join(dir, disk.File), disk.Bytes/2) // its check sum tells
	set, points := openSet(t, dir)
	to := t.TempDir()
	list, err := importer.Import(t.Context(), config(set, to, durable.FS{}))
	if err != nil || len(list[1].Problems) == 0 || !strings.Contains(list[1].Problems[0], "is not imported") {
		t.Fatalf("%+v, %v", list, err)
	}
	_, now := guest(t, to)
	if m := now.Find(points.All[1].ID); other > 0 && (m == nil || m.Disk(disk.Name) != nil) || other == 0 && m != nil {
		t.Errorf("%+v", m)
	}
	imported(t, to, points)

	// A cluster that can't be read, found in the middle of it.
	dir = writeSet(t, "a", "2M", "write -P 1 0 2M", "write -P 2 0 64K;write -P 3 1M 64K", "FULL write -P 5 0 64K")
	path := filepath.Join(dir, "a/INC-1700000060-a")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l2 := bytes.Index(data[5*65536-65536:], []byte{0x80, 0, 0, 0}) + 5*65536 - 65536 // the first L2 entry
	copy(data[l2+16*8:], []byte{0x80, 0, 0, 0x7f, 0, 0, 0, 0})                       // that of 1 MiB, beyond the file
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	set, points = openSet(t, dir)
	to = t.TempDir()
	list, err = importer.Import(t.Context(), config(set, to, durable.FS{}))
	if err != nil || len(list) != 3 || !list[1].Skipped || list[2].Skipped {
		t.Fatalf("%+v, %v", list, err)
	}
	imported(t, to, points)
}

// Points of another guest are no place for a set's, nor is what has changed taken for what was.
func TestRefusals(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(foreigntest.Unpack(t, "virtnbdbackup/v1-chain"), "virtnbdbackup/v1-chain")
	set, points := openSet(t, dir)
	to := t.TempDir()
	cfg := config(set, to, durable.FS{})
	repotest.NewGuest(t, repotest.New(t, to), "web", time.Now()).Add(repotest.Disk{Name: "vda", Size: 1 << 20})
	if _, err := importer.Import(t.Context(), cfg); !errors.Is(err, repo.ErrOtherGuest) {
		t.Error(err)
	}
	cfg.Guest = "db"
	if _, err := importer.Import(t.Context(), cfg); err != nil {
		t.Error(err)
	}
	cfg.Guest = "../db"
	if _, err := importer.Import(t.Context(), cfg); err == nil {
		t.Error("a path was taken for a guest")
	}
	cfg.Guest = "other"
	own, _ := openSet(t, to)
	cfg.Set = own
	if _, err := importer.Import(t.Context(), cfg); !errors.Is(err, importer.ErrNotForeign) {
		t.Error(err)
	}
	// Another point under the id.
	cfg = config(set, t.TempDir(), durable.FS{})
	cfg.Points = []string{string(points.All[0].ID)}
	if _, err := importer.Import(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	r, err := cfg.Open()
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Guest("web")
	if err != nil {
		t.Fatal(err)
	}
	folder := repo.FolderOf(points.All[0])
	if err := g.Rewrite(folder, func(m *chain.Manifest) error { m.UUID = repo.NewUUID(); return nil }); err != nil {
		t.Fatal(err)
	}
	if list, err := importer.Import(t.Context(), cfg); err != nil || !list[0].Skipped || len(list[0].Problems) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
	lock, err := g.LockPrune(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	cfg.LockWait = 0
	if _, err := importer.Import(t.Context(), cfg); !errors.Is(err, repo.ErrLocked) {
		t.Error(err)
	}
}

// Whatever step of an increment's import fails, or is the last one before death, there are whole points, and another import
// goes on.
func TestEveryStep(t *testing.T) {
	t.Parallel()
	set, points := openSet(t, writeSet(t, "a", "1M", "write -P 1 0 256K", "write -P 2 64K 64K"))
	to := t.TempDir()
	var op string
	failAt, steps, dead := 0, 0, false
	fsys := durable.FS{Before: func(o, path string) error {
		steps++
		if steps == failAt {
			op = o + " " + filepath.Base(path)
		}
		if failAt > 0 && (steps == failAt || dead && steps > failAt) {
			return syscall.EIO
		}
		return nil
	}}
	cfg := config(set, to, fsys)
	cfg.Points = []string{string(points.All[0].ID)}
	if _, err := importer.Import(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	template := t.TempDir()
	run(t, "cp", "-a", to+"/.", template)
	cfg.Points = nil
	try := func() error {
		steps = 0
		_, err := importer.Import(t.Context(), cfg)
		return err
	}
	for step := 1; ; step++ {
		run(t, "rm", "-r", to)
		run(t, "cp", "-a", template, to)
		failAt, dead = step, false
		err := try()
		if steps < step {
			if err != nil || steps < 20 {
				t.Errorf("%d steps: %v", steps, err)
			}
			imported(t, to, points)
			return
		}
		g, now := guest(t, to)
		partials, _ := g.Partials()
		if failed := errors.Is(err, syscall.EIO); !failed && !strings.HasPrefix(op, "syncdir") || failed != (len(now) == 1) || len(partials) > 0 {
			t.Errorf("step %d, %s: %v, %d points, partials %v", step, op, err, len(now), partials)
		}
		run(t, "rm", "-r", to)
		run(t, "cp", "-a", template, to)
		dead = true
		if err := try(); !errors.Is(err, syscall.EIO) {
			t.Errorf("step %d, %s: %v", step, op, err)
		}
		_, now = guest(t, to)
		was := len(now)
		failAt = 0
		if err := try(); err != nil {
			t.Errorf("step %d, %s: again: %v", step, op, err)
		}
		g, now = guest(t, to)
		if partials, _ := g.Partials(); len(now) != 2 || len(partials) > 0 {
			t.Errorf("step %d, %s: %d points after %d, partials %v", step, op, len(now), was, partials)
		}
		if strays, err := g.Strays(); len(strays) > 0 || err != nil {
			t.Errorf("step %d, %s: strays %v, %v", step, op, strays, err)
		}
		if t.Failed() || step%5 == 0 {
			imported(t, to, points)
		}
	}
}

// A full file system, an end in the middle, and a qemu-nbd that is not there or no such thing: an error, and nothing left.
func TestFailures(t *testing.T) {
	t.Parallel()
	dir := writeSet(t, "a", "8M", "write -P 1 0 256K", "write -P 2 1M 6M")
	set, points := openSet(t, dir)
	to := t.TempDir()
	if err := unix.Mount("qmchain-test", to, "tmpfs", 0, "size=3m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(to, unix.MNT_DETACH) })
	if list, err := importer.Import(t.Context(), config(set, to, durable.FS{})); !errors.Is(err, syscall.ENOSPC) || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	imported(t, to, points)

	for _, at := range []string{"create", "write", "sync", "rename"} {
		ctx, cancel := context.WithCancel(t.Context())
		to := t.TempDir()
		fsys := durable.FS{Before: func(op, path string) error {
			if op == at && strings.Contains(path, "qcow2") {
				cancel()
			}
			return nil
		}}
		_, err := importer.Import(ctx, config(set, to, fsys))
		if !errors.Is(err, context.Canceled) && at != "rename" {
			t.Errorf("ended before %s: %v", at, err)
		}
		imported(t, to, points)
		cancel()
	}
	for program, want := range map[string]string{"/nonexistent": "no such file", "false": "has ended", "true": "has ended"} {
		to := t.TempDir()
		cfg := config(set, to, durable.FS{})
		cfg.QemuNbd = program
		if _, err := importer.Import(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", program, err)
		}
		imported(t, to, points)
	}
}

// What was written and reads as something else is no point.
func TestVerify(t *testing.T) {
	t.Parallel()
	set, points := openSet(t, writeSet(t, "a", "2M", "write -P 1 0 256K", "write -P 2 64K 64K"))
	for _, change := range []string{"write -P 9 1M 1", "write -P 9 70K 1", "write -z 0 1M"} {
		to := t.TempDir()
		cfg := config(set, to, durable.FS{Before: func(op, path string) error {
			if op == "sync" && strings.HasSuffix(path, ".qcow2") {
				run(t, "qemu-io", "-f", "qcow2", "-c", change, path)
			}
			return nil
		}})
		if _, err := importer.Import(t.Context(), cfg); err != nil {
			t.Errorf("%s: not to be seen without: %v", change, err)
		}
		cfg.Guest, cfg.Verify = "db", true
		if list, err := importer.Import(t.Context(), cfg); !errors.Is(err, importer.ErrDiffers) || len(list) > 0 {
			t.Errorf("%s: %v, %v", change, list, err)
		}
		if _, now := guest(t, to); len(now) != len(points.All) {
			t.Errorf("%d points", len(now))
		}
		if ids, err := os.ReadDir(filepath.Join(to, "db", repo.ImagesFolder)); err != nil || len(ids) > 0 {
			t.Errorf("left: %v, %v", ids, err)
		}
	}
}

// What is doubtful is imported, and says so.
func TestWarnings(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(foreigntest.Unpack(t, "virtnbdbackup/v3-zeroes"), "virtnbdbackup/v3-zeroes")
	set, _ := openSet(t, dir)
	to := t.TempDir()
	list, err := importer.Import(t.Context(), config(set, to, durable.FS{}))
	if err != nil || len(list[len(list)-1].Problems) == 0 {
		t.Fatalf("%+v, %v", list, err)
	}
	_, now := guest(t, to)
	if m := now.Latest(); !strings.Contains(m.Note, foreign.ErrZeroes.Error()) {
		t.Errorf("note %q", m.Note)
	}
}
