package inside

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// What is written is read again, and the disk below stays as it is.
func TestOverlay(t *testing.T) {
	t.Parallel()
	const size = 1<<20 + 512
	path := makeFile(t, size)
	want := bytes.Repeat([]byte("below 8 "), size/8)
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o, err := newOverlay(disk(t, "scsi0", path), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 500 {
		off := random.Int64N(size)
		b := bytes.Repeat([]byte{byte(i)}, min(int(size-off), 1+random.IntN(20_000)))
		if i%2 == 0 {
			if n, err := o.WriteAt(b, off); n != len(b) || err != nil {
				t.Fatal(n, err)
			}
			copy(want[off:], b)
			continue
		}
		n, err := o.ReadAt(b, off)
		if n != len(b) || err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(b, want[off:][:n]) {
			t.Fatalf("%d at %d: %d, %v", len(b), off, n, err)
		}
	}
	if _, err := o.WriteAt(make([]byte, 2), size-1); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("behind the end: %v", err)
	}
	if n, err := o.ReadAt(make([]byte, 10), size-1); n != 1 || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if below, err := os.ReadFile(path); err != nil || !bytes.Equal(below, bytes.Repeat([]byte("below 8 "), size/8)) {
		t.Errorf("the disk has changed: %v", err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
		t.Errorf("left: %v, %v", files, err)
	}
	readOnly, err := newOverlay(disk(t, "scsi0", path), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := readOnly.WriteAt([]byte{1}, 0); !errors.Is(err, os.ErrPermission) {
		t.Errorf("read-only: %v", err)
	}
}
