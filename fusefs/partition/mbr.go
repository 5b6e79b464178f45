package partition

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

// bootSize is the part of the first sector that the format knows, whatever the size of sectors.
const bootSize = 512

// mbr is the content of a sector with an MBR, or with one link of a chain of logical partitions.
type mbr struct {
	signature uint32
	entries   [4]entry
}

// entry is one of the four. Addresses are in sectors.
type entry struct {
	boot, kind     byte
	start, sectors int64
}

func (e entry) extended() bool {
	return e.sectors > 0 && (e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85)
}

func (e entry) data() bool { return e.sectors > 0 && !e.extended() }

// parseMBR returns false if the mark at the end of the sector is missing. The mark alone does not make it a table.
func parseMBR(boot []byte) (mbr, bool) {
	if boot[510] != 0x55 || boot[511] != 0xaa {
		return mbr{}, false
	}
	m := mbr{signature: binary.LittleEndian.Uint32(boot[440:])}
	for i := range m.entries {
		b := boot[446+16*i:]
		m.entries[i] = entry{
			boot:    b[0],
			kind:    b[4],
			start:   int64(binary.LittleEndian.Uint32(b[8:])),
			sectors: int64(binary.LittleEndian.Uint32(b[12:])),
		}
	}
	return m, true
}

// protective tells that the MBR is there to keep programs off that do not know the disk's GPT, or is a hybrid of both kinds.
// Without such an entry nobody uses a GPT. Where the entry begins is not looked at: libblkid doesn't, the kernel wants it at
// sector 1.
func (m mbr) protective() bool {
	for _, e := range m.entries {
		if e.kind == 0xee {
			return true
		}
	}
	return false
}

// plausible is the kernel's test that this is a table and not some boot loader's code.
func (m mbr) plausible() bool {
	for _, e := range m.entries {
		if e.boot != 0 && e.boot != 0x80 {
			return false
		}
	}
	return true
}

// sane tells whether there are partitions, and all of them on the disk and behind the table.
func (m mbr) sane(sectors int64) bool {
	used := false
	for _, e := range m.entries {
		if e.sectors == 0 {
			continue
		}
		if e.start == 0 || e.start+e.sectors > sectors {
			return false
		}
		used = true
	}
	return used
}

// mbr returns the partitions of an MBR, which is in the sector boot.
func (a area) mbr(m mbr, boot []byte, inner bool) ([]Partition, error) {
	if !m.plausible() {
		return nil, ErrNone
	}
	sector, err := a.sectorSize(m)
	if err != nil {
		return nil, err
	}
	if (inner || isVolume(boot)) && !m.sane(a.size/sector) {
		return nil, ErrNone
	}
	if inner {
		known, err := a.known(0)
		if err != nil {
			return nil, err
		}
		if known {
			return nil, ErrNone
		}
	}
	l := list{area: a, sector: sector, signature: m.signature}
	next := 5
	for i, e := range m.entries {
		switch {
		case e.data():
			l.add(i+1, e.kind, e.start, e.sectors)
		case e.extended():
			next = l.logical(e, next)
		}
	}
	slices.SortFunc(l.parts, func(p, q Partition) int { return cmp.Compare(p.Number, q.Number) })
	return l.parts, l.wrong
}

// list is the partitions of an MBR as they are found.
type list struct {
	area
	sector    int64
	signature uint32
	parts     []Partition
	wrong     error // the first thing that is
}

func (l *list) damaged(format string, args ...any) {
	if l.wrong == nil {
		l.wrong = damaged(format, args...)
	}
}

// add adds a partition, cut off at the end of the disk.
func (l *list) add(number int, kind byte, start, sectors int64) {
	capacity := l.size / l.sector
	if start >= capacity {
		l.damaged("partition %d begins behind the end of the disk", number)
		return
	}
	if sectors > capacity-start {
		l.damaged("partition %d ends behind the end of the disk", number)
		sectors = capacity - start
	}
	p := Partition{
		Number: number,
		Offset: start * l.sector,
		Size:   sectors * l.sector,
		Type:   fmt.Sprintf("0x%02x", kind),
	}
	if l.signature != 0 {
		p.UUID = fmt.Sprintf("%08x-%02x", l.signature, number)
	}
	l.parts = append(l.parts, p)
}

// emptyLinks is how many links without a partition a chain can have in a row, as in the kernel.
const emptyLinks = 100

// logical adds the partitions of a chain, numbered from next on, and returns the number after them.
//
// The first two entries of a link are a partition, relative to the link, and the next link, relative to the extended
// partition, in any order. Some programs of old use all four, others leave garbage in the last two.
func (l *list) logical(extended entry, next int) int {
	seen := map[int64]bool{}
	empty := 0
	for at, room := extended.start, extended.sectors; ; {
		switch {
		case seen[at]:
			l.damaged("the chain of logical partitions is a loop")
			return next
		case at >= l.size/l.sector:
			l.damaged("the chain of logical partitions leaves the disk")
			return next
		case empty == emptyLinks:
			l.damaged("the chain of logical partitions has %d links without one", empty)
			return next
		}
		seen[at] = true
		empty++
		sector, err := l.read(at*l.sector, bootSize)
		if err != nil {
			// What was found can be shown. That some may be missing matters more than what else is wrong.
			l.wrong = fmt.Errorf("logical partitions: %w", err)
			return next
		}
		link, ok := parseMBR(sector)
		if !ok {
			// An extended partition that nothing was ever in has none.
			if at != extended.start {
				l.damaged("the chain of logical partitions is broken")
			}
			return next
		}
		for i, e := range link.entries {
			start := at + e.start
			if !e.data() || i >= 2 && (e.start+e.sectors > room || start+e.sectors > extended.start+extended.sectors) {
				continue
			}
			if next > limit {
				l.damaged("more than %d partitions", limit)
				return next
			}
			l.add(next, e.kind, start, e.sectors)
			next++
			empty = 0
		}
		more := false
		for _, e := range link.entries {
			if e.extended() {
				at, room, more = extended.start+e.start, e.sectors, true
				break
			}
		}
		if !more {
			return next
		}
	}
}

// sectorSize returns the size with which most partitions of an MBR begin with something that is known; the smallest of
// several. Nothing is read if all but the smallest would put partitions behind the end of the disk, as is the case for
// most disks.
func (a area) sectorSize(m mbr) (int64, error) {
	sizes := sectorSizes[:1:1]
	for _, sector := range sectorSizes[1:] {
		fits := true
		for _, e := range m.entries {
			fits = fits && (e.sectors == 0 || (e.start+e.sectors)*sector <= a.size)
		}
		if fits {
			sizes = append(sizes, sector)
		}
	}
	best, most := sizes[0], 0
	if len(sizes) == 1 {
		return best, nil
	}
	for _, sector := range sizes {
		n := 0
		for _, e := range m.entries {
			if e.sectors == 0 {
				continue
			}
			begins := a.known
			if e.extended() {
				begins = a.link
			}
			ok, err := begins(e.start * sector)
			if err != nil {
				return 0, err
			}
			if ok {
				n++
			}
		}
		if n > most {
			best, most = sector, n
		}
	}
	return best, nil
}

// link tells whether a link of a chain of logical partitions is at an offset.
func (a area) link(off int64) (bool, error) {
	if off == 0 || a.size-off < bootSize {
		return false, nil
	}
	sector, err := a.read(off, bootSize)
	if err != nil {
		return false, err
	}
	m, ok := parseMBR(sector)
	return ok && m.plausible() && !isVolume(sector), nil
}
