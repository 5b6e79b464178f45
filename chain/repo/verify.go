package repo

import (
	"context"
	"crypto/sha256"
	"fmt"
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
	sums, err := g.ReadSums(ctx, FolderOf(point), d)
	if err != nil {
		return err
	}
	if err := compareSums(ctx, g.ImagePath(point.ID, disk), sums); err != nil {
		return fmt.Errorf("%s/%s/%s: %w", g.Name, ImagesFolder, d.File, err)
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
	for i, want := range sums.Blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := int64(i) * SumsBlock
		b := buf[:min(sums.Size-off, SumsBlock)]
		if err := readBlock(f, b, off); err != nil {
			return err
		}
		if sha256.Sum256(b) != want {
			return fmt.Errorf("%w: bytes %d to %d were changed", chain.ErrDamaged, off, off+int64(len(b)))
		}
	}
	return nil
}
