package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/source"
	"qmchain/fusefs/tree"
)

// errUnmounted is returned when a disk is opened after the mount has ended.
var errUnmounted = errors.New("unmounted")

// disks are the images that are open. All handles of one disk share one image, and all images their pool.
type disks struct {
	catalog *catalog
	options image.PoolOptions
	handles atomic.Int64 // on disks, by those who use the mount

	mu    sync.Mutex
	pool  *image.Pool
	open  map[diskKey]*openDisk
	idle  []*openDisk // those of open that nobody uses, the longest first
	ended bool
	told  map[string]bool // what the log was told of damage

	opened, reopened atomic.Uint64
}

// diskKey is a disk of a point. With the guest: sets beside each other can have points with the same uuid, as copies of one
// another have, and as those of other programs get it from their names.
type diskKey struct{ guest, uuid, disk string }

// openDisk is an image with the number of those who use it; ready is closed when it is open or err is set. It reads like
// the image, and opens that anew when the files that it is made of can't be read any more.
type openDisk struct {
	disks *disks
	place tree.Place
	key   diskKey
	refs  int         // guarded by disks.mu
	timer *time.Timer // that will close it while it is idle; guarded by disks.mu
	ready chan struct{}
	err   error

	now atomic.Pointer[openImage]

	mu       sync.Mutex    // of who opens it anew
	tried    time.Time     // when that was, last
	patience time.Duration // until it is tried again
}

// openImage is an image, the pool that has its files, and the set that it is from.
type openImage struct {
	image.Image
	pool *image.Pool
	set  source.Set
}

func newDisks(c *catalog, options image.PoolOptions) *disks {
	return &disks{catalog: c, options: options, pool: image.NewPool(options), open: map[diskKey]*openDisk{}, told: map[string]bool{}}
}

// acquire opens a disk, or shares it with who has it open. Each call that succeeds needs one of release.
func (d *disks) acquire(p tree.Place, disk string) (*openDisk, error) {
	key := diskKey{p.Guest, p.UUID, disk}
	d.mu.Lock()
	if d.ended {
		d.mu.Unlock()
		return nil, errUnmounted
	}
	o := d.open[key]
	first := o == nil
	if first {
		o = &openDisk{disks: d, place: p, key: key, ready: make(chan struct{})}
		d.open[key] = o
	}
	d.wake(o)
	o.refs++
	pool := d.pool
	d.mu.Unlock()

	if first {
		d.opened.Add(1)
		var img *openImage
		if img, o.err = d.openNow(pool, p, disk); o.err == nil {
			o.now.Store(img)
		}
		close(o.ready)
	}
	<-o.ready
	if o.err != nil {
		d.release(o)
		return nil, o.err
	}
	return o, nil
}

func (d *disks) openNow(pool *image.Pool, p tree.Place, disk string) (*openImage, error) {
	l, point, err := d.catalog.point(p)
	if err != nil {
		return nil, err
	}
	img, err := l.from.OpenDisk(pool, point.Manifest, disk)
	if errors.Is(err, chain.ErrNoPoint) {
		return nil, fmt.Errorf("%w: %w", errGone, err) // since it was listed
	}
	if err != nil {
		return nil, err
	}
	d.tellDamage(l, p, point.Manifest, disk)
	return &openImage{img, pool, l.set}, nil
}

// maxTold bounds of how many disks it is remembered that the log was told of their damage.
const maxTold = 1000

// tellDamage logs what verify has found of a disk that was opened all the same, once: how it is read does not show it.
func (d *disks) tellDamage(l *listing, p tree.Place, m *chain.Manifest, disk string) {
	var text string
	damaged, err := l.damage()
	if found, ok := damaged[m.Ref(disk)]; ok {
		text = fmt.Sprintf("point %s/%s: disk %s may not be what the guest had: %v", p.Guest, p.Point, disk, found)
	}
	if err != nil {
		text = fmt.Sprintf("what verify has found is not known: %v", err)
	}
	d.mu.Lock()
	told := text == "" || d.told[text]
	if len(d.told) >= maxTold {
		clear(d.told)
	}
	if !told {
		d.told[text] = true
	}
	d.mu.Unlock()
	if !told {
		d.catalog.log.WithFields(diskFields(p, disk)).Warn(text)
	}
}

// What nobody uses is kept open for a moment: programs open a disk several times in a row (a file manager, mount(8), a
// script), and to open a long chain takes longer than to read a little of it.
const (
	idleFor = 5 * time.Second
	maxIdle = 4
)

// release gives a disk back; some time after the last one the image is closed.
func (d *disks) release(o *openDisk) {
	d.mu.Lock()
	o.refs--
	var old *openDisk
	if o.refs == 0 && d.open[o.key] == o {
		if img := o.now.Load(); d.ended || img == nil || img.set.Kind() != source.Qmchain {
			delete(d.open, o.key) // others change their images: what is opened is to be looked at again
			old = o
		} else {
			d.idle = append(d.idle, o)
			o.timer = time.AfterFunc(idleFor, func() { d.tire(o) })
			if len(d.idle) > maxIdle {
				old = d.idle[0]
				d.forget(old)
			}
		}
	}
	d.mu.Unlock()
	if old != nil {
		old.close()
	}
}

// tire closes a disk that is still idle.
func (d *disks) tire(o *openDisk) {
	d.mu.Lock()
	idle := slices.Contains(d.idle, o)
	if idle {
		d.forget(o)
	}
	d.mu.Unlock()
	if idle {
		o.close()
	}
}

// forget takes out a disk that is idle, and wake makes it one that is not. The caller holds the lock.
func (d *disks) forget(o *openDisk) {
	d.wake(o)
	delete(d.open, o.key)
}

func (d *disks) wake(o *openDisk) {
	if i := slices.Index(d.idle, o); i >= 0 {
		o.timer.Stop()
		d.idle = slices.Delete(d.idle, i, i+1)
	}
}

func (o *openDisk) close() {
	<-o.ready
	if img := o.now.Load(); img != nil {
		_ = img.Close() // nothing was written; a second Close only says so
	}
}

// inUse is the number of handles.
func (d *disks) inUse() int { return int(d.handles.Load()) }

// count is the number of disks that are in use.
func (d *disks) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open) - len(d.idle)
}

// end closes all images: the kernel does not give handles back once the mount has ended. It must not be called while
// requests are served.
func (d *disks) end() {
	d.mu.Lock()
	d.ended = true
	for len(d.idle) > 0 {
		d.wake(d.idle[0])
	}
	all := d.open
	d.open = map[diskKey]*openDisk{}
	d.mu.Unlock()
	for _, o := range all {
		o.close()
	}
}

// renew returns a pool other than old, for images whose files in old can't be read any more: who opens a file again by its
// name in the same pool gets what the pool has open of it. Those who still use old leave it, one after the other, when they
// find the same.
func (d *disks) renew(old *image.Pool) *image.Pool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pool == old {
		d.pool = image.NewPool(d.options)
	}
	return d.pool
}

// How long a disk that can't be read is not opened anew again: it costs some reads for each layer. Where that works and does
// not help, as with a bad spot of the disk below, the time doubles.
const (
	reopenAgain = 2 * time.Second
	reopenLimit = time.Minute
)

func (o *openDisk) Size() int64 { return o.now.Load().Size() }

func (o *openDisk) ReadAt(p []byte, off int64) (n int, err error) {
	img := o.now.Load()
	n, err = img.ReadAt(p, off)
	if again := o.reopen(img, err); again != nil {
		n, err = again.ReadAt(p, off)
	}
	return n, err
}

func (o *openDisk) Extents(off, length int64) (list []image.Extent, err error) {
	img := o.now.Load()
	list, err = img.Extents(off, length)
	if again := o.reopen(img, err); again != nil {
		list, err = again.Extents(off, length)
	}
	return list, err
}

// reopen opens the disk anew in place of an image that could not be read, if the error is one that this can help against: the
// system has lost the file, as when a share was away. Damage within a file is none. It returns nil, and the image is kept,
// where opening it does not work either: the point may have been removed, and be there only as what is open of it.
func (o *openDisk) reopen(old *openImage, why error) *openImage {
	if why == nil || errors.Is(why, io.EOF) {
		return nil
	}
	var no syscall.Errno
	changed := errors.Is(why, image.ErrChanged)
	if !changed && !errors.As(why, &no) && !errors.Is(why, image.ErrClosed) {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := o.now.Load(); now != old {
		return now // somebody was faster
	}
	clock := o.disks.catalog.now
	since := clock().Sub(o.tried)
	if since < o.patience {
		return nil
	}
	if since > 2*o.patience {
		o.patience = reopenAgain
	}
	o.tried = clock()
	now, err := o.disks.openNow(o.disks.renew(old.pool), o.place, o.key.disk)
	if err != nil {
		return nil
	}
	if changed && now.set == old.set {
		// Not because another mount has other numbers for the same file: it is another one, or was written to.
		_ = now.Close()
		return nil
	}
	o.patience = min(2*o.patience, reopenLimit)
	o.disks.reopened.Add(1)
	o.now.Store(now)
	go old.Close() // when those who read it have found the same
	return now
}

// data is what is shown as one file: a disk, or a part of one.
type data interface {
	io.ReaderAt
	Size() int64
	Extents(off, length int64) ([]image.Extent, error)
}

var (
	_ data = (*openDisk)(nil)
	_ data = section{}
)

// section is a part of a disk, which lies within it.
type section struct {
	disk data
	off  int64
	size int64
}

func (s section) Size() int64 { return s.size }

func (s section) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= s.size {
		return 0, io.EOF
	}
	if left := s.size - off; int64(len(p)) > left {
		n, err := s.disk.ReadAt(p[:left], s.off+off)
		if err == nil {
			err = io.EOF
		}
		return n, err
	}
	return s.disk.ReadAt(p, s.off+off)
}

func (s section) Extents(off, length int64) ([]image.Extent, error) {
	if off < 0 || off >= s.size {
		return nil, nil
	}
	list, err := s.disk.Extents(s.off+off, min(length, s.size-off))
	for i := range list {
		list[i].Off -= s.off
	}
	return list, err
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
func (h *holes) at(img data, off int64) (image.Extent, error) {
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
func (h *holes) seek(ctx context.Context, img data, off int64, isData bool) (pos int64, ok bool, err error) {
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
		if e.Zero != isData {
			return off, true, nil
		}
		off = e.End()
	}
	return size, !isData, nil
}
