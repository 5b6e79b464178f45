package virtnbd

import (
	"bytes"
	"fmt"
	"io"
	"math/bits"
	"sort"

	"qmchain/chain/qcow2"
)

// Stream maps the virtual disk of one stream file. All methods may be called
// concurrently.
type Stream struct {
	r        io.ReaderAt
	fileSize int64
	meta     *Meta
	head     []byte // the first frame

	trailerPos, trailerLen int64 // of the list of compressed sizes

	// The index. Marks are where walks begin, in order; touched has a bit for each
	// region of the disk that a run lies in.
	marks   []mark
	touched []uint64
}

const (
	region = 64 << 20 // bytes of the disk
	// A mark stands at the first frame of a region, but not before so many frames
	// since the last one: a file of millions of tiny frames can't ask for much
	// memory, and a walk to any frame is short.
	markFrames = 32
)

// Open reads all frames' headers of the stream file r, fileSize bytes long; r must
// allow concurrent use. Errors: as ReadMeta.
func Open(r io.ReaderAt, fileSize int64) (*Stream, error) {
	head, text, err := readMeta(r, fileSize)
	if err != nil {
		return nil, err
	}
	meta, err := parseMeta(text)
	if err != nil {
		return nil, err
	}
	s := &Stream{r: r, fileSize: fileSize, meta: meta, head: head}
	if meta.Compressed {
		if err := s.findTrailer(); err != nil {
			return nil, err
		}
	}
	regions := (meta.VirtualSize + region - 1) / region
	s.touched = make([]uint64, (regions+63)/64)
	return s, s.index()
}

// findTrailer finds the list of compressed sizes: it ends the file, but for its own
// header. A stream without data frames may have none.
func (s *Stream) findTrailer() error {
	end := s.fileSize - headerLen
	if end < int64(len(s.head)) {
		return corrupt("the file ends at %d", s.fileSize)
	}
	b := make([]byte, headerLen)
	if err := readFull(s.r, b, end); err != nil {
		return err
	}
	h, err := parseHeader(b)
	if err == nil && h.kind == kindStop {
		return nil
	}
	if err != nil || h.kind != kindComp || h.off != 0 || h.len == 0 || h.len > end-2-int64(len(s.head)) {
		return corrupt("it does not end with a list of compressed sizes: it was cut off")
	}
	s.trailerPos, s.trailerLen = end-int64(len(crlf))-h.len, h.len
	return nil
}

// index walks over all frames once.
func (s *Stream) index() error {
	w := s.walk(mark{pos: int64(len(s.head))}, maxSize)
	var data int64
	for since := markFrames; ; since++ {
		before := w.at
		f, err := w.next()
		if err != nil {
			return err
		}
		if f.kind == kindStop {
			return s.indexed(w, f, data)
		}
		if n := len(s.marks); since >= markFrames && (n == 0 || f.off/region > s.marks[n-1].off/region) {
			before.off = f.off
			s.marks = append(s.marks, before)
			since = 0
		}
		if f.kind == kindData {
			data += f.len
		}
		if f.kind == kindData || s.meta.Incremental {
			for i := f.off / region; i <= (f.end()-1)/region; i++ {
				s.touched[i/64] |= 1 << (i % 64)
			}
		}
	}
}

// indexed checks what can be checked at the stop frame.
func (s *Stream) indexed(w *walker, stop frame, data int64) error {
	if !s.meta.Incremental && w.at.off != s.meta.VirtualSize {
		return corrupt("its frames end at %d of a disk of %d", w.at.off, s.meta.VirtualSize)
	}
	if data != s.meta.DataSize {
		return corrupt("%d bytes of data, not %d as it says", data, s.meta.DataSize)
	}
	if w.sizes == nil {
		if stop.pos != s.fileSize {
			return corrupt("%d bytes behind the stop frame", s.fileSize-stop.pos)
		}
		return nil
	}
	if stop.pos != s.trailerPos {
		return corrupt("the list of compressed sizes begins at %d, not at %d", s.trailerPos, stop.pos)
	}
	if err := w.sizes.end(); err != nil {
		return err
	}
	b := make([]byte, len(crlf))
	if err := readFull(s.r, b, s.trailerPos+s.trailerLen); err != nil {
		return err
	}
	if !bytes.Equal(b, crlf) {
		return corrupt("the list of compressed sizes does not end where it should")
	}
	return nil
}

// Meta returns what the stream says of itself.
func (s *Stream) Meta() *Meta { return s.meta }

// Size returns the size of the virtual disk in bytes.
func (s *Stream) Size() int64 { return s.meta.VirtualSize }

// Span is how much of the disk is well mapped at once: a multiple of it.
func (s *Stream) Span() int64 { return region }

// Same reads the metadata from r again and returns ErrCorrupt if a byte differs.
func (s *Stream) Same(r io.ReaderAt) error {
	b := make([]byte, len(s.head))
	if err := readFull(r, b, 0); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	if !bytes.Equal(b, s.head) {
		return corrupt("the metadata has changed")
	}
	return nil
}

// Next returns the first offset from off on, or Size, before which there is no run.
// It costs no input or output.
func (s *Stream) Next(off int64) int64 {
	if off >= s.Size() {
		return s.Size()
	}
	n := off / region
	for i := n; i < int64(len(s.touched))*64; {
		word := s.touched[i/64] >> (i % 64)
		if word == 0 {
			i = (i/64 + 1) * 64
			continue
		}
		if i += int64(bits.TrailingZeros64(word)); i == n {
			return off
		}
		return min(i*region, s.Size())
	}
	return s.Size()
}

// Map appends to dst the runs in the length bytes of the disk from off on, in
// order. What is between them is not in this stream: zeroes if it is a full, else
// as in the parent. A Compressed run is a whole pack, which may begin before off and
// end behind; Piece reads it. Zeroes of a full are no runs.
func (s *Stream) Map(off, length int64, dst []qcow2.Run) ([]qcow2.Run, error) {
	if off < 0 || length < 0 {
		return dst, fmt.Errorf("map of %d bytes at %d", length, off)
	}
	end := s.Size()
	if length < end-off {
		end = off + length
	}
	if off >= end || len(s.marks) == 0 {
		return dst, nil
	}
	from := sort.Search(len(s.marks), func(i int) bool { return s.marks[i].off > off })
	w := s.walk(s.marks[max(0, from-1)], off)
	for {
		f, err := w.next()
		if err != nil {
			return dst, err
		}
		if f.kind == kindStop || f.off >= end {
			return dst, nil
		}
		if f.end() <= off {
			continue
		}
		start, stop := max(f.off, off), min(f.end(), end)
		switch {
		case f.kind == kindZero:
			if s.meta.Incremental {
				dst = append(dst, qcow2.Run{Off: start, Len: stop - start, Kind: qcow2.Zero})
			}
		case s.meta.Compressed:
			if dst, err = s.packs(f, start, stop, dst); err != nil {
				return dst, err
			}
		default:
			dst = append(dst, qcow2.Run{Off: start, Len: stop - start, Host: f.pos + start - f.off, Kind: qcow2.Data})
		}
	}
}

// packs appends those packs of a data frame that lie in [start, end) of the disk. All
// but the last hold the same number of bytes, which the first one tells.
func (s *Stream) packs(f frame, start, end int64, dst []qcow2.Run) ([]qcow2.Run, error) {
	each := f.len
	if n := int64(len(f.packs)); n != 1 {
		if n == 0 {
			return dst, corrupt("the frame at %d of the disk has no data", f.off)
		}
		h, err := s.readPackHeader(f.pos, f.packs[0])
		if err != nil {
			return dst, fmt.Errorf("at %d of the file: %w", f.pos, err)
		}
		if each = h.content; each <= 0 || n != (f.len+each-1)/each {
			return dst, corrupt("the frame of %d bytes at %d of the disk is in %d parts, the first of %d bytes", f.len, f.off, n, each)
		}
	}
	if each > maxPack {
		return dst, unsupported("%d bytes compressed as one", each)
	}
	pos := f.pos
	for i, size := range f.packs {
		at := f.off + int64(i)*each
		if at >= end {
			break
		}
		length := min(each, f.end()-at)
		if size > maxPackBytes {
			return dst, corrupt("%d bytes compressed to %d", length, size)
		}
		if at+length > start {
			dst = append(dst, qcow2.Run{Off: at, Len: length, Host: pos, Bytes: int32(size), Kind: qcow2.Compressed})
		}
		pos += size
	}
	return dst, nil
}
