package qcow2_test

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"qmchain/chain/qcow2"
)

// content returns bytes of one of several kinds.
func content(rnd *rand.Rand, kind, size int) []byte {
	b := make([]byte, size)
	switch kind {
	case 0: // zeroes
	case 1: // nothing to compress
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
	case 2: // short matches, far and near
		for i := range b {
			b[i] = byte(rnd.IntN(4))
		}
	case 3: // words
		for i := 0; i < size; {
			word := rnd.IntN(200)
			for range 2 + word%7 {
				if i < size {
					b[i] = byte('a' + word%26)
					i++
					word = word*7 + 3
				}
			}
		}
	case 4: // a code with long and short lengths
		for i := range b {
			b[i] = byte(min(rnd.ExpFloat64()*12, 255))
		}
	case 5: // runs of all distances below that of a word
		for i := range b {
			if period := 1 + i>>9%9; i >= period && i%512 >= period {
				b[i] = b[i-period]
			} else {
				b[i] = byte(rnd.Uint32())
			}
		}
	}
	return b
}

// What the standard library's encoder writes, at each of its levels.
func TestInflate(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(7, 7))
	d := qcow2.NewDecoder(1)
	for _, size := range []int{512, 64 << 10} {
		for kind := range 6 {
			want := content(rnd, kind, size)
			for level := flate.HuffmanOnly; level <= flate.BestCompression; level++ {
				var packed bytes.Buffer
				w, err := flate.NewWriter(&packed, level)
				if err != nil {
					t.Fatal(err)
				}
				// A flush ends a block, with one that is stored and empty.
				cut := rnd.IntN(size)
				_, err1 := w.Write(want[:cut])
				err2, err3 := w.Flush(), error(nil)
				if err1 == nil {
					_, err3 = w.Write(want[cut:])
				}
				if err := w.Close(); err != nil || err1 != nil || err2 != nil || err3 != nil {
					t.Fatal(err, err1, err2, err3)
				}
				for _, behind := range []int{0, 1, 7, 30, 511} {
					name := fmt.Sprintf("size %d, kind %d, level %d, %d bytes behind", size, kind, level, behind)
					src := append(bytes.Clone(packed.Bytes()), content(rnd, 1, behind)...)
					got := make([]byte, size)
					if err := d.Decode(qcow2.Zlib, got, src); err != nil || !bytes.Equal(got, want) {
						t.Fatalf("%s: %v, same %v", name, err, bytes.Equal(got, want))
					}
				}
			}
		}
	}
}

// FuzzInflate compares with the standard library: the same streams are good, and mean the same.
func FuzzInflate(f *testing.F) {
	rnd := rand.New(rand.NewPCG(8, 8))
	for kind := range 6 {
		b := content(rnd, kind, 4096)
		f.Add(deflated(f, b), 4096)
		f.Add(deflated(f, b)[:50], 4096)
	}
	f.Add([]byte{1, 4, 0, 0xfb, 0xff, 'a', 'b', 'c', 'd', 'e'}, 4)
	d := qcow2.NewDecoder(1)
	f.Fuzz(func(t *testing.T, src []byte, size int) {
		if size < 1 || size > 2<<20 {
			return
		}
		r := flate.NewReader(bytes.NewReader(src))
		want := make([]byte, size+1)
		n, err := io.ReadFull(r, want)
		good := n == size && errors.Is(err, io.ErrUnexpectedEOF)
		if good {
			// The stream's own end looks the same as the input's: ask again.
			_, err := io.ReadAll(flate.NewReader(bytes.NewReader(src)))
			good = err == nil
		}
		got := make([]byte, size)
		err = d.Decode(qcow2.Zlib, got, src)
		if good != (err == nil) {
			t.Fatalf("good is %v: %v", good, err)
		}
		if good && !bytes.Equal(got, want[:size]) {
			t.Fatal("other content")
		}
	})
}
