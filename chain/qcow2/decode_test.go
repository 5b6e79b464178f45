package qcow2_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"qmchain/chain/image/imagetest"
	"qmchain/chain/qcow2"
)

func deflated(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, 6)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// zstded compresses b; without streaming, the frame tells its length.
func zstded(t testing.TB, b []byte, streaming bool) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, zstd.WithEncoderCRC(streaming))
	if err != nil {
		t.Fatal(err)
	}
	if !streaming {
		return w.EncodeAll(b, nil)
	}
	if _, err := io.Copy(w, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestDecode(t *testing.T) {
	t.Parallel()
	const size = 64 << 10
	d := qcow2.NewDecoder(2)
	rnd := rand.New(rand.NewPCG(1, 2))
	cluster := imagetest.Random(rnd, size)
	junk := imagetest.Random(rnd, 511)
	bomb := make([]byte, 8<<20)
	half := cluster[:size/2]
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	skip := cat([]byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0}, []byte("abc"))
	for _, c := range []struct {
		name string
		c    qcow2.Compression
		src  []byte
		good bool
	}{
		{"zlib", qcow2.Zlib, deflated(t, cluster), true},
		{"zlib and junk", qcow2.Zlib, cat(deflated(t, cluster), junk), true},
		{"zlib short", qcow2.Zlib, deflated(t, cluster[1:]), false},
		{"zlib long", qcow2.Zlib, deflated(t, append(cluster[:size:size], 1)), false},
		{"zlib cut off", qcow2.Zlib, deflated(t, cluster)[:9000], false},
		{"zlib without its last byte", qcow2.Zlib, deflated(t, cluster)[:len(deflated(t, cluster))-1], false},
		{"zlib bomb", qcow2.Zlib, deflated(t, bomb), false},
		{"zlib junk", qcow2.Zlib, junk, false},
		{"zlib empty", qcow2.Zlib, nil, false},
		{"zstd", qcow2.Zstd, zstded(t, cluster, false), true},
		{"zstd and junk", qcow2.Zstd, cat(zstded(t, cluster, false), junk), true},
		{"zstd without a length", qcow2.Zstd, zstded(t, cluster, true), true},
		{"zstd without a length and junk", qcow2.Zstd, cat(zstded(t, cluster, true), junk), true},
		{"zstd and another cluster", qcow2.Zstd, cat(zstded(t, cluster, false), zstded(t, bomb, false)[:300]), true},
		{"zstd frames", qcow2.Zstd, cat(skip, zstded(t, half, false), skip, zstded(t, cluster[size/2:], true), junk), true},
		{"zstd short", qcow2.Zstd, zstded(t, cluster[1:], false), false},
		{"zstd short and junk", qcow2.Zstd, cat(zstded(t, cluster[1:], false), junk), false},
		{"zstd long", qcow2.Zstd, zstded(t, append(cluster[:size:size], 1), false), false},
		{"zstd long without a length", qcow2.Zstd, zstded(t, append(cluster[:size:size], 1), true), false},
		{"zstd frames too long", qcow2.Zstd, cat(zstded(t, half, false), zstded(t, cluster, true)), false},
		{"zstd cut off", qcow2.Zstd, zstded(t, cluster, false)[:9000], false},
		{"zstd bomb", qcow2.Zstd, zstded(t, bomb, false), false},
		{"zstd bomb without a length", qcow2.Zstd, zstded(t, bomb, true), false},
		{"zstd skips all", qcow2.Zstd, cat(skip, skip), false},
		{"zstd skips too far", qcow2.Zstd, []byte{0x50, 0x2a, 0x4d, 0x18, 255, 255, 255, 255}, false},
		{"zstd junk", qcow2.Zstd, junk, false},
		{"zstd empty", qcow2.Zstd, nil, false},
	} {
		// Behind the cluster are the caller's bytes, not ours.
		dst := bytes.Repeat([]byte{0xee}, size+1000)
		err := d.Decode(c.c, dst[:size], c.src)
		if c.good && (err != nil || !bytes.Equal(dst[:size], cluster)) || !c.good && !errors.Is(err, qcow2.ErrCorrupt) {
			t.Errorf("%s: %v", c.name, err)
		}
		if len(bytes.Trim(dst[size:], "\xee")) > 0 {
			t.Errorf("%s: wrote behind the cluster", c.name)
		}
	}
	if err := d.Decode(7, make([]byte, 512), junk); !errors.Is(err, qcow2.ErrUnsupported) {
		t.Errorf("unknown compression: %v", err)
	}
}

func TestDecodeConcurrent(t *testing.T) {
	t.Parallel()
	const size = 16 << 10
	d := qcow2.NewDecoder(2)
	var wait sync.WaitGroup
	for i := range uint64(4) {
		rnd := rand.New(rand.NewPCG(i, 2))
		cluster := imagetest.Random(rnd, size)
		z, s := deflated(t, cluster), zstded(t, cluster, i%2 == 0)
		wait.Go(func() {
			dst := make([]byte, size)
			for n := range 50 {
				clear(dst)
				err := d.Decode(qcow2.Compression(n%2), dst, [][]byte{z, s}[n%2])
				if err != nil || !bytes.Equal(dst, cluster) {
					t.Errorf("decode %d: %v", n, err)
					return
				}
			}
		})
	}
	wait.Wait()
}
