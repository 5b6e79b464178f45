package image

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"qmchain/chain/qcow2"
	"qmchain/chain/virtnbd"
)

// layer is a file that is in use by at least one image.
type layer struct {
	id   uint64
	key  layerKey
	refs int // nodes; guarded by Pool.mu

	file *file
	size int64  // of the virtual disk
	disk mapped // nil: raw

	// One of them is disk, if that is not nil.
	qcow2  *qcow2.Image
	stream *virtnbd.Stream
}

// mapped is a file that says where in it each byte of its disk is.
type mapped interface {
	// Map appends the runs of a range. Ranges without a run are Unallocated.
	Map(off, length int64, dst []qcow2.Run) ([]qcow2.Run, error)
	// Span is how much is best mapped at once: a power of two.
	Span() int64
	// Next is the first offset from off on before which nothing is allocated.
	Next(off int64) int64
}

// layerKey tells layers apart that must not be shared.
type layerKey struct {
	path, name, snapshot string
	format               Format
	changing             bool
	stamp                stamp
}

// open reads what makes l usable. It is called once, before l is shared.
func (l *layer) open(p *Pool) error {
	switch l.key.format {
	case Raw:
		l.size = l.key.stamp.size
		// Opens it, so that a missing right shows now.
		if _, _, err := l.file.seek(0, unix.SEEK_DATA); err != nil {
			return err
		}
	case Qcow2:
		disk, err := qcow2.Open(l.file, l.key.stamp.size, qcow2.Options{Snapshot: l.key.snapshot, Buffers: &p.tables})
		if err != nil {
			return fmt.Errorf("%s: %w", l.key.name, err)
		}
		l.qcow2, l.disk, l.size = disk, disk, disk.Size()
		l.file.verify = disk.Header().Same
	case Stream:
		s, err := virtnbd.Open(l.file, l.key.stamp.size)
		if err != nil {
			return fmt.Errorf("%s: %w", l.key.name, err)
		}
		l.stream, l.disk, l.size = s, s, s.Size()
		l.file.verify = s.Same
	default:
		return fmt.Errorf("%s: %s", l.key.name, l.key.format)
	}
	return nil
}

// check lets the caller of Open look at l.
func (l *layer) check(spec Layer) error {
	switch {
	case l.qcow2 != nil && spec.Check != nil:
		return spec.Check(l.qcow2.Header())
	case l.stream != nil && spec.CheckStream != nil:
		return spec.CheckStream(l.stream.Meta())
	}
	return nil
}

// span is the guest range whose runs are read and kept together.
func (l *layer) span() int64 { return max(groupSize, l.disk.Span()) }

// extents appends to dst what the layer itself holds of group g, its own zeroes
// too.
func (l *layer) extents(p *Pool, g int64, index uint32, dst []extent) ([]extent, error) {
	start := g * groupSize
	end := min(start+groupSize, l.size)
	if start >= end {
		return dst, nil
	}
	if l.disk == nil {
		return l.rawExtents(start, end, index, dst)
	}
	if l.disk.Next(start) >= end {
		return dst, nil
	}
	runs, err := l.runs(p, start)
	if err != nil {
		return dst, err
	}
	for _, r := range runs[firstRun(runs, start):] {
		if r.Off >= end {
			break
		}
		from, to := max(r.Off, start), min(r.Off+r.Len, end)
		e := extent{
			off:   uint32(from - start),
			len:   uint32(to - from),
			layer: index,
			host:  r.Host,
		}
		switch r.Kind {
		case qcow2.Data:
			e.kindBytes = kindData
			e.host += from - r.Off
		case qcow2.Zero:
			e.kindBytes = kindZero
			e.host = 0
		case qcow2.Compressed:
			e.kindBytes = kindCompressed | uint32(r.Bytes)
		case qcow2.Invalid:
			e.kindBytes = kindInvalid | uint32(r.Bytes)
		}
		dst = append(dst, e)
	}
	return dst, nil
}

// runs returns the runs of the span that off is in.
func (l *layer) runs(p *Pool, off int64) ([]qcow2.Run, error) {
	span := l.span()
	n := off / span
	return p.runs.load(key{l.id, n}, func() ([]qcow2.Run, int64, error) {
		return l.readRuns(n*span, span)
	})
}

// firstRun returns the index of the first run that ends behind off.
func firstRun(runs []qcow2.Run, off int64) int {
	lo, hi := 0, len(runs)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if runs[mid].Off+runs[mid].Len > off {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// readRuns reads the runs of a span, without what is unallocated.
func (l *layer) readRuns(off, length int64) ([]qcow2.Run, int64, error) {
	all, err := l.disk.Map(off, length, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", l.key.name, err)
	}
	n := 0
	for _, r := range all {
		if r.Kind != qcow2.Unallocated {
			n++
		}
	}
	var runs []qcow2.Run
	if n > 0 {
		runs = make([]qcow2.Run, 0, n)
	}
	for _, r := range all {
		if r.Kind != qcow2.Unallocated {
			runs = append(runs, r)
		}
	}
	return runs, int64(n) * runBytes, nil
}

const runBytes = 32

// rawExtents: a raw file hides all that is below it, its holes too.
func (l *layer) rawExtents(start, end int64, index uint32, dst []extent) ([]extent, error) {
	add := func(from, to int64, kind uint32) {
		if from < to {
			e := extent{off: uint32(from - start), len: uint32(to - from), layer: index, kindBytes: kind}
			if kind == kindData {
				e.host = from
			}
			dst = append(dst, e)
		}
	}
	for off := start; off < end; {
		data, ok, err := l.file.seek(off, unix.SEEK_DATA)
		if err != nil {
			return dst, err
		}
		if !ok || data >= end {
			add(off, end, kindZero)
			break
		}
		add(off, data, kindZero)
		hole, ok, err := l.file.seek(data, unix.SEEK_HOLE)
		if err != nil {
			return dst, err
		}
		if !ok || hole > end {
			hole = end
		}
		if hole <= data {
			return dst, fmt.Errorf("%s: %w: data at %d ends at %d", l.key.name, ErrChanged, data, hole)
		}
		add(data, hole, kindData)
		off = hole
	}
	return dst, nil
}

// next returns the first offset from off on before which the layer holds no data.
func (l *layer) next(off int64) (int64, error) {
	if off >= l.size {
		return l.size, nil
	}
	if l.disk != nil {
		return l.disk.Next(off), nil
	}
	data, ok, err := l.file.seek(off, unix.SEEK_DATA)
	if !ok || err != nil {
		return l.size, err
	}
	return data, nil
}

// read reads p from offset off of the file; what the last cluster lacks at the end
// of the file is zeroes.
func (l *layer) read(p []byte, off int64) error {
	size := l.key.stamp.size
	if beyond := off + int64(len(p)) - size; beyond > 0 {
		n := max(0, int64(len(p))-beyond)
		clear(p[n:])
		p = p[:n]
		if n == 0 {
			return nil
		}
	}
	_, err := l.file.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w: it ends before byte %d", l.key.name, ErrChanged, off+int64(len(p)))
	}
	return err
}

// readNow reads what of p the kernel has in memory, from offset off of the file on,
// and has the kernel begin to get the rest. It returns how much it has read; what is
// wrong shows when the rest is read.
func (l *layer) readNow(p []byte, off int64) int {
	if off+int64(len(p)) > l.key.stamp.size {
		return 0 // for read to tell what is there
	}
	return l.file.readNow(p, off)
}
