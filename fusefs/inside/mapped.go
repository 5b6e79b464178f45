package inside

import (
	"errors"
	"io"
	"sort"

	"qmchain/chain/image"
)

// mapped is a disk that is made of ranges of others: a partition, or a logical volume. It does not own them.
type mapped struct {
	pieces []piece
	size   int64
}

// piece is a range that is spread over places, stripe by stripe; with one place it is simply there.
type piece struct {
	off, len int64 // of the mapped disk
	stripe   int64 // bytes
	at       []place
}

type place struct {
	img image.Image
	off int64
}

func (m *mapped) add(p piece) {
	p.off = m.size
	m.pieces = append(m.pieces, p)
	m.size += p.len
}

// partOf is a range of a disk.
func partOf(img image.Image, off, size int64) *mapped {
	m := &mapped{}
	m.add(piece{len: size, stripe: size, at: []place{{img, off}}})
	return m
}

// find returns where off is, and how many bytes from there on are together. off is within the disk.
func (m *mapped) find(off int64) (place, int64) {
	p := m.pieces[sort.Search(len(m.pieces), func(i int) bool { return m.pieces[i].off+m.pieces[i].len > off })]
	in := off - p.off
	n := int64(len(p.at))
	number, rest := in/p.stripe, in%p.stripe
	at := p.at[number%n]
	return place{at.img, at.off + number/n*p.stripe + rest}, min(p.stripe-rest, p.len-in)
}

func (m *mapped) Size() int64 { return m.size }

func (m *mapped) ReadAt(b []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("read before the beginning")
	}
	for n < len(b) && off < m.size {
		at, together := m.find(off)
		want := min(int64(len(b)-n), together)
		got, err := at.img.ReadAt(b[n:n+int(want)], at.off)
		n += got
		off += int64(got)
		if int64(got) < want {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// Extents returns those of the run that off is in.
func (m *mapped) Extents(off, length int64) ([]image.Extent, error) {
	if off < 0 || off >= m.size || length <= 0 {
		return nil, nil
	}
	at, together := m.find(off)
	list, err := at.img.Extents(at.off, min(length, together))
	for i := range list {
		list[i].Off += off - at.off
	}
	return list, err
}

func (m *mapped) Close() error { return nil }
