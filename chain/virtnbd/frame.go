package virtnbd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// The kinds of frames, as in their headers.
const (
	kindMeta = "meta"
	kindData = "data"
	kindZero = "zero"
	kindStop = "stop"
	kindComp = "comp" // what ends the trailer
)

const (
	headerLen = 40
	sectorLen = 512
)

var crlf = []byte("\r\n")

// header is a frame's header: its kind in 4 letters, and two numbers of 16 hex
// digits, parted by spaces, with CR LF behind them.
type header struct {
	kind     string
	off, len int64
}

func parseHeader(b []byte) (header, error) {
	if len(b) != headerLen || b[4] != ' ' || b[21] != ' ' || !bytes.Equal(b[38:], crlf) {
		return header{}, corrupt("no frame where one should be")
	}
	h := header{kind: string(b[:4])}
	for _, n := range []struct {
		digits []byte
		to     *int64
	}{{b[5:21], &h.off}, {b[22:38], &h.len}} {
		for _, d := range n.digits {
			switch {
			case '0' <= d && d <= '9':
				d -= '0'
			case 'a' <= d && d <= 'f':
				d -= 'a' - 10
			default:
				return header{}, corrupt("no frame where one should be")
			}
			*n.to = *n.to<<4 | int64(d)
		}
		if *n.to < 0 {
			return header{}, corrupt("a number in a frame's header is too large")
		}
	}
	return h, nil
}

// frame is a data, zero or stop frame.
type frame struct {
	header
	pos   int64   // of its payload in the file
	packs []int64 // sizes of its packs, if it is compressed and they were asked for
	size  int64   // of the payload
}

func (f frame) end() int64 { return f.off + f.len }

// mark is a place between two frames.
type mark struct {
	off     int64 // up to where the frames before it go, in the disk
	pos     int64 // of the next frame's header in the file
	trailer int64 // where the list of sizes goes on, from its start; 0 is the start
}

// walker goes from frame to frame.
type walker struct {
	s     *Stream
	at    mark
	sizes *sizes
	// wantPacks asks for the sizes of the packs of frames that end behind it.
	wantPacks int64

	buf    []byte // of the file, from bufPos on
	bufPos int64
	space  [4096]byte
}

// walk begins at a mark. The sizes of packs are kept of frames that end behind wantPacks.
func (s *Stream) walk(from mark, wantPacks int64) *walker {
	w := &walker{s: s, at: from, wantPacks: wantPacks}
	if s.trailerLen > 0 {
		w.sizes = s.sizesFrom(from.trailer)
	}
	return w
}

// read returns n bytes of the file at pos, and reads some more ahead: zero frames
// lie side by side.
func (w *walker) read(pos int64, n int) ([]byte, error) {
	if pos < w.bufPos || pos+int64(n) > w.bufPos+int64(len(w.buf)) {
		w.bufPos = pos
		w.buf = w.space[:max(0, min(int64(len(w.space)), w.s.fileSize-pos))]
		if len(w.buf) < n {
			return nil, corrupt("the file ends at %d, in the middle of a frame or without a stop", w.s.fileSize)
		}
		if err := readFull(w.s.r, w.buf, pos); err != nil {
			w.buf = nil
			return nil, err
		}
	}
	return w.buf[pos-w.bufPos:][:n], nil
}

// next returns the next frame, whose place in the disk and in the file is checked.
// After a stop frame it must not be called again.
func (w *walker) next() (frame, error) {
	m := w.s.meta
	b, err := w.read(w.at.pos, headerLen)
	if err != nil {
		return frame{}, err
	}
	h, err := parseHeader(b)
	if err != nil {
		return frame{}, fmt.Errorf("at %d of the file: %w", w.at.pos, err)
	}
	f := frame{header: h, pos: w.at.pos + headerLen}
	switch h.kind {
	case kindStop:
		if h.off != 0 || h.len != 0 {
			return frame{}, corrupt("stop frame with %d and %d", h.off, h.len)
		}
		return f, nil
	case kindData, kindZero:
	default:
		return frame{}, corrupt("frame of kind %q at %d of the file", h.kind, w.at.pos)
	}
	switch {
	case h.len == 0 || h.off%sectorLen != 0 || h.off > m.VirtualSize || h.len > m.VirtualSize-h.off:
		return frame{}, corrupt("frame of %d bytes at %d of a disk of %d", h.len, h.off, m.VirtualSize)
	case h.off < w.at.off, !m.Incremental && h.off != w.at.off:
		return frame{}, corrupt("frame at %d of the disk follows one that ends at %d", h.off, w.at.off)
	}
	w.at.off = f.end()
	w.at.pos = f.pos
	if h.kind == kindZero {
		return f, nil
	}
	f.size = h.len
	if m.Compressed {
		if w.sizes == nil {
			return frame{}, corrupt("it has no list of compressed sizes: it was cut off")
		}
		if f.size, f.packs, err = w.sizes.next(f.end() > w.wantPacks); err != nil {
			return frame{}, err
		}
		w.at.trailer = w.sizes.offset()
	}
	end := f.pos + f.size
	if f.size > w.s.fileSize-f.pos {
		return frame{}, corrupt("the data of the frame at %d of the disk is cut off", h.off)
	}
	// The next header is read with it.
	if b, err = w.read(end, len(crlf)); err != nil {
		return frame{}, err
	}
	if !bytes.Equal(b, crlf) {
		return frame{}, corrupt("the data of the frame at %d of the disk does not end where it should", h.off)
	}
	w.at.pos = end + int64(len(crlf))
	return f, nil
}

// sizes reads the trailer: a JSON array with an element for each data frame, which
// is a number, or an object of one key, the sum, with the array of the numbers.
type sizes struct {
	dec   *json.Decoder
	shift int64 // from the decoder's offset to that in the array's text
	err   error
}

// sizesFrom goes on at an offset that sizes.offset has returned, or 0.
func (s *Stream) sizesFrom(off int64) *sizes {
	text := io.Reader(io.NewSectionReader(s.r, s.trailerPos+off, s.trailerLen-off))
	z := &sizes{}
	resume := ""
	if off > 0 {
		resume = "[0" // an array whose first element was read already
		text = io.MultiReader(strings.NewReader(resume), text)
	}
	z.dec = json.NewDecoder(text)
	z.dec.UseNumber()
	z.shift = off - int64(len(resume))
	z.err = z.delim('[')
	if z.err == nil && off > 0 {
		_, z.err = z.number()
	}
	return z
}

func (z *sizes) offset() int64 { return z.dec.InputOffset() + z.shift }

func (z *sizes) token() (json.Token, error) {
	t, err := z.dec.Token()
	var syntax *json.SyntaxError
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &syntax) {
		err = corrupt("list of compressed sizes: %v", err)
	}
	return t, err
}

func (z *sizes) delim(want json.Delim) error {
	t, err := z.token()
	if err == nil && t != want {
		err = corrupt("list of compressed sizes: %v, not %v", t, want)
	}
	return err
}

func (z *sizes) number() (int64, error) {
	t, err := z.token()
	if err != nil {
		return 0, err
	}
	return size(t)
}

// size is the value of a token that is a size.
func size(t json.Token) (int64, error) {
	if number, ok := t.(json.Number); ok {
		if n, err := number.Int64(); err == nil && n >= 0 {
			return n, nil
		}
	}
	return 0, corrupt("list of compressed sizes: %v is no size", t)
}

// next returns the size of the next data frame, and with list those of its packs.
func (z *sizes) next(list bool) (total int64, packs []int64, err error) {
	if z.err != nil {
		return 0, nil, z.err
	}
	t, err := z.token()
	if err != nil {
		return 0, nil, err
	}
	if t != json.Delim('{') {
		n, err := size(t)
		if list {
			packs = []int64{n}
		}
		return n, packs, err
	}
	key, err := z.token()
	if err != nil {
		return 0, nil, err
	}
	if err := z.delim('['); err != nil {
		return 0, nil, err
	}
	for z.dec.More() {
		n, err := z.number()
		if err != nil {
			return 0, nil, err
		}
		if total += n; total < n {
			return 0, nil, corrupt("list of compressed sizes: the sum is too large")
		}
		if list {
			packs = append(packs, n)
		}
	}
	if err := z.delim(']'); err != nil {
		return 0, nil, err
	}
	if err := z.delim('}'); err != nil {
		return 0, nil, err
	}
	if key != fmt.Sprint(total) {
		return 0, nil, corrupt("list of compressed sizes: sum %v of parts that are %d", key, total)
	}
	return total, packs, nil
}

// end makes sure that the list is at its end.
func (z *sizes) end() error {
	if z.err != nil {
		return z.err
	}
	return z.delim(']')
}
