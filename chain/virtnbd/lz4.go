package virtnbd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/pierrec/lz4/v4"

	"qmchain/chain/qcow2"
)

// The LZ4 frame format (github.com/lz4/lz4, doc/lz4_Frame_format.md): a header, then
// blocks of a size, data and maybe a check sum, then a size of 0.
const (
	lz4Magic = 0x184d2204

	flagDict       = 1 << 0
	flagContentSum = 1 << 2
	flagContent    = 1 << 3
	flagBlockSums  = 1 << 4
	flagIndep      = 1 << 5

	maxPackHeader = 19
	history       = 64 << 10 // how far back a block can refer
	stored        = 1 << 31  // of a block's size: it is not compressed
)

const (
	// PieceSize is how many bytes of the disk a piece has; the last one of a pack has
	// what remains. It is a multiple of every size that blocks can have here.
	PieceSize = 1 << 20

	// maxPack bounds what is compressed as one; virtnbdbackup compresses at most what
	// an NBD request reads, 32 or 64 MiB.
	maxPack      = 256 << 20
	maxPackBytes = maxPack + maxPack>>7 + 64
)

// packHeader is the header of a pack.
type packHeader struct {
	length    int
	blockMax  int
	linked    bool // blocks refer to those before them
	blockSums bool
	sum       bool  // of all, behind the last block
	content   int64 // decompressed bytes; -1 if it doesn't say
}

// readPackHeader reads the header of the pack at pos of the file, size bytes long.
func (s *Stream) readPackHeader(pos, size int64) (packHeader, error) {
	b := make([]byte, max(0, min(maxPackHeader, size, s.fileSize-pos)))
	if err := readFull(s.r, b, pos); err != nil {
		return packHeader{}, err
	}
	return parsePackHeader(b)
}

func parsePackHeader(b []byte) (packHeader, error) {
	const fixed = 4 + 2 + 1
	if len(b) < fixed || binary.LittleEndian.Uint32(b) != lz4Magic {
		return packHeader{}, corrupt("compressed data does not begin with an LZ4 frame")
	}
	flags, block := b[4], b[5]
	h := packHeader{
		length:    fixed,
		linked:    flags&flagIndep == 0,
		blockSums: flags&flagBlockSums != 0,
		sum:       flags&flagContentSum != 0,
		content:   -1,
	}
	if flags>>6 != 1 || flags&2 != 0 || block&0x8f != 0 {
		return packHeader{}, corrupt("LZ4 frame with flags %#02x %#02x", flags, block)
	}
	code := block >> 4
	if code < 4 {
		return packHeader{}, corrupt("LZ4 frame with flags %#02x %#02x", flags, block)
	}
	h.blockMax = 1 << (8 + 2*code)
	if flags&flagDict != 0 || h.blockMax > PieceSize {
		return packHeader{}, unsupported("LZ4 frame with flags %#02x %#02x", flags, block)
	}
	if flags&flagContent != 0 {
		h.length += 8
		if len(b) < h.length {
			return packHeader{}, corrupt("LZ4 frame is cut off")
		}
		n := binary.LittleEndian.Uint64(b[6:])
		if n > maxSize {
			return packHeader{}, corrupt("LZ4 frame of %d bytes", n)
		}
		h.content = int64(n)
	}
	if byte(xxh32(b[4:h.length-1])>>8) != b[h.length-1] {
		return packHeader{}, corrupt("LZ4 frame with a wrong check sum of its header")
	}
	return h, nil
}

// Piece is a stretch of a pack's decompressed bytes.
type Piece struct {
	Data []byte

	head  packHeader
	whole []byte // Data, and before it the history for the next block
	next  int64  // where the next block is in the file
}

// Bytes is how much memory a piece takes.
func (p *Piece) Bytes() int64 { return int64(len(p.whole)) }

// Restart is what is needed of a piece to go on with the one behind it: much less than
// the piece itself.
type Restart struct {
	head    packHeader
	history []byte
	next    int64
}

// Restart returns what is needed for the piece behind p.
func (p *Piece) Restart() *Restart {
	return &Restart{head: p.head, history: bytes.Clone(p.whole[len(p.whole)-history:]), next: p.next}
}

// Bytes is how much memory a restart takes.
func (r *Restart) Bytes() int64 { return int64(len(r.history)) }

// Decoder decompresses pieces. One is enough for any number of streams and
// goroutines; it keeps its buffers between calls.
type Decoder struct {
	buffers sync.Pool // *buffer
}

type buffer struct {
	in    *bufio.Reader
	block []byte
}

// Piece decompresses the n-th piece of a Compressed run that s.Map has returned. from
// is the Restart of the piece before it, nil for the first. Blocks are checked by their check sums if
// they have any, as virtnbdbackup's do. A pack that can't be decompressed, or is not as
// long as it should be, is ErrCorrupt.
func (d *Decoder) Piece(s *Stream, run qcow2.Run, n int64, from *Restart) (*Piece, error) {
	start := n * PieceSize
	if n < 0 || start >= run.Len || (n == 0) != (from == nil) {
		return nil, fmt.Errorf("piece %d of %d bytes", n, run.Len)
	}
	end := run.Host + int64(run.Bytes)
	p := &Piece{whole: make([]byte, history+min(PieceSize, run.Len-start))}
	p.Data = p.whole[history:]
	if from == nil {
		h, err := s.readPackHeader(run.Host, int64(run.Bytes))
		if err != nil {
			return nil, err
		}
		if h.content >= 0 && h.content != run.Len {
			return nil, corrupt("LZ4 frame of %d bytes, not %d", h.content, run.Len)
		}
		p.head, p.next = h, run.Host+int64(h.length)
	} else {
		p.head, p.next = from.head, from.next
		copy(p.whole, from.history)
	}
	b, _ := d.buffers.Get().(*buffer)
	if b == nil {
		b = &buffer{in: bufio.NewReaderSize(nil, 64<<10)}
	}
	defer d.buffers.Put(b)
	b.in.Reset(io.NewSectionReader(s.r, p.next, end-p.next))
	defer b.in.Reset(nil)
	if err := b.fill(p, n == 0); err != nil {
		return nil, err
	}
	if start+int64(len(p.Data)) < run.Len {
		return p, nil
	}
	return p, b.last(p, end)
}

// read returns the next n bytes of the pack.
func (b *buffer) read(p *Piece, n int) ([]byte, error) {
	if cap(b.block) < n {
		b.block = make([]byte, n)
	}
	got, err := io.ReadFull(b.in, b.block[:n])
	p.next += int64(got)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = corrupt("LZ4 frame is cut off")
	}
	return b.block[:n], err
}

func (b *buffer) uint32(p *Piece) (uint32, error) {
	word, err := b.read(p, 4)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(word), nil
}

// fill decompresses blocks until the piece is full. All but the last of a pack are of
// the same size, so that a piece ends where a block does.
func (b *buffer) fill(p *Piece, first bool) error {
	for at := 0; at < len(p.Data); {
		dst := p.Data[at:min(at+p.head.blockMax, len(p.Data))]
		size, err := b.uint32(p)
		if err != nil {
			return err
		}
		n := int(size &^ stored)
		if n == 0 || n > p.head.blockMax {
			return corrupt("LZ4 block of %d bytes", n)
		}
		sumLen := 0
		if p.head.blockSums {
			sumLen = 4
		}
		src, err := b.read(p, n+sumLen)
		if err != nil {
			return err
		}
		src, sum := src[:n], src[n:]
		if sumLen > 0 && binary.LittleEndian.Uint32(sum) != xxh32(src) {
			return corrupt("LZ4 block with a wrong check sum")
		}
		if size&stored != 0 {
			if n != len(dst) {
				return corrupt("LZ4 block of %d bytes, not %d", n, len(dst))
			}
			copy(dst, src)
		} else {
			var dict []byte
			if p.head.linked {
				dict = p.whole[at : at+history]
				if first {
					dict = dict[max(0, history-at):] // there is nothing before
				}
			}
			got, err := lz4.UncompressBlockWithDict(src, dst, dict)
			if err != nil {
				return corrupt("LZ4 block: %v", err)
			}
			if got != len(dst) {
				return corrupt("LZ4 block of %d bytes, not %d", got, len(dst))
			}
		}
		at += len(dst)
	}
	return nil
}

// last makes sure that the pack ends where it should.
func (b *buffer) last(p *Piece, end int64) error {
	mark, err := b.uint32(p)
	if err != nil {
		return err
	}
	if p.head.sum {
		if _, err := b.uint32(p); err != nil {
			return err
		}
	}
	if mark != 0 || p.next != end {
		return corrupt("LZ4 frame goes on behind its end")
	}
	return nil
}
