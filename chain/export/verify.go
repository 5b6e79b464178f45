package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// compare compares what was written with the disk, from off to end.
func (p *Plan) compare(ctx context.Context, got image.Image, off, end int64, progress func(int64)) error {
	if got.Size() != p.Size {
		return fmt.Errorf("%w: it has %d bytes, not %d", ErrDiffers, got.Size(), p.Size)
	}
	return inUnits(ctx, p.opts.Jobs, off, end, func(ctx context.Context, off, end int64, buf []byte) error {
		if p.holes[off/unit] {
			if zero, err := allZero(got, off, end-off); zero || err != nil {
				progress(end - off)
				return err
			}
		}
		want := make([]byte, piece)
		for at := off; at < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			to := min(at+piece, end)
			if err := comparePiece(p.img, got, want[:to-at], buf[:to-at], at); err != nil {
				return err
			}
			progress(to - at)
			at = to
		}
		return nil
	})
}

// comparePiece compares one piece. What is a hole in an image is not read from it.
func comparePiece(want, got image.Image, a, b []byte, off int64) error {
	aZero, err := allZero(want, off, int64(len(a)))
	if err != nil {
		return err
	}
	bZero, err := allZero(got, off, int64(len(b)))
	if err != nil {
		return err
	}
	if aZero && bZero {
		return nil
	}
	for _, r := range []struct {
		img  image.Image
		zero bool
		p    []byte
	}{{want, aZero, a}, {got, bZero, b}} {
		if r.zero {
			clear(r.p)
		} else if err := readFull(r.img, r.p, off); err != nil {
			return err
		}
	}
	if bytes.Equal(a, b) {
		return nil
	}
	i := 0
	for a[i] == b[i] {
		i++
	}
	return fmt.Errorf("%w: byte %d is %#02x, not %#02x", ErrDiffers, off+int64(i), b[i], a[i])
}

func allZero(img image.Image, off, length int64) (bool, error) {
	for e, err := range image.Walk(img, off, length) {
		if err != nil || !e.Zero {
			return false, err
		}
	}
	return true, nil
}

// onDisk reads a raw file or device past the page cache.
type onDisk struct {
	file   *os.File
	size   int64
	device bool // has no holes
}

// readBack opens what was written and synced, so that it is read from the disk.
func readBack(path string, size int64) (image.Image, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		// A file system without direct I/O. What is on the disk is let go of, and read again.
		if file, err = os.Open(path); err == nil {
			dropCache(file)
		}
	}
	if err != nil {
		return nil, err
	}
	d := &onDisk{file: file, size: size}
	info, err := file.Stat()
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	if d.device = !info.Mode().IsRegular(); !d.device {
		d.size = info.Size()
	}
	return d, nil
}

// dropCache has the kernel forget what it has of a file in memory and on disk.
func dropCache(f *os.File) { _ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }

func (d *onDisk) Size() int64  { return d.size }
func (d *onDisk) Close() error { return d.file.Close() }

// ReadAt reads whole pages, as direct I/O needs it: off and the buffer begin at one, and the buffer has room up to the end
// of its last one.
func (d *onDisk) ReadAt(p []byte, off int64) (int, error) {
	whole := p[:(len(p)+page-1)/page*page]
	n := 0
	for n < len(p) {
		m, err := unix.Pread(int(d.file.Fd()), whole[n:], off+int64(n))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return min(n, len(p)), fmt.Errorf("read at %d: %w", off, err)
		}
		if m == 0 {
			return n, io.EOF
		}
		n += m
	}
	return len(p), nil
}

func (d *onDisk) Extents(off, length int64) ([]image.Extent, error) {
	if d.device {
		return []image.Extent{{Off: off, Len: length}}, nil
	}
	fd, end := int(d.file.Fd()), off+length
	data, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO) || err == nil && data >= end:
		return []image.Extent{{Off: off, Len: length, Zero: true}}, nil
	case err != nil:
		return nil, fmt.Errorf("seek at %d: %w", off, err)
	case data > off:
		return []image.Extent{{Off: off, Len: data - off, Zero: true}}, nil
	}
	hole, err := unix.Seek(fd, off, unix.SEEK_HOLE)
	if err != nil {
		return nil, fmt.Errorf("seek at %d: %w", off, err)
	}
	return []image.Extent{{Off: off, Len: min(hole, end) - off}}, nil
}
