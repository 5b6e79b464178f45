package qcow2

import (
	"encoding/binary"
	"fmt"
)

// Metadata calls f with each range of the file that holds the header or tables: the first cluster, the L1 table, all L2
// tables, the reference count table and its blocks. The rest of the file is data, or of no use. Images with internal
// snapshots, which have tables of their own, are refused with ErrUnsupported.
func (m *Image) Metadata(f func(off, length int64)) error {
	h := m.h
	if h.Snapshots > 0 {
		return unsupported("internal snapshots")
	}
	cluster := h.ClusterSize()
	f(0, cluster)
	if err := m.pointers(h.l1Offset, h.l1Entries, offsetMask, f); err != nil {
		return fmt.Errorf("L1 table: %w", err)
	}
	if err := m.pointers(h.refOffset, h.refClusters*cluster/8, refBlockOffset, f); err != nil {
		return fmt.Errorf("reference count table: %w", err)
	}
	return nil
}

// refBlockOffset are the bits of an entry of the reference count table that say where the block is.
const refBlockOffset uint64 = 0xffff_ffff_ffff_fe00

// pointers calls f with a table of n entries, and with each cluster that it points to.
func (m *Image) pointers(table, n int64, mask uint64, f func(off, length int64)) error {
	if table > m.fileSize || n*8 > m.fileSize-table {
		return corrupt("table of %d entries at %#x is outside the file", n, table)
	}
	f(table, n*8)
	buf := m.bufs.get()
	defer m.bufs.put(buf)
	for i := int64(0); i < n; {
		b := buf[:min((n-i)*8, chunk)]
		if err := readFull(m.r, b, table+i*8); err != nil {
			return err
		}
		for ; len(b) > 0; b, i = b[8:], i+1 {
			off := int64(binary.BigEndian.Uint64(b) & mask)
			if off < 0 || off >= m.fileSize {
				return corrupt("entry %d, %#x, is outside the file", i, uint64(off))
			}
			if off != 0 {
				f(off, m.h.ClusterSize())
			}
		}
	}
	return nil
}
