package fusefs

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain/image"
)

// bytesDisk is a disk of data alone, but for a hole in its last 4 bytes.
type bytesDisk []byte

func (d bytesDisk) Size() int64 { return int64(len(d)) }

func (d bytesDisk) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(d).ReadAt(p, off) }

func (d bytesDisk) Extents(off, length int64) ([]image.Extent, error) {
	hole := d.Size() - 4
	all := []image.Extent{{Off: off, Len: min(off+length, hole) - off}, {Off: max(off, hole), Len: off + length - max(off, hole), Zero: true}}
	var list []image.Extent
	for _, e := range all {
		if e.Len > 0 {
			list = append(list, e)
		}
	}
	return list, nil
}

// A part of a disk ends where it does: what comes behind it would be in the last page of who maps the file.
func TestSection(t *testing.T) {
	t.Parallel()
	s := section{bytesDisk("0123456789abcdef"), 10, 4}
	if s.Size() != 4 {
		t.Errorf("size %d", s.Size())
	}
	for _, test := range []struct {
		off  int64
		n    int
		want string
		err  error
	}{
		{0, 4, "abcd", nil},
		{1, 2, "bc", nil},
		{2, 100, "cd", io.EOF},
		{4, 1, "", io.EOF},
		{9, 1, "", io.EOF},
		{-1, 1, "", io.EOF},
	} {
		p := make([]byte, test.n)
		n, err := s.ReadAt(p, test.off)
		if string(p[:n]) != test.want || !errors.Is(err, test.err) {
			t.Errorf("%d bytes at %d: %q, %v; want %q, %v", test.n, test.off, p[:n], err, test.want, test.err)
		}
	}
	for _, test := range []struct {
		off, length int64
		want        []image.Extent
	}{
		{0, 4, []image.Extent{{Off: 0, Len: 2}, {Off: 2, Len: 2, Zero: true}}},
		{1, 1 << 30, []image.Extent{{Off: 1, Len: 1}, {Off: 2, Len: 2, Zero: true}}},
		{3, 1 << 30, []image.Extent{{Off: 3, Len: 1, Zero: true}}},
		{4, 1, nil},
	} {
		got, err := s.Extents(test.off, test.length)
		if diff := cmp.Diff(test.want, got); diff != "" || err != nil {
			t.Errorf("%d bytes at %d: %v %s", test.length, test.off, err, diff)
		}
	}
}
