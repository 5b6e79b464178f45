package image_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/virtnbd"
	"qmchain/chain/virtnbd/streamtest"
)

// streams makes a full and increments on it, with data, zeroes and gaps, and the disk that
// they are.
func streams(t testing.TB, size int64, count int, compress bool) ([]image.Layer, []byte) {
	t.Helper()
	dir := t.TempDir()
	rnd := rand.New(rand.NewPCG(uint64(size), uint64(count)))
	var disk []byte
	var list []image.Layer
	for i := range count {
		s := streamtest.Stream{Size: size, Compress: compress, Limit: 700 << 10, Checkpoint: fmt.Sprint("virtnbdbackup.", i)}
		if i > 0 {
			s.Parent = fmt.Sprint("virtnbdbackup.", i-1)
		}
		for at := int64(rnd.IntN(3)) * 512; at < size; {
			n := min(512*(1+rnd.Int64N(1<<(1+rnd.IntN(12)))), size-at)
			if i > 0 && rnd.IntN(5) == 0 {
				s.Frames = append(s.Frames, streamtest.Frame{Off: at, Len: n})
			} else {
				s.Frames = append(s.Frames, streamtest.Frame{Off: at, Data: imagetest.Random(rnd, n)})
			}
			at += n + 512*rnd.Int64N(1<<(1+rnd.IntN(8+3*min(i, 1))))
		}
		file := s.Bytes()
		var err error
		if disk, err = streamtest.Apply(disk, file); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, fmt.Sprint(i, ".data"))
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		list = append(list, layerOf(path, image.Stream))
	}
	return list, disk
}

func TestStreams(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for _, compress := range []bool{false, true} {
		for _, count := range []int{1, 4} {
			t.Run(fmt.Sprintf("compressed %v, %d", compress, count), func(t *testing.T) {
				t.Parallel()
				layers, want := streams(t, 5*mib+1536, count, compress)
				imagetest.Run(t, opener(layers...), want)
			})
		}
	}
}

// A disk whose streams are more than one group long, and empty for most of it.
func TestSparseStreams(t *testing.T) {
	t.Parallel()
	const size = 300 << 20
	dir := t.TempDir()
	rnd := rand.New(rand.NewPCG(5, 5))
	far := imagetest.Random(rnd, 3<<20)
	var layers []image.Layer
	want := make([]byte, size)
	for i, s := range []streamtest.Stream{
		// Across a group's border, compressed as one.
		{Compress: true, Frames: []streamtest.Frame{{Off: 127 << 20, Data: far}}},
		{Parent: "virtnbdbackup.0", Frames: []streamtest.Frame{{Off: 128<<20 - 512, Data: far[:1024]}, {Off: size - 512, Data: far[:512]}}},
		{Parent: "virtnbdbackup.1", Compress: true, Frames: []streamtest.Frame{{Off: 128 << 20, Len: 65536}}},
	} {
		s.Size = size
		path := filepath.Join(dir, fmt.Sprint(i))
		file := s.Bytes()
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		layers = append(layers, layerOf(path, image.Stream))
	}
	copy(want[127<<20:], far)
	copy(want[128<<20-512:], far[:512])
	copy(want[size-512:], far[:512])
	clear(want[128<<20:][:65536])
	img := open(t, image.NewPool(image.PoolOptions{}), layers...)
	imagetest.Equal(t, img, want)
	var data int64
	for e, err := range image.Walk(img, 0, size) {
		if err != nil {
			t.Fatal(err)
		}
		if !e.Zero {
			data += e.Len
		}
	}
	if limit := int64(len(far)) + 512; data > limit {
		t.Errorf("%d bytes of data, at most %d expected", data, limit)
	}
}

// Many readers of compressed streams, and room for hardly any of what they decompress.
func TestStreamsInSmallPool(t *testing.T) {
	t.Parallel()
	size := int64(4 << 20)
	s := streamtest.Stream{Size: size, Compress: true, Frames: []streamtest.Frame{{Off: 0, Data: imagetest.Random(rand.New(rand.NewPCG(1, 3)), size)}}}
	path := filepath.Join(t.TempDir(), "one")
	if err := os.WriteFile(path, s.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	want := s.Frames[0].Data
	img := open(t, image.NewPool(image.PoolOptions{MaxFiles: 1, MaxClusters: 1, MaxMeta: 1}), layerOf(path, image.Stream))
	var wait sync.WaitGroup
	for i := range 4 {
		wait.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 3))
			for range 10 {
				off := rnd.Int64N(size - 4096)
				p := make([]byte, 1+rnd.IntN(1<<20))
				n, _ := img.ReadAt(p, off)
				if n == 0 || !bytes.Equal(p[:n], want[off:off+int64(n)]) {
					t.Errorf("other content in %d bytes at %d", len(p), off)
				}
			}
		})
	}
	wait.Wait()
}

// A full hides what is below it, so it can't be anything else than the base.
func TestFullStreamOnOther(t *testing.T) {
	t.Parallel()
	layers, _ := streams(t, 1<<20, 2, false)
	pool := image.NewPool(image.PoolOptions{})
	if img, err := pool.Open(-1, layers[1], layers[0]); err == nil {
		_ = img.Close()
		t.Error("it was opened")
	}
	img := open(t, pool, layers...) // the pool is not in disorder
	if _, err := img.ReadAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// A stream is checked when it is opened, and when another file has taken its place.
func TestStreamChecks(t *testing.T) {
	t.Parallel()
	layers, want := streams(t, 1<<20, 2, true)
	layers[1].CheckStream = func(m *virtnbd.Meta) error {
		if m.Checkpoint != "virtnbdbackup.1" {
			return fmt.Errorf("checkpoint %s", m.Checkpoint)
		}
		return nil
	}
	pool := image.NewPool(image.PoolOptions{MaxFiles: 1, MaxMeta: 1, MaxClusters: 1})
	img := open(t, pool, layers...)
	imagetest.Equal(t, img, want)
	swapped := []image.Layer{layers[0], layers[1]}
	swapped[1].Path = layers[0].Path
	if _, err := pool.Open(-1, swapped...); err == nil {
		t.Error("another stream was opened")
	}
	swapped[1] = layers[1]
	swapped[1].CheckStream = func(*virtnbd.Meta) error { return errors.New("no") }
	if _, err := pool.Open(-1, swapped...); err == nil || !strings.Contains(err.Error(), "no") {
		t.Errorf("the check was not asked: %v", err)
	}
	// The same name, size and time, but not the same bytes.
	for _, l := range layers {
		info, err := os.Stat(l.Path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(l.Path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("9"), 60); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(l.Path, time.Time{}, info.ModTime()); err != nil {
			t.Fatal(err)
		}
	}
	fresh := make([]byte, 1<<20)
	for off := int64(0); ; off += 4096 {
		if _, err := img.ReadAt(fresh[:4096], off); err != nil {
			if !errors.Is(err, image.ErrChanged) {
				t.Error(err)
			}
			break
		}
	}
}
