// Package imagetest holds the contract that every image.Image fulfils, as a test
// suite to run over each kind of image, and helpers to make images with the real
// qemu-img and qemu-io.
package imagetest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"qmchain/chain/image"
)

// Run checks that the image that open returns keeps the contract of image.Image
// and has the content want. It opens and closes it several times.
func Run(t *testing.T, open func() (image.Image, error), want []byte) {
	t.Helper()
	size := int64(len(want))
	opened := func(t *testing.T) image.Image {
		t.Helper()
		img, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if img.Size() != size {
			t.Fatalf("size %d, want %d", img.Size(), size)
		}
		return img
	}
	seed := uint64(len(want))

	t.Run("whole", func(t *testing.T) {
		img := opened(t)
		defer closeImage(t, img)
		Equal(t, img, want)
	})
	t.Run("ReadAt", func(t *testing.T) {
		img := opened(t)
		defer closeImage(t, img)
		edges(t, img, want)
		if err := randomReads(img, want, rand.New(rand.NewPCG(seed, 1)), 300); err != nil {
			t.Error(err)
		}
	})
	t.Run("Extents", func(t *testing.T) {
		img := opened(t)
		defer closeImage(t, img)
		extents(t, img, want)
	})
	t.Run("concurrent", func(t *testing.T) {
		img := opened(t)
		defer closeImage(t, img)
		var wait sync.WaitGroup
		for i := range 4 {
			wait.Go(func() {
				rnd := rand.New(rand.NewPCG(seed, uint64(2+i)))
				if err := randomReads(img, want, rnd, 60); err != nil {
					t.Error(err)
				}
				if _, err := img.Extents(0, size); err != nil {
					t.Error(err)
				}
			})
		}
		wait.Wait()
	})
	t.Run("Close", func(t *testing.T) { closing(t, opened, size) })
}

// Equal checks that the image holds exactly want, reading it from the start to
// the end in pieces of 1 MiB.
func Equal(t testing.TB, img io.ReaderAt, want []byte) {
	t.Helper()
	buf := make([]byte, 1<<20)
	stale := bytes.Repeat([]byte{0xa5}, len(buf))
	for off := 0; ; off += len(buf) {
		copy(buf, stale) // what isn't written to must show
		n, err := img.ReadAt(buf, int64(off))
		left := want[min(off, len(want)):]
		switch {
		case len(left) >= len(buf) && (err != nil || n != len(buf)):
			t.Fatalf("read of %d bytes at %d: %d, %v", len(buf), off, n, err)
		case len(left) < len(buf) && (!errors.Is(err, io.EOF) || n != len(left)):
			t.Fatalf("read of %d bytes at %d, %d bytes before the end: %d, %v", len(buf), off, len(left), n, err)
		}
		if err := diff(buf[:n], left[:n], off); err != nil {
			t.Fatal(err)
		}
		if n < len(buf) {
			return
		}
	}
}

// diff says where got, read at off, differs from want.
func diff(got, want []byte, off int) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte %d (of a read at %d) is %#02x, want %#02x", off+i, off, got[i], want[i])
		}
	}
	return nil
}

func closeImage(t *testing.T, img image.Image) {
	t.Helper()
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}

// edges reads at and around the ends of the image.
func edges(t *testing.T, img image.Image, want []byte) {
	t.Helper()
	size := int64(len(want))
	for _, c := range []struct {
		off int64
		len int
		n   int
		err error
	}{
		{0, 0, 0, nil},
		{size, 0, 0, nil},
		{size + 1, 0, 0, nil},
		{size, 1, 0, io.EOF},
		{size + 1<<40, 4096, 0, io.EOF},
		{max(size-1, 0), int(min(size, 1)), int(min(size, 1)), nil},
		{max(size-100, 0), 200, int(min(size, 100)), io.EOF},
		{0, len(want), len(want), nil},
	} {
		buf := make([]byte, c.len)
		n, err := img.ReadAt(buf, c.off)
		if n != c.n || !errors.Is(err, c.err) {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v, want %d, %v", c.len, c.off, n, err, c.n, c.err)
			continue
		}
		if n > 0 {
			if err := diff(buf[:n], want[c.off:c.off+int64(n)], int(c.off)); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := img.ReadAt(make([]byte, 1), -1); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("ReadAt at -1: %v", err)
	}
}

func randomReads(img image.Image, want []byte, rnd *rand.Rand, count int) error {
	if len(want) == 0 {
		return nil
	}
	buf := make([]byte, 2<<20)
	for range count {
		length := 1 + rnd.IntN(1<<(1+rnd.IntN(21)))
		off := rnd.IntN(len(want))
		if rnd.IntN(2) == 0 {
			off &^= 1<<rnd.IntN(18) - 1
		}
		p := buf[:length]
		n, err := img.ReadAt(p, int64(off))
		left := want[off:]
		if len(left) >= length && (n != length || err != nil) || len(left) < length && (n != len(left) || !errors.Is(err, io.EOF)) {
			return fmt.Errorf("ReadAt(%d bytes, %d) = %d, %w", length, off, n, err)
		}
		if err := diff(p[:n], left[:n], off); err != nil {
			return err
		}
	}
	return nil
}

// extents checks that extents cover what was asked for and that zeroes are zeroes.
func extents(t *testing.T, img image.Image, want []byte) {
	t.Helper()
	size := int64(len(want))
	check := func(list []image.Extent, off, end int64) int64 {
		t.Helper()
		for i, e := range list {
			if e.Off != off || e.Len <= 0 || e.End() > end {
				t.Fatalf("extent %+v where %d to %d is due", e, off, end)
			}
			if i > 0 && list[i-1].Zero == e.Zero {
				t.Fatalf("extents %+v and %+v are not merged", list[i-1], e)
			}
			if e.Zero && !zeroes(want[e.Off:e.End()]) {
				t.Fatalf("extent %+v is not zero", e)
			}
			off = e.End()
		}
		return off
	}
	for off := int64(0); off < size; {
		list, err := img.Extents(off, size+12345)
		if err != nil {
			t.Fatal(err)
		}
		next := check(list, off, size)
		if next == off {
			t.Fatalf("no extents at %d", off)
		}
		off = next
	}
	var at int64
	for e, err := range image.Walk(img, 0, 1<<62) {
		if err != nil {
			t.Fatal(err)
		}
		at = check([]image.Extent{e}, at, size)
	}
	if at != size {
		t.Errorf("Walk ends at %d of %d", at, size)
	}
	rnd := rand.New(rand.NewPCG(uint64(size), 99))
	for range min(size, 50) {
		off := rnd.Int64N(size)
		length := 1 + rnd.Int64N(1<<(1+rnd.IntN(26)))
		list, err := img.Extents(off, length)
		if err != nil {
			t.Fatal(err)
		}
		if check(list, off, min(off+length, size)) == off {
			t.Fatalf("no extents at %d", off)
		}
	}
	for _, c := range [][2]int64{{0, 0}, {size, 0}, {size, 1}, {size + 10, 10}} {
		if list, err := img.Extents(c[0], c[1]); err != nil || len(list) != 0 {
			t.Errorf("Extents(%d, %d) = %v, %v", c[0], c[1], list, err)
		}
	}
	if _, err := img.Extents(-1, 10); err == nil {
		t.Error("Extents at -1: no error")
	}
}

func zeroes(b []byte) bool {
	var zero [64 << 10]byte
	for len(b) > 0 {
		n := min(len(b), len(zero))
		if !bytes.Equal(b[:n], zero[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// closing checks that Close waits for readers and ends the image for all others.
func closing(t *testing.T, opened func(*testing.T) image.Image, size int64) {
	img := opened(t)
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() {
			buf := make([]byte, min(size, 64<<10))
			for range 100 {
				_, err := img.ReadAt(buf, 0)
				if errors.Is(err, image.ErrClosed) {
					return
				}
				if err != nil {
					t.Errorf("read beside Close: %v", err)
					return
				}
			}
		})
	}
	closeImage(t, img)
	wait.Wait()
	if _, err := img.ReadAt(make([]byte, 1), 0); !errors.Is(err, image.ErrClosed) {
		t.Errorf("ReadAt after Close: %v", err)
	}
	if _, err := img.Extents(0, 1); !errors.Is(err, image.ErrClosed) {
		t.Errorf("Extents after Close: %v", err)
	}
	if img.Size() != size {
		t.Errorf("Size after Close: %d", img.Size())
	}
	if err := img.Close(); !errors.Is(err, image.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
}

// QemuImg runs qemu-img and returns its output.
func QemuImg(t testing.TB, args ...string) string {
	t.Helper()
	return run(t, "qemu-img", args...)
}

// QemuIO runs qemu-io commands on an image file, many in one process, and fails
// the test if one fails.
func QemuIO(t testing.TB, format, path string, commands ...string) {
	t.Helper()
	for len(commands) > 0 {
		n := min(len(commands), 500)
		args := []string{"-f", format}
		for _, c := range commands[:n] {
			args = append(args, "-c", c)
		}
		run(t, "qemu-io", append(args, path)...)
		commands = commands[n:]
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	// qemu-io complains of a failed command on either stream, and exits with 0 or 1.
	failed := name == "qemu-io" && (strings.Contains(out.String(), " failed: ") || errs.Len() > 0)
	if err != nil || failed {
		text := out.String()
		t.Fatalf("%s %.500q: %v\n...%s\n%s", name, args, err, text[max(0, len(text)-300):], errs.String())
	}
	return out.String()
}

// Content returns the disk of an image file as qemu-img, with the backing files
// that the headers name, reads it.
func Content(t testing.TB, format, path string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	QemuImg(t, "convert", "-f", format, "-O", "raw", path, raw)
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Writer makes qemu-io commands that write random bytes, different ones each time.
type Writer struct {
	rnd *rand.Rand
	dir string
	n   int
}

// NewWriter returns a writer whose bytes and choices follow from seed.
func NewWriter(t testing.TB, seed uint64) *Writer {
	return &Writer{rnd: rand.New(rand.NewPCG(seed, 7)), dir: t.TempDir()}
}

// Rand returns the writer's source of randomness.
func (w *Writer) Rand() *rand.Rand { return w.rnd }

// Write returns the command that writes length random bytes at off, and the
// bytes.
func (w *Writer) Write(t testing.TB, options string, off, length int64) (string, []byte) {
	t.Helper()
	b := Random(w.rnd, length)
	w.n++
	path := filepath.Join(w.dir, fmt.Sprint("source", w.n))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("write %s -s %s %d %d", options, path, off, length), b
}

// Random returns random bytes none of which is zero. Half of them repeat others,
// so that they can be compressed.
func Random(rnd *rand.Rand, length int64) []byte {
	b := make([]byte, length+8)
	for i := 0; i < int(length); i += 8 {
		if i%64 < 32 {
			binary.LittleEndian.PutUint64(b[i:], rnd.Uint64()|0x0101010101010101)
		} else {
			copy(b[i:i+8], b[i-32:])
		}
	}
	return b[:length:length]
}
