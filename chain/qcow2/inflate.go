package qcow2

import (
	"encoding/binary"
	"errors"
	"math/bits"
)

// inflater decompresses DEFLATE (RFC 1951) from one slice to another. A library's
// decoder reads from a stream, of which it must not take a byte too much, and keeps
// the last 32 KiB for matches; where all of the input and the output are in memory
// there is no need for either, and it takes half the time.
type inflater struct {
	src  []byte
	pos  int    // of the next byte that is not in acc
	acc  uint64 // bits of the input, the next one lowest
	have uint   // bits in acc; those above are zero, or the input's own

	lengths  [maxLiterals + maxDistances]uint8
	literals table
	dists    table
}

const (
	maxLiterals  = 286
	maxDistances = 30
	endOfBlock   = 256
	maxCodeBits  = 15

	literalBits  = 10 // of codes that are found by one look
	distanceBits = 8

	// The most that a length and a distance can have: two codes, 5 and 13 bits.
	matchBits = 2*maxCodeBits + 5 + 13
)

var (
	errDeflate  = errors.New("not a deflate stream")
	errDistance = errors.New("a match from before the beginning")
)

// An entry of a table says what a code means: its length in bits (the lowest byte),
// the number of extra bits or one of these flags (the next), and a value.
const (
	isLiteral  = 0x20 << 8 // value is the byte
	isEnd      = 0x40 << 8
	isLink     = 0x80 << 8 // value is where the table for the bits that follow begins
	extraMask  = 0x1f
	valueShift = 16
)

// table decodes a Huffman code. An entry of 0 is a code that is not used.
type table struct {
	head  [1 << literalBits]uint32 // by the first bits
	tail  []uint32                 // by those that follow, for the codes that have more
	first uint                     // how many the first bits are
	rest  uint                     // how many follow at most
}

var codeOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// literalEntry is the entry of a symbol of the literals and lengths, without the
// length of its code.
func literalEntry(symbol int) uint32 {
	switch {
	case symbol < endOfBlock:
		return uint32(symbol)<<valueShift | isLiteral
	case symbol == endOfBlock:
		return isEnd
	case symbol < 265:
		return uint32(symbol-257+3) << valueShift
	case symbol == 285:
		return 258 << valueShift
	}
	extra := (symbol - 261) / 4
	return uint32((4+(symbol-261)%4)<<extra+3)<<valueShift | uint32(extra)<<8
}

func distanceEntry(symbol int) uint32 {
	if symbol < 4 {
		return uint32(symbol+1) << valueShift
	}
	extra := symbol/2 - 1
	return uint32((2+symbol%2)<<extra+1)<<valueShift | uint32(extra)<<8
}

func codeEntry(symbol int) uint32 { return uint32(symbol) << valueShift }

// build makes the table of a code with the given lengths. Codes that are complete are
// right, and so is one of a single code of one bit, and none at all as long as it is
// not used: what zlib accepts.
func (t *table) build(lengths []uint8, first uint, entry func(symbol int) uint32) error {
	var count [maxCodeBits + 1]int
	longest := uint(0)
	for _, n := range lengths {
		count[n]++
		longest = max(longest, uint(n))
	}
	count[0] = 0
	t.first, t.rest = first, max(longest, first)-first
	clear(t.head[:1<<first])
	t.tail = t.tail[:0]
	if longest == 0 {
		return nil
	}
	var next [maxCodeBits + 2]int
	for n := 1; n <= maxCodeBits; n++ {
		next[n+1] = (next[n] + count[n]) << 1
	}
	if used := next[longest] + count[longest]; used != 1<<longest && (used != 1 || longest != 1) {
		return errDeflate
	}
	for symbol, n := range lengths {
		if n == 0 {
			continue
		}
		length := uint(n)
		code := uint(bits.Reverse16(uint16(next[n]))) >> (16 - length)
		next[n]++
		e := entry(symbol) | uint32(n)
		if length <= first {
			for i := code; i < 1<<first; i += 1 << length {
				t.head[i] = e
			}
			continue
		}
		link := &t.head[code&(1<<first-1)]
		if *link == 0 {
			*link = uint32(len(t.tail))<<valueShift | isLink
			t.tail = append(t.tail, make([]uint32, 1<<t.rest)...)
		}
		second := t.tail[*link>>valueShift:]
		for i := code >> first; i < 1<<t.rest; i += 1 << (length - first) {
			second[i] = e
		}
	}
	return nil
}

// find returns the entry of the code that acc begins with.
func (t *table) find(acc uint64) uint32 {
	e := t.head[acc&(1<<t.first-1)]
	if e&isLink != 0 {
		e = t.second(e, acc)
	}
	return e
}

func (t *table) second(e uint32, acc uint64) uint32 {
	return t.tail[uint64(e>>valueShift)+acc>>t.first&(1<<t.rest-1)]
}

// fill brings at least matchBits into acc, or what is left of the input.
func (z *inflater) fill() {
	if z.pos+8 <= len(z.src) {
		z.acc |= binary.LittleEndian.Uint64(z.src[z.pos:]) << z.have
		z.pos += int(63-z.have) / 8
		z.have |= 56
		return
	}
	for z.have <= 56 && z.pos < len(z.src) {
		z.acc |= uint64(z.src[z.pos]) << z.have
		z.pos++
		z.have += 8
	}
}

// take takes n bits, at most 16.
func (z *inflater) take(n uint) (uint, error) {
	if z.have < n {
		if z.fill(); z.have < n {
			return 0, errTooShort
		}
	}
	v := uint(z.acc & (1<<n - 1))
	z.acc >>= n
	z.have -= n
	return v, nil
}

// inflate fills dst from src. What follows the last block is left alone.
func (z *inflater) inflate(dst, src []byte) error {
	z.src, z.pos, z.acc, z.have = src, 0, 0, 0
	defer func() { z.src = nil }()
	n := 0
	for last := false; !last; {
		head, err := z.take(3)
		if err != nil {
			return err
		}
		last = head&1 != 0
		switch head >> 1 {
		case 0:
			n, err = z.stored(dst, n)
		case 1:
			if err = z.fixed(); err == nil {
				n, err = z.block(dst, n)
			}
		case 2:
			if err = z.dynamic(); err == nil {
				n, err = z.block(dst, n)
			}
		default:
			err = errDeflate
		}
		if err != nil {
			return err
		}
	}
	if n < len(dst) {
		return errTooShort
	}
	return nil
}

// stored copies a block that is not compressed.
func (z *inflater) stored(dst []byte, n int) (int, error) {
	z.pos -= int(z.have / 8) // whole bytes go back, the rest is padding
	z.acc, z.have = 0, 0
	if len(z.src)-z.pos < 4 {
		return n, errTooShort
	}
	size := int(binary.LittleEndian.Uint16(z.src[z.pos:]))
	if size != int(^binary.LittleEndian.Uint16(z.src[z.pos+2:])) {
		return n, errDeflate
	}
	z.pos += 4
	switch {
	case len(z.src)-z.pos < size:
		return n, errTooShort
	case len(dst)-n < size:
		return n, errTooLong
	}
	copy(dst[n:], z.src[z.pos:z.pos+size])
	z.pos += size
	return n + size, nil
}

// fixed sets the codes that need no description.
func (z *inflater) fixed() error {
	var lengths [288]uint8
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		default:
			lengths[i] = 8
		}
	}
	entry := func(symbol int) uint32 {
		if symbol >= maxLiterals {
			return isLiteral | isEnd // has a code, but no meaning
		}
		return literalEntry(symbol)
	}
	if err := z.literals.build(lengths[:], literalBits, entry); err != nil {
		return err
	}
	var dists [32]uint8
	for i := range dists {
		dists[i] = 5
	}
	return z.dists.build(dists[:], distanceBits, func(symbol int) uint32 {
		if symbol >= maxDistances {
			return isEnd
		}
		return distanceEntry(symbol)
	})
}

// dynamic reads the codes of a block.
func (z *inflater) dynamic() error {
	head, err := z.take(14)
	if err != nil {
		return err
	}
	literals, dists, codes := int(head&31)+257, int(head>>5&31)+1, int(head>>10)+4
	if literals > maxLiterals || dists > maxDistances {
		return errDeflate
	}
	var lengths [len(codeOrder)]uint8
	for _, symbol := range codeOrder[:codes] {
		n, err := z.take(3)
		if err != nil {
			return err
		}
		lengths[symbol] = uint8(n)
	}
	if err := z.literals.build(lengths[:], literalBits, codeEntry); err != nil {
		return err
	}
	all := z.lengths[:literals+dists]
	for i := 0; i < len(all); {
		symbol, err := z.code()
		if err != nil {
			return err
		}
		if symbol < 16 {
			all[i] = uint8(symbol)
			i++
			continue
		}
		repeat := [3]struct{ base, extra uint }{{3, 2}, {3, 3}, {11, 7}}[symbol-16]
		more, err := z.take(repeat.extra)
		if err != nil {
			return err
		}
		value := uint8(0)
		if symbol == 16 {
			if i == 0 {
				return errDeflate
			}
			value = all[i-1]
		}
		end := i + int(repeat.base+more)
		if end > len(all) {
			return errDeflate
		}
		for ; i < end; i++ {
			all[i] = value
		}
	}
	if err := z.literals.build(all[:literals], literalBits, literalEntry); err != nil {
		return err
	}
	return z.dists.build(all[literals:], distanceBits, distanceEntry)
}

// code reads a code length's symbol.
func (z *inflater) code() (uint, error) {
	if z.have < maxCodeBits {
		z.fill()
	}
	e := z.literals.find(z.acc)
	n := uint(e & 0xff)
	if n == 0 || n > z.have {
		return 0, z.ended(errDeflate)
	}
	z.acc >>= n
	z.have -= n
	return uint(e >> valueShift), nil
}

// ended returns err, or that the input has ended where that is the reason.
func (z *inflater) ended(err error) error {
	if z.pos == len(z.src) && z.have < matchBits {
		return errTooShort
	}
	return err
}

// block decompresses a block by the codes that are set, to dst from n on. It returns
// where it ends.
func (z *inflater) block(dst []byte, n int) (int, error) {
	n, ended, err := z.bulk(dst, n)
	if ended || err != nil {
		return n, err
	}
	for {
		if z.have < matchBits {
			z.fill()
		}
		e := z.literals.find(z.acc)
		size := uint(e & 0xff)
		if size == 0 || size > z.have {
			return n, z.ended(errDeflate)
		}
		z.acc >>= size
		z.have -= size
		if e&(isLiteral|isEnd) != 0 {
			switch {
			case e&isEnd == 0:
				if n == len(dst) {
					return n, errTooLong
				}
				dst[n] = byte(e >> valueShift)
				n++
				continue
			case e&isLiteral != 0:
				return n, errDeflate
			}
			return n, nil
		}
		length, err := z.value(e)
		if err != nil {
			return n, err
		}
		e = z.dists.find(z.acc)
		size = uint(e & 0xff)
		if size == 0 || size > z.have || e&isEnd != 0 {
			return n, z.ended(errDeflate)
		}
		z.acc >>= size
		z.have -= size
		dist, err := z.value(e)
		switch {
		case err != nil:
			return n, err
		case dist > n:
			return n, errDistance
		case length > len(dst)-n:
			return n, errTooLong
		}
		repeat(dst, n, dist, length)
		n += length
	}
}

// bulk is block for as long as neither end is near, so that nothing has to be looked at
// for each symbol but what it is. It says whether the block has ended.
func (z *inflater) bulk(dst []byte, n int) (int, bool, error) {
	const longest = 258
	src, pos, acc, have := z.src, z.pos, z.acc, z.have
	defer func() { z.pos, z.acc, z.have = pos, acc, have }()
	literals, dists := &z.literals, &z.dists
	for pos+16 <= len(src) && n+longest+16 <= len(dst) {
		acc |= binary.LittleEndian.Uint64(src[pos:]) << (have & 63)
		pos += int((63 - have) >> 3)
		have |= 56
		e := literals.head[acc&(1<<literalBits-1)]
		// Two literals have at most 30 of the 56 bits, which leaves enough for a third code.
		for range 2 {
			if e&isLink != 0 {
				e = literals.second(e, acc)
			}
			if e&(isLiteral|isEnd) != isLiteral {
				break
			}
			acc >>= e & 63
			have -= uint(e & 63)
			dst[n] = byte(e >> valueShift)
			n++
			e = literals.head[acc&(1<<literalBits-1)]
		}
		if e&isLink != 0 {
			e = literals.second(e, acc)
		}
		if e&(isLiteral|isEnd) == isLiteral {
			acc >>= e & 63
			have -= uint(e & 63)
			dst[n] = byte(e >> valueShift)
			n++
			continue
		}
		acc |= binary.LittleEndian.Uint64(src[pos:]) << (have & 63)
		pos += int((63 - have) >> 3)
		have |= 56
		acc >>= e & 63
		have -= uint(e & 63)
		switch {
		case e&0xff == 0 || e&isLiteral != 0:
			return n, false, errDeflate
		case e&isEnd != 0:
			return n, true, nil
		}
		extra := uint(e>>8) & extraMask
		length := int(e>>valueShift) + int(acc&(1<<extra-1))
		acc >>= extra
		have -= extra
		e = dists.head[acc&(1<<distanceBits-1)]
		if e&isLink != 0 {
			e = dists.second(e, acc)
		}
		if e&0xff == 0 || e&isEnd != 0 {
			return n, false, errDeflate
		}
		acc >>= e & 63
		have -= uint(e & 63)
		extra = uint(e>>8) & extraMask
		dist := int(e>>valueShift) + int(acc&(1<<extra-1))
		acc >>= extra
		have -= extra
		if dist > n {
			return n, false, errDistance
		}
		repeat(dst, n, dist, length)
		n += length
	}
	return n, false, nil
}

// value adds an entry's extra bits to its value.
func (z *inflater) value(e uint32) (int, error) {
	extra := uint(e>>8) & extraMask
	if extra > z.have {
		return 0, errTooShort
	}
	v := int(e>>valueShift) + int(z.acc&(1<<extra-1))
	z.acc >>= extra
	z.have -= extra
	return v, nil
}

// repeat writes length bytes at n that are the same as those dist before.
func repeat(dst []byte, n, dist, length int) {
	if dist >= 8 && n+length+8 <= len(dst) {
		// Eight at a time; what this writes behind the end is written again.
		for end := n + length; n < end; n += 8 {
			binary.LittleEndian.PutUint64(dst[n:], binary.LittleEndian.Uint64(dst[n-dist:]))
		}
		return
	}
	for end := n + length; n < end; n++ {
		dst[n] = dst[n-dist]
	}
}
