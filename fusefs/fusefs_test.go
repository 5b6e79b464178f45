package fusefs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
	"qmchain/fusefs"
)

var start = time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)

// logBuffer is a log that can be looked at while it is written to.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) logger() *logrus.Logger {
	log := logrus.New()
	log.SetOutput(l)
	log.SetLevel(logrus.DebugLevel)
	log.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	return log
}

// mount is a mounted repository, in this process.
type mount struct {
	*fusefs.Mounted
	dir string
	log *logBuffer
}

func openSet(t testing.TB, dir string) source.Set {
	t.Helper()
	set, err := source.OpenAll(dir)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func mountRepo(t *testing.T, r *repo.Repo) *mount {
	t.Helper()
	return mountSet(t, r.Dir, image.PoolOptions{})
}

// mountSet mounts the set in a directory.
func mountSet(t *testing.T, from string, pool image.PoolOptions) *mount {
	t.Helper()
	m, err := tryMount(t, from, t.TempDir(), pool)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func tryMount(t *testing.T, from, dir string, pool image.PoolOptions) (*mount, error) {
	t.Helper()
	log := &logBuffer{}
	set := openSet(t, from)
	t.Cleanup(func() { _ = set.Close() })
	m, err := fusefs.Mount(context.Background(), fusefs.Options{Set: set, Dir: dir, Log: log.logger(), Pool: pool})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		select {
		case <-m.Done():
		default:
			if err := m.Unmount(context.Background()); err != nil {
				t.Errorf("unmount: %v", err)
			}
		}
		if t.Failed() {
			t.Logf("log of the mount:\n%s", log)
		}
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	})
	return &mount{m, dir, log}, nil
}

func (m *mount) path(elem ...string) string {
	return filepath.Join(append([]string{m.dir}, elem...)...)
}

// run runs a program, bounded, and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryRun(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryRun(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func equal(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Errorf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
			return
		}
	}
	t.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
}

func isZero(b []byte) bool { return bytes.Equal(b, make([]byte, len(b))) }

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// fixture is a repository that tests only read, with one guest: scsi0 as a full and five increments with content of its
// own in each, and scsi1 with an ext4, in which the last point changed a file.
type fixture struct {
	repo *repo.Repo
	g    *repotest.Guest
}

const (
	fixtureSize = 12 << 20
	oldFill     = 0x11 // what big.bin in the ext4 is made of,
	newFill     = 0x22 // and what in the newest point
)

var sharedFixture struct {
	once sync.Once
	dir  string
	fixture
	failed string
}

type fatal struct{ failed *string }

func (f fatal) Helper() {}
func (f fatal) Fatalf(format string, args ...any) {
	*f.failed = fmt.Sprintf(format, args...)
	panic(f)
}

func TestMain(m *testing.M) {
	code := m.Run()
	if sharedFixture.dir != "" {
		_ = os.RemoveAll(sharedFixture.dir)
	}
	os.Exit(code)
}

func shared(t *testing.T) fixture {
	t.Helper()
	f := &sharedFixture
	f.once.Do(func() {
		defer func() {
			if p := recover(); p != nil && f.failed == "" {
				panic(p)
			}
		}()
		tb := fatal{&f.failed}
		dir, err := os.MkdirTemp("", "fusefs-fixture-")
		if err != nil {
			tb.Fatalf("%v", err)
		}
		f.dir = dir
		f.repo = repotest.New(tb, mkdir(tb, dir, "repo"))
		f.g = repotest.NewGuest(tb, f.repo, "110", start)
		f.g.SetFiles(map[string][]byte{"110.conf": []byte("memory: 512\n"), "110.fw": []byte("[OPTIONS]\n")})
		ext4 := filepath.Join(dir, "ext4.raw")
		at := makeExt4(tb, ext4)
		f.g.Add(
			repotest.Disk{Name: "scsi0", Size: fixtureSize, Write: repotest.RandomWrites(1, 30, fixtureSize, 10)},
			repotest.Disk{Name: "scsi1", Image: ext4},
		)
		for i := range 5 {
			disks := []repotest.Disk{{Name: "scsi0", Write: repotest.RandomWrites(uint64(100+i), 8, fixtureSize, byte(40+10*i))}}
			if i == 4 {
				disks = append(disks, repotest.Disk{Name: "scsi1", Write: []repotest.Write{{Off: at, Len: 1 << 20, Fill: newFill}}})
			}
			f.g.Add(disks...)
		}
	})
	if f.failed != "" {
		t.Fatal(f.failed)
	}
	return f.fixture
}

func mkdir(tb repotest.TB, elem ...string) string {
	dir := filepath.Join(elem...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		tb.Fatalf("%v", err)
	}
	return dir
}

// makeExt4 makes a file system with a megabyte of oldFill in big.bin, and returns where in the image that is.
func makeExt4(tb repotest.TB, path string) int64 {
	src := mkdir(tb, path+".src")
	big := bytes.Repeat([]byte{oldFill}, 1<<20)
	if err := errors.Join(
		os.WriteFile(filepath.Join(src, "big.bin"), big, 0o600),
		os.WriteFile(filepath.Join(src, "hello"), []byte("hello\n"), 0o600),
	); err != nil {
		tb.Fatalf("%v", err)
	}
	out, err := exec.Command("mkfs.ext4", "-q", "-F", "-d", src, path, "16M").CombinedOutput()
	if err != nil {
		tb.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	img, err := os.ReadFile(path)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	at := bytes.Index(img, big)
	if at < 0 {
		tb.Fatalf("big.bin is not in one piece")
	}
	return int64(at)
}

func rawName(disk string) string { return disk + ".raw" }

// Every point of every disk, whole, as the model says and as qemu-img says.
func TestContent(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	for i, p := range f.g.Points {
		for _, d := range p.Disks {
			path := m.path("110", string(p.ID), rawName(d.Name))
			want := f.g.Want(p.ID, d.Name)
			equal(t, path, must(os.ReadFile(path))(t), want)
			if i%3 == 1 || i == len(f.g.Points)-1 {
				run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", path, f.g.ImagePath(p.ID, d.Name))
				flat := filepath.Join(t.TempDir(), "want.raw")
				if err := os.WriteFile(flat, want, 0o600); err != nil {
					t.Fatal(err)
				}
				run(t, "cmp", path, flat)
			}
		}
	}
	newest := f.g.Points.Latest().ID
	equal(t, "latest", must(os.ReadFile(m.path("110", "latest", "scsi0.raw")))(t), f.g.Want(newest, "scsi0"))
	equal(t, "point.json", must(os.ReadFile(m.path("110", "latest", "point.json")))(t),
		must(os.ReadFile(filepath.Join(f.g.PointDir(newest), "point.json")))(t))
	equal(t, "110.conf", must(os.ReadFile(m.path("110", "latest", "guest", "110.conf")))(t), []byte("memory: 512\n"))
}

func TestAttributes(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	p := f.g.Points.Latest()

	names := func(path string) string {
		// By ls and not by os.ReadDir, which hides "." and "..".
		return strings.Join(strings.Fields(run(t, "ls", "-a", path)), " ")
	}
	if got, want := names(m.dir), ". .. 110"; got != want {
		t.Errorf("root: %q, want %q", got, want)
	}
	want := ". .."
	for _, p := range f.g.Points {
		want += " " + string(p.ID)
	}
	if got, want := names(m.path("110")), want+" latest"; got != want {
		t.Errorf("guest: %q, want %q", got, want)
	}
	if got, want := names(m.path("110", "latest")+"/"), ". .. guest point.json scsi0.raw scsi1.raw"; got != want {
		t.Errorf("point: %q, want %q", got, want)
	}
	if got, want := names(m.path("110", "latest", "guest")), ". .. 110.conf 110.fw"; got != want {
		t.Errorf("guest's files: %q, want %q", got, want)
	}
	if got := must(os.Readlink(m.path("110", "latest")))(t); got != string(p.ID) {
		t.Errorf("latest is %q, want %q", got, p.ID)
	}

	disk := must(os.Stat(m.path("110", string(p.ID), "scsi0.raw")))(t)
	if disk.Size() != fixtureSize || disk.Mode() != 0o400 || !disk.ModTime().Equal(p.Time) {
		t.Errorf("disk: size %d, mode %s, time %s; want %d, -r--------, %s", disk.Size(), disk.Mode(), disk.ModTime(), fixtureSize, p.Time)
	}
	if st := disk.Sys().(*syscall.Stat_t); int(st.Uid) != os.Getuid() || st.Blocks == 0 || st.Blocks >= fixtureSize/512 {
		t.Errorf("disk: owner %d, %d blocks", st.Uid, st.Blocks)
	}
	folder := must(os.Stat(m.path("110", string(p.ID))))(t)
	if folder.Mode() != os.ModeDir|0o500 || !folder.ModTime().Equal(p.Time) {
		t.Errorf("folder: mode %s, time %s", folder.Mode(), folder.ModTime())
	}
	for _, name := range []string{"nope", "110/nope", "110/20260101T000000Z-0000", "110/latest/nope", "110/latest/guest/nope", "110/.git", "lost+found"} {
		if _, err := os.Lstat(m.path(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}

	var here, there unix.Statfs_t
	if err := errors.Join(unix.Statfs(m.dir, &here), unix.Statfs(f.repo.Dir, &there)); err != nil {
		t.Fatal(err)
	}
	if here.Blocks != there.Blocks || here.Bsize != there.Bsize || here.Namelen != there.Namelen {
		t.Errorf("df: %+v, want %+v", here, there)
	}

	line := mountLine(t, m.dir)
	for _, want := range []string{" fuse.qmchain " + f.repo.Dir + " ", "ro,nosuid,nodev,noexec", "default_permissions", "max_read=1048576"} {
		if !strings.Contains(line, want) {
			t.Errorf("mount has no %q: %s", want, line)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(m.dir, &st); err != nil {
		t.Fatal(err)
	}
	bdi := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	if got := strings.TrimSpace(string(must(os.ReadFile(bdi))(t))); got != "4096" {
		t.Errorf("read_ahead_kb is %s", got)
	}
}

func mountLine(t *testing.T, dir string) string {
	t.Helper()
	for line := range strings.Lines(string(must(os.ReadFile("/proc/self/mountinfo"))(t))) {
		if strings.Contains(line, " "+dir+" ") {
			return line
		}
	}
	return ""
}

func TestInodesOutliveTheMount(t *testing.T) {
	t.Parallel()
	f := shared(t)
	numbers := func() string {
		m := mountRepo(t, f.repo)
		out := run(t, "find", m.dir, "-printf", `%i %P\n`)
		if err := m.Unmount(t.Context()); err != nil {
			t.Fatal(err)
		}
		return out
	}
	if a, b := numbers(), numbers(); a != b || strings.Count(a, "\n") < 30 {
		t.Errorf("%s\nafter a new mount:\n%s", a, b)
	}
}

// A copy must not be larger than what the disk holds.
func TestSparseCopies(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	p := f.g.Points.Latest()
	want := f.g.Want(p.ID, "scsi0")
	var data int64
	for off := 0; off < len(want); off += 64 << 10 {
		if !isZero(want[off : off+64<<10]) {
			data += 64 << 10
		}
	}
	if data > fixtureSize*3/4 {
		t.Fatalf("the fixture has %d bytes of data: too little zeroes to test with", data)
	}
	for _, how := range []string{"auto", "always"} {
		to := filepath.Join(t.TempDir(), "copy.raw")
		run(t, "cp", "--sparse="+how, m.path("110", "latest", "scsi0.raw"), to)
		equal(t, "cp --sparse="+how, must(os.ReadFile(to))(t), want)
		if got := allocated(t, to); got > data+data/8 {
			t.Errorf("cp --sparse=%s: the copy takes %d bytes, the disk holds %d", how, got, data)
		}
	}
}

func TestArchives(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	p := f.g.Points.Latest()
	to := t.TempDir()
	for _, how := range []string{"cp", "tar"} {
		dir := mkdir(t, to, how)
		switch how {
		case "cp":
			if out := run(t, "cp", "-a", m.path("110", string(p.ID)), dir); out != "" {
				t.Errorf("cp -a says %s", out)
			}
		case "tar":
			archive := filepath.Join(to, "point.tar")
			if out := run(t, "tar", "--xattrs", "--acls", "--sparse", "-C", m.path("110"), "-cf", archive, string(p.ID)); out != "" {
				t.Errorf("tar says %s", out)
			}
			if info := must(os.Stat(archive))(t); info.Size() > fixtureSize {
				t.Errorf("tar --sparse made %d bytes", info.Size())
			}
			run(t, "tar", "--delay-directory-restore", "-C", dir, "-xf", archive)
		}
		for _, d := range p.Disks {
			path := filepath.Join(dir, string(p.ID), rawName(d.Name))
			equal(t, path, must(os.ReadFile(path))(t), f.g.Want(p.ID, d.Name))
			if info := must(os.Stat(path))(t); !info.ModTime().Equal(p.Time) {
				t.Errorf("%s: time %s, want %s", path, info.ModTime(), p.Time)
			}
		}
	}
	run(t, "chmod", "-R", "u+w", to) // or the test's folder can't be removed
}

func TestHoles(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	for _, p := range f.g.Points {
		want := f.g.Want(p.ID, "scsi0")
		file := must(os.Open(m.path("110", string(p.ID), "scsi0.raw")))(t)
		fd := int(file.Fd())
		holes := 0
		hole := func(from, to int64) {
			if from < to {
				holes++
			}
			if !isZero(want[from:to]) {
				t.Errorf("%s: the hole from %d to %d has data in it", p.ID, from, to)
			}
		}
		for off := int64(0); ; {
			data, err := unix.Seek(fd, off, unix.SEEK_DATA)
			if err == unix.ENXIO {
				hole(off, int64(len(want)))
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			end := must(unix.Seek(fd, data, unix.SEEK_HOLE))(t)
			if data < off || end <= data || end > int64(len(want)) {
				t.Fatalf("from %d: data at %d up to %d", off, data, end)
			}
			mid := data + (end-data)/2
			if again := must(unix.Seek(fd, mid, unix.SEEK_DATA))(t); again != mid {
				t.Fatalf("%d is data, but data is found at %d", mid, again)
			}
			hole(off, data)
			off = end
		}
		if holes == 0 {
			t.Errorf("%s: no holes", p.ID)
		}
		for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
			for _, off := range []int64{int64(len(want)), int64(len(want)) + 1<<40} {
				if _, err := unix.Seek(fd, off, whence); err != unix.ENXIO {
					t.Errorf("seek behind the end: %v", err)
				}
			}
		}
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A file system within a disk, mounted by way of a loop device.
func TestLoopMount(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	for _, test := range []struct {
		point *chain.Manifest
		fill  byte
	}{{f.g.Points[0], oldFill}, {f.g.Points.Latest(), newFill}} {
		dev := strings.TrimSpace(run(t, "losetup", "-r", "--show", "-f", m.path("110", string(test.point.ID), "scsi1.raw")))
		dir := t.TempDir()
		detach := sync.OnceFunc(func() {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
			run(t, "losetup", "-d", dev)
		})
		t.Cleanup(detach)
		run(t, "mount", "-t", "ext4", "-o", "ro", dev, dir)
		equal(t, "hello", must(os.ReadFile(filepath.Join(dir, "hello")))(t), []byte("hello\n"))
		equal(t, "big.bin", must(os.ReadFile(filepath.Join(dir, "big.bin")))(t), bytes.Repeat([]byte{test.fill}, 1<<20))
		archive := filepath.Join(t.TempDir(), "files.tar")
		run(t, "tar", "-C", dir, "-cf", archive, ".")
		equal(t, "big.bin in tar", []byte(run(t, "tar", "-xOf", archive, "./big.bin")), bytes.Repeat([]byte{test.fill}, 1<<20))
		detach()
	}
}

// Many readers of many points at once, small and large, with and without the page cache.
func TestParallelReaders(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	want := map[chain.ID][]byte{}
	for _, p := range f.g.Points {
		want[p.ID] = f.g.Want(p.ID, "scsi0")
	}
	var wg sync.WaitGroup
	for reader := range 32 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(reader), 7))
			for range 4 {
				p := f.g.Points[r.IntN(len(f.g.Points))]
				flags := unix.O_RDONLY
				if reader%2 == 0 {
					flags |= unix.O_DIRECT
				}
				file, err := os.OpenFile(m.path("110", string(p.ID), "scsi0.raw"), flags, 0)
				if err != nil {
					t.Error(err)
					return
				}
				for range 15 {
					n := 4096 * (1 + r.Int64N(32))
					off := r.Int64N(fixtureSize/4096) * 4096
					got := make([]byte, n)
					k, err := file.ReadAt(got, off)
					if err != nil && err != io.EOF {
						t.Error(err)
						return
					}
					if w := want[p.ID][off:min(off+n, fixtureSize)]; !bytes.Equal(got[:k], w) {
						t.Errorf("%s: %d bytes at %d differ", p.ID, n, off)
						return
					}
				}
				if err := file.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// The image files of a disk that nobody uses any more are closed some time after; those of a few disks only.
func TestImagesAreClosed(t *testing.T) {
	t.Parallel()
	const points, kept = 7, 4
	g := smallGuest(t)
	for len(g.Points) < points {
		increment(g, byte(len(g.Points)))
	}
	isOpen := func(n int) func() bool { return func() bool { return openUnder(t, g.Repo.Dir) == n } }
	if !isOpen(0)() {
		t.Fatal("files of the repository are open before any disk is")
	}
	// What is kept is kept for five seconds. A machine that is too busy for that proves nothing.
	for range 5 {
		began := time.Now()
		wrong := keptImages(t, g, points, kept)
		inTime := time.Since(began) < 4*time.Second
		eventually(t, "closed", isOpen(0))
		if inTime {
			for _, w := range wrong {
				t.Error(w)
			}
			return
		}
	}
	t.Error("it takes more than four seconds to open a few disks")
}

// keptImages looks into the disks of a guest's points, one after the other, and says what is wrong with what is open then.
func keptImages(t *testing.T, g *repotest.Guest, points, kept int) (wrong []string) {
	t.Helper()
	m := mountRepo(t, g.Repo)
	opened := func(want int) {
		t.Helper()
		if n := counter(t, m, `qmchain_fuse_disks_opened_total{,how="first"`); n != strconv.Itoa(want) {
			wrong = append(wrong, fmt.Sprintf("disks were opened %s times, want %d", n, want))
		}
	}
	unused := func() bool { return counter(t, m, "qmchain_fuse_open_disks{") == "0" }
	for _, p := range slices.Backward(g.Points) {
		path := m.path("110", string(p.ID), "scsi0.raw")
		a, b := must(os.Open(path))(t), must(os.Open(path))(t)
		_ = a.Close()
		_ = must(io.ReadAll(b))(t)
		_ = b.Close()
		eventually(t, "not in use", unused)
	}
	opened(points)
	if n := openUnder(t, g.Repo.Dir); n != kept { // those of the oldest points, of which each has one file more than the one before
		wrong = append(wrong, fmt.Sprintf("%d files are open, want %d", n, kept))
	}
	for range 3 {
		_ = must(os.Open(m.path("110", string(g.Points[0].ID), "scsi0.raw")))(t).Close()
	}
	opened(points)
	return wrong
}

// openUnder counts this process's open image files under dir.
func openUnder(t *testing.T, dir string) int {
	t.Helper()
	n := 0
	for _, e := range must(os.ReadDir("/proc/self/fd"))(t) {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && strings.HasPrefix(to, dir+"/") && strings.HasSuffix(to, ".qcow2") {
			n++
		}
	}
	return n
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

const smallSize = 1 << 20

// smallGuest has a full and an increment of a small disk, in a repository of its own.
func smallGuest(t *testing.T) *repotest.Guest {
	t.Helper()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Size: smallSize, Write: []repotest.Write{{Off: 0, Len: smallSize, Fill: 1}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 128 << 10, Len: 128 << 10, Fill: 2}}})
	return g
}

func increment(g *repotest.Guest, fill byte) *chain.Manifest {
	return g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 0, Len: 4096, Fill: fill}}})
}

// What a backup has just reported is there at once, and latest names it.
func TestNewPoint(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	m := mountRepo(t, g.Repo)
	for i := range byte(3) {
		_ = must(os.ReadDir(m.path("110")))(t) // and so in the caches
		_ = must(os.Readlink(m.path("110", "latest")))(t)
		p := increment(g, 10+i)
		if got := must(os.Readlink(m.path("110", "latest")))(t); got != string(p.ID) {
			t.Errorf("latest is %s, want %s", got, p.ID)
		}
		equal(t, "new point", must(os.ReadFile(m.path("110", string(p.ID), "scsi0.raw")))(t), g.Want(p.ID, "scsi0"))
	}
	// Also one whose name was asked for before, and a new guest.
	if _, err := os.Stat(m.path("111")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("guest that is not there: %v", err)
	}
	other := repotest.NewGuest(t, g.Repo, "111", start)
	p := other.Add(repotest.Disk{Name: "virtio0", Size: smallSize})
	_ = must(os.Stat(m.path("111", string(p.ID), "virtio0.raw")))(t)
	if entries := must(os.ReadDir(m.dir))(t); len(entries) != 2 {
		t.Errorf("%d guests", len(entries))
	}
}

func TestRemovedPoint(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	m := mountRepo(t, g.Repo)
	p := increment(g, 9)
	path := m.path("110", string(p.ID), "scsi0.raw")
	open := must(os.Open(path))(t)
	defer open.Close()
	want := g.Want(p.ID, "scsi0")

	for _, path := range []string{g.PointDir(p.ID), g.ImagePath(p.ID, "scsi0")} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the point is gone", func() bool {
		_, err := os.Stat(path)
		return errors.Is(err, os.ErrNotExist)
	})
	if got, want := must(os.Readlink(m.path("110", "latest")))(t), string(g.Points[1].ID); got != want {
		t.Errorf("latest is %s, want %s", got, want)
	}
	if _, err := os.Open(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("open: %v", err)
	}
	// Who has it open reads on.
	got := make([]byte, smallSize)
	if _, err := open.ReadAt(got, 0); err != nil {
		t.Error(err)
	}
	equal(t, "removed point", got, want)
	if _, err := open.Stat(); err != nil {
		t.Errorf("fstat: %v", err)
	}
}

// Another point under the id of one that was removed must not be taken for it, whatever is cached.
func TestPointReplaced(t *testing.T) {
	t.Parallel()
	a, b := smallGuest(t), smallGuest(t)
	m := mountRepo(t, a.Repo)
	p := increment(a, 7)
	path := m.path("110", string(p.ID), "scsi0.raw")
	equal(t, "first", must(os.ReadFile(path))(t), a.Want(p.ID, "scsi0"))

	// The other guest's points are of the same times; the ids' random digits are made the same.
	full := b.Points[0]
	if err := os.RemoveAll(a.PointDir(p.ID)); err != nil {
		t.Fatal(err)
	}
	other := *full
	other.ID, other.Disks = p.ID, slices.Clone(full.Disks)
	other.Disks[0].File = chain.ImageFile(p.ID, "scsi0")
	text, err := other.Encode()
	if err != nil {
		t.Fatal(err)
	}
	run(t, "cp", b.ImagePath(full.ID, "scsi0"), a.ImagePath(p.ID, "scsi0"))
	run(t, "cp", "-r", b.PointDir(full.ID), a.PointDir(p.ID))
	if err := os.WriteFile(filepath.Join(a.PointDir(p.ID), chain.ManifestFile), text, 0o600); err != nil {
		t.Fatal(err)
	}
	want := b.Want(full.ID, "scsi0")
	eventually(t, "the other point's content", func() bool {
		got, err := os.ReadFile(path)
		return err == nil && bytes.Equal(got, want)
	})
}

// A damaged manifest hides its point, says so once, and nothing else is touched.
func TestDamagedManifest(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	bad := increment(g, 9)
	repotest.Flip(t, filepath.Join(g.PointDir(bad.ID), chain.ManifestFile), 40)
	newer := increment(g, 10) // as a later version of the program might write it
	if err := os.WriteFile(filepath.Join(g.PointDir(newer.ID), chain.ManifestFile), []byte(`{"format": 99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	m := mountRepo(t, g.Repo)
	for range 3 {
		if _, err := os.Stat(m.path("110", string(bad.ID))); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("damaged point: %v", err)
		}
		time.Sleep(400 * time.Millisecond)
	}
	if got, want := must(os.Readlink(m.path("110", "latest")))(t), string(g.Points[1].ID); got != want {
		t.Errorf("latest is %s, want the newest readable %s", got, want)
	}
	good := g.Points[1].ID
	equal(t, "other point", must(os.ReadFile(m.path("110", string(good), "scsi0.raw")))(t), g.Want(good, "scsi0"))
	for _, p := range []*chain.Manifest{bad, newer} {
		if n := strings.Count(m.log.String(), string(p.ID)+" can't be read"); n != 1 {
			t.Errorf("%s: said %d times", p.ID, n)
		}
	}
	// And it comes back when it is repaired.
	repotest.Flip(t, filepath.Join(g.PointDir(bad.ID), chain.ManifestFile), 40)
	eventually(t, "repaired", func() bool {
		_, err := os.Stat(m.path("110", string(bad.ID)))
		return err == nil
	})
}

// A gap in a chain is an I/O error for what needs it, with the reason in the log, and nothing for what does not.
func TestDamagedChain(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	newest := increment(g, 9)
	missing := g.Points[1]
	if err := os.Remove(g.ImagePath(missing.ID, "scsi0")); err != nil {
		t.Fatal(err)
	}
	m := mountRepo(t, g.Repo)
	for _, p := range []*chain.Manifest{missing, newest} {
		path := m.path("110", string(p.ID), "scsi0.raw")
		_ = must(os.Stat(path))(t)
		for range 3 {
			if _, err := os.ReadFile(path); !errors.Is(err, unix.EIO) {
				t.Errorf("%s: %v", p.ID, err)
			}
		}
		want := fmt.Sprintf("point 110/%s: disk scsi0 can't be opened", p.ID)
		if n := strings.Count(m.log.String(), want); n != 1 {
			t.Errorf("%q is %d times in the log:\n%s", want, n, m.log)
		}
	}
	first := g.Points[0].ID
	equal(t, "the full", must(os.ReadFile(m.path("110", string(first), "scsi0.raw")))(t), g.Want(first, "scsi0"))
}

// One bad cluster costs that cluster: what is around it is read, and the file does not end there.
func TestBadCluster(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	full := g.Points[0]
	image := g.ImagePath(full.ID, "scsi0")
	const bad = 5 // index of the cluster
	file := must(os.OpenFile(image, os.O_RDWR, 0))(t)
	word := func(off int64) int64 {
		b := make([]byte, 8)
		if _, err := file.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		var v int64
		for _, c := range b {
			v = v<<8 | int64(c)
		}
		return v
	}
	l2 := word(word(40)) & 0x00fffffffffffe00                                            // the header's l1_table_offset, and its first entry
	if _, err := file.WriteAt([]byte{0x80, 0, 0, 0, 0, 1, 2, 0}, l2+8*bad); err != nil { // no multiple of a cluster
		t.Fatal(err)
	}
	_ = file.Close()
	m := mountRepo(t, g.Repo)
	disk := must(os.Open(m.path("110", string(full.ID), "scsi0.raw")))(t)
	defer disk.Close()
	want := g.Want(full.ID, "scsi0")
	for i := range smallSize / (64 << 10) {
		got := make([]byte, 64<<10)
		_, err := disk.ReadAt(got, int64(i)<<16)
		switch {
		case i == bad && !errors.Is(err, unix.EIO):
			t.Errorf("bad cluster: %v", err)
		case i != bad && err != nil:
			t.Errorf("cluster %d: %v", i, err)
		case i != bad:
			equal(t, "cluster "+strconv.Itoa(i), got, want[i<<16:(i+1)<<16])
		}
	}
	if info := must(disk.Stat())(t); info.Size() != smallSize {
		t.Errorf("the disk has %d bytes now", info.Size())
	}
	if log := m.log.String(); !strings.Contains(log, "point 110/"+string(full.ID)+": disk scsi0 can't be read") {
		t.Errorf("nothing in the log:\n%s", log)
	}
}

// What the kernel has read of a disk is kept from one open to the next.
func TestCacheIsKept(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	m := mountRepo(t, g.Repo)
	p := g.Points[0]
	path := m.path("110", string(p.ID), "scsi0.raw")
	want := g.Want(p.ID, "scsi0")
	equal(t, "first", must(os.ReadFile(path))(t), want)
	// Nobody does this to a repository; here it shows who answers the second time.
	image := g.ImagePath(p.ID, "scsi0")
	info := must(os.Stat(image))(t)
	for off := int64(0x50000); off < info.Size(); off += 4096 {
		repotest.Flip(t, image, off)
	}
	equal(t, "second", must(os.ReadFile(path))(t), want)
}

// Only regular files of a point are passed through, and none from elsewhere.
func TestGuestFiles(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := mkdir(t, g.PointDir(g.Points[0].ID), "guest")
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "110.conf"), []byte("cores: 1\n"), 0o640),
		os.Symlink(secret, filepath.Join(dir, "link")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
		os.Mkdir(filepath.Join(dir, "sub"), 0o700),
		os.Symlink(filepath.Dir(secret), filepath.Join(g.PointDir(g.Points[1].ID), "guest")),
	); err != nil {
		t.Fatal(err)
	}
	m := mountRepo(t, g.Repo)
	if got := strings.Fields(run(t, "ls", m.path("110", string(g.Points[0].ID), "guest"))); !slices.Equal(got, []string{"110.conf"}) {
		t.Errorf("guest's files: %q", got)
	}
	conf := m.path("110", string(g.Points[0].ID), "guest", "110.conf")
	equal(t, "110.conf", must(os.ReadFile(conf))(t), []byte("cores: 1\n"))
	if info := must(os.Stat(conf))(t); info.Mode() != 0o440 {
		t.Errorf("mode %s", info.Mode())
	}
	for _, path := range []string{
		m.path("110", string(g.Points[0].ID), "guest", "link"),
		m.path("110", string(g.Points[1].ID), "guest"),
		m.path("110", string(g.Points[1].ID), "guest", "secret"),
	} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	// A folder that is looked into while it is a folder, and is swapped for a link then.
	if err := errors.Join(os.RemoveAll(dir), os.Symlink(filepath.Dir(secret), dir)); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(conf); err == nil {
		t.Errorf("110.conf is now %q", got)
	}
}

func TestReadOnly(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	m := mountRepo(t, g.Repo)
	point := m.path("110", string(g.Points[0].ID))
	disk, manifest := filepath.Join(point, "scsi0.raw"), filepath.Join(point, "point.json")
	open := func(path string, flags int) error {
		f, err := os.OpenFile(path, flags, 0o600)
		if err == nil {
			_ = f.Close()
		}
		return err
	}
	try := func(t *testing.T) {
		for name, err := range map[string]error{
			"open to write":      open(disk, os.O_WRONLY),
			"open for both":      open(disk, os.O_RDWR),
			"open to append":     open(manifest, os.O_WRONLY|os.O_APPEND),
			"open and truncate":  open(disk, os.O_RDWR|os.O_TRUNC),
			"create":             open(filepath.Join(point, "new"), os.O_WRONLY|os.O_CREATE),
			"create a temporary": open(point, os.O_WRONLY|unix.O_TMPFILE),
			"truncate":           os.Truncate(disk, 0),
			"remove a disk":      os.Remove(disk),
			"remove a point":     unix.Rmdir(point),
			"mkdir":              os.Mkdir(m.path("112"), 0o700),
			"mknod":              unix.Mkfifo(filepath.Join(point, "fifo"), 0o600),
			"rename":             os.Rename(disk, disk+"x"),
			"link":               os.Link(disk, disk+"x"),
			"symlink":            os.Symlink("x", m.path("110", "x")),
			"chmod":              os.Chmod(disk, 0o777),
			"chown":              os.Chown(point, 1, 1),
			"set times":          os.Chtimes(disk, start, start),
			"set an attribute":   unix.Setxattr(disk, "user.x", []byte("y"), 0),
		} {
			if !errors.Is(err, unix.EROFS) && (name != "set an attribute" || !errors.Is(err, unix.ENOTSUP)) {
				t.Errorf("%s: %v", name, err)
			}
		}
		equal(t, "disk", must(os.ReadFile(disk))(t), g.Want(g.Points[0].ID, "scsi0"))
	}
	t.Run("by the mount", try)
	// The super-user can take the mount's own flag away, not the file system's refusal.
	if err := unix.Mount("", m.dir, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	t.Run("remounted", try)
}
