package image_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/virtnbd/streamtest"
)

const benchSize = 128 << 20

// BenchmarkRead reads chains of increments of 1 % each, all in the page cache.
func BenchmarkRead(b *testing.B) {
	layers, _ := buildChain(b, 16, benchSize, 200, benchSize>>16/100)
	for _, n := range []int{1, 50, 200} {
		img := open(b, image.NewPool(image.PoolOptions{}), layers[:n]...)
		sequential(b, fmt.Sprintf("seq1M/%d", n), img)
		b.Run(fmt.Sprintf("rand4k/%d", n), func(b *testing.B) {
			b.SetBytes(4096)
			b.ReportAllocs()
			buf := make([]byte, 4096)
			rnd := rand.New(rand.NewPCG(1, 1))
			for b.Loop() {
				if _, err := img.ReadAt(buf, rnd.Int64N(benchSize-4096)&^4095); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("rand4k-parallel/%d", n), func(b *testing.B) {
			b.SetBytes(4096)
			b.SetParallelism(8)
			b.RunParallel(func(pb *testing.PB) {
				buf := make([]byte, 4096)
				rnd := rand.New(rand.NewPCG(rand.Uint64(), 1))
				for pb.Next() {
					if _, err := img.ReadAt(buf, rnd.Int64N(benchSize-4096)&^4095); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

func sequential(b *testing.B, name string, img image.Image) {
	b.Run(name, func(b *testing.B) {
		const piece = 1 << 20
		b.SetBytes(piece)
		b.ReportAllocs()
		buf := make([]byte, piece)
		off := int64(0)
		for b.Loop() {
			if _, err := img.ReadAt(buf, off); err != nil {
				b.Fatal(err)
			}
			if off += piece; off == img.Size() {
				off = 0
			}
		}
	})
}

// BenchmarkRaw is the bound: preads of one raw file.
func BenchmarkRaw(b *testing.B) {
	path := filepath.Join(b.TempDir(), "raw")
	if err := os.WriteFile(path, imagetest.Random(rand.New(rand.NewPCG(1, 1)), benchSize), 0o600); err != nil {
		b.Fatal(err)
	}
	sequential(b, "seq1M", open(b, image.NewPool(image.PoolOptions{}), layerOf(path, image.Raw)))
}

// BenchmarkOpen opens a chain and reads its first bytes, with nothing known before.
func BenchmarkOpen(b *testing.B) {
	layers, _ := buildChain(b, 16, benchSize, 200, benchSize>>16/100)
	for _, n := range []int{1, 50, 200} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			buf := make([]byte, 4096)
			for b.Loop() {
				img, err := image.NewPool(image.PoolOptions{}).Open(benchSize, layers[:n]...)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := img.ReadAt(buf, 0); err != nil {
					b.Fatal(err)
				}
				_ = img.Close()
			}
		})
	}
}

// BenchmarkCompressed reads fulls that qemu-img has compressed.
func BenchmarkCompressed(b *testing.B) {
	dir := b.TempDir()
	raw := filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, imagetest.Random(rand.New(rand.NewPCG(1, 1)), 64<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	for _, c := range []string{"zlib", "zstd"} {
		path := filepath.Join(dir, c)
		imagetest.QemuImg(b, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+c, raw, path)
		img := open(b, image.NewPool(image.PoolOptions{}), layerOf(path, image.Qcow2))
		sequential(b, "seq1M/"+c, img)
		b.Run("rand4k/"+c, func(b *testing.B) {
			b.ReportAllocs()
			buf := make([]byte, 4096)
			rnd := rand.New(rand.NewPCG(1, 1))
			for b.Loop() {
				if _, err := img.ReadAt(buf, rnd.Int64N(64<<20-4096)&^4095); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkStream reads at random a stream that virtnbdbackup has compressed in packs of 32 MiB, where each block refers to
// those before it.
func BenchmarkStream(b *testing.B) {
	const size = 128 << 20
	rnd := rand.New(rand.NewPCG(1, 1))
	s := streamtest.Stream{Size: size, Compress: true, Limit: 32 << 20, Frames: []streamtest.Frame{{Off: 0, Data: imagetest.Random(rnd, size)}}}
	path := filepath.Join(b.TempDir(), "stream")
	if err := os.WriteFile(path, s.Bytes(), 0o600); err != nil {
		b.Fatal(err)
	}
	img := open(b, image.NewPool(image.PoolOptions{}), layerOf(path, image.Stream))
	sequential(b, "seq1M", img)
	b.Run("rand4k", func(b *testing.B) {
		buf := make([]byte, 4096)
		for b.Loop() {
			if _, err := img.ReadAt(buf, rnd.Int64N(size-4096)&^4095); err != nil {
				b.Fatal(err)
			}
		}
	})
}
