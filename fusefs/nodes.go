package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdfs "io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/sirupsen/logrus"

	"qmchain/chain/repo"
	"qmchain/fusefs/tree"
)

// How long the kernel may go without asking again.
const (
	// changes is for folders, links and files that are passed through: whether they are there, and what they are like,
	// can change at any time, and is to be seen about a second later. A name that is not there is never kept: the point
	// that a backup has just reported must be found.
	changes = time.Second
	// lasts is for disks. As long as the folder that it is in is there (asked for each second), a disk is; size and time
	// are fixed. What could still change are the rights to its images and the estimate of its blocks.
	lasts = time.Minute
)

// fileSystem is what all nodes share.
type fileSystem struct {
	catalog *catalog
	disks   *disks
	log     logrus.FieldLogger

	mu   sync.Mutex
	said map[string]time.Time // see complain
}

// complainAgain is how long an error that repeats is not logged again: one bad cluster under a program that retries
// must not fill the log.
const complainAgain = time.Minute

func (f *fileSystem) complain(what string, err error) {
	text := what + ": " + err.Error()
	now := time.Now()
	f.mu.Lock()
	last, ok := f.said[text]
	if len(f.said) > 1000 {
		clear(f.said)
	}
	again := !ok || now.Sub(last) > complainAgain
	if again {
		f.said[text] = now
	}
	f.mu.Unlock()
	if again {
		f.log.Error(text)
	}
}

// errno is what the kernel is told of an error. What the caller can't know the reason of is logged.
func (f *fileSystem) errno(what string, err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errGone):
		return syscall.ESTALE // makes the kernel look the path up again
	case errors.Is(err, stdfs.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, errUnmounted):
		return syscall.ENOTCONN
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	}
	f.complain(what, err)
	if errors.Is(err, stdfs.ErrPermission) {
		return syscall.EACCES
	}
	return syscall.EIO
}

// path is how the log calls something in the tree.
func path(p tree.Place, name string) string {
	s := "/" + p.Guest
	if p.Point != "" {
		s += "/" + string(p.Point)
	}
	if p.Files {
		s += "/" + tree.FilesFolder
	}
	if name != "" && p.Guest != "" {
		s += "/"
	}
	return s + name
}

// node is what all kinds of nodes have in common.
type node struct {
	fs.Inode
	about
}

type about struct {
	fsys *fileSystem
	in   tree.Place // the folder that it is in
	n    tree.Node  // as it was when it was first looked up
}

var (
	_ fs.NodeGetattrer     = (*node)(nil)
	_ fs.NodeStatfser      = (*node)(nil)
	_ fs.NodeSetattrer     = (*node)(nil)
	_ fs.NodeSetxattrer    = (*node)(nil)
	_ fs.NodeRemovexattrer = (*node)(nil)
)

// path is how the log calls the node.
func (x *about) path() string { return path(x.in, x.n.Name) }

// now is the node as it is now.
func (x *about) now() (tree.Node, error) {
	if x.n.Ino == tree.RootIno {
		return x.fsys.catalog.root()
	}
	n, err := x.fsys.catalog.find(x.in, x.n.Name)
	if err == nil && n.Ino == x.n.Ino {
		return n, nil
	}
	if err == nil || errors.Is(err, stdfs.ErrNotExist) {
		err = fmt.Errorf("%s: %w", x.path(), errGone)
	}
	return tree.Node{}, err
}

func (x *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n, err := x.now()
	if err != nil {
		if x.n.Kind == tree.Dir {
			return x.fsys.errno(x.path(), err)
		}
		n = x.n // may still be open, and is read on through what is open
	}
	fillAttr(&out.Attr, n)
	out.SetTimeout(timeout(n))
	return 0
}

// Statfs is that of the file system that the set is on.
func (x *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	var st syscall.Statfs_t
	if err := syscall.Statfs(x.fsys.catalog.set.Dir(), &st); err != nil {
		return x.fsys.errno(x.fsys.catalog.set.Dir(), err)
	}
	out.FromStatfsT(&st)
	return 0
}

// The mount is read-only, so the kernel refuses what follows by itself, until somebody remounts it. go-fuse's own answers
// are not EROFS, and for some of them not even errors.

func (x *node) Setattr(context.Context, fs.FileHandle, *fuse.SetAttrIn, *fuse.AttrOut) syscall.Errno {
	return syscall.EROFS
}

func (x *node) Setxattr(context.Context, string, []byte, uint32) syscall.Errno { return syscall.EROFS }

func (x *node) Removexattr(context.Context, string) syscall.Errno { return syscall.EROFS }

func timeout(n tree.Node) time.Duration {
	if n.Kind == tree.Disk {
		return lasts
	}
	return changes
}

func fileType(k tree.Kind) uint32 {
	switch k {
	case tree.Dir:
		return syscall.S_IFDIR
	case tree.Link:
		return syscall.S_IFLNK
	}
	return syscall.S_IFREG
}

func fillAttr(out *fuse.Attr, n tree.Node) {
	out.Ino = n.Ino
	out.Size = uint64(n.Size)
	out.Blocks = uint64(n.Blocks)
	// go-fuse puts its own idea of Blocks in the place of ours where this is 0. Nothing else hangs on it.
	out.Blksize = 4096
	out.Mode = fileType(n.Kind) | uint32(n.Mode.Perm())
	out.Nlink = 1 // of folders too: the count of subfolders is not known, as 1 says to find(1)
	out.Owner = fuse.Owner{Uid: n.UID, Gid: n.GID}
	out.SetTimes(&n.Time, &n.Time, &n.Time)
}

// folder is the root, a guest, a point, or the folder with a point's configuration files.
type folder struct{ node }

var (
	_ fs.NodeLookuper  = (*folder)(nil)
	_ fs.NodeReaddirer = (*folder)(nil)
	_ fs.NodeCreater   = (*folder)(nil)
	_ fs.NodeTmpfiler  = (*folder)(nil)
	_ fs.NodeMkdirer   = (*folder)(nil)
	_ fs.NodeMknoder   = (*folder)(nil)
	_ fs.NodeLinker    = (*folder)(nil)
	_ fs.NodeSymlinker = (*folder)(nil)
	_ fs.NodeUnlinker  = (*folder)(nil)
	_ fs.NodeRmdirer   = (*folder)(nil)
	_ fs.NodeRenamer   = (*folder)(nil)
)

func (x *folder) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	place := x.n.Place
	n, err := x.fsys.catalog.find(place, name)
	if err != nil {
		return nil, x.fsys.errno(path(place, name), err)
	}
	base := about{x.fsys, place, n}
	var child fs.InodeEmbedder
	switch n.Kind {
	case tree.Dir:
		child = &folder{node{about: base}}
	case tree.Link:
		child = &link{node{about: base}}
	case tree.Disk:
		child = &disk{node{about: base}}
	default:
		child = &file{node{about: base}}
	}
	fillAttr(&out.Attr, n)
	out.SetAttrTimeout(timeout(n))
	out.SetEntryTimeout(timeout(n))
	// go-fuse finds a node that it already has by its inode number, and drops this one then.
	return x.NewInode(ctx, child, fs.StableAttr{Mode: fileType(n.Kind), Ino: n.Ino}), 0
}

func (x *folder) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	nodes, err := x.fsys.catalog.list(x.n.Place)
	if err != nil {
		return nil, x.fsys.errno(x.path(), err)
	}
	entries := make([]fuse.DirEntry, 0, len(nodes)+2)
	entries = append(entries,
		fuse.DirEntry{Mode: syscall.S_IFDIR, Name: ".", Ino: x.n.Ino},
		fuse.DirEntry{Mode: syscall.S_IFDIR, Name: ".."},
	)
	for _, n := range nodes {
		entries = append(entries, fuse.DirEntry{Mode: fileType(n.Kind), Name: n.Name, Ino: n.Ino})
	}
	return fs.NewListDirStream(entries), 0
}

func (x *folder) Create(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EROFS
}

func (x *folder) Tmpfile(context.Context, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EROFS
}

func (x *folder) Mkdir(context.Context, string, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

func (x *folder) Mknod(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

func (x *folder) Link(context.Context, fs.InodeEmbedder, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

func (x *folder) Symlink(context.Context, string, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

func (x *folder) Unlink(context.Context, string) syscall.Errno { return syscall.EROFS }
func (x *folder) Rmdir(context.Context, string) syscall.Errno  { return syscall.EROFS }
func (x *folder) Rename(context.Context, string, fs.InodeEmbedder, string, uint32) syscall.Errno {
	return syscall.EROFS
}

// link is a symbolic link.
type link struct{ node }

var _ fs.NodeReadlinker = (*link)(nil)

func (x *link) Readlink(context.Context) ([]byte, syscall.Errno) {
	n, err := x.now()
	if err != nil {
		return nil, x.fsys.errno(x.path(), err)
	}
	return []byte(n.Target), 0
}

// file is a file of the set, passed through.
type file struct{ node }

var _ fs.NodeOpener = (*file)(nil)

func (x *file) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY || flags&syscall.O_TRUNC != 0 {
		return nil, 0, syscall.EROFS
	}
	f, err := x.open()
	if err != nil {
		return nil, 0, x.fsys.errno(x.path(), err)
	}
	// The kernel's cache is not kept: a manifest can be written again, with a note for one.
	return &fileHandle{f, x}, fuse.FOPEN_NOFLUSH, 0
}

// open opens the file. No symbolic link leads it out of the point's folder.
func (x *file) open() (*os.File, error) {
	l, point, err := x.fsys.catalog.point(x.in)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(l.from.Folder(point.Manifest))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := root.OpenFile(x.n.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // O_NONBLOCK: a FIFO must not hang us
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		_ = f.Close()
		return nil, fmt.Errorf("%s is not a regular file", x.n.Path)
	}
	return f, nil
}

type fileHandle struct {
	f    *os.File
	node *file
}

var (
	_ fs.FileReader   = (*fileHandle)(nil)
	_ fs.FileReleaser = (*fileHandle)(nil)
)

func (h *fileHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := h.f.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, h.node.fsys.errno(h.node.path(), err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func (h *fileHandle) Release(context.Context) syscall.Errno {
	_ = h.f.Close() // nothing was written
	return 0
}

// disk is a disk of a point.
type disk struct{ node }

var _ fs.NodeOpener = (*disk)(nil)

func (x *disk) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY || flags&syscall.O_TRUNC != 0 {
		return nil, 0, syscall.EROFS
	}
	o, err := x.fsys.disks.acquire(x.in, x.n.Disk)
	if errors.Is(err, repo.ErrLocked) {
		return nil, 0, syscall.EBUSY // for as long as a merge lasts below which nothing can be read
	}
	if err != nil {
		if !errors.Is(err, errGone) && !errors.Is(err, errUnmounted) {
			// Also where a layer is missing, which must not look like a disk that isn't there.
			x.fsys.complain(fmt.Sprintf("point %s/%s: disk %s can't be opened", x.in.Guest, x.in.Point, x.n.Disk), err)
			return nil, 0, syscall.EIO
		}
		return nil, 0, x.fsys.errno(x.path(), err)
	}
	// What the kernel has of a disk stays right for good: another content would be another point, and inode. There is
	// nothing to flush.
	return &diskHandle{open: o, node: x}, fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH, 0
}

type diskHandle struct {
	open  *openDisk
	node  *disk
	holes holes
}

var (
	_ fs.FileReader   = (*diskHandle)(nil)
	_ fs.FileLseeker  = (*diskHandle)(nil)
	_ fs.FileReleaser = (*diskHandle)(nil)
)

// Read reads into go-fuse's own buffer, and all of it or nothing: the kernel takes less for the end of the file, and
// would cut it off there. After an error in a long read-ahead it comes back for the page that is needed.
func (h *diskHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := h.open.img.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, h.errno("read", err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

const (
	seekData = 3 // lseek(2)
	seekHole = 4
)

func (h *diskHandle) Lseek(ctx context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	if whence != seekData && whence != seekHole {
		return 0, syscall.EINVAL
	}
	pos, ok, err := h.holes.seek(ctx, h.open.img, int64(min(off, 1<<62)), whence == seekData)
	switch {
	case err != nil:
		return 0, h.errno("find holes", err)
	case !ok:
		return 0, syscall.ENXIO
	}
	return uint64(pos), 0
}

func (h *diskHandle) errno(what string, err error) syscall.Errno {
	if errors.Is(err, context.Canceled) {
		return syscall.EINTR
	}
	h.node.fsys.complain(fmt.Sprintf("point %s/%s: disk %s: %s", h.node.in.Guest, h.node.in.Point, h.node.n.Disk, what), err)
	return syscall.EIO
}

func (h *diskHandle) Release(context.Context) syscall.Errno {
	h.node.fsys.disks.release(h.open)
	return 0
}
