package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
)

// Snapshot is an internal snapshot of an image.
type Snapshot struct {
	ID, Name    string
	VirtualSize int64 // bytes

	l1Offset, l1Entries int64
}

const (
	snapshotHeaderLen = 40
	// QEMU's own limit on the extra data of a snapshot.
	maxSnapshotExtra = 1024
)

// ReadSnapshots returns the internal snapshots of the image file r.
func ReadSnapshots(r io.ReaderAt, fileSize int64, h *Header) ([]Snapshot, error) {
	var list []Snapshot
	err := walkSnapshots(r, fileSize, h, func(s Snapshot) bool {
		list = append(list, s)
		return true
	})
	return list, err
}

// findSnapshot looks for an id first, then for a name, as QEMU does.
func findSnapshot(r io.ReaderAt, fileSize int64, h *Header, idOrName string) (Snapshot, error) {
	var found Snapshot
	ok := false
	err := walkSnapshots(r, fileSize, h, func(s Snapshot) bool {
		if s.ID == idOrName {
			found, ok = s, true
			return false
		}
		if s.Name == idOrName && !ok {
			found, ok = s, true
		}
		return true
	})
	if err != nil {
		return Snapshot{}, err
	}
	if !ok {
		return Snapshot{}, fmt.Errorf("no internal snapshot %q", idOrName)
	}
	if found.l1Entries > maxL1Bytes/8 || found.l1Offset&(h.ClusterSize()-1) != 0 {
		return Snapshot{}, corrupt("L1 table of snapshot %q", idOrName)
	}
	return found, nil
}

// walkSnapshots calls f with each entry of the snapshot table until it returns false.
func walkSnapshots(r io.ReaderAt, fileSize int64, h *Header, f func(Snapshot) bool) error {
	off := h.snapshotsOffset
	for i := range h.Snapshots {
		var b [snapshotHeaderLen]byte
		if off > fileSize {
			return corrupt("snapshot %d is outside the file", i)
		}
		if err := readFull(r, b[:], off); err != nil {
			return fmt.Errorf("snapshot table: %w", err)
		}
		be := binary.BigEndian
		idLen, nameLen, extraLen := int(be.Uint16(b[12:])), int(be.Uint16(b[14:])), int(be.Uint32(b[36:]))
		if extraLen > maxSnapshotExtra {
			return corrupt("snapshot %d has %d bytes of extra data", i, extraLen)
		}
		rest := make([]byte, extraLen+idLen+nameLen)
		if err := readFull(r, rest, off+snapshotHeaderLen); err != nil {
			return fmt.Errorf("snapshot table: %w", err)
		}
		s := Snapshot{
			ID:          string(rest[extraLen : extraLen+idLen]),
			Name:        string(rest[extraLen+idLen:]),
			VirtualSize: h.VirtualSize,
			l1Entries:   int64(be.Uint32(b[8:])),
		}
		// Without this field the disk has had one size all its life.
		if extraLen >= 16 {
			size := be.Uint64(rest[8:]) &^ (sectorLen - 1)
			if size > math.MaxInt64-sectorLen {
				return corrupt("snapshot %d of %d bytes", i, size)
			}
			s.VirtualSize = int64(size)
		}
		l1 := be.Uint64(b[:])
		if l1 > math.MaxInt64-maxL1Bytes {
			return corrupt("snapshot %d has its L1 table at %#x", i, l1)
		}
		s.l1Offset = int64(l1)
		if !f(s) {
			return nil
		}
		off = (off + snapshotHeaderLen + int64(len(rest)) + 7) &^ 7
	}
	return nil
}

// SameTables reports whether two disks of one file, the active one or those of
// snapshots, are mapped by the same L2 tables: then they hold the same. Disks that are
// not may hold the same nevertheless.
func (m *Image) SameTables(other *Image) (bool, error) {
	if m.size != other.size || m.tables != other.tables {
		return false, nil
	}
	one, two := m.bufs.get(), m.bufs.get()
	defer m.bufs.put(one)
	defer m.bufs.put(two)
	for at := int64(0); at < m.tables*8; at += chunk {
		a, b := one[:min(chunk, m.tables*8-at)], two[:min(chunk, m.tables*8-at)]
		if err := readFull(m.r, a, m.l1Offset+at); err != nil {
			return false, fmt.Errorf("L1 table: %w", err)
		}
		if err := readFull(other.r, b, other.l1Offset+at); err != nil {
			return false, fmt.Errorf("L1 table: %w", err)
		}
		for i := 0; i < len(a); i += 8 {
			if binary.BigEndian.Uint64(a[i:])&^copied != binary.BigEndian.Uint64(b[i:])&^copied {
				return false, nil
			}
		}
	}
	return true, nil
}
