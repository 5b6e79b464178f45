package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain/image"
	"qmchain/chain/source"
	"qmchain/fusefs/tree"
	"qmchain/internal/mountinfo"
)

// Errors of Mount and Unmount.
var (
	// ErrNoFUSE: the kernel has no FUSE, or this user may not use it.
	ErrNoFUSE = errors.New("FUSE can't be used")
	// ErrMounted: there is a mount of a set already.
	ErrMounted = errors.New("already mounted")
	// ErrStale: there is a mount whose server is gone, and it can't be taken away: it is another program's, or another user's.
	ErrStale = errors.New("a mount without a server is left there")
	// ErrNested: the set and the mount point are within one another: reading the one would need the other.
	ErrNested = errors.New("what is to be mounted and the mount point are within one another")
	// ErrBusy: a file of the mount is in use.
	ErrBusy = errors.New("in use")
	// ErrHangs: the mount has ended, but a read of the set has not returned. Only the end of the process ends it.
	ErrHangs = errors.New("a read of the backups hangs")
)

// Options say what to mount and where.
type Options struct {
	// Set is what to mount. It must stay open until the mount has ended.
	Set source.Set
	// Dir is the mount point.
	Dir string
	// AllowOther lets other users than the one who mounts in, as far as the modes of the set's files do.
	AllowOther bool
	// View changes the owners and modes that are shown, and with them who may read what.
	View tree.View
	// Pool bounds what open images use. Zero values are its own defaults, but for the number of open files, which is then
	// taken from what the process may have.
	Pool image.PoolOptions
	Log  logrus.FieldLogger
	// Debug logs every request.
	Debug bool
}

// What the kernel is asked for.
const (
	// mountFlags: nothing is written, and nothing in a disk image is a program, a device or set-uid on this host.
	mountFlags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	// maxRead is the size of the largest request, in bytes. 1 MiB is the most that the kernel does; each request is a
	// turn through the kernel and back, so fewer are better.
	maxRead = 1 << 20
	// maxBackground is how many read-ahead and asynchronous requests may be under way. The kernel's 12 are less than four
	// streams of readAheadKB, and less than one program's queue of asynchronous reads; four streams were seen to gain a
	// tenth, 16 reads of 64 KiB at a time a third.
	maxBackground = 64
	// readAheadKB is how far the kernel reads ahead, in KiB. Its default for a FUSE mount, 128, limits each request to
	// that and leaves nothing to do in parallel: sequential reading was seen to take a quarter more time, up to twice as
	// much, and a third more of the processor. More than 4096 was seen to gain nothing.
	readAheadKB = 4096
)

// fuseOptions are the options that mount(2) and fusermount3 share.
func fuseOptions(allowOther bool) []string {
	o := []string{
		// The kernel checks modes and owners; without it everyone who gets in may read everything.
		"default_permissions",
		// Must be what go-fuse is told as MaxWrite.
		"max_read=" + strconv.Itoa(maxRead),
	}
	if allowOther {
		o = append(o, "allow_other")
	}
	return o
}

// How long things may take.
const (
	// lockLimit is for another server at the same place to end, right after its unmount.
	lockLimit = 5 * time.Second
	// answerLimit is for the first answer: it needs one look at the set's folder.
	answerLimit = 30 * time.Second
	// busyLimit is how long Unmount waits for files that are in use.
	busyLimit = 3 * time.Second
	// endLimit is how long requests that are being served may take to return once the kernel has ended the mount.
	endLimit = 3 * time.Second
	// watchEvery is how often the watch looks at the device. A change of the mounts wakes it at once.
	watchEvery = time.Second
)

// Mounted is a mount that is being served.
type Mounted struct {
	dir   string
	entry mountinfo.Entry // as it was made
	log   logrus.FieldLogger
	fsys  *fileSystem
	place *os.File // the folder under the mount, locked
	fdMu  sync.Mutex
	fd    int // our own descriptor of the device, to ask whether the mount still lives; -1 in the end

	served chan struct{} // closed when go-fuse has ended: no request is being served
	gone   chan struct{} // closed when the mount has ended, whether all requests have returned or not
	ending atomic.Bool   // Unmount was called
	once   sync.Once
	err    error // set before gone is closed
}

// Dir is the mount point, without symbolic links.
func (m *Mounted) Dir() string { return m.dir }

// Mount mounts a set and serves it until the mount ends, however that comes: Unmount, umount(8) by somebody else,
// or an abort by the kernel. ctx is for the making of the mount only. It wraps ErrNoFUSE, ErrMounted, ErrStale, ErrNested,
// fs.ErrNotExist, or what the system says of the mount point.
func Mount(ctx context.Context, o Options) (*Mounted, error) {
	dir, err := clearMountPoint(ctx, o.Dir, o.Log)
	if err != nil {
		return nil, err
	}
	if err := checkNesting(o.Set.Dir(), dir); err != nil {
		return nil, err
	}
	place, err := takePlace(ctx, dir)
	if err != nil {
		return nil, err
	}
	if names, err := place.Readdirnames(1); err == nil && len(names) > 0 {
		// Often on purpose: a file that shows that nothing is mounted.
		o.Log.Warnf("mount point %s is not empty: what is in it is hidden as long as the backups are mounted", dir)
	}
	if o.Pool.MaxFiles == 0 {
		o.Pool.MaxFiles = maxFiles()
	}
	m := &Mounted{dir: dir, log: o.Log, place: place, served: make(chan struct{}), gone: make(chan struct{})}
	m.fsys = newFileSystem(dir, o, time.Now)
	if err := m.start(ctx, o); err != nil {
		m.fsys.tables.end(0)
		_ = place.Close()
		return nil, err
	}
	return m, nil
}

func newFileSystem(dir string, o Options, now func() time.Time) *fileSystem {
	f := &fileSystem{dir: dir, view: o.View, stats: newStats(now()), log: newQuietLog(o.Log, now)}
	f.catalog = newCatalog(o.Set, o.Log, now)
	f.disks = newDisks(f.catalog, o.Pool)
	f.tables = newTables(f.disks, f.log, now)
	f.catalog.partitions = f.tables.of
	return f
}

// end closes what is open, once no request is served any more. It reports whether all of it could be closed: what hangs in
// a read can't.
func (f *fileSystem) end() bool {
	if !f.tables.end(endLimit) {
		return false
	}
	f.disks.end()
	f.catalog.home.end()
	return true
}

// mostFiles is how many image files may be open at a time: a chain of a year's days in each of ten points read at once.
const mostFiles = 4096

// maxFiles is mostFiles, or half of what the process may open if that is less. The more, the better: an image whose place
// another one needs is closed, to be opened again by its path, and a point that was removed has none.
func maxFiles() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0 // the pool's default
	}
	return int(min(limit.Cur/2, mostFiles))
}

// start makes the mount and sees that it answers.
func (m *Mounted) start(ctx context.Context, o Options) error {
	fd, err := device(ctx, m.dir, o.Set.Dir(), o.AllowOther)
	if err != nil {
		return err
	}
	if m.fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		_ = unix.Close(fd)
		m.abandon()
		return fmt.Errorf("%s: %w", deviceFile, err)
	}
	err = m.serve(fd, o)
	if err == nil {
		err = m.identify()
	}
	if err != nil {
		m.closeFD()
		m.abandon()
		return err
	}
	go m.watch()
	if err := m.settle(ctx); err != nil {
		m.stop(err)
		return err
	}
	return nil
}

// serve starts go-fuse.
func (m *Mounted) serve(fd int, o Options) error {
	root, err := m.fsys.catalog.root()
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	opts := &fs.Options{
		MountOptions: fuse.MountOptions{
			// Nothing is ever written, but this also sets the size of reads.
			MaxWrite:      maxRead,
			MaxBackground: maxBackground,
			// Asynchronous reads (SyncRead is not set): what is read ahead goes to several processors.
			//
			// What go-fuse could splice is a range of one file; a reply here is bytes of several. Without this it would
			// set up a pipe for each of them, only to find that out: small reads were seen to take twice the processor's
			// time. A vector (ReadResultVector) avoids that as well, and was as fast. Ranges of several files gathered in a pipe
			// (ReadResultPipe) were seen to take no less of the processor than reading and writing them.
			DisableSplice: true,
			Debug:         o.Debug,
			Logger:        log.New(logWriter{o.Log}, "", 0),
			PanicHandler: func(p any) fuse.Status {
				o.Log.Errorf("defect in a file system request: %v", p)
				return fuse.EIO
			},
		},
		// A mode of 0 means nobody, and not go-fuse's default.
		NullPermissions: true,
		RootStableAttr:  &fs.StableAttr{Ino: tree.RootIno},
		Logger:          log.New(logWriter{o.Log}, "", 0),
		// Time-outs are set with each answer (see changes and lasts); none for names that are not there.
	}
	raw := fs.NewNodeFS(&folder{node{about: about{fsys: m.fsys, n: root}}}, opts)
	// go-fuse takes this name for a mount that is made already.
	server, err := fuse.NewServer(counted{raw, m.fsys.stats}, "/dev/fd/"+strconv.Itoa(fd), &opts.MountOptions)
	if err != nil {
		return fmt.Errorf("FUSE: %w", err) // fd was closed
	}
	allowWaiting()
	go func() {
		server.Serve()
		close(m.served)
	}()
	return nil
}

// callsAtATime is how many system calls may be under way before Go's scheduler has to look for those that only wait.
const callsAtATime = 8

// allowWaiting raises GOMAXPROCS, for the whole process. Nearly all that a server does is system calls, each of which Go
// takes to keep a processor busy until a timer finds that it waits. With no more of Go's processors than there are real
// ones, the kernel's next request waits for that timer; on two processors, reads of 4 KiB one at a time were seen to take a
// third more time, 16 at a time from a cold cache a half, and long reads a fifth.
func allowWaiting() {
	if runtime.GOMAXPROCS(0) < callsAtATime {
		runtime.GOMAXPROCS(callsAtATime)
	}
}

// logWriter takes go-fuse's own messages.
type logWriter struct{ log logrus.FieldLogger }

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Debugf("go-fuse: %s", p)
	return len(p), nil
}

// abandon takes a mount away that nobody serves.
func (m *Mounted) abandon() {
	if err := unmountAt(context.Background(), m.dir, true, true); err != nil {
		m.log.WithError(err).Warn("mount is left without a server")
	}
}

// identify finds out which mount ours is.
func (m *Mounted) identify() error {
	mounts, err := mountinfo.Read()
	if err != nil {
		return err
	}
	entry, ok := mountinfo.Top(mounts, m.dir)
	if !ok || entry.Type != fsType {
		return fmt.Errorf("mount %s: it was taken away at once", m.dir)
	}
	m.entry = entry
	m.setReadAhead()
	return nil
}

// settle waits for the first answer.
func (m *Mounted) settle(ctx context.Context) error {
	answered := make(chan error, 1)
	go func() { answered <- firstAnswer(m.dir) }()
	select {
	case err := <-answered:
		if err != nil {
			return fmt.Errorf("mount %s does not answer: %w", m.dir, err)
		}
		return nil
	case <-time.After(answerLimit):
		return fmt.Errorf("mount %s does not answer within %s", m.dir, answerLimit)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// firstAnswer opens the file that go-fuse has in every mount for this, and polls it. go-fuse's answer makes the kernel
// never poll files of this mount again; otherwise a Go program that serves and reads one mount, as a test does, can block
// all its processors in the runtime's own poller.
func firstAnswer(dir string) error {
	fd, err := unix.Open(filepath.Join(dir, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return unix.Close(fd)
}

// setReadAhead raises the mount's read-ahead. Only root may, and only through sysfs: what is agreed on with the kernel at
// the mount can lower it, not raise it.
func (m *Mounted) setReadAhead() {
	path := "/sys/class/bdi/" + m.entry.Device + "/read_ahead_kb"
	if err := os.WriteFile(path, []byte(strconv.Itoa(readAheadKB)), 0); err != nil {
		m.log.WithError(err).Debug("read-ahead stays at the kernel's default, sequential reads are slower")
	}
}

// maxStale is how many dead mounts on one another are taken away, as they come of starting a server that dies over and over.
const maxStale = 16

// clearMountPoint returns the mount point's path without symbolic links. What servers of this program have left there that
// were killed is taken away: it answers nobody, and in fstab nobody would be there to do it.
func clearMountPoint(ctx context.Context, dir string, log logrus.FieldLogger) (string, error) {
	for tries := 0; ; tries++ {
		path, err := checkMountPoint(ctx, dir)
		if !errors.Is(err, ErrStale) || path == "" || tries == maxStale {
			return path, err
		}
		if unmountErr := unmountAt(ctx, path, true, false); unmountErr != nil {
			return "", fmt.Errorf("%w: %w", err, unmountErr)
		}
		log.Warnf("%s: a mount whose server had died was there, and is taken away", path)
	}
}

// checkMountPoint returns the mount point's path without symbolic links. It does so with ErrStale, too, if the mount is one
// of this program's.
func checkMountPoint(ctx context.Context, dir string) (string, error) {
	mounts, err := mountinfo.Read()
	if err != nil {
		return "", err
	}
	path, err := mountPath(mounts, dir)
	if err != nil {
		return "", fmt.Errorf("mount point: %w", err)
	}
	if top, ok := mountinfo.Top(mounts, path); ok && top.Type == fsType {
		if answers(ctx, path) {
			return "", fmt.Errorf("%s: %w (%s)", path, ErrMounted, top.Source)
		}
		return path, fmt.Errorf("%s: %w", path, ErrStale)
	}
	info, err := os.Stat(path)
	if errors.Is(err, unix.ENOTCONN) {
		return "", fmt.Errorf("%s: %w", path, ErrStale)
	}
	if err != nil {
		return "", fmt.Errorf("mount point: %w", err)
	}
	if !info.IsDir() {
		return "", fmt.Errorf("mount point %s: %w", path, unix.ENOTDIR)
	}
	return path, nil
}

// mountPath returns the path by which mountinfo knows dir. It does not look at dir itself if that is a mount point: that
// could be a mount whose server does not answer.
func mountPath(mounts []mountinfo.Entry, dir string) (string, error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	if path != "/" {
		path = filepath.Join(parent, filepath.Base(path))
	}
	if _, ok := mountinfo.Top(mounts, path); ok {
		return path, nil
	}
	return filepath.EvalSymlinks(path)
}

// answers reports whether a file system answers soon.
func answers(ctx context.Context, path string) bool {
	answered := make(chan bool, 1)
	go func() {
		_, err := os.Stat(path)
		answered <- !errors.Is(err, unix.ENOTCONN)
	}()
	select {
	case ok := <-answered:
		return ok
	case <-time.After(2 * time.Second):
		return true // slow, but there
	case <-ctx.Done():
		return true
	}
}

// checkNesting refuses what would make the server wait for itself.
func checkNesting(set, dir string) error {
	set, err := filepath.EvalSymlinks(set)
	if err != nil {
		return err
	}
	for _, pair := range [][2]string{{set, dir}, {dir, set}} {
		outer, err := os.Stat(pair[0])
		if err != nil {
			return err
		}
		for path := pair[1]; ; path = filepath.Dir(path) {
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			if os.SameFile(outer, info) {
				return fmt.Errorf("%s, %s: %w", set, dir, ErrNested)
			}
			if path == "/" {
				break
			}
		}
	}
	return nil
}

// takePlace locks the mount point and sees that it is still free: another server may have mounted there between our look
// and our lock, which is then one on the other's root. When that goes, ours must be on the folder below.
func takePlace(ctx context.Context, dir string) (*os.File, error) {
	for {
		place, err := lockPlace(ctx, dir, lockLimit)
		if err != nil {
			return nil, err
		}
		if _, err := checkMountPoint(ctx, dir); err != nil {
			_ = place.Close()
			return nil, err
		}
		locked, err := place.Stat()
		if err == nil {
			var now os.FileInfo
			if now, err = os.Stat(dir); err == nil && os.SameFile(locked, now) {
				return place, nil
			}
		}
		_ = place.Close()
		if err != nil && !errors.Is(err, unix.ENOTCONN) {
			return nil, fmt.Errorf("mount point: %w", err)
		}
	}
}

// lockPlace opens and locks the folder that is to be mounted on. The lock keeps two servers from the same place, and is how
// Unmount tells when one has ended: the kernel gives it back when the process is gone, however that came.
func lockPlace(ctx context.Context, dir string, limit time.Duration) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("mount point: %w", err)
	}
	deadline := time.Now().Add(limit)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case err != unix.EWOULDBLOCK && err != unix.EINTR:
			return f, nil // some file systems have no locks on folders
		case time.Now().After(deadline):
			_ = f.Close()
			return nil, fmt.Errorf("%s: another process holds a lock on it, most likely another server's: %w", dir, ErrMounted)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
