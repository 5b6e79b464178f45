package standard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

const (
	fileMode = 0o600 // an image holds all that its guest does
	dirMode  = 0o700

	// piece is read and written at a time, a multiple of cluster.
	piece = 1 << 20
)

// clone makes dst share the blocks of src, if the file system can.
func clone(dst, src *os.File) bool { return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil }

// copySparse copies what is no hole of a file into a new one.
func copySparse(ctx context.Context, dst, src *os.File, size int64, limit *limiter, progress func(int64)) error {
	if err := dst.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, piece)
	for off := int64(0); off < size; {
		data, end, err := nextData(src, off, size)
		if err != nil {
			return err
		}
		for off = data; off < end; {
			b := buf[:min(piece, end-off)]
			if err := limit.wait(ctx, len(b)); err != nil {
				return err
			}
			if err := readFull(src, b, off); err != nil {
				return fmt.Errorf("%s: %w", src.Name(), err)
			}
			if _, err := dst.WriteAt(b, off); err != nil {
				return err
			}
			off += int64(len(b))
			progress(int64(len(b)))
		}
	}
	return nil
}

// nextData returns where the next data of a file begins and ends. Where the file system can't tell holes all is data.
func nextData(f *os.File, off, size int64) (data, end int64, err error) {
	fd := int(f.Fd())
	data, err = unix.Seek(fd, off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size, nil
	}
	if err == nil {
		end, err = unix.Seek(fd, data, unix.SEEK_HOLE)
	}
	if errors.Is(err, unix.EINVAL) {
		return off, size, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%s: seek at %d: %w", f.Name(), off, err)
	}
	return min(data, size), min(end, size), nil
}

// readFull reads p, all of which is there.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read at %d: %w", off, err)
}

// limiter bounds a rate.
type limiter struct {
	rate int64 // bytes per second; 0: none

	mu   sync.Mutex
	next time.Time // when the next byte may go
}

// wait waits until n bytes may go. It is for many goroutines.
func (l *limiter) wait(ctx context.Context, n int) error {
	if l.rate <= 0 {
		return ctx.Err()
	}
	l.mu.Lock()
	now := time.Now()
	if l.next.Before(now) {
		l.next = now
	}
	at := l.next
	l.next = at.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	l.mu.Unlock()
	t := time.NewTimer(time.Until(at))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// limited is an image whose reading is bounded.
type limited struct {
	image.Image
	ctx   context.Context //nolint:containedctx // ReadAt has none
	limit *limiter
}

func (l limited) ReadAt(p []byte, off int64) (int, error) {
	if err := l.limit.wait(l.ctx, len(p)); err != nil {
		return 0, err
	}
	return l.Image.ReadAt(p, off)
}
