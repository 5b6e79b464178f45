package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

const (
	extIdentity uint32 = 0x716d6368 // "qmch"

	// MaxIdentity is the longest identity, in bytes.
	MaxIdentity = 128
)

// ErrNoRoom means that a header extension doesn't fit into the first cluster.
var ErrNoRoom = errors.New("no room in the qcow2 header")

// SetIdentity writes data into the header of the image f as a header extension of
// our own, in place of an earlier one. QEMU keeps it when it rewrites the header.
// f is open for reading and writing, is a version 3 image and nobody else has it
// open. The header's cluster is written by one pwrite; the caller syncs.
// Errors: ErrUnsupported for a version 2 image, ErrNoRoom, and those of ReadHeader.
func SetIdentity(f *os.File, data []byte) error {
	if len(data) == 0 || len(data) > MaxIdentity {
		return fmt.Errorf("identity of %d bytes, 1 to %d allowed", len(data), MaxIdentity)
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	h, err := ReadHeader(f, st.Size())
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	cluster, err := h.withIdentity(data)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	_, err = f.WriteAt(cluster, 0)
	return err
}

// withIdentity returns the first cluster of the image with the identity data.
// Nothing else can be in that cluster: the format forbids it.
func (h *Header) withIdentity(data []byte) ([]byte, error) {
	if h.Version < 3 {
		return nil, unsupported("version %d has no place for an identity", h.Version)
	}
	be := binary.BigEndian
	out := append([]byte(nil), h.raw[:h.length]...)
	extension := func(typ uint32, data []byte) {
		out = be.AppendUint32(out, typ)
		out = be.AppendUint32(out, uint32(len(data)))
		out = append(out, data...)
		for len(out)%8 != 0 {
			out = append(out, 0)
		}
	}
	// Readers expect extensions on 8-byte boundaries from the header's end on.
	if h.length%8 != 0 {
		return nil, corrupt("header length %d", h.length)
	}
	for _, typ := range h.order {
		if typ != extIdentity {
			extension(typ, h.Extensions[typ])
		}
	}
	extension(extIdentity, data)
	extension(extEnd, nil)
	if be.Uint64(out[8:]) != 0 { // backing_file_offset
		be.PutUint64(out[8:], uint64(len(out)))
		out = append(out, h.BackingFile...)
	}
	if int64(len(out)) > h.ClusterSize() {
		return nil, fmt.Errorf("%w: %d bytes needed, a cluster has %d", ErrNoRoom, len(out), h.ClusterSize())
	}
	return append(out, make([]byte, h.ClusterSize()-int64(len(out)))...), nil
}
