package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"qmchain/chain"
	"qmchain/chain/image"
)

// maxSums bounds a sums file: that of an image of 1 PiB has 17 GiB, one of 16 TiB still 260 MiB.
const maxSums = 512 << 20

// CheckSums reads the image of a disk in a point, but not those below it, and compares it with its check sums. What
// differs wraps chain.ErrDamaged and says where it is in the file.
func (g *Guest) CheckSums(ctx context.Context, point *chain.Manifest, disk string) error {
	d := point.Disk(disk)
	if d == nil {
		return fmt.Errorf("point %s has no disk %q: %w", point.ID, disk, chain.ErrNoPoint)
	}
	want, err := readFile(filepath.Join(g.PointDir(point.ID), d.Sums.File), maxSums)
	if err != nil {
		return fmt.Errorf("%s/%s: %w", g.Name, point.ID, damage(err))
	}
	if digest(want) != d.Sums.SHA256 {
		return fmt.Errorf("%s/%s: %w: %s was changed", g.Name, point.ID, chain.ErrDamaged, d.Sums.File)
	}
	got, err := g.sums(ctx, g.ImagePath(point.ID, disk))
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%w: %s", chain.ErrDamaged, differs(got, want))
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", g.Name, filepath.Join(ImagesFolder, d.File), err)
	}
	return nil
}

func (g *Guest) sums(ctx context.Context, path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, damage(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, damage(image.ErrNotRegular)
	}
	text, _, err := computeSums(ctx, f)
	return text, err
}

// differs says where the sums of an image first differ from those that it had.
func differs(got, want []byte) string {
	size := func(line []byte) (n int64, err error) {
		var version, block int64
		_, err = fmt.Sscanf(string(line), "qmchain-sums %d sha256 %d %d", &version, &block, &n)
		return n, err
	}
	g, w := bytes.Split(got, []byte("\n")), bytes.Split(want, []byte("\n"))
	now, err1 := size(g[0])
	was, err2 := size(w[0])
	switch {
	case errors.Join(err1, err2) != nil:
		return "its check sums are of another kind"
	case now != was:
		return fmt.Sprintf("it has %d bytes, not %d", now, was)
	}
	for i := 1; i < min(len(g), len(w)); i++ {
		if !bytes.Equal(g[i], w[i]) {
			off := int64(i-1) * sumsBlock
			return fmt.Sprintf("bytes %d to %d were changed", off, min(off+sumsBlock, now))
		}
	}
	return "its check sums are of another kind"
}
