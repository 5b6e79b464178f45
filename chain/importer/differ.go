package importer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/chain/source"
	"qmchain/chain/virtnbd"
)

const (
	// cluster is that of the images that are made: what is compared and written as a whole.
	cluster = 64 << 10
	// piece is how much is read and written at a time, region how much is looked at.
	piece  = 1 << 20
	region = 64 << 20
)

// places tells where two points can differ.
type places interface {
	// mark calls f with ranges between off and end, in any order, so that whatever differs there is in one of them.
	mark(off, end int64, f func(off, end int64)) error
	// next is the first offset from off on before which nothing is marked, in a region that has something, or size.
	next(off, size int64) int64
	close()
}

// anywhere is where at least one of the two holds data.
type anywhere struct{ now, old image.Image } // old can be nil

func (a anywhere) mark(off, end int64, f func(off, end int64)) error {
	for _, img := range []image.Image{a.now, a.old} {
		if img == nil {
			continue
		}
		for e, err := range image.Walk(img, off, end-off) {
			if err != nil && img == a.old {
				return ownError{err}
			}
			if err != nil {
				return err
			}
			if !e.Zero {
				f(e.Off, e.End())
			}
		}
	}
	return nil
}

func (anywhere) next(off, _ int64) int64 { return off }
func (anywhere) close()                  {}

// mapped is a file that says where it holds something.
type mapped interface {
	Map(off, length int64, dst []qcow2.Run) ([]qcow2.Run, error)
	Next(off int64) int64
	Size() int64
}

// layers is where those files hold something that are not below both points, and what is beyond the end of one of them:
// what is below is not seen there.
type layers struct {
	files  []*os.File
	maps   []mapped
	beyond int64
}

func (l *layers) mark(off, end int64, f func(off, end int64)) error {
	if end > l.beyond {
		f(max(off, l.beyond), end)
	}
	for _, m := range l.maps {
		to := min(end, m.Size())
		if off >= to {
			continue
		}
		runs, err := m.Map(off, to-off, nil)
		if err != nil {
			return err
		}
		for _, r := range runs {
			if r.Kind != qcow2.Unallocated {
				f(max(off, r.Off), min(to, r.Off+r.Len))
			}
		}
	}
	return nil
}

func (l *layers) next(off, size int64) int64 {
	next := min(size, max(off, l.beyond))
	for _, m := range l.maps {
		if n := m.Next(off); n < m.Size() {
			next = min(next, n)
		}
	}
	return next
}

func (l *layers) close() {
	for _, f := range l.files {
		_ = f.Close()
	}
}

// shared finds the places where a disk of two points of a set can differ, if both are read through the same file; nil if
// not.
func shared(points *source.Points, a, b *chain.Manifest, disk string) (places, error) {
	over, err := points.All.Layers(a, disk)
	if err != nil {
		return nil, err
	}
	under, err := points.All.Layers(b, disk)
	if err != nil {
		return nil, err
	}
	common := 0
	for common < min(len(over), len(under)) && over[common] == under[common] {
		common++
	}
	if common == 0 {
		return nil, nil
	}
	l := &layers{beyond: 1<<63 - 1}
	for _, layer := range append(over[common:], under[common:]...) {
		m, err := l.open(points, layer)
		if err != nil {
			l.close()
			return nil, err
		}
		l.maps = append(l.maps, m)
		l.beyond = min(l.beyond, m.Size())
	}
	return l, nil
}

// open opens the file of a layer for its map.
func (l *layers) open(points *source.Points, layer chain.Layer) (mapped, error) {
	spec, ok := points.Image(layer)
	if !ok {
		return nil, fmt.Errorf("point %s: disk %s: %w: it has no file", layer.Point.ID, layer.Disk.Name, chain.ErrDamaged)
	}
	f, err := os.OpenFile(spec.Path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	l.files = append(l.files, f)
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || spec.Bytes >= 0 && info.Size() != spec.Bytes {
		return nil, fmt.Errorf("%s: %w", spec.Name, image.ErrChanged)
	}
	var m mapped
	switch spec.Format {
	case image.Qcow2:
		var q *qcow2.Image
		if q, err = qcow2.Open(f, info.Size(), qcow2.Options{Snapshot: spec.Snapshot}); err == nil && spec.Check != nil {
			err = spec.Check(q.Header())
		}
		m = q
	case image.Stream:
		var s *virtnbd.Stream
		if s, err = virtnbd.Open(f, info.Size()); err == nil && spec.CheckStream != nil {
			err = spec.CheckStream(s.Meta())
		}
		m = s
	default:
		err = fmt.Errorf("%w: an increment in format %s", chain.ErrDamaged, spec.Format)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", spec.Name, err)
	}
	return m, nil
}

// output takes what differs.
type output interface {
	write(ctx context.Context, p []byte, off int64) error
	zero(ctx context.Context, off, length int64) error
}

// difference writes what makes one disk of another.
type difference struct {
	now      image.Image
	old      image.Image // nil is one of zeroes
	size     int64       // of now, as it is to be
	where    places
	out      output
	progress func(done int64)

	marked   [region / cluster]bool
	buf, was []byte
}

// ownError is an error of reading what was imported, not the set.
type ownError struct{ err error }

func (e ownError) Error() string { return "what was imported before can't be read: " + e.err.Error() }
func (e ownError) Unwrap() error { return e.err }

func (d *difference) write(ctx context.Context) error {
	d.buf, d.was = make([]byte, piece), make([]byte, piece)
	for off := d.where.next(0, d.size); off < d.size; {
		start := off / region * region
		end := min(start+region, d.size)
		clear(d.marked[:])
		err := d.where.mark(start, end, func(from, to int64) {
			for c := (from - start) / cluster; start+c*cluster < to; c++ {
				d.marked[c] = true
			}
		})
		if err != nil {
			return err
		}
		if err := d.region(ctx, start, end); err != nil {
			return err
		}
		d.progress(end)
		off = d.where.next(end, d.size)
	}
	d.progress(d.size)
	return nil
}

// region writes what differs of the clusters that are marked between start and end.
func (d *difference) region(ctx context.Context, start, end int64) error {
	for c := 0; start+int64(c)*cluster < end; c++ {
		if !d.marked[c] {
			continue
		}
		from := c
		for c+1 < len(d.marked) && d.marked[c+1] && c+1-from < piece/cluster {
			c++
		}
		if err := d.piece(ctx, start+int64(from)*cluster, min(start+int64(c+1)*cluster, end)); err != nil {
			return err
		}
	}
	return nil
}

// what says what is to be done with a cluster.
type what int

const (
	leave what = iota
	zero
	data
)

func (d *difference) piece(ctx context.Context, off, end int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now, was := d.buf[:end-off], d.was[:end-off]
	if err := read(d.now, now, off); err != nil {
		return err
	}
	if err := read(d.old, was, off); err != nil {
		return ownError{err}
	}
	for at := 0; at < len(now); {
		kind, to := d.judge(now, was, at)
		for to < len(now) {
			k, next := d.judge(now, was, to)
			if k != kind {
				break
			}
			to = next
		}
		var err error
		switch kind {
		case zero:
			err = d.out.zero(ctx, off+int64(at), int64(to-at))
		case data:
			err = d.out.write(ctx, now[at:to], off+int64(at))
		}
		if err != nil {
			return err
		}
		at = to
	}
	return nil
}

// judge looks at the cluster at at, and returns where it ends.
func (d *difference) judge(now, was []byte, at int) (what, int) {
	to := min(at+cluster, len(now))
	switch {
	case bytes.Equal(now[at:to], was[at:to]):
		return leave, to
	case isZero(now[at:to]):
		return zero, to
	}
	return data, to
}

var zeroes [cluster]byte

func isZero(p []byte) bool { return bytes.Equal(p, zeroes[:len(p)]) }

// read reads p; what is beyond the end of the image, or there is no image for, is zeroes.
func read(img image.Image, p []byte, off int64) error {
	var n int
	if img != nil {
		n = int(max(0, min(int64(len(p)), img.Size()-off)))
	}
	clear(p[n:])
	if n == 0 {
		return nil
	}
	got, err := img.ReadAt(p[:n], off)
	if got == n {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
