package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	// SumsBlock is how much of an image one check sum covers, in bytes.
	SumsBlock = 4 << 20

	maxSumsFile = 1 << 30 // of an image of 64 TiB
)

// Sums are the check sums of an image file. Their file has a line "qmchain-sums 1 sha256 BLOCK SIZE", both in bytes, and the
// SHA-256 of each block in hex, a line each; the last block is what remains. `split -b 4M --filter=sha256sum IMAGE` prints
// the same digests.
type Sums struct {
	Size   int64 // of the image, in bytes
	Blocks [][sha256.Size]byte
}

const sumsHead = "qmchain-sums 1 sha256 %d %d\n"

// Text is what the file of the sums holds.
func (s *Sums) Text() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, sumsHead, SumsBlock, s.Size)
	for _, b := range s.Blocks {
		out.WriteString(hex.EncodeToString(b[:]))
		out.WriteByte('\n')
	}
	return out.Bytes()
}

func parseSums(text []byte) (*Sums, error) {
	s := &Sums{}
	head, rest, _ := strings.Cut(string(text), "\n")
	var block int64
	if _, err := fmt.Sscanf(head+"\n", sumsHead, &block, &s.Size); err != nil || block != SumsBlock || s.Size < 0 {
		return nil, fmt.Errorf("%.80q is not the head of a file of check sums", head)
	}
	if lines := blocks(s.Size); int64(len(rest)) != lines*(2*sha256.Size+1) {
		return nil, fmt.Errorf("%d bytes of check sums, not %d lines", len(rest), lines)
	}
	for ; rest != ""; rest = rest[2*sha256.Size+1:] {
		var b [sha256.Size]byte
		if _, err := hex.Decode(b[:], []byte(rest[:2*sha256.Size])); err != nil || rest[2*sha256.Size] != '\n' {
			return nil, errors.New("a line is not a check sum")
		}
		s.Blocks = append(s.Blocks, b)
	}
	return s, nil
}

// blocks is how many check sums a file of that size has.
func blocks(size int64) int64 { return (size + SumsBlock - 1) / SumsBlock }

// ComputeSums reads an image file of size bytes. The sums of blocks that known says are those of old are taken from there.
func ComputeSums(ctx context.Context, f io.ReaderAt, size int64, old *Sums, known func(block int64) bool) (*Sums, error) {
	s := &Sums{Size: size, Blocks: make([][sha256.Size]byte, blocks(size))}
	buf := make([]byte, min(size, SumsBlock))
	for i := range s.Blocks {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		off := int64(i) * SumsBlock
		n := min(size-off, SumsBlock)
		if old != nil && n == SumsBlock && off+n <= old.Size && known(int64(i)) {
			s.Blocks[i] = old.Blocks[i]
			continue
		}
		if err := readBlock(f, buf[:n], off); err != nil {
			return nil, err
		}
		s.Blocks[i] = sha256.Sum256(buf[:n])
	}
	return s, nil
}

func readBlock(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
