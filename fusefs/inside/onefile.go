package inside

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// A volume is a file for the loop device: the only one of a FUSE file system that is mounted nowhere.
//
// It is served by a process of its own, that reads nothing through the mount. What waits for a block of a mounted file
// system can't be killed, and keeps all descriptors of its process: if /dev/fuse was among them, the kernel would never give
// up the connection, and the wait would have no end. So a kill ends it, whomever it hits:
//
//   - when the server dies, the kernel gives up the connection, and who waits gets an error;
//   - when its parent dies, which mounts and reads, the server is told (Pdeathsig comes with the end of one thread, others
//     may be waiting) and ends.
//
// A server that is told to end also aborts the connection, where fusectl is mounted: its own end can be held up by what it
// reads from.

// FileFD is the descriptor on which a server passes its mount on.
const FileFD = 3

// endSignal tells a server to end.
const endSignal = unix.SIGUSR1

// File says what the server process of a Kernel is to serve.
type File struct {
	Volume      Volume
	SkipJournal bool   // nothing can be written
	Source      string // the Kernel's
	// Temp is the folder for what a replay writes: into a file without a name.
	Temp string
	Log  logrus.FieldLogger
}

// fileMark begins the file's name, by which loop devices on it are known.
const fileMark = "qmchain "

func fileName(source string) string {
	return fileMark + strings.ReplaceAll(source[:min(len(source), 200)], "/", " ")
}

// maxRequest is the size of the largest request, in bytes: the kernel's limit.
const maxRequest = 1 << 20

// Serve passes the mount on and serves the file until nobody has it open any more, or the parent is gone. Then the process
// must exit.
func (f File) Serve(ctx context.Context) error {
	told := make(chan os.Signal, 1)
	signal.Notify(told, endSignal)
	defer signal.Stop(told)
	temp := f.Temp
	if f.SkipJournal {
		temp = ""
	}
	disk, err := newOverlay(f.Volume.img, temp)
	if err != nil {
		return err
	}
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/fuse: %w", err)
	}
	own, err := unix.FcntlInt(uintptr(device), unix.F_DUPFD_CLOEXEC, 0) // the server closes its own
	if err != nil {
		return fmt.Errorf("/dev/fuse: %w", err)
	}
	mount, err := detached("fuse", map[string]string{
		"source": "qmchain", "fd": strconv.Itoa(device), "rootmode": "40000", "user_id": "0", "group_id": "0", "max_read": strconv.Itoa(maxRequest),
	}, nil)
	if err != nil {
		return fmt.Errorf("FUSE: %w", err)
	}
	logger := log.New(debugWriter{f.Log}, "", 0)
	opts := &fs.Options{
		MountOptions: fuse.MountOptions{
			MaxWrite:      maxRequest,
			DisableSplice: true, // what is read is made of pieces
			Logger:        logger,
		},
		Logger: logger,
	}
	root := &oneFolder{name: fileName(f.Source), disk: disk, log: f.Log}
	server, err := fuse.NewServer(fs.NewNodeFS(root, opts), "/dev/fd/"+strconv.Itoa(device), &opts.MountOptions)
	if err != nil {
		return fmt.Errorf("FUSE: %w", err)
	}
	served := make(chan struct{})
	go func() {
		server.Serve()
		close(served)
	}()
	var st unix.Stat_t
	if err := unix.Fstat(mount, &st); err != nil {
		return fmt.Errorf("FUSE: %w", err)
	}
	err = unix.Sendmsg(FileFD, []byte{0}, unix.UnixRights(mount), nil, unix.MSG_NOSIGNAL)
	_, _ = unix.Close(mount), unix.Close(FileFD)
	if err != nil {
		return fmt.Errorf("pass the mount on: %w", err)
	}
	select {
	case <-served:
		return nil
	case <-told:
	case <-ctx.Done():
	}
	if err := abortConnection(own, unix.Minor(st.Dev)); err != nil {
		f.Log.WithError(err).Debug("the connection can't be aborted")
	}
	return nil
}

// abortConnection makes the kernel give up a connection, so that everything that waits for it gets an error. The number is
// another's as soon as the connection has ended, which the device tells.
func abortConnection(device int, number uint32) error {
	fds := []unix.PollFd{{Fd: int32(device)}}
	if _, err := unix.Poll(fds, 0); err == nil && fds[0].Revents&unix.POLLERR != 0 {
		return nil
	}
	return os.WriteFile(filepath.Join("/sys/fs/fuse/connections", strconv.FormatUint(uint64(number), 10), "abort"), []byte("1"), 0)
}

// oneFile is the file for those who use it, and its server.
type oneFile struct {
	name    string
	mount   int // descriptor of the mount
	server  *os.Process
	aborted atomic.Bool
	ended   chan struct{} // closed when the server has ended
	err     error         // set before: why, if it was not asked to, and the file still had users
}

// startFile starts a server and gets its mount. An *exec.ExitError is in the error if the server ended at once; it has said
// why.
func startFile(ctx context.Context, cmd *exec.Cmd, source string) (*oneFile, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "mount"), os.NewFile(uintptr(pair[1]), "mount")
	defer ours.Close()
	cmd.ExtraFiles = []*os.File{theirs} // the first is FileFD
	// A session of its own: the terminal's signals are for the parent, which may still need it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: endSignal}
	f := &oneFile{name: fileName(source), mount: -1, ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The parent-death signal comes at the end of the thread that made the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		_ = theirs.Close()
		f.server = cmd.Process
		started <- err
		if err != nil {
			return
		}
		if err = cmd.Wait(); err != nil && !f.aborted.Load() {
			f.err = fmt.Errorf("server of the volume: %w", err)
		}
		close(f.ended)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start the server of the volume: %w", err)
	}
	defer context.AfterFunc(ctx, f.abort)()
	if f.mount, err = receive(ctx, ours); err == nil {
		return f, nil
	}
	if !errors.Is(err, io.EOF) {
		f.abort()
	}
	select {
	case <-f.ended:
	case <-time.After(endLimit):
	}
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, io.EOF):
		select {
		case <-f.ended:
			return nil, cmp.Or(f.err, err)
		default:
		}
	}
	return nil, fmt.Errorf("server of the volume: %w", err)
}

// receive gets a descriptor.
func receive(ctx context.Context, from *os.File) (int, error) {
	c, err := net.FileConn(from)
	if err != nil {
		return -1, err
	}
	defer c.Close()
	conn := c.(*net.UnixConn)
	// A server that hangs does not close its end.
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), rights)
	if err != nil {
		return -1, err
	}
	if n == 0 {
		return -1, io.EOF
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil {
		return -1, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// How long a server has to end by itself: when the file has no users any more, which what it reads from can hold up, and
// when it is told to.
const (
	closePatience = 3 * time.Second
	abortPatience = time.Second
)

// end has the file's users let go of it, and aborts it if that takes too long.
func (f *oneFile) end(letGo func()) {
	go letGo() // it can hang itself
	select {
	case <-f.ended:
	case <-time.After(closePatience):
		f.abort()
	}
}

// abort ends the server. Who waits for the file gets an error.
func (f *oneFile) abort() {
	f.aborted.Store(true)
	_ = f.server.Signal(endSignal)
	time.AfterFunc(abortPatience, func() { _ = f.server.Kill() }) // no other process: once it was waited for, nothing is sent
}

type debugWriter struct{ log logrus.FieldLogger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.Debugf("go-fuse: %s", p)
	return len(p), nil
}

// open opens the file.
func (f *oneFile) open(flags int) (int, error) {
	fd, err := unix.Openat(f.mount, f.name, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open the volume: %w", err)
	}
	return fd, nil
}

// detach lets go of the mount.
func (f *oneFile) detach() { _ = unix.Close(f.mount) }

// detached makes a mount that is attached nowhere. The kernel's reasons are in its errors.
func detached(driver string, values map[string]string, flags []string) (int, error) {
	config, err := unix.Fsopen(driver, unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) {
		return -1, fmt.Errorf("the kernel has no file system %s: %w", driver, err)
	}
	if err != nil {
		return -1, fmt.Errorf("file system %s: %w", driver, err)
	}
	defer unix.Close(config)
	fail := func(err error) (int, error) {
		said := make([]byte, 1024)
		if n, _ := unix.Read(config, said); n > 2 { // a letter for the severity, a blank
			return -1, fmt.Errorf("%w: %s", err, printable(string(said[2:n])))
		}
		return -1, err
	}
	for name, value := range values {
		if err := unix.FsconfigSetString(config, name, value); err != nil {
			return fail(fmt.Errorf("option %s=%s: %w", name, value, err))
		}
	}
	for _, name := range flags {
		if err := unix.FsconfigSetFlag(config, name); err != nil {
			return fail(fmt.Errorf("option %s: %w", name, err))
		}
	}
	if err := unix.FsconfigCreate(config); err != nil {
		return fail(err)
	}
	const attrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	mount, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return fail(err)
	}
	return mount, nil
}

// oneFolder is the root.
type oneFolder struct {
	fs.Inode
	name string
	disk *overlay
	log  logrus.FieldLogger
}

var _ fs.NodeOnAdder = (*oneFolder)(nil)

func (x *oneFolder) OnAdd(ctx context.Context) {
	x.AddChild(x.name, x.NewPersistentInode(ctx, &oneDisk{folder: x}, fs.StableAttr{Mode: syscall.S_IFREG}), false)
}

type oneDisk struct {
	fs.Inode
	folder *oneFolder
}

var (
	_ fs.NodeGetattrer = (*oneDisk)(nil)
	_ fs.NodeOpener    = (*oneDisk)(nil)
	_ fs.NodeReader    = (*oneDisk)(nil)
	_ fs.NodeWriter    = (*oneDisk)(nil)
	_ fs.NodeFsyncer   = (*oneDisk)(nil)
)

func (x *oneDisk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = syscall.S_IFREG | 0o600
	out.Size = uint64(x.folder.disk.Size())
	out.Nlink = 1
	return 0
}

// Open: what goes through here is kept by the kernel for the loop device already.
func (x *oneDisk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH, 0
}

func (x *oneDisk) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := x.folder.disk.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		x.folder.log.WithError(err).Error("read of the volume")
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func (x *oneDisk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	n, err := x.folder.disk.WriteAt(data, off)
	switch {
	case errors.Is(err, os.ErrPermission):
		return 0, syscall.EROFS
	case err != nil:
		x.folder.log.WithError(err).Error("replay of the journal")
		return uint32(n), fs.ToErrno(err)
	}
	return uint32(n), 0
}

// Fsync: what is thrown away needs none.
func (x *oneDisk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }
