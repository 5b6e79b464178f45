package qcow2

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Decoder decompresses clusters. One is enough for any number of images and
// goroutines; it keeps its buffers between calls.
type Decoder struct {
	zstd      *zstd.Decoder
	outputs   sync.Pool // *[]byte, for zstd
	inflaters sync.Pool // *inflater
}

// maxWindow is the zstd window that QEMU's decoder accepts (the library's default).
const maxWindow = 128 << 20

// NewDecoder returns a decoder of which up to parallel zstd clusters can be
// decompressed at once; further calls wait.
func NewDecoder(parallel int) *Decoder {
	z, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(parallel),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecodeAllCapLimit(true)) // what goes beyond dst is an error, not an allocation
	if err != nil {
		panic(err) // only ever says that an option above is out of range
	}
	return &Decoder{zstd: z}
}

// Decode fills dst, which has the length of a cluster, from src, a compressed
// cluster with possibly more bytes behind it. A cluster that is shorter or longer
// than dst is ErrCorrupt; so is one that can't be decompressed.
func (d *Decoder) Decode(c Compression, dst, src []byte) error {
	var err error
	switch c {
	case Zlib:
		err = d.inflate(dst, src)
	case Zstd:
		err = d.unzstd(dst, src)
	default:
		return unsupported("compression type %d", c)
	}
	if err != nil {
		return fmt.Errorf("%w: compressed cluster: %w", ErrCorrupt, err)
	}
	return nil
}

var (
	errTooLong  = errors.New("it is longer than a cluster")
	errTooShort = errors.New("it is shorter than a cluster")
)

func (d *Decoder) inflate(dst, src []byte) error {
	z, _ := d.inflaters.Get().(*inflater)
	if z == nil {
		z = &inflater{}
	}
	defer d.inflaters.Put(z)
	return z.inflate(dst, src)
}

// zstdSlack is how much room behind the output lets the library copy 16 bytes at a
// time, which saves more than the copy of the cluster that it takes to have it.
const zstdSlack = 16

// unzstd decompresses frame by frame: DecodeAll takes all of its input for
// frames, but what follows the last one here is another cluster or nothing.
func (d *Decoder) unzstd(dst, src []byte) error {
	buf, _ := d.outputs.Get().(*[]byte)
	if buf == nil {
		buf = new([]byte)
	}
	defer d.outputs.Put(buf)
	if cap(*buf) < len(dst)+zstdSlack {
		*buf = make([]byte, 0, len(dst)+zstdSlack)
	}
	n := 0
	for n < len(dst) {
		frame, err := zstdFrame(src)
		if err != nil {
			return err
		}
		out, err := d.zstd.DecodeAll(src[:frame], (*buf)[:0:len(dst)-n+zstdSlack])
		if errors.Is(err, zstd.ErrDecoderSizeExceeded) {
			return errTooLong
		}
		if err != nil {
			return err
		}
		if len(out) > len(dst)-n {
			return errTooLong
		}
		n += copy(dst[n:], out)
		src = src[frame:]
	}
	return nil
}

// zstdFrame returns the length of the zstd frame that src begins with (RFC 8878, 3.1.1).
func zstdFrame(src []byte) (int, error) {
	if len(src) == 0 {
		return 0, errTooShort
	}
	var h zstd.Header
	if err := h.Decode(src); err != nil {
		return 0, err
	}
	n := h.HeaderSize
	if h.Skippable {
		if uint64(h.SkippableSize) > uint64(len(src)-n) {
			return 0, io.ErrUnexpectedEOF
		}
		return n + int(h.SkippableSize), nil
	}
	for last := false; !last; {
		if len(src)-n < 3 {
			return 0, io.ErrUnexpectedEOF
		}
		block := int(src[n]) | int(src[n+1])<<8 | int(src[n+2])<<16
		last = block&1 != 0
		size := block >> 3
		if rle := block>>1&3 == 1; rle {
			size = 1 // one byte, repeated `size` times
		}
		n += 3 + size
		if n > len(src) {
			return 0, io.ErrUnexpectedEOF
		}
	}
	if h.HasCheckSum {
		n += 4
	}
	if n > len(src) {
		return 0, io.ErrUnexpectedEOF
	}
	return n, nil
}
