package verify

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/image"
	"qmchain/chain/repo"
)

// sums compares an image's file with its check sums. Its error is that of the context, or foreign.ErrNoSum.
func (r *run) sums(ctx context.Context, v *view, t *target) ([]fault, error) {
	file := t.at.Name
	var bad []int64
	var want *repo.Sums
	var err error
	if r.repo == nil {
		err = v.points.CheckSums(ctx, t.Point, t.Disk.Name)
	} else {
		folder := repo.FolderOf(t.Point)
		if want, err = r.repo.ReadSums(ctx, folder, t.Disk); err == nil {
			bad, err = r.hash(ctx, t.at.Path, want)
		} else {
			file = v.relative(filepath.Join(r.repo.FolderDir(folder), t.Disk.Sums.File))
		}
	}
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(err, foreign.ErrNoSum):
		return nil, err
	case err != nil:
		return []fault{{kindOf(err), file, reason(err, file)}}, nil
	case len(bad) > 0:
		return []fault{{Damage, file, ranges(bad, want.Size) + " were changed"}}, nil
	}
	return nil, nil
}

// hash compares a file with its check sums, several blocks at a time, and returns those that differ, in order.
func (r *run) hash(ctx context.Context, path string, want *repo.Sums) ([]int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, image.ErrNotRegular
	case info.Size() != want.Size:
		return nil, fmt.Errorf("%w: it has %d bytes, not %d", chain.ErrDamaged, info.Size(), want.Size)
	}
	var mu sync.Mutex
	var bad []int64
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(r.jobs, len(want.Blocks)) {
		g.Go(func() error {
			buf := make([]byte, min(want.Size, repo.SumsBlock))
			for {
				i := next.Add(1) - 1
				if i >= int64(len(want.Blocks)) {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				off := i * repo.SumsBlock
				b := buf[:min(want.Size-off, repo.SumsBlock)]
				if err := readFull(f, b, off); err != nil {
					return err
				}
				if sha256.Sum256(b) != want.Blocks[i] {
					mu.Lock()
					bad = append(bad, i)
					mu.Unlock()
				}
				r.progress(int64(len(b)))
			}
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	slices.Sort(bad)
	return bad, nil
}

// readFull reads p whole. The file's end before that is io.ErrUnexpectedEOF.
func readFull(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ranges names the bytes that blocks cover, but not more than three ranges.
func ranges(blocks []int64, size int64) string {
	var texts []string
	for i := 0; i < len(blocks); {
		j := i + 1
		for j < len(blocks) && blocks[j] == blocks[j-1]+1 {
			j++
		}
		texts = append(texts, fmt.Sprintf("%d to %d", blocks[i]*repo.SumsBlock, min((blocks[j-1]+1)*repo.SumsBlock, size)))
		i = j
	}
	if n := len(texts); n > 3 {
		texts = append(texts[:3], fmt.Sprintf("those of %d other ranges", n-3))
	}
	return "bytes " + strings.Join(texts, ", ")
}
