package inside

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// oneFile is a FUSE file system of one file, the volume, which is mounted nowhere. It ends when detach was called and nobody
// has the file open.
type oneFile struct {
	name   string
	mount  int           // descriptor of the mount
	served chan struct{} // closed when it has ended
}

// fileMark begins the file's name, by which loop devices on it are known.
const fileMark = "qmchain "

// maxRequest is the size of the largest request, in bytes: the kernel's limit.
const maxRequest = 1 << 20

// serveOneFile makes the mount.
func serveOneFile(o *overlay, source string, logger logrus.FieldLogger) (*oneFile, error) {
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	mount, err := detached("fuse", map[string]string{
		"source": "qmchain", "fd": strconv.Itoa(device), "rootmode": "40000", "user_id": "0", "group_id": "0", "max_read": strconv.Itoa(maxRequest),
	}, nil)
	if err != nil {
		_ = unix.Close(device)
		return nil, fmt.Errorf("FUSE: %w", err)
	}
	f := &oneFile{name: fileMark + strings.ReplaceAll(source[:min(len(source), 200)], "/", " "), mount: mount, served: make(chan struct{})}
	opts := &fs.Options{
		MountOptions: fuse.MountOptions{
			MaxWrite:      maxRequest,
			DisableSplice: true, // what is read is made of pieces
			Logger:        log.New(debugWriter{logger}, "", 0),
		},
		Logger: log.New(debugWriter{logger}, "", 0),
	}
	server, err := fuse.NewServer(fs.NewNodeFS(&oneFolder{name: f.name, disk: o, log: logger}, opts), "/dev/fd/"+strconv.Itoa(device), &opts.MountOptions)
	if err != nil {
		_ = unix.Close(mount)
		return nil, fmt.Errorf("FUSE: %w", err) // device was closed
	}
	go func() {
		server.Serve()
		close(f.served)
	}()
	return f, nil
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
