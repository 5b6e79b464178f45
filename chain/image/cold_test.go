package image_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// forget takes what the kernel has of the layers' files out of its cache.
func forget(t *testing.T, layers []image.Layer) {
	t.Helper()
	for _, l := range layers {
		f, err := os.OpenFile(l.Path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// Reads over many layers are right, whatever part of them the kernel has to get from the disk first.
func TestCold(t *testing.T) {
	t.Parallel()
	layers, want := buildChain(t, 12, 2<<20, 12, 60)
	img := open(t, image.NewPool(image.PoolOptions{}), layers...)
	rnd := rand.New(rand.NewPCG(4, 4))
	for range 20 {
		forget(t, layers)
		// Some of it comes back before the read that counts.
		for range rnd.IntN(20) {
			if _, err := img.ReadAt(make([]byte, 1+rnd.IntN(9000)), rnd.Int64N(2<<20-10000)); err != nil {
				t.Fatal(err)
			}
		}
		off := rnd.Int64N(1 << 20)
		got := make([]byte, 1+rnd.IntN(1<<20))
		if _, err := img.ReadAt(got, off); err != nil || !bytes.Equal(got, want[off:][:len(got)]) {
			t.Fatalf("%d bytes at %d: %v, the same: %v", len(got), off, err, bytes.Equal(got, want[off:][:len(got)]))
		}
	}
}

// A file that was cut off shows in a long read where it ends, with what is before.
func TestColdCutOff(t *testing.T) {
	t.Parallel()
	layers, want := buildChain(t, 12, 1<<20, 2, 128)
	img := open(t, image.NewPool(image.PoolOptions{}), layers...)
	got := make([]byte, 1<<20)
	if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("before: %v", err)
	}
	forget(t, layers)
	info, err := os.Stat(layers[1].Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(layers[1].Path, info.Size()/2); err != nil {
		t.Fatal(err)
	}
	clear(got)
	n, err := img.ReadAt(got, 0)
	if !errors.Is(err, image.ErrChanged) || n == 0 || n == len(got) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if !bytes.Equal(got[:n], want[:n]) {
		t.Errorf("other content in the %d bytes before the end", n)
	}
}
