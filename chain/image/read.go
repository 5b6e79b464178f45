package image

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"qmchain/chain/qcow2"
	"qmchain/chain/virtnbd"
)

// layered is the Image of a chain of layers.
type layered struct {
	pool  *Pool
	size  int64
	top   *node
	chain []*layer

	// mu is held for reading by every call, so that Close waits for them.
	mu     sync.RWMutex
	closed bool
}

var (
	_ Image = (*layered)(nil)
	_ Filer = (*layered)(nil)
)

func (m *layered) Size() int64 { return m.size }

func (m *layered) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	m.closed = true
	m.pool.release(m.top)
	m.top, m.chain = nil, nil
	return nil
}

func (m *layered) File() (*os.File, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return nil, ErrClosed
	}
	base := m.chain[0]
	if len(m.chain) > 1 || base.disk != nil || m.size != base.key.stamp.size {
		return nil, nil
	}
	return base.file.dup()
}

func (m *layered) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return 0, ErrClosed
	}
	if off < 0 {
		return 0, fmt.Errorf("read at %d", off)
	}
	if off >= m.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > m.size-off {
		p, atEnd = p[:m.size-off], io.EOF
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		start := uint32(at % groupSize)
		n := min(len(p)-done, int(groupSize-start))
		g, err := m.top.group(m.pool, at/groupSize)
		if err != nil {
			return done, err
		}
		good, err := m.readGroup(p[done:done+n], g, at-int64(start), start)
		if err != nil {
			return done + good, err
		}
		done += n
	}
	return len(p), atEnd
}

// readGroup reads p from offset from of the group g, which begins at base. On an
// error it returns how many bytes are good.
func (m *layered) readGroup(p []byte, g *group, base int64, from uint32) (int, error) {
	to := from + uint32(len(p))
	list := g.extents[g.first(from):]
	list = list[:lead(list, to)]
	if len(list) == 1 && list[0].off <= from && to <= list[0].end() {
		return m.readOne(p, list[0], base, from)
	}
	var room [32]waiting
	late := room[:0] // what the kernel has to get from the disk
	packed := 0
	at := from // up to where p is filled, but for what is late or packed
	var bad error
	for i, e := range list {
		start, end := max(e.off, from), min(e.end(), to)
		clear(p[at-from : start-from])
		at = end
		switch e.kind() {
		case kindData:
			part := p[start-from : end-from]
			// The first turn takes what the kernel has in memory, and has it begin to
			// read the rest, which may be in many files: all at once.
			if n := m.chain[e.layer].readNow(part, e.host+int64(start-e.off)); n < len(part) {
				late = append(late, waiting{e, start + uint32(n), end})
			}
		case kindCompressed:
			packed++
		case kindInvalid:
			bad = m.invalid(e, base)
		}
		if bad != nil {
			list, to = list[:i], start
			break
		}
	}
	if bad == nil {
		clear(p[at-from:])
	}
	for _, w := range late {
		if err := m.chain[w.layer].read(p[w.from-from:w.to-from], w.host+int64(w.from-w.off)); err != nil {
			bad, to = err, w.from
			break
		}
	}
	if packed > 0 {
		// What is compressed before an error counts.
		if good, err := m.unpack(p[:to-from], list[:lead(list, to)], packed, base, from); err != nil {
			return good, err
		}
	}
	return int(to - from), bad
}

// waiting is the part of a data extent that is still to be read.
type waiting struct {
	extent
	from, to uint32 // from the group's start
}

// lead returns how many extents of the list begin before off.
func lead(list []extent, off uint32) int {
	n := firstExtent(list, off)
	if n < len(list) && list[n].off < off {
		n++
	}
	return n
}

// readOne reads p, all of which is in the extent e: the usual small read.
func (m *layered) readOne(p []byte, e extent, base int64, from uint32) (int, error) {
	var err error
	switch e.kind() {
	case kindData:
		err = m.chain[e.layer].read(p, e.host+int64(from-e.off))
	case kindCompressed:
		err = m.cluster(p, e, base+int64(from))
	case kindInvalid:
		err = m.invalid(e, base)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// invalid says what is wrong with the extent e of the group at base.
func (m *layered) invalid(e extent, base int64) error {
	r := qcow2.Run{Kind: qcow2.Invalid, Off: base + int64(e.off), Host: e.host, Bytes: e.bytes()}
	return fmt.Errorf("%s: %w", m.chain[e.layer].key.name, r.Err())
}

// unpack fills those parts of p that are in compressed clusters, of which there
// are packed in list, the extents that p needs; the other arguments and the result
// are those of readGroup.
func (m *layered) unpack(p []byte, list []extent, packed int, base int64, from uint32) (int, error) {
	u := &unpacking{m: m, p: p, list: list, base: base, from: from}
	// Others help, as many as there are places for now; this goroutine goes on
	// without them, so nobody ever waits for a place.
	for range packed - 1 {
		select {
		case m.pool.helpers <- struct{}{}:
			u.helpers.Go(func() {
				u.run()
				<-m.pool.helpers
			})
			continue
		default:
		}
		break
	}
	u.run()
	u.helpers.Wait()
	if u.err != nil {
		return u.good, u.err
	}
	return len(p), nil
}

// unpacking is one call of unpack.
type unpacking struct {
	m    *layered
	p    []byte
	list []extent
	base int64
	from uint32

	helpers sync.WaitGroup
	next    atomic.Int64 // index of the extent to take next

	mu   sync.Mutex
	good int // bytes before the first error
	err  error
}

// run takes extents until there are none left.
func (u *unpacking) run() {
	for {
		i := int(u.next.Add(1)) - 1
		if i >= len(u.list) {
			return
		}
		e := u.list[i]
		if e.kind() != kindCompressed {
			continue
		}
		start := max(e.off, u.from)
		end := min(e.end(), u.from+uint32(len(u.p)))
		if err := u.m.cluster(u.p[start-u.from:end-u.from], e, u.base+int64(start)); err != nil {
			u.mu.Lock()
			if good := int(start - u.from); u.err == nil || good < u.good {
				u.good, u.err = good, err
			}
			u.mu.Unlock()
			return
		}
	}
}

// cluster reads p at guest offset off, all within e: a compressed cluster, or a
// pack of a stream.
func (m *layered) cluster(p []byte, e extent, off int64) error {
	pool, l := m.pool, m.chain[e.layer]
	if l.stream != nil {
		return m.pack(l, p, off)
	}
	size := l.qcow2.Header().ClusterSize()
	inCluster := off & (size - 1)
	k := key{l.id, off / size}
	if whole := int64(len(p)) == size; whole {
		// Usually part of a long read, after which the kernel or the caller keeps
		// the data. Keeping it here would only push out what small reads need.
		if data, ok := pool.clusters.get(k); ok {
			copy(p, data)
			return nil
		}
		return m.decode(l, p, e, off)
	}
	data, ok := pool.clusters.get(k)
	if !ok {
		var err error
		data, err = pool.clusters.load(k, func() ([]byte, int64, error) {
			data := make([]byte, size)
			return data, size, m.decode(l, data, e, off)
		})
		if err != nil {
			return err
		}
	}
	copy(p, data[inCluster:])
	return nil
}

// decode reads and decompresses the cluster e around guest offset off into p.
func (m *layered) decode(l *layer, p []byte, e extent, off int64) error {
	in := m.pool.inputs.Get().(*[]byte)
	defer m.pool.inputs.Put(in)
	n := int(e.bytes())
	if cap(*in) < n {
		*in = make([]byte, n)
	}
	src := (*in)[:n]
	if err := l.read(src, e.host); err != nil {
		return err
	}
	if err := m.pool.decoder.Decode(l.qcow2.Header().Compression, p, src); err != nil {
		return fmt.Errorf("%s: guest offset %d: %w", l.key.name, off&^(int64(len(p))-1), err)
	}
	return nil
}

// pack reads p at guest offset off, all within one pack of the stream l.
func (m *layered) pack(l *layer, p []byte, off int64) error {
	runs, err := l.runs(m.pool, off)
	if err != nil {
		return err
	}
	i := firstRun(runs, off)
	if i == len(runs) || runs[i].Off > off || runs[i].Kind != qcow2.Compressed {
		return fmt.Errorf("%s: %w: nothing is at guest offset %d any more", l.key.name, ErrChanged, off)
	}
	run := runs[i]
	for len(p) > 0 {
		at := off - run.Off
		piece, err := m.pool.piece(l, run, at/virtnbd.PieceSize)
		if err != nil {
			return fmt.Errorf("%s: guest offset %d: %w", l.key.name, off, err)
		}
		n := copy(p, piece.Data[at%virtnbd.PieceSize:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// piece returns the n-th piece of a pack, decompressed, which takes the end of the one
// before it.
func (p *Pool) piece(l *layer, run qcow2.Run, n int64) (*virtnbd.Piece, error) {
	k := key{l.id, run.Off + n*virtnbd.PieceSize}
	return p.pieces.load(k, func() (*virtnbd.Piece, int64, error) {
		var from *virtnbd.Restart
		if n > 0 {
			var err error
			if from, err = p.restart(l, run, n); err != nil {
				return nil, 0, err
			}
		}
		piece, err := p.streams.Piece(l.stream, run, n, from)
		if err != nil {
			return nil, 0, err
		}
		return piece, piece.Bytes(), nil
	})
}

// restart returns what the n-th piece of a pack needs of those before it. Many of these
// can be kept: without, a read at random has to begin at the beginning of the pack.
func (p *Pool) restart(l *layer, run qcow2.Run, n int64) (*virtnbd.Restart, error) {
	k := key{l.id, run.Off + n*virtnbd.PieceSize}
	return p.restarts.load(k, func() (*virtnbd.Restart, int64, error) {
		before, err := p.piece(l, run, n-1)
		if err != nil {
			return nil, 0, err
		}
		r := before.Restart()
		return r, r.Bytes(), nil
	})
}

// Bounds of one call of Extents.
const (
	maxExtents = 4096
	maxGroups  = 256
	// After this many groups without data it pays to ask the layers for the next.
	emptyGroups = 16
)

func (m *layered) Extents(off, length int64) ([]Extent, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return nil, ErrClosed
	}
	if off < 0 || length < 0 {
		return nil, fmt.Errorf("extents of %d bytes at %d", length, off)
	}
	end := m.size
	if length < end-off {
		end = off + length
	}
	var list []Extent
	add := func(to int64, zero bool) {
		if to <= off {
			return
		}
		if n := len(list); n > 0 && list[n-1].Zero == zero {
			list[n-1].Len += to - off
		} else {
			list = append(list, Extent{off, to - off, zero})
		}
		off = to
	}
	empty := 0
	for groups := 0; off < end && groups < maxGroups && len(list) < maxExtents; groups++ {
		if empty >= emptyGroups {
			next, err := m.nextData(off)
			if err != nil {
				return nil, err
			}
			add(min(next, end), true)
			empty = 0
			continue
		}
		g, err := m.top.group(m.pool, off/groupSize)
		if err != nil {
			return nil, err
		}
		base := off &^ (groupSize - 1)
		stop := min(base+groupSize, end)
		empty++
		for _, e := range g.extents[g.first(uint32(off-base)):] {
			if base+int64(e.off) >= stop {
				break
			}
			empty = 0
			add(base+int64(e.off), true)
			add(min(base+int64(e.end()), stop), false)
		}
		add(stop, true)
	}
	return list, nil
}

// nextData returns an offset from off on before which no layer holds data.
func (m *layered) nextData(off int64) (int64, error) {
	next := m.size
	for _, l := range m.chain {
		n, err := l.next(off)
		if err != nil {
			return 0, err
		}
		if n < l.size { // else it has none
			next = min(next, n)
		}
	}
	return next, nil
}
