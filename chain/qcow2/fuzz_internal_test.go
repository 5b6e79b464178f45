package qcow2

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"testing"
)

// Whatever an image says: its header is read or refused for a reason that has a name, all that is found by it is in its bounds, and an
// identity that is written into it changes nothing else.
func FuzzImage(f *testing.F) {
	seeds, err := filepath.Glob("../image/testdata/seeds/*.qcow2")
	if err != nil || len(seeds) < 8 {
		f.Fatal(seeds, err)
	}
	for _, path := range seeds {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		if len(b) < 16<<10 {
			f.Add(b, int64(len(b)))
		}
		h, err := ReadHeader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			f.Fatal(err)
		}
		if h.Version == 3 {
			with := *h
			with.BackingFile, with.order = "base.qcow2", append(h.order, extBackingFormat)
			with.Extensions = maps.Clone(h.Extensions)
			with.Extensions[extBackingFormat] = []byte("qcow2")
			with.raw = bytes.Clone(h.raw)
			with.raw[15] = 1 // where the name is, comes with it
			if b, err := with.withIdentity([]byte("id")); err == nil {
				f.Add(b[:min(len(b), 4096)], int64(len(b)))
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		if size < int64(len(b)) || size > 64<<20 {
			return
		}
		r := io.NewSectionReader(padded(b), 0, size) // what is not there is zero
		known := func(err error) {
			t.Helper()
			if !errors.Is(err, ErrNotQcow2) && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
		}
		h, err := ReadHeader(r, size)
		if err != nil {
			known(err)
			return
		}
		if h.VirtualSize < 0 || h.VirtualSize%sectorLen != 0 || int64(len(h.raw)) > h.ClusterSize() || len(h.Extensions) > maxExtensions || len(h.BackingFile) > maxBackingName {
			t.Fatalf("%+v", h)
		}
		if err := h.Same(r); err != nil {
			t.Error(err)
		}
		snapshots, err := ReadSnapshots(r, size, h)
		if err != nil {
			known(err)
		}
		if len(snapshots) > h.Snapshots {
			t.Errorf("%d snapshots of %d", len(snapshots), h.Snapshots)
		}
		identify(t, h)

		var tried []string
		if len(snapshots) > 0 {
			tried = append(tried, snapshots[0].ID, snapshots[len(snapshots)-1].Name)
		}
		for _, snapshot := range append(tried, "") {
			m, err := Open(r, size, Options{Snapshot: snapshot})
			if err != nil {
				if snapshot == "" {
					known(err)
				}
				continue
			}
			mapAll(t, m, size)
			err = m.Metadata(func(off, length int64) {
				if off < 0 || length < 0 || off+length < 0 || off > size {
					t.Errorf("metadata of %d bytes at %d of %d", length, off, size)
				}
			})
			if err != nil {
				known(err)
			}
			if same, err := m.SameTables(m); err != nil || !same {
				t.Errorf("not the same as itself: %v", err)
			}
		}
	})
}

// mapAll looks at the runs of a disk, of which there may be too many for all.
func mapAll(t *testing.T, m *Image, fileSize int64) {
	for off, n := m.Next(0), 0; off < m.Size() && n < 100; off, n = m.Next(off), n+1 {
		runs, err := m.Map(off, m.Span(), nil)
		if err != nil {
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatal(err)
			}
			return
		}
		for _, r := range runs {
			if r.Off != off || r.Len <= 0 || r.Len > m.Size()-off {
				t.Fatalf("run %+v at %d of %d", r, off, m.Size())
			}
			off += r.Len
			switch r.Kind {
			case Data:
				if r.Host < 0 || r.Host >= fileSize {
					t.Fatalf("run %+v in a file of %d", r, fileSize)
				}
			case Compressed:
				if r.Host < 0 || r.Host >= fileSize || r.Bytes <= 0 {
					t.Fatalf("run %+v in a file of %d", r, fileSize)
				}
			case Invalid:
				if !errors.Is(r.Err(), ErrCorrupt) {
					t.Fatal(r.Err())
				}
			case Unallocated, Zero:
			}
		}
		if len(runs) == 0 {
			t.Fatalf("no run at %d of %d", off, m.Size())
		}
	}
}

// padded is what reads as zero behind its end.
type padded []byte

func (p padded) ReadAt(b []byte, off int64) (int, error) {
	clear(b)
	if off < int64(len(p)) {
		copy(b, p[off:])
	}
	return len(b), nil
}

// identify writes an identity, and another one over it.
func identify(t *testing.T, h *Header) {
	first, err := h.withIdentity([]byte("another"))
	if err != nil {
		return
	}
	read := func(b []byte) *Header {
		t.Helper()
		if int64(len(b)) != h.ClusterSize() {
			t.Fatalf("%d bytes", len(b))
		}
		got, err := ReadHeader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatalf("with an identity it can't be read: %v", err)
		}
		return got
	}
	data := bytes.Repeat([]byte("i"), MaxIdentity)
	second, err := read(first).withIdentity(data)
	if errors.Is(err, ErrNoRoom) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	got := read(second)
	if !bytes.Equal(got.Identity(), data) {
		t.Errorf("the identity is %q", got.Identity())
	}
	for typ, ext := range h.Extensions {
		if typ != extIdentity && !bytes.Equal(got.Extensions[typ], ext) {
			t.Errorf("extension %#x is %q, was %q", typ, got.Extensions[typ], ext)
		}
	}
	a, b := *h, *got
	a.Extensions, a.order, a.raw = nil, nil, nil
	b.Extensions, b.order, b.raw = nil, nil, nil
	if len(got.Extensions)-len(h.Extensions) > 1 || !equal(a, b) {
		t.Errorf("%+v became %+v", a, b)
	}
}

func equal(a, b Header) bool {
	return a.Version == b.Version && a.ClusterBits == b.ClusterBits && a.VirtualSize == b.VirtualSize && a.BackingFile == b.BackingFile &&
		a.BackingFormat == b.BackingFormat && a.DataFile == b.DataFile && a.Incompatible == b.Incompatible && a.Compatible == b.Compatible &&
		a.Autoclear == b.Autoclear && a.CryptMethod == b.CryptMethod && a.RefcountBits == b.RefcountBits && a.Compression == b.Compression &&
		a.Snapshots == b.Snapshots && a.l1Offset == b.l1Offset && a.l1Entries == b.l1Entries && a.refOffset == b.refOffset
}
