package image_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
)

// layerOf returns the layer of a file, whose size is not told.
func layerOf(path string, format image.Format) image.Layer {
	return image.Layer{Path: path, Name: filepath.Base(path), Format: format, Bytes: -1}
}

func qcow2Layers(paths ...string) []image.Layer {
	var list []image.Layer
	for _, p := range paths {
		list = append(list, layerOf(p, image.Qcow2))
	}
	return list
}

// opener opens layers with a pool of its own each time.
func opener(layers ...image.Layer) func() (image.Image, error) {
	return func() (image.Image, error) { return image.NewPool(image.PoolOptions{}).Open(-1, layers...) }
}

// open opens layers until the end of the test.
func open(t testing.TB, p *image.Pool, layers ...image.Layer) image.Image {
	t.Helper()
	img, err := p.Open(-1, layers...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = img.Close() })
	return img
}

// read returns the whole of a small image.
func read(t testing.TB, img image.Image) []byte {
	t.Helper()
	b := make([]byte, img.Size())
	if _, err := img.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// fill makes commands that put data, zeroes and discards all over a disk, around
// the borders of its clusters too.
func fill(t testing.TB, w *imagetest.Writer, size, cluster int64, zeroes bool) []string {
	t.Helper()
	var list []string
	write := func(off, length int64) {
		if off = max(off, 0); off < size {
			c, _ := w.Write(t, "", off, min(length, size-off))
			list = append(list, c)
		}
	}
	write(0, 3*cluster)
	write(size-cluster-cluster/2, 2*cluster) // to the very end
	write(5*cluster-100, 200)
	write(7*cluster+1, cluster)
	for range 12 {
		write(w.Rand().Int64N(size), 1+w.Rand().Int64N(2*cluster))
	}
	if zeroes {
		list = append(list,
			fmt.Sprintf("write -z %d %d", cluster, cluster),
			fmt.Sprintf("write -z -u %d %d", size/2&^511, min(3*cluster, size/4)),
			fmt.Sprintf("write -z %d %d", min(8*cluster, size/2)+333, cluster/2),
			fmt.Sprintf("discard %d %d", size/3&^(cluster-1), 2*cluster))
	}
	return list
}

func TestFormats(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for _, c := range []struct {
		name    string
		options string
		cluster int64
		size    int64
	}{
		{"512", "cluster_size=512", 512, mib + 512},
		{"512 refcount 1", "cluster_size=512,refcount_bits=1", 512, mib},
		{"512 compat 0.10", "cluster_size=512,compat=0.10", 512, mib},
		{"4k", "cluster_size=4k", 4 << 10, 2*mib + 1024},
		{"64k", "cluster_size=64k", 64 << 10, 6 * mib},
		{"64k odd size", "cluster_size=64k", 64 << 10, 5*mib + 3*512},
		{"64k compat 0.10", "cluster_size=64k,compat=0.10", 64 << 10, 6 * mib},
		{"64k extended", "cluster_size=64k,extended_l2=on", 64 << 10, 6*mib + 512},
		{"16k extended", "cluster_size=16k,extended_l2=on", 16 << 10, 3 * mib},
		{"2M extended", "cluster_size=2M,extended_l2=on", 2 << 20, 13*mib + 512},
		{"2M", "cluster_size=2M", 2 << 20, 13*mib + 512},
		{"lazy refcounts", "cluster_size=64k,lazy_refcounts=on", 64 << 10, 4 * mib},
		{"preallocated metadata", "cluster_size=64k,preallocation=metadata", 64 << 10, 4*mib + 512},
		{"preallocated", "cluster_size=64k,preallocation=falloc", 64 << 10, 4*mib + 512},
		{"preallocated extended", "cluster_size=64k,preallocation=metadata,extended_l2=on", 64 << 10, 4*mib + 512},
		{"zlib", "cluster_size=64k,compression_type=zlib", 64 << 10, 5*mib + 512},
		{"zstd", "cluster_size=64k,compression_type=zstd", 64 << 10, 5*mib + 512},
		{"zlib 512", "cluster_size=512", 512, mib},
		{"zstd 512", "cluster_size=512,compression_type=zstd", 512, mib},
		{"zstd 4k", "cluster_size=4k,compression_type=zstd", 4 << 10, 2 * mib},
		{"zlib 2M", "cluster_size=2M,compression_type=zlib", 2 << 20, 13*mib + 512},
		{"zstd 2M", "cluster_size=2M,compression_type=zstd", 2 << 20, 13*mib + 512},
		{"zstd extended", "cluster_size=64k,compression_type=zstd,extended_l2=on", 64 << 10, 5*mib + 512},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := imagetest.NewWriter(t, uint64(len(c.name)))
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", c.options, path, fmt.Sprint(c.size))
			imagetest.QemuIO(t, "qcow2", path, fill(t, w, c.size, c.cluster, true)...)
			if strings.Contains(c.name, "zlib") || strings.Contains(c.name, "zstd") {
				plain := path
				path = filepath.Join(t.TempDir(), "compressed.qcow2")
				imagetest.QemuImg(t, "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", c.options, plain, path)
				// Compressed clusters beside, and partly overwritten by, others.
				imagetest.QemuIO(t, "qcow2", path, fill(t, w, c.size, c.cluster, true)[3:9]...)
			}
			imagetest.Run(t, opener(layerOf(path, image.Qcow2)), imagetest.Content(t, "qcow2", path))
		})
	}
}

// A raw file of any length is a disk; its holes are zeroes.
func TestRaw(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.raw")
	want := make([]byte, 8<<20+777)
	rnd := rand.New(rand.NewPCG(1, 1))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int{0, 1 << 20, 5<<20 + 4096, 8<<20 + 700} {
		b := imagetest.Random(rnd, 70)
		copy(want[off:], b)
		if _, err := f.WriteAt(b, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(len(want))); err != nil {
		t.Fatal(err)
	}
	imagetest.Run(t, opener(layerOf(path, image.Raw)), want)

	pool := image.NewPool(image.PoolOptions{})
	holes := 0
	for e, err := range image.Walk(open(t, pool, layerOf(path, image.Raw)), 0, int64(len(want))) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Zero {
			holes++
		}
	}
	if holes < 3 {
		t.Errorf("%d zero extents in a file with 4 pieces of data", holes)
	}

	// QEMU sees whole sectors; a manifest says what QEMU saw.
	img, err := pool.Open(8<<20+1024, layerOf(path, image.Raw))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	imagetest.Equal(t, img, append(want, make([]byte, 1024-777)...))
	for _, size := range []int64{0, 8 << 20, 8<<20 + 512, 8<<20 + 2048} {
		if img, err := pool.Open(size, layerOf(path, image.Raw)); err == nil {
			_ = img.Close()
			t.Errorf("opened a raw file of %d bytes as a disk of %d", len(want), size)
		}
	}
}

// A disk that grows and shrinks from layer to layer, over a raw base: what a
// smaller layer has cut off never comes back.
func TestSizes(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	dir := t.TempDir()
	w := imagetest.NewWriter(t, 3)
	base := filepath.Join(dir, "base.raw")
	if err := os.WriteFile(base, imagetest.Random(w.Rand(), 6*mib+300), 0o600); err != nil {
		t.Fatal(err)
	}
	layers := []image.Layer{layerOf(base, image.Raw)}
	backing, format := base, "raw"
	for i, c := range []struct {
		size    int64
		options string
	}{
		{9*mib + 512, "cluster_size=64k"},
		{3*mib + 1536, "cluster_size=4k"},
		{8 * mib, "cluster_size=2M"},
		{8*mib + 512, "cluster_size=64k,extended_l2=on"},
		{2*mib + 512, "cluster_size=512"},
		{2 * mib, "cluster_size=64k"},
		{66*mib + 512, "cluster_size=64k"}, // more than one group
		{65 * mib, "cluster_size=64k"},
		{130 * mib, "cluster_size=64k"},
	} {
		path := filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", backing, "-F", format, "-o", c.options, path, fmt.Sprint(c.size))
		var commands []string
		for range 4 {
			off := w.Rand().Int64N(c.size)
			cmd, _ := w.Write(t, "", off, min(c.size-off, 1+w.Rand().Int64N(200<<10)))
			commands = append(commands, cmd)
		}
		end, _ := w.Write(t, "", c.size-1000, 1000)
		commands = append(commands, end)
		if c.size > 65*mib {
			border, _ := w.Write(t, "", 64*mib-70000, 140000)
			commands = append(commands, border)
		}
		imagetest.QemuIO(t, "qcow2", path, commands...)
		layers = append(layers, layerOf(path, image.Qcow2))
		backing, format = path, "qcow2"
		want := imagetest.Content(t, "qcow2", path)
		if i == 3 || c.size == 130*mib {
			imagetest.Run(t, opener(layers...), want)
		} else {
			imagetest.Equal(t, open(t, image.NewPool(image.PoolOptions{}), layers...), want)
		}
	}
}

// Every point of a long chain in which each layer changes bytes that others have
// changed before, against the model of its bytes and against qemu-img.
func TestChain(t *testing.T) {
	t.Parallel()
	const size, length = 3<<20 + 512, 50
	dir := t.TempDir()
	w := imagetest.NewWriter(t, 4)
	options := []string{"cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on", "cluster_size=512", "cluster_size=64k,compat=0.10"}
	model := make([]byte, size)
	var paths []string
	var want [][]byte
	for i := range length {
		path := filepath.Join(dir, fmt.Sprintf("%02d.qcow2", i))
		args := []string{"create", "-q", "-f", "qcow2", "-o", options[i%len(options)]}
		if i > 0 {
			args = append(args, "-b", paths[i-1], "-F", "qcow2")
		}
		imagetest.QemuImg(t, append(args, path, fmt.Sprint(size))...)
		var commands []string
		writes := 4
		if i == 0 {
			writes = 40
		}
		for range writes {
			// Few places, so that layers lie on one another.
			off := w.Rand().Int64N(size/(80<<10)) * (80 << 10)
			length := min(1+w.Rand().Int64N(90<<10), size-off)
			if w.Rand().IntN(5) == 0 {
				commands = append(commands, fmt.Sprintf("write -z %d %d", off, length))
				clear(model[off : off+length])
				continue
			}
			c, b := w.Write(t, "", off, length)
			commands = append(commands, c)
			copy(model[off:], b)
		}
		imagetest.QemuIO(t, "qcow2", path, commands...)
		paths = append(paths, path)
		want = append(want, bytes.Clone(model))
	}
	layers := qcow2Layers(paths...)
	for _, i := range []int{0, 1, 7, 24, length - 1} {
		if !bytes.Equal(imagetest.Content(t, "qcow2", paths[i]), want[i]) {
			t.Fatalf("the model of point %d is not what qemu-img reads", i)
		}
	}
	imagetest.Run(t, opener(layers...), want[length-1])

	// Points that share their layers, opened in any order, read in any order.
	pool := image.NewPool(image.PoolOptions{})
	images := make([]image.Image, length)
	for _, i := range w.Rand().Perm(length) {
		images[i] = open(t, pool, layers[:i+1]...)
	}
	for _, i := range w.Rand().Perm(length) {
		imagetest.Equal(t, images[i], want[i])
	}
	for _, i := range w.Rand().Perm(length) {
		if i%3 != 0 {
			if err := images[i].Close(); err != nil {
				t.Error(err)
			}
		}
	}
	for i := 0; i < length; i += 3 {
		imagetest.Equal(t, images[i], want[i])
	}
}
