package qcow2_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"

	"qmchain/chain/qcow2"
)

// FuzzZstd compares with the library's reader of streams, which takes all of its input for frames, while a cluster can be followed by
// others. It takes no more memory than a cluster needs, whatever a frame says of its own size.
func FuzzZstd(f *testing.F) {
	rnd := rand.New(rand.NewPCG(9, 9))
	for kind := range 6 {
		b := content(rnd, kind, 4096)
		f.Add(zstded(f, b, false), uint16(4096))
		f.Add(zstded(f, b, true), uint16(4095))
		f.Add(append(zstded(f, b[:1000], true), zstded(f, b[1000:], false)...), uint16(4096))
	}
	f.Add([]byte("\x50\x2a\x4d\x18\x02\x00\x00\x00ab\x28\xb5\x2f\xfd\x04\x00\x21\x00\x00a"), uint16(4))
	f.Add([]byte("\x28\xb5\x2f\xfd\xe0\xff\xff\xff\xff\xff\xff\xff\x7f\x03\x00\x01"), uint16(4096))
	d := qcow2.NewDecoder(1)
	f.Fuzz(func(t *testing.T, src []byte, length uint16) {
		size := max(int(length), 1)
		got := make([]byte, size)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := d.Decode(qcow2.Zstd, got, src)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
			t.Errorf("%d bytes allocated for %d", n, size)
		}
		if err != nil && !errors.Is(err, qcow2.ErrCorrupt) {
			t.Fatalf("unexpected kind of error: %v", err)
		}

		r, openErr := zstd.NewReader(bytes.NewReader(src), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
		if openErr != nil {
			t.Fatal(openErr)
		}
		defer r.Close()
		want := make([]byte, size+1)
		n, readErr := io.ReadFull(r, want)
		switch {
		case errors.Is(readErr, zstd.ErrWindowSizeExceeded) || errors.Is(readErr, zstd.ErrDecoderSizeExceeded):
			return // a cluster is read with a larger one
		case err == nil && (n < size || !bytes.Equal(got, want[:size])):
			t.Fatalf("other content: %d bytes, %v", n, readErr)
		case err != nil && n == size && errors.Is(readErr, io.ErrUnexpectedEOF) && whole(src):
			t.Fatalf("it is good: %v", err)
		}
	})
}

// whole tells whether src is frames up to its end: the error of io.ReadFull alone does not.
func whole(src []byte) bool {
	r, err := zstd.NewReader(bytes.NewReader(src), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return false
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, r)
	return err == nil
}
