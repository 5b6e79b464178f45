package export

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
	"qmchain/internal/durable"
)

// loop makes a block device of so many bytes, full of random data, and returns its path and that of the file below it.
func loop(t *testing.T, size int64, options ...string) (dev, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(file, imagetest.Random(rand.New(rand.NewPCG(uint64(size), 1)), size), 0o600); err != nil {
		t.Fatal(err)
	}
	return attach(t, file, options...), file
}

func attach(t *testing.T, file string, options ...string) (dev string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "losetup", append(append([]string{"--find", "--show"}, options...), file)...).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	})
	return dev
}

// onDevice is what is on a device, but not in its cache.
func onDevice(t *testing.T, dev string, size int64) []byte {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dropCache(f)
	data := make([]byte, size)
	if err := readFull(f, data, 0); err != nil {
		t.Fatal(err)
	}
	return data
}

func TestDevice(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 20, 9*mib+512)
	size := int64(len(want))
	for _, test := range []struct {
		room    int64
		options []string
	}{
		{size, nil},
		{size + 512, nil},
		{size + 5*mib + 3584, []string{"--sector-size", "4096"}},
	} {
		dev, file := loop(t, test.room, test.options...)
		before := readFile(t, file)
		if _, err := write(t.Context(), img, dev, Options{Format: Raw}); !errors.Is(err, ErrExists) {
			t.Errorf("a device that is not empty: %v", err)
		}
		if !bytes.Equal(onDevice(t, dev, test.room), before) {
			t.Error("it was changed all the same")
		}
		link := filepath.Join(t.TempDir(), "lv")
		if err := os.Symlink(dev, link); err != nil {
			t.Fatal(err)
		}
		p := mustWrite(t, img, link, Options{Format: Raw, Force: true})
		if !p.Device || p.Output != dev || p.Room != test.room || p.Work() != size {
			t.Errorf("plan %+v", p)
		}
		got := onDevice(t, dev, test.room)
		if !bytes.Equal(got[:size], want) {
			t.Error("wrong content")
		}
		if !bytes.Equal(got[size:], before[size:]) {
			t.Error("what is behind the disk was changed")
		}
		// What is zeroes is given back.
		if used := dataBytes(t, file); used > p.Data+test.room-size+mib {
			t.Errorf("%d bytes of %d of data are used", used, p.Data)
		}
	}
	dev, file := loop(t, size)
	p, err := Look(t.Context(), img, dev, Options{Format: Qcow2, Force: true})
	if !errors.Is(err, ErrKind) {
		t.Errorf("qcow2: %+v, %v", p, err)
	}
	if _, err := write(t.Context(), img, attach(t, file, "--read-only"), Options{Format: Raw, Force: true}); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a read-only device: %v", err)
	}
	dev, file = loop(t, size-512)
	before := readFile(t, file)
	if _, err := write(t.Context(), img, dev, Options{Format: Raw, Force: true}); !errors.Is(err, ErrTooSmall) {
		t.Errorf("a device that is too small: %v", err)
	}
	if !bytes.Equal(readFile(t, file), before) {
		t.Error("it was changed all the same")
	}
}

func TestDeviceInUse(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 21, 2*mib)
	dev, file := loop(t, 20*mib)
	refused := func(what, text string) {
		t.Helper()
		before := readFile(t, file)
		_, err := write(t.Context(), img, dev, Options{Format: Raw, Force: true})
		if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", what, err)
		}
		if !bytes.Equal(readFile(t, file), before) {
			t.Errorf("%s: it was changed all the same", what)
		}
	}

	letGo := hold(t, dev)
	refused("open elsewhere", "sleep (process ")
	letGo()

	if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-F", dev).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, "ext4", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	refused("mounted", "mounted at "+dir)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}

	// Somebody who is soon gone, as udev is, is waited for.
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(200*time.Millisecond, func() { _ = f.Close() })
	mustWrite(t, img, dev, Options{Format: Raw, Force: true})
	if !bytes.Equal(onDevice(t, dev, 2*mib), want) {
		t.Error("wrong content")
	}
}

// hold has another process keep a device or file open, as a QEMU has the disk of its guest: without O_EXCL.
func hold(t *testing.T, path string) (letGo func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	holder := exec.Command("sleep", "600")
	holder.ExtraFiles = []*os.File{f}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	letGo = sync.OnceFunc(func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	})
	t.Cleanup(letGo)
	return letGo
}

// A disk is in use when a partition of it is, and the other way round; one partition of two is not.
func TestPartitionInUse(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 24, 2*mib)
	file := filepath.Join(t.TempDir(), "device")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 20*mib)); err != nil {
		t.Fatal(err)
	}
	table := exec.CommandContext(t.Context(), "sfdisk", "-q", file)
	table.Stdin = strings.NewReader("label: gpt\nsize=4M\nsize=4M\n")
	if out, err := table.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dev := attach(t, file)
	// Not by the kernel itself, which may know no partition tables.
	if out, err := exec.CommandContext(t.Context(), "partx", "--add", dev).CombinedOutput(); err != nil {
		t.Fatalf("partx: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("partx", "--delete", dev).CombinedOutput(); err != nil {
			t.Errorf("partx: %v: %s", err, out)
		}
	})
	refused := func(out string) {
		t.Helper()
		if _, err := write(t.Context(), img, out, Options{Format: Raw, Force: true}); !errors.Is(err, ErrInUse) {
			t.Errorf("%s: %v", out, err)
		}
	}
	letGo := hold(t, dev+"p1")
	refused(dev)
	mustWrite(t, img, dev+"p2", Options{Format: Raw})
	letGo()
	letGo = hold(t, dev)
	refused(dev + "p1")
	letGo()
	if !bytes.Equal(onDevice(t, dev+"p2", 2*mib), want) {
		t.Error("wrong content")
	}
	if !isZero(onDevice(t, dev+"p1", 4*mib)) {
		t.Error("the other partition was changed")
	}
}

// Wherever it ends, the device looks empty, and the next run, without Force, succeeds.
func TestDeviceIsUnfinished(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 22, 3*mib)
	size := int64(len(want))
	for at := int32(1); ; at++ {
		dev, file := loop(t, size)
		before := readFile(t, file)
		var steps atomic.Int32
		opts := Options{Format: Raw, Force: true, FS: durable.FS{Before: func(string, string) error {
			if steps.Add(1) == at {
				return syscall.EIO
			}
			return nil
		}}}
		_, err := write(t.Context(), img, dev, opts)
		if steps.Load() < at {
			if err != nil || at < 8 {
				t.Errorf("%v after %d steps", err, at-1)
			}
			return
		}
		if !errors.Is(err, syscall.EIO) || errors.Is(err, ErrUnfinished) != (at > 1) {
			t.Errorf("step %d: %v", at, err)
		}
		switch got := onDevice(t, dev, size); {
		case at == 1 && !bytes.Equal(got, before):
			t.Error("changed before the first step")
		case at > 1 && !isZero(got[:headBytes]):
			t.Errorf("step %d: it looks finished", at)
		}
		mustWrite(t, img, dev, Options{Format: Raw, Force: at == 1})
		if !bytes.Equal(onDevice(t, dev, size), want) {
			t.Errorf("step %d: wrong content", at)
		}
	}
}

func TestDeviceVerify(t *testing.T) {
	t.Parallel()
	img, want := chainOf(t, 23, 5*mib)
	for _, at := range []int64{0, page + 1, headBytes + dataFrom(want[headBytes:]), int64(len(want)) - 1} {
		dev, _ := loop(t, int64(len(want)))
		damage := func() {
			f, err := os.OpenFile(dev, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte{want[at] ^ 0xff}, at); err != nil {
				t.Error(err)
			}
			if err := f.Sync(); err != nil {
				t.Error(err)
			}
		}
		// Behind the program's back: the head when it was written, the rest before it is verified.
		opts := Options{Format: Raw, Force: true}
		p, err := Look(t.Context(), img, dev, opts)
		if err != nil {
			t.Fatal(err)
		}
		p.img = &onSecondRead{Image: img, at: at, f: damage}
		w, err := p.Start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = w.Write(t.Context(), nil)
		if err == nil {
			err = w.Verify(t.Context(), nil)
		}
		if err == nil {
			err = w.Commit(t.Context())
		}
		if !errors.Is(err, ErrDiffers) || !errors.Is(err, ErrUnfinished) {
			t.Errorf("byte %d: %v", at, err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if !isZero(onDevice(t, dev, headBytes)) {
			t.Errorf("byte %d: it looks finished", at)
		}
	}
}

// onSecondRead calls f when a byte is read for the second time: to be compared.
type onSecondRead struct {
	image.Image
	at    int64
	reads atomic.Int32
	f     func()
}

func (o *onSecondRead) ReadAt(p []byte, off int64) (int, error) {
	if off <= o.at && o.at < off+int64(len(p)) && o.reads.Add(1) == 2 {
		o.f()
	}
	return o.Image.ReadAt(p, off)
}

// Devices that can't zero by themselves: what is zeroes already is left alone, as thin volumes allocate what is written.
func TestZeroing(t *testing.T) {
	t.Parallel()
	const size = 4 * mib
	for _, test := range []struct {
		name        string
		punch, fill error
	}{
		{"as it can", nil, nil},
		{"no punch", unix.EOPNOTSUPP, nil},
		{"neither", unix.EOPNOTSUPP, unix.EINVAL},
	} {
		dev, file := loop(t, size)
		if err := unix.Fallocate(fdOf(t, file), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 2*mib, mib); err != nil {
			t.Fatal(err)
		}
		want := onDevice(t, dev, size)
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		z := newZeroing(f)
		fill, filled := z.fill, int64(0)
		if test.punch != nil {
			z.punch = func(int64, int64) error { return test.punch }
		}
		z.fill = func(off, length int64) error {
			filled += length
			if test.fill != nil {
				return test.fill
			}
			return fill(off, length)
		}
		for _, r := range [][2]int64{{0, 512}, {page - 512, 1024}, {5*page - 512, page + 1024}, {mib - 512, 2*mib + 1024}, {size - 700, 700}} {
			if err := z.zero(r[0], r[1]); err != nil {
				t.Fatal(err)
			}
			clear(want[r[0] : r[0]+r[1]])
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(onDevice(t, dev, size), want) {
			t.Errorf("%s: wrong content", test.name)
		}
		switch used := dataBytes(t, file); {
		case test.punch == nil && (filled > 0 || used > 2*mib+64<<10):
			t.Errorf("%s: %d bytes used", test.name, used)
		case test.punch != nil && (filled == 0 || filled > mib+64<<10 || used > 3*mib):
			t.Errorf("%s: %d bytes filled, %d used", test.name, filled, used)
		}
	}
	bad := errors.New("bad")
	z := newZeroing(nil)
	z.punch = func(int64, int64) error { return bad }
	if err := z.zero(0, page); !errors.Is(err, bad) {
		t.Errorf("an error: %v", err)
	}
}

func fdOf(t *testing.T, path string) int {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return int(f.Fd())
}

// dataFrom is where the first byte is that is not zero.
func dataFrom(p []byte) int64 { return int64(len(p) - len(bytes.TrimLeft(p, "\x00"))) }
