package repo

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
)

// OpenDisk opens a disk of a point as a read-only image. It is made of the layers that the manifests name; an image that
// is missing, of another size than when it was made, or another than its manifest says, is an error that wraps
// chain.ErrDamaged.
func (g *Guest) OpenDisk(pool *image.Pool, points chain.Points, point *chain.Manifest, disk string) (image.Image, error) {
	layers, err := g.layers(points, point, disk)
	if err != nil {
		return nil, err
	}
	img, err := pool.Open(point.Disk(disk).VirtualSize, layers...)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: disk %s: %w", g.Name, point.ID, disk, damage(err))
	}
	return img, nil
}

// damage wraps chain.ErrDamaged around the errors of reading a backup that say that it is not what it was. All others say
// that it could not be read just now: a share that hiccups damages nothing.
func damage(err error) error {
	for _, e := range []error{fs.ErrNotExist, syscall.ELOOP, image.ErrChanged, image.ErrNotRegular, qcow2.ErrNotQcow2, qcow2.ErrCorrupt, qcow2.ErrUnsupported} {
		if errors.Is(err, e) && !errors.Is(err, chain.ErrDamaged) {
			return fmt.Errorf("%w: %w", chain.ErrDamaged, err)
		}
	}
	return err
}

// layers are the image files of a disk, each with the check that it is the file that its manifest speaks of.
func (g *Guest) layers(points chain.Points, point *chain.Manifest, disk string) ([]image.Layer, error) {
	lineage, err := points.Layers(point, disk)
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", g.Name, err)
	}
	layers := make([]image.Layer, len(lineage))
	for i, l := range lineage {
		layers[i] = image.Layer{
			Path:   g.ImagePath(l.Point.ID, l.Disk.Name),
			Name:   filepath.Join(g.Name, ImagesFolder, l.Disk.File),
			Format: image.Qcow2,
			Check:  func(h *qcow2.Header) error { return checkHeader(l, h) },
			Bytes:  l.Disk.Bytes,
		}
	}
	return layers, nil
}

// checkHeader makes sure that an image is the one that its manifest speaks of. The backing file in the header is only
// compared, never followed.
func checkHeader(l chain.Layer, h *qcow2.Header) error {
	if !bytes.Equal(h.Identity(), identity(l.Point.Ref(l.Disk.Name))) {
		return fmt.Errorf("%w: it is not the image of disk %s of point %s", chain.ErrDamaged, l.Disk.Name, l.Point.ID)
	}
	if h.VirtualSize != l.Disk.VirtualSize {
		return fmt.Errorf("%w: virtual size is %d, not %d", chain.ErrDamaged, h.VirtualSize, l.Disk.VirtualSize)
	}
	backing, format := "", ""
	if l.Disk.Parent != nil {
		backing, format = chain.BackingFile(*l.Disk.Parent), "qcow2"
	}
	if h.BackingFile != backing || h.BackingFormat != format {
		return fmt.Errorf("%w: its header names the backing file %q (%s), not %q", chain.ErrDamaged, h.BackingFile, h.BackingFormat, backing)
	}
	return nil
}

// CheckImages makes sure that the images that a disk of a point is read from are all there and are those that the
// manifests speak of. It reads headers, not data.
func (g *Guest) CheckImages(points chain.Points, point *chain.Manifest, disk string) error {
	pool := image.NewPool(image.PoolOptions{})
	img, err := g.OpenDisk(pool, points, point, disk)
	if err != nil {
		return err
	}
	return img.Close()
}
