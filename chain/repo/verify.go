package repo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
)

// CheckSums reads the image of a disk in a point, but not those below it, and compares it with its check sums. What
// differs wraps chain.ErrDamaged and says where it is in the file. An image that is being merged has none just now.
func (g *Guest) CheckSums(ctx context.Context, point *chain.Manifest, disk string) error {
	d := point.Disk(disk)
	if d == nil {
		return fmt.Errorf("point %s has no disk %q: %w", point.ID, disk, chain.ErrNoPoint)
	}
	if d.Merging != nil {
		return nil
	}
	err := g.checkSums(ctx, point, d)
	for tries := 0; errors.Is(err, chain.ErrDamaged) && tries < maxTries; tries++ {
		// It may have taken in another one since its manifest was read.
		now, readErr := g.Read(FolderOf(point))
		if readErr != nil || now.UUID != point.UUID || now.Disk(disk) == nil || now.Disk(disk).Generation == d.Generation {
			break
		}
		point, d = now, now.Disk(disk)
		err = g.checkSums(ctx, point, d)
	}
	return err
}

func (g *Guest) checkSums(ctx context.Context, point *chain.Manifest, d *chain.Disk) error {
	sums, err := g.ReadSums(ctx, FolderOf(point), d)
	if err != nil {
		return err
	}
	if err := compareSums(ctx, g.ImagePath(point.ID, d.Name), sums); err != nil {
		return fmt.Errorf("%s/%s/%s: %w", g.Name, ImagesFolder, d.File, err)
	}
	return nil
}

// CompareBlocks compares some blocks of an image file with their check sums. Those behind the sums' end are left out.
func CompareBlocks(ctx context.Context, f io.ReaderAt, sums *Sums, blocks map[int64]bool) error {
	buf := make([]byte, min(sums.Size, SumsBlock))
	for i := range blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i >= int64(len(sums.Blocks)) {
			continue
		}
		if err := compareBlock(f, buf, sums, i); err != nil {
			return err
		}
	}
	return nil
}

func compareBlock(f io.ReaderAt, buf []byte, sums *Sums, i int64) error {
	off := i * SumsBlock
	b := buf[:min(sums.Size-off, SumsBlock)]
	if err := readBlock(f, b, off); err != nil {
		return err
	}
	if sha256.Sum256(b) != sums.Blocks[i] {
		return fmt.Errorf("%w: bytes %d to %d were changed", chain.ErrDamaged, off, off+int64(len(b)))
	}
	return nil
}

func compareSums(ctx context.Context, path string, sums *Sums) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return damage(err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return err
	case info.Mode().Type() != fs.FileMode(0):
		return damage(image.ErrNotRegular)
	case info.Size() != sums.Size:
		return fmt.Errorf("%w: it has %d bytes, not %d", chain.ErrDamaged, info.Size(), sums.Size)
	}
	buf := make([]byte, min(sums.Size, SumsBlock))
	for i := range sums.Blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := compareBlock(f, buf, sums, int64(i)); err != nil {
			return err
		}
	}
	return nil
}
