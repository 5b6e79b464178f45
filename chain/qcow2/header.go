// Package qcow2 reads one qcow2 image file: its header, and where in the file
// each byte of its virtual disk is.
//
// The words are those of QEMU's format description (docs/interop/qcow2):
//
//   - cluster: the unit of allocation, 512 bytes to 2 MiB. A guest cluster is a
//     piece of the virtual disk, a host cluster a piece of the file.
//   - L1 and L2 tables: the two-level map from guest to host clusters. One L2
//     table is one cluster long; the L1 table holds the offsets of all L2 tables.
//   - subcluster: with extended L2 entries, one 32nd of a cluster.
//   - backing file: the image that shows through where this one is unallocated.
//   - header extension: a typed record behind the header. QEMU keeps those that
//     it doesn't know, which is how the identity record of this package survives.
//
// The package neither opens files nor caches tables, follows no path that it
// finds in a header, and reads no backing file: package image stacks images and
// keeps what was read. Nothing in a file is trusted: every size is bounded before
// memory is taken for it, every offset is checked against the file.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
)

var (
	// ErrNotQcow2 means that the file doesn't begin with a qcow2 header.
	ErrNotQcow2 = errors.New("not a qcow2 image")
	// ErrCorrupt means that the file contradicts the format.
	ErrCorrupt = errors.New("corrupt qcow2 image")
	// ErrUnsupported means a valid image with a feature that this package can't
	// read: encryption, an external data file, an unknown incompatible feature.
	ErrUnsupported = errors.New("unsupported qcow2 image")
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrCorrupt}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrUnsupported}, args...)...)
}

// Bits of Header.Incompatible.
const (
	Dirty           uint64 = 1 << iota // reference counts may be stale; reading doesn't need them
	Corrupt                            // QEMU found the image corrupt
	DataFile                           // guest data is in another file
	CompressionType                    // compressed clusters are not zlib
	ExtendedL2                         // clusters have subclusters
)

const knownIncompatible = Dirty | Corrupt | DataFile | CompressionType | ExtendedL2

// Compression is how compressed clusters are compressed.
type Compression uint8

const (
	Zlib Compression = 0 // raw deflate
	Zstd Compression = 1
)

// Types of header extensions.
const (
	extEnd           uint32 = 0
	extBackingFormat uint32 = 0xe2792aca
	extFeatureTable  uint32 = 0x6803f857
	extDataFile      uint32 = 0x44415441
)

const (
	magic     = 0x514649fb // "QFI\xfb"
	headerV2  = 72
	headerV3  = 104
	sectorLen = 512

	minClusterBits = 9
	maxClusterBits = 21

	// QEMU's own limits (block/qcow2.h).
	maxL1Bytes       = 32 << 20
	maxRefTableBytes = 8 << 20
	maxSnapshots     = 65536
	maxBackingName   = 1023
	maxFormatName    = 15

	// QEMU sets no limit on the number of extensions. Real images hold less
	// than ten; thousands are an attack on our memory.
	maxExtensions = 256
)

// Header is what the first cluster of an image says.
type Header struct {
	Version     int   // 2 or 3
	ClusterBits int   // 9 to 21
	VirtualSize int64 // bytes; a part of a sector at the end doesn't count, as in QEMU

	BackingFile   string // as written in the file: to compare with, never to be opened
	BackingFormat string // "" where the image doesn't say
	DataFile      string // name of the external data file, "" without one

	Incompatible uint64 // feature bits, 0 in version 2
	Compatible   uint64
	Autoclear    uint64

	CryptMethod  uint32 // 0: not encrypted
	RefcountBits int
	Compression  Compression
	Snapshots    int // number of internal snapshots

	// Extensions holds every header extension, known or not, by type.
	Extensions map[uint32][]byte

	length          int // of the header without extensions
	l1Offset        int64
	l1Entries       int64
	refOffset       int64 // of the reference count table
	refClusters     int64
	snapshotsOffset int64
	order           []uint32 // of the extensions in the file
	raw             []byte   // the header, its extensions and the backing file's name
}

// ClusterSize returns the size of a cluster in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// Identity returns what SetIdentity wrote into the image, nil if it has none.
func (h *Header) Identity() []byte { return h.Extensions[extIdentity] }

// l2EntryBytes is 16 with extended L2 entries, else 8.
func (h *Header) l2EntryBytes() int64 {
	if h.Incompatible&ExtendedL2 != 0 {
		return 16
	}
	return 8
}

// tableBits is the log2 of the guest bytes that one L2 table maps.
func (h *Header) tableBits() int {
	if h.Incompatible&ExtendedL2 != 0 {
		return 2*h.ClusterBits - 4
	}
	return 2*h.ClusterBits - 3
}

// ReadHeader reads the header of the image file r, which is fileSize bytes long.
// It reads the headers of images too that can't be read further (see Supported).
// Errors: ErrNotQcow2, ErrCorrupt, ErrUnsupported (an unknown version), or r's.
func ReadHeader(r io.ReaderAt, fileSize int64) (*Header, error) {
	// The usual header ends within 1 KiB; a longer one is read again, whole.
	buf := make([]byte, min(fileSize, 4096))
	if err := readFull(r, buf, 0); err != nil {
		return nil, fmt.Errorf("qcow2 header: %w", err)
	}
	if len(buf) < headerV2 || binary.BigEndian.Uint32(buf) != magic {
		return nil, ErrNotQcow2
	}
	bits := binary.BigEndian.Uint32(buf[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return nil, corrupt("cluster size 2^%d", bits)
	}
	if fileSize < 1<<bits {
		return nil, corrupt("the file (%d bytes) is shorter than its first cluster", fileSize)
	}
	h := &Header{ClusterBits: int(bits)}
	err := h.parse(buf[:min(int64(len(buf)), h.ClusterSize())])
	if errors.Is(err, errShort) {
		buf = make([]byte, h.ClusterSize())
		if err := readFull(r, buf, 0); err != nil {
			return nil, fmt.Errorf("qcow2 header: %w", err)
		}
		h = &Header{ClusterBits: int(bits)}
		err = h.parse(buf)
	}
	if err != nil {
		return nil, err
	}
	return h, nil
}

// errShort asks for the rest of the first cluster.
var errShort = errors.New("header goes on behind what was read")

// parse reads the header from b, the beginning of the first cluster.
func (h *Header) parse(b []byte) error {
	be := binary.BigEndian
	u32 := func(off int) uint32 { return be.Uint32(b[off:]) }
	u64 := func(off int) uint64 { return be.Uint64(b[off:]) }

	cluster := uint64(h.ClusterSize())
	version := u32(4)
	if version != 2 && version != 3 {
		return unsupported("version %d", version)
	}
	h.Version = int(version)
	h.length = headerV2
	refcountOrder := uint32(4)
	if version == 3 {
		h.Incompatible = u64(72)
		h.Compatible = u64(80)
		h.Autoclear = u64(88)
		refcountOrder = u32(96)
		length := u32(100)
		if length < headerV3 || uint64(length) > cluster {
			return corrupt("header length %d", length)
		}
		h.length = int(length)
	}
	if h.length > len(b) {
		return errShort
	}
	if h.length > headerV3 {
		h.Compression = Compression(b[headerV3])
	}
	if refcountOrder > 6 {
		return corrupt("reference count order %d", refcountOrder)
	}
	h.RefcountBits = 1 << refcountOrder
	h.CryptMethod = u32(32)

	if err := h.parseTables(u32, u64); err != nil {
		return err
	}

	backingOffset, backingLen := u64(8), uint64(u32(16))
	end := cluster
	if backingOffset != 0 {
		if backingOffset < uint64(h.length) || backingOffset > cluster {
			return corrupt("backing file name at offset %d", backingOffset)
		}
		if backingLen > min(maxBackingName, cluster-backingOffset) {
			return corrupt("backing file name of %d bytes", backingLen)
		}
		end = backingOffset
	}
	used, err := h.parseExtensions(b, int(end))
	if err != nil {
		return err
	}
	if backingOffset != 0 {
		nameEnd := int(backingOffset + backingLen)
		if nameEnd > len(b) {
			return errShort
		}
		h.BackingFile = string(b[backingOffset:nameEnd])
		used = nameEnd
	}
	h.raw = append([]byte(nil), b[:used]...)
	return nil
}

// parseTables checks where the header says that the tables are, by the rules of
// QEMU's qcow2_do_open. That they are inside the file is checked when they are read.
func (h *Header) parseTables(u32 func(int) uint32, u64 func(int) uint64) error {
	table := func(what string, offset, entries, entryLen, maxBytes uint64) error {
		if entries > maxBytes/entryLen {
			return corrupt("%s of %d entries", what, entries)
		}
		if offset > math.MaxInt64-entries*entryLen || offset&uint64(h.ClusterSize()-1) != 0 {
			return corrupt("%s at offset %#x", what, offset)
		}
		return nil
	}
	l1Offset, l1Entries := u64(40), uint64(u32(36))
	if err := table("L1 table", l1Offset, l1Entries, 8, maxL1Bytes); err != nil {
		return err
	}
	refClusters := uint64(u32(56))
	if refClusters == 0 {
		return corrupt("no reference count table")
	}
	if err := table("reference count table", u64(48), refClusters, uint64(h.ClusterSize()), maxRefTableBytes); err != nil {
		return err
	}
	h.refOffset, h.refClusters = int64(u64(48)), int64(refClusters)
	snapshotsOffset, snapshots := u64(64), uint64(u32(60))
	if err := table("snapshot table", snapshotsOffset, snapshots, snapshotHeaderLen, maxSnapshots*snapshotHeaderLen); err != nil {
		return err
	}
	size := u64(24) &^ (sectorLen - 1)
	if size > math.MaxInt64-sectorLen || tablesFor(int64(size), h.tableBits()) > int64(l1Entries) {
		return corrupt("L1 table of %d entries is too small for %d bytes", l1Entries, size)
	}
	h.VirtualSize = int64(size)
	h.l1Offset, h.l1Entries = int64(l1Offset), int64(l1Entries)
	h.snapshotsOffset, h.Snapshots = int64(snapshotsOffset), int(snapshots)
	return nil
}

// tablesFor returns how many L2 tables map a disk of size bytes.
func tablesFor(size int64, tableBits int) int64 {
	n := size >> tableBits
	if size&(1<<tableBits-1) != 0 {
		n++
	}
	return n
}

// parseExtensions reads the header extensions in b, which end before end, and
// returns where they end.
func (h *Header) parseExtensions(b []byte, end int) (int, error) {
	h.Extensions = map[uint32][]byte{}
	off := h.length
	for off < end {
		if off+8 > end {
			return 0, corrupt("header extension at offset %d is cut off", off)
		}
		if off+8 > len(b) {
			return 0, errShort
		}
		typ, n := binary.BigEndian.Uint32(b[off:]), binary.BigEndian.Uint32(b[off+4:])
		off += 8
		if typ == extEnd {
			break
		}
		if uint64(n) > uint64(end-off) {
			return 0, corrupt("header extension %#08x of %d bytes", typ, n)
		}
		if off+int(n) > len(b) {
			return 0, errShort
		}
		if _, twice := h.Extensions[typ]; twice {
			return 0, corrupt("header extension %#08x appears twice", typ)
		}
		if len(h.Extensions) == maxExtensions {
			return 0, corrupt("more than %d header extensions", maxExtensions)
		}
		data := append([]byte(nil), b[off:off+int(n)]...)
		h.Extensions[typ] = data
		h.order = append(h.order, typ)
		switch typ {
		case extBackingFormat:
			if n > maxFormatName {
				return 0, corrupt("backing format name of %d bytes", n)
			}
			h.BackingFormat = string(data)
		case extDataFile:
			h.DataFile = string(data)
		}
		off += int(n+7) &^ 7
	}
	return min(off, end, len(b)), nil
}

// Supported returns nil if this package can read the image's data, else an
// ErrUnsupported or ErrCorrupt that says why not.
func (h *Header) Supported() error {
	if unknown := h.Incompatible &^ knownIncompatible; unknown != 0 {
		return unsupported("incompatible feature %s", h.featureNames(unknown))
	}
	if h.Incompatible&Corrupt != 0 {
		return corrupt("it is marked as corrupt; qemu-img check tells more")
	}
	if h.CryptMethod != 0 {
		return unsupported("it is encrypted (method %d)", h.CryptMethod)
	}
	if h.Incompatible&DataFile != 0 {
		return unsupported("its data is in an external data file")
	}
	if h.Compression != Zlib && h.Compression != Zstd {
		return unsupported("compression type %d", h.Compression)
	}
	if (h.Compression != Zlib) != (h.Incompatible&CompressionType != 0) {
		return corrupt("compression type %d contradicts the feature bits", h.Compression)
	}
	if h.Incompatible&ExtendedL2 != 0 && h.ClusterBits < 14 {
		return corrupt("subclusters in clusters of %d bytes", h.ClusterSize())
	}
	return nil
}

// featureNames names incompatible features by the image's own feature table.
func (h *Header) featureNames(bits uint64) string {
	const entryLen = 48 // type, bit, name
	names := map[uint64]string{}
	for t := h.Extensions[extFeatureTable]; len(t) >= entryLen; t = t[entryLen:] {
		if t[0] == 0 && t[1] < 64 {
			names[1<<t[1]] = strings.TrimRight(string(t[2:entryLen]), "\x00")
		}
	}
	var list []string
	for i := range 64 {
		if bit := bits & (1 << i); bit != 0 {
			name := fmt.Sprintf("bit %d", i)
			if n := names[bit]; n != "" {
				name += fmt.Sprintf(" (%q)", n)
			}
			list = append(list, name)
		}
	}
	return strings.Join(list, ", ")
}

// Same reads the header from r again and returns ErrCorrupt if a byte of it differs.
func (h *Header) Same(r io.ReaderAt) error {
	buf := make([]byte, len(h.raw))
	if err := readFull(r, buf, 0); err != nil {
		return fmt.Errorf("qcow2 header: %w", err)
	}
	if string(buf) != string(h.raw) {
		return corrupt("the header has changed")
	}
	return nil
}

// readFull fills p from offset off of r; the end of the file in between is
// io.ErrUnexpectedEOF.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
