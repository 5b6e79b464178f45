package image_test

import (
	"bytes"
	"flag"
	"fmt"
	"path/filepath"
	"testing"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
)

var seeds = flag.Int("seeds", 8, "random chains to try")

// TestRandom writes, zeroes and discards at random over random chains, and
// compares every point with qemu-img and with a model of its bytes.
func TestRandom(t *testing.T) {
	t.Parallel()
	for seed := range uint64(*seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			randomChain(t, seed)
		})
	}
}

func randomChain(t *testing.T, seed uint64) {
	dir := t.TempDir()
	w := imagetest.NewWriter(t, seed)
	rnd := w.Rand()
	pool := image.NewPool(image.PoolOptions{MaxFiles: 1 + rnd.IntN(4)})
	var model diskModel
	var layers []image.Layer
	var backing string
	for i := range 2 + rnd.IntN(6) {
		bits := 9 + rnd.IntN(10)
		options := fmt.Sprintf("cluster_size=%d", 1<<bits)
		v3 := true
		switch {
		case bits >= 14 && rnd.IntN(3) == 0:
			options += ",extended_l2=on"
		case rnd.IntN(5) == 0:
			options += ",compat=0.10"
			v3 = false
		}
		if v3 && rnd.IntN(2) == 0 {
			options += ",compression_type=zstd"
		}
		size := model.size()
		if i == 0 || rnd.IntN(4) == 0 {
			size = (512<<10 + rnd.Int64N(2<<20)) &^ 511
		}
		model.resize(size)

		path := filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		args := []string{"create", "-q", "-f", "qcow2", "-o", options}
		if backing != "" {
			args = append(args, "-b", backing, "-F", "qcow2")
		}
		imagetest.QemuImg(t, append(args, path, fmt.Sprint(size))...)

		var commands []string
		cluster := int64(1) << bits
		// Compressed clusters go where nothing is allocated, so they come first.
		taken := map[int64]bool{}
		for range rnd.IntN(5) {
			off := rnd.Int64N(size) &^ (cluster - 1)
			if taken[off] || off+cluster > size {
				continue
			}
			taken[off] = true
			c, b := w.Write(t, "-c", off, cluster)
			commands = append(commands, c)
			model.write(off, b)
		}
		for range 5 + rnd.IntN(40) {
			off := rnd.Int64N(size)
			length := 1 + rnd.Int64N(1<<(1+rnd.IntN(18)))
			if rnd.IntN(3) == 0 {
				off, length = off&^(cluster-1), (length+cluster-1)&^(cluster-1)
			}
			length = min(length, size-off)
			switch rnd.IntN(8) {
			case 0:
				commands = append(commands, fmt.Sprintf("write -z %d %d", off, length))
				model.write(off, make([]byte, length))
			case 1:
				commands = append(commands, fmt.Sprintf("write -z -u %d %d", off, length))
				model.write(off, make([]byte, length))
			case 2:
				commands = append(commands, fmt.Sprintf("discard %d %d", off, length))
				model.discard(off, length)
			default:
				c, b := w.Write(t, "", off, length)
				commands = append(commands, c)
				model.write(off, b)
			}
		}
		imagetest.QemuIO(t, "qcow2", path, commands...)
		layers = append(layers, layerOf(path, image.Qcow2))
		backing = path

		want := imagetest.Content(t, "qcow2", path)
		if err := model.settle(want); err != nil {
			t.Fatalf("seed %d, layer %d (%s): the model is not what qemu-img reads: %v", seed, i, options, err)
		}
		img := open(t, pool, layers...) // all stay open: points share layers
		if img.Size() != int64(len(want)) {
			t.Fatalf("seed %d, layer %d: size %d, want %d", seed, i, img.Size(), len(want))
		}
		imagetest.Equal(t, img, want)
	}
	imagetest.Run(t, opener(layers...), model.bytes)
}

// diskModel is the content of a disk. What was discarded reads as before or as
// zeroes; QEMU decides.
type diskModel struct {
	bytes     []byte
	discarded []bool
}

func (m *diskModel) size() int64 { return int64(len(m.bytes)) }

func (m *diskModel) resize(size int64) {
	keep := min(size, m.size())
	m.bytes = append(bytes.Clone(m.bytes[:keep]), make([]byte, size-keep)...)
	m.discarded = make([]bool, size)
}

func (m *diskModel) write(off int64, b []byte) {
	copy(m.bytes[off:], b)
	clear(m.discarded[off : off+int64(len(b))])
}

func (m *diskModel) discard(off, length int64) {
	for i := off; i < off+length; i++ {
		m.discarded[i] = true
	}
}

// settle takes over what really became of the discards, if all else is as it should be.
func (m *diskModel) settle(actual []byte) error {
	if len(actual) != len(m.bytes) {
		return fmt.Errorf("%d bytes, %d expected", len(actual), len(m.bytes))
	}
	for i, b := range actual {
		if b != m.bytes[i] && (b != 0 || !m.discarded[i]) {
			return fmt.Errorf("byte %d is %#02x, %#02x expected", i, b, m.bytes[i])
		}
	}
	copy(m.bytes, actual)
	clear(m.discarded)
	return nil
}
