package fusefs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/fusefs/tree"
)

// errUnmounted is returned when a disk is opened after the mount has ended.
var errUnmounted = errors.New("unmounted")

// disks are the images that are open. All handles of one disk share one image, and all images their pool.
type disks struct {
	catalog *catalog
	pool    *image.Pool

	mu      sync.Mutex
	open    map[diskKey]*openDisk
	handles int
	ended   bool
}

type diskKey struct{ uuid, disk string }

// openDisk is an image with the number of handles on it; ready is closed when img and err are set.
type openDisk struct {
	key   diskKey
	refs  int
	ready chan struct{}
	img   image.Image
	err   error
}

func newDisks(c *catalog, pool *image.Pool) *disks {
	return &disks{catalog: c, pool: pool, open: map[diskKey]*openDisk{}}
}

// acquire opens a disk, or shares it with who has it open. Each call that succeeds needs one of release.
func (d *disks) acquire(p tree.Place, disk string) (*openDisk, error) {
	key := diskKey{p.UUID, disk}
	d.mu.Lock()
	if d.ended {
		d.mu.Unlock()
		return nil, errUnmounted
	}
	o := d.open[key]
	first := o == nil
	if first {
		o = &openDisk{key: key, ready: make(chan struct{})}
		d.open[key] = o
	}
	o.refs++
	d.handles++
	d.mu.Unlock()

	if first {
		o.img, o.err = d.openImage(p, disk)
		close(o.ready)
	}
	<-o.ready
	if o.err != nil {
		d.release(o)
		return nil, o.err
	}
	return o, nil
}

func (d *disks) openImage(p tree.Place, disk string) (image.Image, error) {
	l, point, err := d.catalog.point(p)
	if err != nil {
		return nil, err
	}
	img, err := l.from.OpenDisk(d.pool, point.Manifest, disk)
	if errors.Is(err, chain.ErrNoPoint) {
		return nil, fmt.Errorf("%w: %w", errGone, err) // since it was listed
	}
	return img, err
}

// release gives a handle back; the last one closes the image.
func (d *disks) release(o *openDisk) {
	d.mu.Lock()
	d.handles--
	o.refs--
	last := o.refs == 0
	if last && d.open[o.key] == o {
		delete(d.open, o.key)
	}
	d.mu.Unlock()
	if last {
		o.close()
	}
}

func (o *openDisk) close() {
	<-o.ready
	if o.img != nil {
		_ = o.img.Close() // nothing was written; a second Close only says so
	}
}

// inUse is the number of handles.
func (d *disks) inUse() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.handles
}

// end closes all images: the kernel does not give handles back once the mount has ended. It must not be called while
// requests are served.
func (d *disks) end() {
	d.mu.Lock()
	d.ended = true
	all := d.open
	d.open = map[diskKey]*openDisk{}
	d.mu.Unlock()
	for _, o := range all {
		o.close()
	}
}

// holes answers a handle's questions for the next hole and the next data. They are asked one after the other, so what the
// image said of the range behind one is kept for the next.
type holes struct {
	mu   sync.Mutex
	kept []image.Extent
}

// holeWindow is how much of a disk is asked for at once, in bytes. Extents does a bounded piece of work by itself.
const holeWindow = 1 << 30

// at returns the extent that off is in. It ends at the latest where the window does: the next one may be like it.
func (h *holes) at(img image.Image, off int64) (image.Extent, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, again := range []bool{false, true} {
		if n := len(h.kept); n > 0 && h.kept[0].Off <= off && off < h.kept[n-1].End() {
			return h.kept[findExtent(h.kept, off)], nil
		}
		if again {
			break
		}
		var err error
		if h.kept, err = img.Extents(off, holeWindow); err != nil {
			h.kept = nil
			return image.Extent{}, err
		}
	}
	return image.Extent{}, fmt.Errorf("image does not say what is at %d", off)
}

// findExtent returns the index of the extent that holds off, which must be in one of them.
func findExtent(list []image.Extent, off int64) int {
	lo, hi := 0, len(list)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if list[mid].End() > off {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// seekPatience is for how long a search goes on after a signal came for who waits for it. Most signals are harmless, and
// few programs expect that lseek is interrupted; but a search through a large disk must not outlive a kill by much.
const seekPatience = 3 * time.Second

// seek returns the first offset from off on that is data, or that is a hole. The end of the disk counts as a hole. ok is
// false where there is none: behind the end, and behind the last data.
func (h *holes) seek(ctx context.Context, img image.Image, off int64, data bool) (pos int64, ok bool, err error) {
	began := time.Now()
	size := img.Size()
	if off < 0 || off >= size {
		return 0, false, nil
	}
	for off < size {
		if err := ctx.Err(); err != nil && time.Since(began) > seekPatience {
			return 0, false, err
		}
		e, err := h.at(img, off)
		if err != nil {
			return 0, false, err
		}
		if e.Zero != data {
			return off, true, nil
		}
		off = e.End()
	}
	return size, !data, nil
}
