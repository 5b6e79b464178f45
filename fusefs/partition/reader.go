package partition

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// budget is what may be read of one disk, in bytes. Each piece counts as at least one page, so it also bounds how many
// there are. The most that sane tables take is 255 table sectors of logical partitions and a look into as many partitions,
// 2 MiB in all, and two GPTs of the largest size.
const (
	budget = 8 << 20
	page   = 4096
)

var errBudget = fmt.Errorf("%w: more to read than %d MiB", ErrDamaged, budget>>20)

// reader is one look at a disk.
type reader struct {
	ctx  context.Context
	disk io.ReaderAt
	left int64
}

func (r *reader) read(off, n int64) ([]byte, error) {
	if err := r.ctx.Err(); err != nil {
		return nil, err
	}
	if r.left -= max(n, page); r.left < 0 {
		return nil, errBudget
	}
	b := make([]byte, n)
	if got, err := r.disk.ReadAt(b, off); got < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read %d bytes at %d: %w", n, off, err)
	}
	return b, nil
}
