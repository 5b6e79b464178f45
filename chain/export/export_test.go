package export

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
	"qmchain/internal/durable"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mib = 1 << 20

// chainOf makes a chain of two qcow2 images, with data, zeroes as data, zero clusters and compressed clusters, and returns
// it as an image, and what qemu-img reads in it.
func chainOf(t testing.TB, seed uint64, size int64) (image.Image, []byte) {
	t.Helper()
	dir := t.TempDir()
	w := imagetest.NewWriter(t, seed)
	var layers []image.Layer
	for i, name := range []string{"base.qcow2", "top.qcow2"} {
		path := filepath.Join(dir, name)
		args := []string{"create", "-q", "-f", "qcow2"}
		if i > 0 {
			args = append(args, "-b", layers[i-1].Path, "-F", "qcow2")
		}
		imagetest.QemuImg(t, append(args, path, fmt.Sprint(size))...)
		var cmds []string
		write := func(options string, off, length int64) {
			cmd, _ := w.Write(t, options, off, min(length, size-off))
			cmds = append(cmds, cmd)
		}
		write("", 0, 3*page)
		write("", max(0, size-5*page)/512*512, 5*page)
		for range 10 {
			write("", w.Rand().Int64N(size)/512*512, 512*(1+w.Rand().Int64N(600)))
		}
		// QEMU stores these as data, as it looks into nothing that it writes.
		off := size / 3 / (64 << 10) * (64 << 10)
		cmds = append(cmds, fmt.Sprintf("write -P 0 %d %d", off, min(mib, size-off)), fmt.Sprintf("write -P 7 %d 512", min(off+mib/2, size-512)))
		if i > 0 {
			cmds = append(cmds, fmt.Sprintf("write -z %d %d", 64<<10, min(128<<10, size-64<<10)))
		}
		imagetest.QemuIO(t, "qcow2", path, cmds...)
		layers = append(layers, image.Layer{Path: path, Name: name, Format: image.Qcow2, Bytes: -1})
	}
	img, err := image.NewPool(image.PoolOptions{}).Open(-1, layers...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = img.Close() })
	return img, imagetest.Content(t, "qcow2", layers[1].Path)
}

// write does all that a restore does.
func write(ctx context.Context, img image.Image, output string, opts Options) (*Plan, error) {
	p, err := Look(ctx, img, output, opts)
	if err != nil {
		return nil, err
	}
	if err := CheckSpace([]*Plan{p}); err != nil {
		return p, err
	}
	w, err := p.Start(ctx)
	if err != nil {
		return p, err
	}
	err = w.Write(ctx, nil)
	if err == nil {
		err = w.Verify(ctx, nil)
	}
	if err == nil {
		err = w.Commit(ctx)
	}
	return p, errors.Join(err, w.Close())
}

func mustWrite(t *testing.T, img image.Image, output string, opts Options) *Plan {
	t.Helper()
	p, err := write(t.Context(), img, output, opts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// names lists a folder, the staging files in it too.
func names(t testing.TB, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// dataBytes is how much of a file is no hole.
func dataBytes(t testing.TB, path string) (bytes int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for hole := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), hole, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return bytes
		}
		if err == nil {
			hole, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		}
		if err != nil {
			t.Fatal(err)
		}
		bytes += hole - data
	}
}

func TestRaw(t *testing.T) {
	t.Parallel()
	for i, size := range []int64{512, 3*page + 512, 5 * mib, 130*mib + 1536} {
		img, want := chainOf(t, uint64(i), max(size, 128<<10+512)) // what chainOf needs at least
		dir := t.TempDir()
		path := filepath.Join(dir, "disk.raw")
		p := mustWrite(t, img, path, Options{Format: Raw, Jobs: i})
		if !bytes.Equal(readFile(t, path), want) {
			t.Errorf("size %d: wrong content", size)
		}
		if p.Replaces || p.Device || p.Output != path || p.Size != int64(len(want)) || p.Data == 0 {
			t.Errorf("size %d: plan %+v", size, p)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		if got := names(t, dir); len(got) != 1 {
			t.Errorf("left: %q", got)
		}
		// As many holes as cp finds.
		other := filepath.Join(dir, "other")
		if out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", path, other).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got, cp := dataBytes(t, path), dataBytes(t, other); got > cp {
			t.Errorf("size %d: %d bytes, %d by cp", size, got, cp)
		}
	}
}

// Raw images can have any size.
func TestOddSizes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, size := range []int64{1, 777, page + 1, unit + 1} {
		src := filepath.Join(dir, fmt.Sprint(size))
		if err := os.WriteFile(src, imagetest.Random(rnd, size), 0o600); err != nil {
			t.Fatal(err)
		}
		img, err := image.NewPool(image.PoolOptions{}).Open(-1, image.Layer{Path: src, Name: src, Format: image.Raw, Bytes: size})
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		out := src + ".raw"
		mustWrite(t, img, out, Options{Format: Raw})
		if !bytes.Equal(readFile(t, out), readFile(t, src)) {
			t.Errorf("size %d: wrong content", size)
		}
	}
}

func TestQcow2(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 9, 40*mib+512)
	for _, compress := range []bool{false, true} {
		dir := t.TempDir()
		path := filepath.Join(dir, "a disk: of qcow2, all")
		var done, total atomic.Int64
		p, err := Look(t.Context(), img, path, Options{Format: Qcow2, Compress: compress})
		if err != nil {
			t.Fatal(err)
		}
		w, err := p.Start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		progress := func(d, n int64) { done.Store(max(d, done.Load())); total.Store(n) }
		if err := errors.Join(w.Write(t.Context(), progress), w.Verify(t.Context(), nil), w.Commit(t.Context()), w.Close()); err != nil {
			t.Fatal(err)
		}
		if total.Load() != p.Data || done.Load() < p.Data*9/10 || done.Load() > p.Data*11/10 {
			t.Errorf("progress to %d of %d, of %d", done.Load(), total.Load(), p.Data)
		}
		if !bytes.Equal(imagetest.Content(t, "qcow2", path), want) {
			t.Error("wrong content")
		}
		imagetest.QemuImg(t, "check", "-q", "-f", "qcow2", path)
		var info struct {
			Backing string `json:"backing-filename"`
			Actual  int64  `json:"actual-size"`
			Format  struct {
				Data struct {
					Compression string `json:"compression-type"`
				}
			} `json:"format-specific"`
		}
		if err := json.Unmarshal([]byte(imagetest.QemuImg(t, "info", "--output=json", "-f", "qcow2", path)), &info); err != nil {
			t.Fatal(err)
		}
		if info.Backing != "" || (info.Format.Data.Compression == "zstd") != compress {
			t.Errorf("%+v", info)
		}
		if !compress && info.Actual > p.Space() {
			t.Errorf("%d bytes, at most %d were planned", info.Actual, p.Space())
		}
		if compress && info.Actual > p.Data*8/10 {
			t.Errorf("%d bytes of %d: not compressed", info.Actual, p.Data)
		}
		if got := names(t, dir); len(got) != 1 {
			t.Errorf("left: %q", got)
		}
	}
}

// What is there already, and where nothing can be.
func TestOutputs(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 3, 2*mib)
	dir := t.TempDir()
	repo := filepath.Join(dir, "repo")
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.MkdirAll(path("repo/110/images"), 0o700),
		os.Symlink(path("repo/110"), path("by-the-way")),
		os.WriteFile(path("file"), []byte("precious"), 0o640),
		os.Symlink("file", path("link")),
		os.Symlink("nowhere", path("dangling")),
		syscall.Mkfifo(path("fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		output string
		format Format
		force  bool
		is     error
	}{
		{path("file"), Raw, false, ErrExists},
		{path("file"), Qcow2, false, ErrExists},
		{path("link"), Raw, false, ErrExists},
		{path("dangling"), Raw, true, ErrExists},
		{path("fifo"), Raw, true, ErrKind},
		{dir, Raw, true, ErrKind},
		{"/dev/null", Raw, true, ErrKind},
		{"/dev/no-such-disk", Raw, true, fs.ErrNotExist},
		{path("none/disk.raw"), Raw, false, fs.ErrNotExist},
		{path("file/disk.raw"), Raw, false, syscall.ENOTDIR},
		{path("repo/disk.raw"), Raw, false, ErrInside},
		{path("repo/110/images/disk.raw"), Qcow2, false, ErrInside},
		{path("by-the-way/disk.raw"), Raw, false, ErrInside},
		{path(strings.Repeat("x", 250)), Raw, false, syscall.ENAMETOOLONG},
	} {
		_, err := write(t.Context(), img, test.output, Options{Format: test.format, Force: test.force, Outside: repo})
		if !errors.Is(err, test.is) {
			t.Errorf("%s: %v", test.output, err)
		}
	}
	if got := fmt.Sprint(names(t, dir)); got != "[by-the-way dangling fifo file link repo]" || string(readFile(t, path("file"))) != "precious" {
		t.Errorf("changed: %s", got)
	}
	// By request, but not if somebody uses it.
	letGo := hold(t, path("file"))
	if _, err := write(t.Context(), img, path("file"), Options{Format: Raw, Force: true}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "sleep (process ") {
		t.Errorf("a file in use: %v", err)
	}
	letGo()
	// A link stays one.
	p := mustWrite(t, img, path("link"), Options{Format: Raw, Force: true, Outside: repo})
	if !p.Replaces || p.Output != path("file") || !bytes.Equal(readFile(t, path("file")), want) {
		t.Errorf("not replaced: %+v", p)
	}
	if to, err := os.Readlink(path("link")); err != nil || to != "file" {
		t.Errorf("the link is %q, %v", to, err)
	}
}

// Somebody else makes the file while it is written.
func TestNothingIsReplacedAtTheCommit(t *testing.T) {
	t.Parallel()
	img, _ := chainOf(t, 4, 2*mib)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	for _, at := range []string{"rename", "sync"} {
		opts := Options{Format: Raw, FS: durable.FS{Before: func(op, _ string) error {
			if op == at {
				return os.WriteFile(path, []byte("precious"), 0o600)
			}
			return nil
		}}}
		if _, err := write(t.Context(), img, path, opts); !errors.Is(err, ErrExists) {
			t.Errorf("%s: %v", at, err)
		}
		if got := names(t, dir); len(got) != 1 || string(readFile(t, path)) != "precious" {
			t.Errorf("%s: left %q", at, got)
		}
		_ = os.Remove(path)
	}
}

func TestOneWriterAtATime(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 5, 2*mib)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	opts := Options{Format: Raw}
	p, err := Look(t.Context(), img, path, opts)
	if err != nil {
		t.Fatal(err)
	}
	w, err := p.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write(t.Context(), img, path, opts); !errors.Is(err, ErrInUse) {
		t.Errorf("a second writer: %v", err)
	}
	if err := errors.Join(w.Write(t.Context(), nil), w.Commit(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readFile(t, path), want) {
		t.Error("wrong content")
	}

	// Many at once: one of them makes it.
	path = filepath.Join(dir, "other.raw")
	var made atomic.Int32
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			switch _, err := write(t.Context(), img, path, opts); {
			case err == nil:
				made.Add(1)
			case !errors.Is(err, ErrInUse) && !errors.Is(err, ErrExists):
				t.Error(err)
			}
		})
	}
	wait.Wait()
	if made.Load() != 1 || !bytes.Equal(readFile(t, path), want) || len(names(t, dir)) != 2 {
		t.Errorf("made %d times; %q", made.Load(), names(t, dir))
	}
}

// A staging file that a dead writer has left is begun anew, whatever is in it; what is no file is not touched.
func TestLeftovers(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 6, 2*mib)
	for _, format := range []Format{Raw, Qcow2} {
		dir := t.TempDir()
		path := filepath.Join(dir, "disk")
		if err := os.WriteFile(staging(path), bytes.Repeat([]byte{0x5a}, 9*mib), 0o644); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, img, path, Options{Format: format})
		if !bytes.Equal(imagetest.Content(t, string(format), path), want) || len(names(t, dir)) != 1 {
			t.Errorf("%s: wrong content, or something is left: %q", format, names(t, dir))
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
	}
	dir := t.TempDir()
	precious, path := filepath.Join(dir, "precious"), filepath.Join(dir, "disk")
	if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("precious", staging(path)); err != nil {
		t.Fatal(err)
	}
	if _, err := write(t.Context(), img, path, Options{Format: Raw}); !errors.Is(err, syscall.ELOOP) || string(readFile(t, precious)) != "precious" {
		t.Errorf("a link: %v", err)
	}
	_ = os.Remove(staging(path))
	if err := syscall.Mkfifo(staging(path), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := write(t.Context(), img, path, Options{Format: Raw}); !errors.Is(err, ErrKind) {
		t.Errorf("a fifo: %v", err)
	}
}

// When a step fails, nothing is left, nothing looks finished, and the next run succeeds.
func TestEveryStepFails(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 7, unit+512)
	for _, format := range []Format{Raw, Qcow2} {
		for at := int32(1); ; at++ {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk")
			var steps atomic.Int32
			op := ""
			_, err := write(t.Context(), img, path, Options{Format: format, FS: durable.FS{Before: func(step, _ string) error {
				if steps.Add(1) == at {
					op = step
					return syscall.EIO
				}
				return nil
			}}})
			if steps.Load() < at {
				if err != nil || at < 6 {
					t.Errorf("%s: %v after %d steps", format, err, at-1)
				}
				break
			}
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("%s: step %d (%s): %v", format, at, op, err)
			}
			// After the rename, only that the name is on the disk is not known.
			if left := names(t, dir); len(left) != 0 && op != "syncdir" {
				t.Errorf("%s: step %d (%s): left %q", format, at, op, left)
			}
			mustWrite(t, img, path, Options{Format: format, Force: op == "syncdir"})
			if !bytes.Equal(imagetest.Content(t, string(format), path), want) {
				t.Errorf("%s: step %d (%s): wrong content", format, at, op)
			}
		}
	}
}

// broken is an image that can't be read everywhere.
type broken struct {
	image.Image
	at  int64
	err error
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off <= b.at && b.at < off+int64(len(p)) {
		return 0, b.err
	}
	return b.Image.ReadAt(p, off)
}

func TestUnreadableImage(t *testing.T) {
	t.Parallel()
	img, _ := chainOf(t, 8, unit+mib)
	bad := errors.New("a bad cluster")
	for _, format := range []Format{Raw, Qcow2} {
		dir := t.TempDir()
		_, err := write(t.Context(), broken{img, 5, bad}, filepath.Join(dir, "disk"), Options{Format: format})
		if !errors.Is(err, bad) || len(names(t, dir)) != 0 {
			t.Errorf("%s: %v; left: %q", format, err, names(t, dir))
		}
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	img, _ := chainOf(t, 10, unit+mib)
	for _, format := range []Format{Raw, Qcow2} {
		for _, at := range []string{"create", "write", "sync"} {
			ctx, cancel := context.WithCancel(t.Context())
			dir := t.TempDir()
			_, err := write(ctx, img, filepath.Join(dir, "disk"), Options{Format: format, FS: durable.FS{Before: func(op, _ string) error {
				if op == at {
					cancel()
				}
				return nil
			}}})
			if !errors.Is(err, context.Canceled) || len(names(t, dir)) != 0 {
				t.Errorf("%s: cancelled before %s: %v; left: %q", format, at, err, names(t, dir))
			}
			cancel()
		}
	}
}

func TestVerify(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 11, unit+mib+512)
	hole := int64(bytes.Index(want, make([]byte, 3*piece)) + piece)
	for _, format := range []Format{Raw, Qcow2} {
		for _, at := range []int64{1, hole, int64(len(want)) - 1} {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk")
			damage := func() error {
				if format == Qcow2 {
					imagetest.QemuIO(t, "qcow2", staging(path), fmt.Sprintf("write -P 0x99 %d 1", at))
					return nil
				}
				f, err := os.OpenFile(staging(path), os.O_WRONLY, 0)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = f.WriteAt([]byte{0x99}, at)
				return errors.Join(err, f.Sync())
			}
			p, err := Look(t.Context(), img, path, Options{Format: format})
			if err != nil {
				t.Fatal(err)
			}
			w, err := p.Start(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(w.Write(t.Context(), nil), damage()); err != nil {
				t.Fatal(err)
			}
			err = w.Verify(t.Context(), nil)
			if !errors.Is(err, ErrDiffers) || !strings.Contains(err.Error(), fmt.Sprintf("byte %d is 0x99", at)) {
				t.Errorf("%s: byte %d: %v", format, at, err)
			}
			if err := w.Close(); err != nil || len(names(t, dir)) != 0 {
				t.Errorf("%v; left: %q", err, names(t, dir))
			}
		}
	}
}

// small mounts a file system of so many bytes.
func small(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("qmchain-test", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestSpace(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 12, 64*mib)
	for _, format := range []Format{Raw, Qcow2} {
		dir := small(t, mib)
		path := filepath.Join(dir, "disk")
		_, err := write(t.Context(), img, path, Options{Format: format})
		if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "1.0 MiB (1048576) are free") || len(names(t, dir)) != 0 {
			t.Errorf("%s: %v", format, err)
		}
		// Running out of it.
		p, err := Look(t.Context(), img, path, Options{Format: format})
		if err != nil {
			t.Fatal(err)
		}
		w, err := p.Start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Write(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "o space left on device") {
			t.Errorf("%s: %v", format, err)
		}
		if err := w.Close(); err != nil || len(names(t, dir)) != 0 {
			t.Errorf("%v; left: %q", err, names(t, dir))
		}
	}
	// Two that fit alone, but not together; and the same one twice after what a dead run has left.
	p, err := Look(t.Context(), img, filepath.Join(t.TempDir(), "disk"), Options{Format: Raw})
	if err != nil {
		t.Fatal(err)
	}
	dir := small(t, p.Data+p.Data/2)
	var plans []*Plan
	for _, name := range []string{"a", "b"} {
		p, err := Look(t.Context(), img, filepath.Join(dir, name), Options{Format: Raw})
		if err != nil {
			t.Fatal(err)
		}
		plans = append(plans, p)
	}
	if err := CheckSpace(plans); !errors.Is(err, ErrNoSpace) {
		t.Errorf("two: %v", err)
	}
	if err := os.WriteFile(staging(plans[0].Output), imagetest.Random(rand.New(rand.NewPCG(1, 1)), p.Data), 0o600); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, img, plans[0].Output, Options{Format: Raw})
	if !bytes.Equal(readFile(t, plans[0].Output), want) {
		t.Error("wrong content")
	}
}

// A disk of many TiB with little in it takes neither time nor memory. (File systems that can't have so large files say so.)
func TestHugeDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	src := filepath.Join(dir, "src.qcow2")
	const size = 8 << 40
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", src, fmt.Sprint(int64(size)))
	imagetest.QemuIO(t, "qcow2", src, "write -P 1 0 1M", fmt.Sprintf("write -P 2 %d 1M", size-mib))
	img, err := image.NewPool(image.PoolOptions{}).Open(-1, image.Layer{Path: src, Name: src, Format: image.Qcow2, Bytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	out := filepath.Join(dir, "out.raw")
	mustWrite(t, img, out, Options{Format: Raw})
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, mib)
	if _, err := f.ReadAt(b, size-mib); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{2}, mib)) {
		t.Errorf("wrong content, %v", err)
	}
	if got := dataBytes(t, out); got != 2*mib {
		t.Errorf("%d bytes", got)
	}
}
