package partition

import (
	"encoding/binary"
	"hash/crc32"
	"io"
)

// Tables that no program makes.

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
)

// drive is a disk in memory. It counts what is read.
type drive struct {
	size  int64
	pages map[int64]*[page]byte // others are zeroes

	reads int
	bytes int64
}

func newDrive(size int64) *drive { return &drive{size: size, pages: map[int64]*[page]byte{}} }

func (d *drive) ReadAt(p []byte, off int64) (int, error) {
	d.reads++
	d.bytes += int64(len(p))
	if off < 0 || off >= d.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), d.size-off))
	for done := 0; done < n; {
		at := off + int64(done)
		piece := p[done:min(n, done+int(page-at%page))]
		if content := d.pages[at/page]; content != nil {
			copy(piece, content[at%page:])
		} else {
			clear(piece)
		}
		done += len(piece)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *drive) put(off int64, data []byte) {
	for len(data) > 0 {
		if d.pages[off/page] == nil {
			d.pages[off/page] = new([page]byte)
		}
		n := copy(d.pages[off/page][off%page:], data)
		off, data = off+int64(n), data[n:]
	}
}

// bootSector returns a sector with an MBR, or a link of a chain.
func bootSector(signature uint32, entries ...entry) []byte {
	b := make([]byte, bootSize)
	le := binary.LittleEndian
	le.PutUint32(b[440:], signature)
	for i, e := range entries {
		at := b[446+16*i:]
		at[0], at[4] = e.boot, e.kind
		le.PutUint32(at[8:], uint32(e.start))
		le.PutUint32(at[12:], uint32(e.sectors))
	}
	b[510], b[511] = 0x55, 0xaa
	return b
}

func protective() []byte { return bootSector(0, entry{kind: 0xee, start: 1, sectors: 0xffffffff}) }

// rawHeader is what a GPT header says, true or not.
type rawHeader struct {
	size             uint32
	self             uint64
	first, last      uint64
	array            uint64
	count, entrySize uint32
	arraySum         uint32
}

func (h rawHeader) bytes(sector int64) []byte {
	b := make([]byte, sector)
	copy(b, headerMark)
	le := binary.LittleEndian
	le.PutUint32(b[8:], 0x10000)
	le.PutUint32(b[12:], h.size)
	le.PutUint64(b[24:], h.self)
	le.PutUint64(b[40:], h.first)
	le.PutUint64(b[48:], h.last)
	le.PutUint64(b[72:], h.array)
	le.PutUint32(b[80:], h.count)
	le.PutUint32(b[84:], h.entrySize)
	le.PutUint32(b[88:], h.arraySum)
	le.PutUint32(b[16:], crc32.ChecksumIEEE(b[:min(int64(h.size), sector)]))
	return b
}

// span is a partition in a GPT.
type span struct{ first, last uint64 }

func entryArray(size int, spans ...span) []byte {
	b := make([]byte, size*len(spans))
	le := binary.LittleEndian
	for i, s := range spans {
		if s == (span{}) {
			continue
		}
		at := b[i*size:]
		le.PutUint32(at, 0x0fc63daf)
		le.PutUint32(at[16:], uint32(i+1))
		le.PutUint64(at[32:], s.first)
		le.PutUint64(at[40:], s.last)
	}
	return b
}

// putGPT puts a GPT for an area of the disk there. Its header can be changed, to say what is not true.
func (d *drive) putGPT(off, size, sector int64, entryBytes int, change func(*rawHeader), spans ...span) {
	array := entryArray(entryBytes, spans...)
	h := rawHeader{
		size: headerSize, self: 1, first: 3, last: uint64(size/sector - 1), array: 2,
		count: uint32(len(spans)), entrySize: uint32(entryBytes), arraySum: crc32.ChecksumIEEE(array),
	}
	if change != nil {
		change(&h)
	}
	d.put(off, protective())
	d.put(off+sector, h.bytes(sector))
	d.put(off+2*sector, array)
}
