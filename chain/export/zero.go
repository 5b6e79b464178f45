package export

import (
	"bytes"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// zeroing is a device as the destination of a disk: what is in it may be anything.
type zeroing struct {
	*os.File
	// punch has a range read as zeroes and gives back what is below it; fill writes zeroes. They fail where the device
	// can't. The kernel answers for the zeroes in both; after a discard, only the device would.
	punch, fill func(off, length int64) error
	buffers     sync.Pool // of *[piece]byte
}

func newZeroing(f *os.File) *zeroing {
	by := func(mode uint32) func(off, length int64) error {
		return func(off, length int64) error {
			return unix.Fallocate(int(f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, length)
		}
	}
	z := &zeroing{File: f, punch: by(unix.FALLOC_FL_PUNCH_HOLE), fill: by(unix.FALLOC_FL_ZERO_RANGE)}
	z.buffers.New = func() any { return new([piece]byte) }
	return z
}

func (z *zeroing) flush(off, length int64) { flush(z.File, off, length) }

// leastZero is the cluster of the usual thin volume: less of it can't be given back.
func (z *zeroing) leastZero() int { return 64 << 10 }

func (z *zeroing) zero(off, length int64) error {
	// Devices zero whole blocks. What is beside them is written.
	end := off + length
	first, last := (off+page-1)/page*page, end/page*page
	if first >= last {
		return z.write(off, end)
	}
	if err := z.write(off, first); err != nil {
		return err
	}
	if err := z.write(last, end); err != nil {
		return err
	}
	err := z.punch(first, last-first)
	if can(err) {
		return err
	}
	return z.pieces(first, last)
}

// can tells a device that is not able to do a thing from one that fails.
func can(err error) bool {
	return !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV)
}

// pieces zeroes what is not zeroes already: reading what a thin volume has not allocated allocates nothing.
func (z *zeroing) pieces(off, end int64) error {
	buf := z.buffers.Get().(*[piece]byte)
	defer z.buffers.Put(buf)
	for ; off < end; off += piece {
		p := buf[:min(piece, end-off)]
		if err := readFull(z.File, p, off); err != nil {
			return err
		}
		if isZero(p) {
			continue
		}
		err := z.fill(off, int64(len(p)))
		if !can(err) {
			err = z.write(off, off+int64(len(p)))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

var zeroPage [page]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), page)
		if !bytes.Equal(p[:n], zeroPage[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// write writes zeroes.
func (z *zeroing) write(off, end int64) error {
	for off < end {
		n := min(page, end-off)
		if _, err := z.WriteAt(zeroPage[:n], off); err != nil {
			return err
		}
		off += n
	}
	return nil
}
