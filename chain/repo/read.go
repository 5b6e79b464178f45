package repo

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"reflect"
	"sync"
	"syscall"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
)

// OpenDisk opens a disk of a point as a read-only image. It is made of the layers that the manifests name; an image that
// is missing, of another size than when it was made, or another than its manifest says, is an error that wraps
// chain.ErrDamaged.
func (g *Guest) OpenDisk(pool *image.Pool, points chain.Points, point *chain.Manifest, disk string) (image.Image, error) {
	release, err := g.hold(point)
	if err != nil {
		return nil, err
	}
	img, err := g.open(pool, points, point, disk)
	if errors.Is(err, chain.ErrDamaged) {
		// The points may have been read before one of them took in another.
		img, err = g.openNow(pool, points, point, disk, err)
	}
	if err != nil {
		release()
		return nil, err
	}
	return &held{guest: g, pool: pool, point: point, disk: disk, release: release, img: img}, nil
}

// maxTries bounds how often a disk is opened anew: a merge can end at any moment, but not again and again.
const maxTries = 3

// openNow opens a disk as the repository is now, not as it was when points was read. The error is the one given if nothing
// has changed since, or the points can't be read.
func (g *Guest) openNow(pool *image.Pool, points chain.Points, point *chain.Manifest, disk string, err error) (image.Image, error) {
	for range maxTries {
		now, _, readErr := g.Points()
		if readErr != nil {
			return nil, err
		}
		m := now.Find(point.ID)
		if m == nil || m.UUID != point.UUID || m.Disk(disk) == nil || reflect.DeepEqual(now, points) {
			return nil, err
		}
		var img image.Image
		if img, err = g.open(pool, now, m, disk); err == nil || !errors.Is(err, chain.ErrDamaged) {
			return img, err
		}
		points = now
	}
	return nil, err
}

func (g *Guest) open(pool *image.Pool, points chain.Points, point *chain.Manifest, disk string) (image.Image, error) {
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

// held is a disk of a point that nobody removes meanwhile. Its layers can be merged, though; a file that the pool has closed
// in between is then another one when it is opened again, and the disk is opened anew.
type held struct {
	guest   *Guest
	pool    *image.Pool
	point   *chain.Manifest
	disk    string
	release func()

	mu     sync.RWMutex
	img    image.Image
	closed bool
}

func (h *held) Size() int64 { return h.point.Disk(h.disk).VirtualSize }

func (h *held) ReadAt(p []byte, off int64) (n int, err error) {
	err = h.do(func(img image.Image) error {
		n, err = img.ReadAt(p, off)
		return err
	})
	return n, err
}

func (h *held) Extents(off, length int64) (list []image.Extent, err error) {
	err = h.do(func(img image.Image) error {
		list, err = img.Extents(off, length)
		return err
	})
	return list, err
}

// do tries f, and tries it again with the layers as they are now if one of those it has is not what it was.
func (h *held) do(f func(image.Image) error) error {
	for tries := 0; ; tries++ {
		h.mu.RLock()
		img := h.img
		err := f(img)
		h.mu.RUnlock()
		if tries == maxTries || !errors.Is(err, image.ErrChanged) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESTALE) {
			return err
		}
		if err := h.reopen(img, err); err != nil {
			return err
		}
	}
}

// reopen opens the disk anew, unless somebody else has done so since f failed with img.
func (h *held) reopen(img image.Image, err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.img != img || h.closed {
		return nil
	}
	now, err := h.guest.openNow(h.pool, nil, h.point, h.disk, err)
	if err != nil {
		return err
	}
	_ = img.Close()
	h.img = now
	return nil
}

func (h *held) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.img.Close()
	if !h.closed {
		h.closed = true
		h.release()
	}
	return err
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
		if l.Disk.Merging != nil {
			layers[i].Bytes, layers[i].Changing = -1, true
		}
	}
	return layers, nil
}

// checkHeader makes sure that an image is the one that its manifest speaks of. The backing file in the header is only
// compared, never followed.
func checkHeader(l chain.Layer, h *qcow2.Header) error {
	if l.Disk.Merging != nil {
		return checkMerging(l, h)
	}
	if !bytes.Equal(h.Identity(), identity(l.Point.Ref(l.Disk.Name))) {
		return fmt.Errorf("%w: it is not the image of disk %s of point %s", chain.ErrDamaged, l.Disk.Name, l.Point.ID)
	}
	if h.VirtualSize != l.Disk.VirtualSize {
		return fmt.Errorf("%w: virtual size is %d, not %d", chain.ErrDamaged, h.VirtualSize, l.Disk.VirtualSize)
	}
	return checkBacking(l, h)
}

func checkBacking(l chain.Layer, h *qcow2.Header) error {
	backing, format := backingName(l.Disk.Parent), ""
	if backing != "" {
		format = "qcow2"
	}
	if h.BackingFile != backing || h.BackingFormat != format {
		return fmt.Errorf("%w: its header names the backing file %q (%s), not %q", chain.ErrDamaged, h.BackingFile, h.BackingFormat, backing)
	}
	return nil
}

// checkMerging is checkHeader for an image that is becoming that of its child: it can have grown to the child's size, and have
// got its identity.
func checkMerging(l chain.Layer, h *qcow2.Header) error {
	if id := h.Identity(); !bytes.Equal(id, identity(l.Point.Ref(l.Disk.Name))) && !bytes.Equal(id, identity(*l.Disk.Merging)) {
		return fmt.Errorf("%w: it is not the image of disk %s of point %s", chain.ErrDamaged, l.Disk.Name, l.Point.ID)
	}
	if h.VirtualSize < l.Disk.VirtualSize {
		return fmt.Errorf("%w: virtual size is %d, not %d", chain.ErrDamaged, h.VirtualSize, l.Disk.VirtualSize)
	}
	return checkBacking(l, h)
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
