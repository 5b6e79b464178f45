package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"sync"
)

// Kind says where the bytes of a Run come from.
type Kind uint8

const (
	Unallocated Kind = iota // from the backing file; zeroes where there is none
	Zero                    // zeroes, whatever the backing file holds
	Data                    // from the file, as they are
	Compressed              // from a compressed cluster in the file
	Invalid                 // nobody knows: the table entry is corrupt
)

// Run is a range of the virtual disk whose bytes come from one place.
type Run struct {
	Off, Len int64 // guest bytes

	// Host is the place in the file: for Data the offset of the byte at Off,
	// for Zero, if Options ask for it, that of clusters which are kept for it; else 0,
	// for Compressed that of the compressed cluster (whose uncompressed bytes
	// begin at the guest cluster's start, wherever in it Off is), for Invalid
	// the corrupt table entry.
	Host int64
	// Bytes is, for Compressed, how many bytes the compressed cluster has at
	// most; others may begin within them.
	Bytes int32
	Kind  Kind
}

// What can be wrong with a table entry: Run.Bytes of an Invalid one.
const (
	badTableReserved int32 = iota
	badTableUnaligned
	badTableOutside
	badReserved
	badUnaligned
	badOutside
	badZeroV2
	badSubclusters
)

// Err returns what is wrong with an Invalid run (an ErrCorrupt), nil for others.
func (r Run) Err() error {
	if r.Kind != Invalid {
		return nil
	}
	var what, why string
	switch r.Bytes {
	case badTableReserved, badTableUnaligned, badTableOutside:
		what = "L1"
	default:
		what = "L2"
	}
	switch r.Bytes {
	case badTableReserved, badReserved:
		why = "has reserved bits set"
	case badTableUnaligned, badUnaligned:
		why = "is not aligned to a cluster"
	case badTableOutside, badOutside:
		why = "points outside the file"
	case badZeroV2:
		why = "has the zero flag, unknown to version 2"
	case badSubclusters:
		why = "has contradicting subclusters"
	}
	return corrupt("%s entry %#x for guest offset %d %s", what, uint64(r.Host), r.Off, why)
}

// Options say which disk of an image to open.
type Options struct {
	// Snapshot is the id or the name of an internal snapshot; "" is the active disk.
	Snapshot string
	// ZeroHosts has Map tell the places of clusters that are kept for Zero runs.
	ZeroHosts bool
	// Buffers may be shared by many images; nil gives the image its own.
	Buffers *Buffers
}

// Buffers lends the memory that tables are read into. The zero value is ready.
type Buffers struct {
	pool sync.Pool // *[chunk]byte
}

// chunk is how much of a table is read at once.
const chunk = 64 << 10

func (b *Buffers) get() *[chunk]byte {
	if buf, ok := b.pool.Get().(*[chunk]byte); ok {
		return buf
	}
	return new([chunk]byte)
}

func (b *Buffers) put(buf *[chunk]byte) { b.pool.Put(buf) }

// Image maps the virtual disk of one image file. It holds no table, only one bit
// for each L2 table. All methods may be called concurrently.
type Image struct {
	r        io.ReaderAt
	fileSize int64
	h        *Header

	size      int64 // of the virtual disk
	l1Offset  int64
	tables    int64    // L1 entries that matter
	allocated []uint64 // a bit for each of them that is not zero

	zeroHosts bool
	bufs      *Buffers
}

// Open reads the header and the L1 table of the image file r, fileSize bytes
// long; r must allow concurrent use. Errors: as ReadHeader and Header.Supported.
func Open(r io.ReaderAt, fileSize int64, opts Options) (*Image, error) {
	h, err := ReadHeader(r, fileSize)
	if err != nil {
		return nil, err
	}
	if err := h.Supported(); err != nil {
		return nil, err
	}
	m := &Image{r: r, fileSize: fileSize, h: h, size: h.VirtualSize, l1Offset: h.l1Offset, zeroHosts: opts.ZeroHosts, bufs: opts.Buffers}
	if m.bufs == nil {
		m.bufs = &Buffers{}
	}
	entries := h.l1Entries
	if opts.Snapshot != "" {
		s, err := findSnapshot(r, fileSize, h, opts.Snapshot)
		if err != nil {
			return nil, err
		}
		m.size, m.l1Offset, entries = s.VirtualSize, s.l1Offset, s.l1Entries
	}
	m.tables = tablesFor(m.size, h.tableBits())
	if m.tables > entries {
		return nil, corrupt("L1 table of %d entries is too small for %d bytes", entries, m.size)
	}
	if m.tables*8 > fileSize-m.l1Offset {
		return nil, corrupt("L1 table of %d entries at %#x is outside the file", m.tables, m.l1Offset)
	}
	return m, m.readL1()
}

// readL1 finds out which L2 tables there are.
func (m *Image) readL1() error {
	m.allocated = make([]uint64, (m.tables+63)/64)
	buf := m.bufs.get()
	defer m.bufs.put(buf)
	for i := int64(0); i < m.tables; {
		b := buf[:min((m.tables-i)*8, chunk)]
		if err := readFull(m.r, b, m.l1Offset+i*8); err != nil {
			return fmt.Errorf("L1 table: %w", err)
		}
		for ; len(b) > 0; b, i = b[8:], i+1 {
			if binary.BigEndian.Uint64(b)&^copied != 0 {
				m.allocated[i/64] |= 1 << (i % 64)
			}
		}
	}
	return nil
}

// Header returns the image's header.
func (m *Image) Header() *Header { return m.h }

// Size returns the size of the virtual disk in bytes.
func (m *Image) Size() int64 { return m.size }

// Span returns how many bytes of the virtual disk are mapped by the part of an L2
// table that is read at once (64 KiB at most): a power of two. To read each table
// only once, map ranges that are multiples of it.
func (m *Image) Span() int64 {
	return min(1<<m.h.tableBits(), chunk/m.h.l2EntryBytes()<<m.h.ClusterBits)
}

// Next returns the first offset from off on, or Size, before which nothing is
// allocated. It costs no input or output and knows only whole L2 tables.
func (m *Image) Next(off int64) int64 {
	if off >= m.size {
		return m.size
	}
	i := off >> m.h.tableBits()
	n := m.nextTable(i)
	if n == i {
		return off
	}
	return min(n<<m.h.tableBits(), m.size)
}

// nextTable returns the first L1 entry from i on that is not zero, else m.tables.
func (m *Image) nextTable(i int64) int64 {
	for i < m.tables {
		if word := m.allocated[i/64] >> (i % 64); word != 0 {
			return i + int64(bits.TrailingZeros64(word))
		}
		i = (i/64 + 1) * 64
	}
	return m.tables
}

// Parts of table entries.
const (
	copied     uint64 = 1 << 63
	compressed uint64 = 1 << 62
	zeroFlag   uint64 = 1

	offsetMask = 0x00fffffffffffe00

	l1Reserved = 0x7f000000000001ff
	l2Reserved = 0x3f000000000001fe // the zero flag is another matter
)

// Map appends to dst the runs that make up the length bytes of the virtual disk
// from off on, clipped to the disk: in order, without gaps, each as long as it
// can be. It reads the tables from the file each time. Corrupt table entries are
// runs too (Invalid), so that the rest of the disk stays readable; an error is a
// failed read.
func (m *Image) Map(off, length int64, dst []Run) ([]Run, error) {
	if off < 0 || length < 0 {
		return dst, fmt.Errorf("map of %d bytes at %d", length, off)
	}
	end := m.size
	if length < end-off {
		end = off + length
	}
	w := walker{m: m, runs: dst, keep: len(dst)}
	l1 := m.bufs.get()
	defer m.bufs.put(l1)
	l2 := m.bufs.get()
	defer m.bufs.put(l2)

	tableBits := m.h.tableBits()
	last := (end - 1) >> tableBits
	var known []byte // L1 entries of tables from first on
	var first int64
	for off < end {
		i := off >> tableBits
		if next := m.nextTable(i); next > i {
			stop := min(end, next<<tableBits)
			w.add(Run{Off: off, Len: stop - off, Kind: Unallocated})
			off = stop
			continue
		}
		if i-first >= int64(len(known)/8) {
			first = i
			known = l1[:min((last+1-i)*8, chunk)]
			if err := readFull(m.r, known, m.l1Offset+i*8); err != nil {
				return dst, fmt.Errorf("L1 table: %w", err)
			}
		}
		stop := min(end, (i+1)<<tableBits)
		if err := w.table(binary.BigEndian.Uint64(known[(i-first)*8:]), off, stop, l2[:]); err != nil {
			return dst, err
		}
		off = stop
	}
	return w.runs, nil
}

// walker collects the runs of one Map.
type walker struct {
	m    *Image
	runs []Run
	keep int // runs before are the caller's
}

// add appends r, or lengthens the last run where r goes on from it.
func (w *walker) add(r Run) {
	if len(w.runs) > w.keep {
		last := &w.runs[len(w.runs)-1]
		if last.Kind == r.Kind {
			switch r.Kind {
			case Unallocated:
				last.Len += r.Len
				return
			case Zero:
				if last.Host == 0 && r.Host == 0 || last.Host != 0 && last.Host+last.Len == r.Host {
					last.Len += r.Len
					return
				}
			case Data:
				if last.Host+last.Len == r.Host {
					last.Len += r.Len
					return
				}
			}
		}
	}
	w.runs = append(w.runs, r)
}

// table adds the runs of [off, end), which the L2 table of L1 entry l1 maps.
func (w *walker) table(l1 uint64, off, end int64, buf []byte) error {
	m := w.m
	table := int64(l1 & offsetMask)
	if l1&^copied == 0 {
		w.add(Run{Off: off, Len: end - off, Kind: Unallocated})
		return nil
	}
	bad := int32(-1)
	switch {
	case l1&l1Reserved != 0:
		bad = badTableReserved
	case table&(m.h.ClusterSize()-1) != 0:
		bad = badTableUnaligned
	case table > m.fileSize-m.h.ClusterSize():
		bad = badTableOutside
	}
	if bad >= 0 {
		w.add(Run{Off: off, Len: end - off, Kind: Invalid, Host: int64(l1), Bytes: bad})
		return nil
	}
	cluster, entryLen := m.h.ClusterSize(), m.h.l2EntryBytes()
	for off < end {
		index := off & (1<<m.h.tableBits() - 1) >> m.h.ClusterBits
		count := (end - 1 - off&^(cluster-1)) >> m.h.ClusterBits // clusters after off's
		b := buf[:min((count+1)*entryLen, int64(len(buf)))]
		if err := readFull(m.r, b, table+index*entryLen); err != nil {
			return fmt.Errorf("L2 table: %w", err)
		}
		for ; len(b) > 0; b = b[entryLen:] {
			// Most of an increment's tables is this.
			if n := zeroEntries(b, entryLen); n > 0 {
				stop := min(end, off&^(cluster-1)+n<<m.h.ClusterBits)
				w.add(Run{Off: off, Len: stop - off, Kind: Unallocated})
				off = stop
				if b = b[n*entryLen:]; len(b) == 0 {
					break
				}
			}
			stop := min(end, off&^(cluster-1)+cluster)
			entry := binary.BigEndian.Uint64(b)
			if entryLen == 16 && entry&compressed == 0 {
				w.subclusters(entry, binary.BigEndian.Uint64(b[8:]), off, stop)
			} else {
				r := m.decode(entry, off)
				r.Off, r.Len = off, stop-off
				w.add(r)
			}
			off = stop
		}
	}
	return nil
}

// zeroEntries returns how many of the first entries in b are zero.
func zeroEntries(b []byte, entryLen int64) int64 {
	n := 0
	for n < len(b) && binary.NativeEndian.Uint64(b[n:]) == 0 {
		n += 8
	}
	return int64(n) / entryLen
}

// decode returns the run, but for its range, of a cluster with the L2 entry, at
// guest offset off.
func (m *Image) decode(entry uint64, off int64) Run {
	invalid := func(why int32) Run { return Run{Kind: Invalid, Host: int64(entry), Bytes: why} }
	inCluster := off & (m.h.ClusterSize() - 1)
	if entry&compressed != 0 {
		// The lower bits are the offset, the upper ones the number of sectors
		// beyond the first; where they part depends on the cluster size.
		shift := 62 - (m.h.ClusterBits - 8)
		host := int64(entry & (1<<shift - 1))
		sectors := int64(entry&(compressed-1)) >> shift
		if host >= m.fileSize {
			return invalid(badOutside)
		}
		n := (sectors+1)*sectorLen - host&(sectorLen-1)
		// The last sector in the file may be cut off.
		return Run{Kind: Compressed, Host: host, Bytes: int32(min(n, m.fileSize-host))}
	}
	host := int64(entry & offsetMask)
	switch {
	case entry&l2Reserved != 0:
		return invalid(badReserved)
	case host&(m.h.ClusterSize()-1) != 0:
		return invalid(badUnaligned)
	case entry&zeroFlag != 0:
		if m.h.Version < 3 {
			return invalid(badZeroV2)
		}
		r := Run{Kind: Zero}
		if m.zeroHosts && host != 0 {
			r.Host = host + inCluster
		}
		return r
	case host == 0:
		return Run{Kind: Unallocated}
	case host >= m.fileSize:
		// The last cluster may not have been written to its end; what is missing
		// reads as zeroes. More is damage, for qemu-img check too.
		return invalid(badOutside)
	}
	return Run{Kind: Data, Host: host + inCluster}
}

// subclusters adds the runs of [off, end), in one cluster with an extended L2
// entry: the cluster's own and the bitmap of its 32 subclusters.
func (w *walker) subclusters(entry, bitmap uint64, off, end int64) {
	m := w.m
	subBits := m.h.ClusterBits - 5
	alloc, zero := uint32(bitmap), uint32(bitmap>>32)
	host := int64(entry & offsetMask)
	bad := int32(-1)
	switch {
	case entry&(l2Reserved|zeroFlag) != 0:
		bad = badReserved
	case host&(m.h.ClusterSize()-1) != 0:
		bad = badUnaligned
	case alloc != 0 && host >= m.fileSize:
		bad = badOutside
	case alloc&zero != 0, host == 0 && alloc != 0:
		bad = badSubclusters
	}
	if bad >= 0 {
		w.add(Run{Off: off, Len: end - off, Kind: Invalid, Host: int64(entry), Bytes: bad})
		return
	}
	for off < end {
		inCluster := off & (m.h.ClusterSize() - 1)
		sub := inCluster >> subBits
		stop := min(end, off-inCluster+(sub+1)<<subBits)
		r := Run{Off: off, Len: stop - off}
		switch {
		case zero>>sub&1 != 0:
			r.Kind = Zero
		case alloc>>sub&1 != 0:
			r.Kind, r.Host = Data, host+inCluster
		}
		w.add(r)
		off = stop
	}
}
