package partition

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"unicode/utf16"
)

// Sizes in bytes, of the UEFI specification, "GUID Partition Table (GPT) Disk Layout".
const (
	headerSize   = 92  // at least; at most a sector
	entrySize    = 128 // times a power of two
	maxEntrySize = 4096
	maxArray     = 1 << 20 // 16 KiB is usual; the kernel's limit is 4 MiB
)

const headerMark = "EFI PART"

// errNoHeader means that nothing looks like a GPT header where one would be.
var errNoHeader = damaged("no GPT where the MBR says that there is one")

// header is a GPT header that agrees with its check sum and with the disk. Addresses are in sectors.
type header struct {
	sector    int64  // size, in bytes
	last      uint64 // last sector of the disk
	array     int64
	count     int64
	entrySize int64
	arraySum  uint32
}

// gpt reads the table by its header, or else by the backup.
//
// A table inside a partition must have the former. What a partition held before it was put to its present use often
// survives at the end.
func (a area) gpt(inner bool) ([]Partition, error) {
	wrong := errNoHeader
	for _, backup := range []bool{false, true} {
		for _, sector := range sectorSizes {
			at := int64(1)
			if backup {
				at = a.size/sector - 1
			}
			if at < 1 || at >= a.size/sector {
				continue
			}
			h, err := a.header(sector, at)
			var array []byte
			if err == nil {
				array, err = a.array(h)
			}
			switch {
			case errors.Is(err, errNoHeader):
				continue
			case errors.Is(err, ErrDamaged) && !errors.Is(err, errBudget):
				if errors.Is(wrong, errNoHeader) {
					wrong = err
				}
				continue
			case err != nil:
				return nil, err
			}
			parts, err := h.partitions(array)
			if backup {
				err = fmt.Errorf("%w; its backup is used", wrong)
			}
			return parts, err
		}
		if inner {
			break
		}
	}
	return nil, wrong
}

// header reads the header at a sector.
func (a area) header(sector, at int64) (header, error) {
	b, err := a.read(at*sector, sector)
	if err != nil {
		return header{}, err
	}
	if string(b[:8]) != headerMark {
		return header{}, errNoHeader
	}
	le := binary.LittleEndian
	size := le.Uint32(b[12:])
	if size < headerSize || int64(size) > sector {
		return header{}, damaged("a GPT header of %d bytes", size)
	}
	sum := le.Uint32(b[16:])
	clear(b[16:20]) // it is not part of itself
	if crc32.ChecksumIEEE(b[:size]) != sum {
		return header{}, damaged("the check sum of the GPT header is wrong")
	}
	h := header{
		sector:    sector,
		last:      uint64(a.size/sector - 1),
		count:     int64(le.Uint32(b[80:])),
		entrySize: int64(le.Uint32(b[84:])),
		arraySum:  le.Uint32(b[88:]),
	}
	if self := le.Uint64(b[24:]); self != uint64(at) {
		return header{}, damaged("the GPT header at sector %d is that of sector %d", at, self)
	}
	// The disk has become smaller, or this is a part of it.
	if first, last := le.Uint64(b[40:]), le.Uint64(b[48:]); first > last || last > h.last {
		return header{}, damaged("the GPT is for sectors %d to %d, but the disk ends at %d", first, last, h.last)
	}
	if h.entrySize < entrySize || h.entrySize > maxEntrySize || bits.OnesCount64(uint64(h.entrySize)) != 1 ||
		h.count == 0 || h.count > maxArray/h.entrySize {
		return header{}, damaged("a GPT of %d entries of %d bytes", h.count, h.entrySize)
	}
	array := le.Uint64(b[72:])
	if array > h.last || h.count*h.entrySize > a.size-int64(array)*sector {
		return header{}, damaged("the entries of the GPT at sector %d are behind the end of the disk", array)
	}
	h.array = int64(array)
	return h, nil
}

// array reads the entries.
func (a area) array(h header) ([]byte, error) {
	b, err := a.read(h.array*h.sector, h.count*h.entrySize)
	if err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(b) != h.arraySum {
		return nil, damaged("the check sum of the GPT's entries is wrong")
	}
	return b, nil
}

// partitions returns those of the entries that lie on the disk; which one does not is the error.
func (h header) partitions(array []byte) (parts []Partition, err error) {
	le := binary.LittleEndian
	for i := range min(h.count, limit) {
		b := array[i*h.entrySize:][:entrySize]
		if [16]byte(b) == [16]byte{} {
			continue // not in use
		}
		first, last := le.Uint64(b[32:]), le.Uint64(b[40:])
		if first > last || last > h.last {
			if err == nil {
				err = damaged("partition %d is from sector %d to %d, but the disk ends at %d", i+1, first, last, h.last)
			}
			continue
		}
		parts = append(parts, Partition{
			Number: int(i + 1),
			Offset: int64(first) * h.sector,
			Size:   int64(last-first+1) * h.sector,
			Type:   guid(b[:16]),
			UUID:   guid(b[16:32]),
			Label:  label(b[56:]),
		})
	}
	return parts, err
}

// guid writes a GUID as Linux does. Its first three numbers are in little endian.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

// label decodes a name, which is UTF-16 and ends with a NUL if there is room. What is no UTF-16 becomes U+FFFD.
func label(b []byte) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		u := binary.LittleEndian.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}
