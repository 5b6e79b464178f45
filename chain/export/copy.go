package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

const (
	// unit is what a worker takes on at a time, and what goes to the disk together: the part of an image that is resolved
	// at once.
	unit = 64 << 20
	// piece is read and written at a time. It stays in the processor's cache meanwhile; with larger ones the kernel takes
	// large folios for the page cache, whose making took longer than all the rest on a virtual machine.
	piece = 256 << 10
	// page is the least that can be a hole: the block of most file systems.
	page = 4096
)

// destination is what a disk is written to. All methods are called concurrently, for ranges that don't overlap.
type destination interface {
	io.WriterAt
	// zero has a range read as zeroes.
	zero(off, length int64) error
	// flush has a range that was written begin its way to the disk. Only a sync tells how it ends.
	flush(off, length int64)
	// leastZero is from how many zeroes on in the midst of data it pays to call zero rather than to write them.
	leastZero() int
}

// copying is the copying of a range of a disk.
type copying struct {
	plan     *Plan
	dst      destination
	before   func() error      // called before each unit with work
	progress func(bytes int64) // called with how much more is done
}

// run copies from off to end.
func (c *copying) run(ctx context.Context, off, end int64) error {
	return inUnits(ctx, c.plan.opts.Jobs, off, end, func(ctx context.Context, off, end int64, buf []byte) error {
		return c.unit(ctx, off, end, buf)
	})
}

// inUnits calls f for all units from off to end, jobs at a time, each with a buffer of one piece. It stops at the first
// error.
func inUnits(ctx context.Context, jobs int, off, end int64, f func(ctx context.Context, off, end int64, buf []byte) error) error {
	var next atomic.Int64
	next.Store(off / unit)
	g, ctx := errgroup.WithContext(ctx)
	for range min(int64(jobs), (end+unit-1)/unit) {
		g.Go(func() error {
			// Whole pages, as direct I/O needs them.
			buf, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			if err != nil {
				return fmt.Errorf("memory for a buffer: %w", err)
			}
			defer func() { _ = unix.Munmap(buf) }()
			for {
				n := next.Add(1) - 1
				start, stop := max(off, n*unit), min(end, (n+1)*unit)
				if start >= stop {
					return nil
				}
				if err := f(ctx, start, stop, buf); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

func (c *copying) unit(ctx context.Context, off, end int64, buf []byte) error {
	if c.plan.holes[off/unit] && !c.plan.Device {
		return nil
	}
	if err := c.before(); err != nil {
		return err
	}
	for e, err := range image.Walk(c.plan.img, off, end-off) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if e.Zero && !c.plan.Device {
			continue // it is one to begin with
		}
		if e.Zero {
			if err := c.dst.zero(e.Off, e.Len); err != nil {
				return err
			}
			c.progress(e.Len)
			continue
		}
		// Pieces lie alike in all disks, so that a hole of one page is one wherever its extent begins.
		for at := e.Off; at < e.End(); {
			to := min(at/piece*piece+piece, e.End())
			if err := c.piece(ctx, buf[:to-at], at); err != nil {
				return err
			}
			c.progress(to - at)
			at = to
		}
	}
	c.dst.flush(off, end-off)
	return nil
}

// piece copies one piece of data.
func (c *copying) piece(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := readFull(c.plan.img, p, off); err != nil {
		return err
	}
	return split(p, c.dst.leastZero(), func(start, end int, zero bool) error {
		if zero {
			return c.dst.zero(off+int64(start), int64(end-start))
		}
		_, err := c.dst.WriteAt(p[start:end], off+int64(start))
		return err
	})
}

// readFull reads p, all of which lies in the image.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) || err == nil {
		return io.ErrUnexpectedEOF
	}
	return err
}

// split calls f for the parts of p one after the other. A part is zero if it is of at least so many bytes, a multiple of
// the page, that are all zeroes; p is taken to begin at a page.
func split(p []byte, least int, f func(start, end int, zero bool) error) error {
	zeroAt := func(at int) bool { return isZero(p[at:min(at+page, len(p))]) }
	data := 0 // where data that is not yet passed on begins
	for at := 0; at < len(p); {
		if !zeroAt(at) {
			at += page
			continue
		}
		end := at
		for end < len(p) && zeroAt(end) {
			end += page
		}
		end = min(end, len(p))
		if end-at >= least || end-at == len(p) {
			if data < at {
				if err := f(data, at, false); err != nil {
					return err
				}
			}
			if err := f(at, end, true); err != nil {
				return err
			}
			data = end
		}
		at = end
	}
	if data < len(p) {
		return f(data, len(p), false)
	}
	return nil
}
