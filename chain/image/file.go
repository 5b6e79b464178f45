package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// files bounds the number of open files. A file is opened when it is read, and
// closed when another one needs its place and nobody is reading it.
//
// No reader holds more than one file at a time, so waiting for a place can't
// deadlock.
type files struct {
	max int

	mu      sync.Mutex
	changed *sync.Cond   // a file fell idle, was opened or closed
	waiting atomic.Int32 // in changed.Wait, or about to
	open    []*file      // and those that are being opened
	hand    int          // of the clock that picks what to close
}

func newFiles(maxFiles int) *files {
	t := &files{max: maxFiles}
	t.changed = sync.NewCond(&t.mu)
	return t
}

// stamp tells whether a file is still the same, as far as stat can tell.
type stamp struct {
	dev, ino uint64
	size     int64
	mtime    unix.Timespec
}

func stampOf(st *unix.Stat_t) stamp {
	return stamp{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim}
}

// file is an image file of a layer, open or not.
type file struct {
	files *files
	path  string
	name  string // for errors
	stamp stamp

	changing bool // see Layer.Changing

	// verify, if set, looks at a file that was opened again.
	verify func(io.ReaderAt) error

	// turn has room for the one that reads much from the disk, if that is a local one.
	turn  chan struct{}
	local bool // valid while refs >= 0

	// refs is the number of reads in progress, or notOpen.
	refs atomic.Int64
	used atomic.Bool
	slow atomic.Bool // the file system knows no RWF_NOWAIT
	fd   int         // valid while refs >= 0

	listed bool // in files.open; guarded by files.mu
}

const notOpen = -1

// stat returns the stamp of the file that is at path now.
func (t *files) stat(path, name string) (stamp, error) {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Lstat(path, &st) }); err != nil {
		return stamp{}, fmt.Errorf("%s: stat: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return stamp{}, fmt.Errorf("%s: %w", name, ErrNotRegular)
	}
	return stampOf(&st), nil
}

// newFile returns the file at path, not yet open, which must have the stamp.
func (t *files) newFile(path, name string, s stamp) *file {
	f := &file{files: t, path: path, name: name, stamp: s, turn: make(chan struct{}, 1)}
	f.refs.Store(notOpen)
	return f
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	fd, err := f.acquire()
	if err != nil {
		return 0, err
	}
	done := f.takeTurn(fd, p, off)
	n, err := pread(fd, p, off)
	done()
	f.release()
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%s: read at %d: %w", f.name, off, err)
	}
	return n, err
}

const (
	// largeRead is, in bytes, what a reading from the beginning to the end asks for at once; of the usual read-ahead, less.
	largeRead = 128 << 10
	// turnPatience is longer than a read takes, and short beside what a share takes to say that it does not answer.
	turnPatience = 200 * time.Millisecond
)

// takeTurn makes large reads of what is not in the kernel's cache wait for one another, until done is called: the kernel's
// read-ahead follows one reader of a file from the beginning to the end, and has several, as a mount has them, wait for each
// other in its own way, at up to three times the processor. Shares need several at a time. Before Linux 6.5 it can't be told
// what is in the cache, and nobody waits.
func (f *file) takeTurn(fd int, p []byte, off int64) (done func()) {
	done = func() {}
	if len(p) < largeRead || !f.local {
		return done
	}
	var st unix.Cachestat_t
	err := unix.Cachestat(uint(fd), &unix.CachestatRange{Off: uint64(off), Len: uint64(len(p))}, &st, 0)
	if err != nil || st.Cache >= uint64(len(p)/os.Getpagesize()) {
		return done
	}
	timer := time.NewTimer(turnPatience)
	defer timer.Stop()
	select {
	case f.turn <- struct{}{}:
		return func() { <-f.turn }
	case <-timer.C:
		return done
	}
}

// readNow reads what of p is in the kernel's cache, from the beginning of p on, and has
// the kernel read ahead the rest. On file systems that can't do this it reads nothing.
func (f *file) readNow(p []byte, off int64) int {
	if f.slow.Load() {
		return 0
	}
	fd, err := f.acquire()
	if err != nil {
		return 0
	}
	defer f.release()
	n, err := unix.Preadv2(fd, [][]byte{p}, off, unix.RWF_NOWAIT)
	if errors.Is(err, unix.EOPNOTSUPP) {
		f.slow.Store(true)
	}
	return max(0, n)
}

// dup returns the open file, with a descriptor of its own.
func (f *file) dup() (*os.File, error) {
	fd, err := f.acquire()
	if err != nil {
		return nil, err
	}
	defer f.release()
	again, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.name, err)
	}
	return os.NewFile(uintptr(again), f.path), nil
}

// seek returns the next data (unix.SEEK_DATA) or hole (unix.SEEK_HOLE) from off
// on. ok is false where there is no more data.
func (f *file) seek(off int64, whence int) (pos int64, ok bool, err error) {
	fd, err := f.acquire()
	if err != nil {
		return 0, false, err
	}
	defer f.release()
	pos, err = unix.Seek(fd, off, whence)
	if errors.Is(err, unix.ENXIO) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("%s: seek at %d: %w", f.name, off, err)
	}
	return pos, true, nil
}

// acquire returns the open file descriptor, which stays open until release.
func (f *file) acquire() (int, error) {
	for {
		n := f.refs.Load()
		if n < 0 {
			return f.files.reopen(f)
		}
		if f.refs.CompareAndSwap(n, n+1) {
			if !f.used.Load() {
				f.used.Store(true)
			}
			return f.fd, nil
		}
	}
}

func (f *file) release() {
	if f.refs.Add(-1) == 0 && f.files.waiting.Load() > 0 {
		f.files.wake()
	}
}

func (t *files) wake() {
	t.mu.Lock()
	t.changed.Broadcast()
	t.mu.Unlock()
}

// reopen opens f, or waits for who does, and acquires it.
func (t *files) reopen(f *file) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting.Add(1) // before looking at refs: release looks the other way round
	defer t.waiting.Add(-1)
	for {
		if n := f.refs.Load(); n >= 0 {
			if f.refs.CompareAndSwap(n, n+1) {
				return f.fd, nil
			}
			continue
		}
		if !f.listed && (len(t.open) < t.max || t.evict()) {
			break
		}
		t.changed.Wait()
	}
	f.listed = true // holds the place and keeps others from opening f
	t.open = append(t.open, f)
	t.mu.Unlock()
	fd, err := f.openNow()
	t.mu.Lock()
	if err != nil {
		t.unlist(f)
	} else {
		f.fd = fd
		f.refs.Store(1)
		f.used.Store(true)
	}
	t.changed.Broadcast()
	return fd, err
}

// evict closes one idle file and says whether there was one. The caller holds the lock.
func (t *files) evict() bool {
	// Twice around: the first time takes the marks of use away.
	for range 2 * len(t.open) {
		if t.hand >= len(t.open) {
			t.hand = 0
		}
		f := t.open[t.hand]
		if f.used.Swap(false) {
			t.hand++
			continue
		}
		if t.close(f) {
			return true
		}
		t.hand++
	}
	return false
}

// close closes f unless it is being read or not open. The caller holds the lock.
func (t *files) close(f *file) bool {
	if !f.refs.CompareAndSwap(0, notOpen) {
		return false
	}
	_ = unix.Close(f.fd) // nothing was written
	t.unlist(f)
	return true
}

func (t *files) unlist(f *file) {
	f.listed = false
	for i, g := range t.open {
		if g == f {
			last := len(t.open) - 1
			t.open[i] = t.open[last]
			t.open[last] = nil
			t.open = t.open[:last]
			return
		}
	}
}

// forget closes f, which nobody will read any more.
func (t *files) forget(f *file) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.close(f) {
		t.changed.Broadcast()
	}
}

// openNow opens the file and makes sure that it is the one that is expected.
func (f *file) openNow() (int, error) {
	var fd int
	err := retry(func() (err error) {
		// O_NONBLOCK: a FIFO that has come into the file's place must not hang us.
		fd, err = unix.Open(f.path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("%s: open: %w", f.name, err)
	}
	if err := f.same(fd); err != nil {
		_ = unix.Close(fd)
		return 0, fmt.Errorf("%s: %w", f.name, err)
	}
	f.local = IsLocal(fd)
	return fd, nil
}

// IsLocal tells whether an open file is on a file system of this host, as far as those are known.
func IsLocal(fd int) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false
	}
	const zfs = 0x2fc12fc1
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, zfs:
		return true
	}
	return false
}

func (f *file) same(fd int) error {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return ErrNotRegular
	}
	now := stampOf(&st)
	if f.changing && now.dev == f.stamp.dev && now.ino == f.stamp.ino {
		return nil
	}
	if now != f.stamp {
		switch {
		case now.dev != f.stamp.dev || now.ino != f.stamp.ino:
			return fmt.Errorf("%w: another file has taken its place", ErrChanged)
		case now.size != f.stamp.size:
			return fmt.Errorf("%w: %d bytes, %d before", ErrChanged, now.size, f.stamp.size)
		}
		return fmt.Errorf("%w: it was written to", ErrChanged)
	}
	if f.verify == nil {
		return nil
	}
	if err := f.verify(fdReader(fd)); err != nil {
		return fmt.Errorf("%w: %w", ErrChanged, err)
	}
	return nil
}

type fdReader int

func (fd fdReader) ReadAt(p []byte, off int64) (int, error) { return pread(int(fd), p, off) }

// pread reads p whole; io.EOF where the file ends before.
func pread(fd int, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pread(fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		if n == 0 {
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

// retry repeats f while signals interrupt it.
func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
