package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
)

// sumsBlock is how much of an image one check sum covers, in bytes.
const sumsBlock = 4 << 20

// computeSums reads an image file and returns the text of its sums file and the image's size. The text is a line
// "qmchain-sums 1 sha256 BLOCK SIZE", both in bytes, and the SHA-256 of each block in hex, a line each; the last block
// is what remains. `split -b 4M --filter=sha256sum IMAGE` prints the same digests.
func computeSums(ctx context.Context, f *os.File) (text []byte, size int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	size = info.Size()
	var out bytes.Buffer
	fmt.Fprintf(&out, "qmchain-sums 1 sha256 %d %d\n", sumsBlock, size)
	block := make([]byte, min(size, sumsBlock))
	for off := int64(0); off < size; off += sumsBlock {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		block = block[:min(size-off, sumsBlock)]
		if _, err := f.ReadAt(block, off); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, 0, err
		}
		out.WriteString(digest(block))
		out.WriteByte('\n')
	}
	return out.Bytes(), size, nil
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
