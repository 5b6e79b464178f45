package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdfs "io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"qmchain/chain/repo"
	"qmchain/chain/source"
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
	dir     string // where it is mounted
	catalog *catalog
	disks   *disks
	tables  *tables
	stats   *stats
	view    tree.View
	log     *quietLog
}

// errno is what the kernel is told of an error. What the caller can't know the reason of is logged.
func (f *fileSystem) errno(in tree.Place, name string, err error) syscall.Errno {
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
	case errors.Is(err, repo.ErrLocked):
		return syscall.EBUSY // for as long as a merge lasts below which nothing can be read
	case errors.Is(err, source.ErrAway) && f.catalog.home.isAway.Load():
		return syscall.EIO // which the log has been told of, once for all
	}
	f.log.error(placeFields(in), path(in, name)+": "+err.Error())
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
	_ fs.NodeGetxattrer    = (*node)(nil)
	_ fs.NodeListxattrer   = (*node)(nil)
	_ fs.NodeSetxattrer    = (*node)(nil)
	_ fs.NodeRemovexattrer = (*node)(nil)
)

// path is how the log calls the node.
func (x *about) path() string { return path(x.in, x.n.Name) }

func (x *about) errno(err error) syscall.Errno { return x.fsys.errno(x.in, x.n.Name, err) }

// now is the node as it is now.
func (x *about) now(ctx context.Context) (tree.Node, error) {
	if x.n.Ino == tree.RootIno {
		return x.fsys.catalog.root()
	}
	n, err := x.fsys.catalog.find(ctx, x.in, x.n.Name)
	if err == nil && n.Ino == x.n.Ino {
		return n, nil
	}
	if err == nil || errors.Is(err, stdfs.ErrNotExist) {
		err = fmt.Errorf("%s: %w", x.path(), errGone)
	}
	return tree.Node{}, err
}

func (x *node) Getattr(ctx context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n, err := x.now(ctx)
	if err != nil {
		if x.n.Kind == tree.Dir {
			return x.errno(err)
		}
		n = x.n // may still be open, and is read on through what is open
	}
	x.fsys.fillAttr(&out.Attr, n)
	out.SetTimeout(timeout(n))
	return 0
}

// Statfs is that of the file system that the set is on.
func (x *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	var st syscall.Statfs_t
	if _, err := x.fsys.catalog.home.now(); err != nil {
		return x.errno(err)
	}
	if err := syscall.Statfs(x.fsys.catalog.home.dir, &st); err != nil {
		return x.errno(err)
	}
	out.FromStatfsT(&st)
	return 0
}

func (x *node) Getxattr(_ context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	if !strings.HasPrefix(name, "user.") {
		// ls -l asks for access lists and security labels of each file: three requests, until it learns that the whole mount
		// has none.
		return 0, syscall.ENOTSUP
	}
	if !strings.HasPrefix(name, tree.AttributePrefix) {
		return 0, syscall.ENODATA
	}
	list, err := x.fsys.catalog.attributes(x.in, x.n)
	if err != nil {
		return 0, x.errno(err)
	}
	value, ok := list.Get(name)
	if !ok {
		return 0, syscall.ENODATA
	}
	return fit(dest, []byte(value))
}

func (x *node) Listxattr(_ context.Context, dest []byte) (uint32, syscall.Errno) {
	list, err := x.fsys.catalog.attributes(x.in, x.n)
	if err != nil {
		return 0, x.errno(err)
	}
	var names []byte
	for _, a := range list {
		names = append(append(names, a.Name...), 0)
	}
	return fit(dest, names)
}

// fit answers who asks for the size first, with no room at all, and who has not enough, listxattr(2).
func fit(dest, text []byte) (uint32, syscall.Errno) {
	if len(text) > len(dest) {
		return uint32(len(text)), syscall.ERANGE
	}
	return uint32(copy(dest, text)), 0
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

func (f *fileSystem) fillAttr(out *fuse.Attr, n tree.Node) {
	perm := f.view.Perm(n.Kind, n.Perm)
	out.Ino = n.Ino
	out.Size = uint64(n.Size)
	out.Blocks = uint64(n.Blocks)
	// go-fuse puts its own idea of Blocks in the place of ours where this is 0. Nothing else hangs on it.
	out.Blksize = 4096
	out.Mode = fileType(n.Kind) | uint32(perm.Mode.Perm())
	out.Nlink = 1 // of folders too: the count of subfolders is not known, as 1 says to find(1)
	out.Owner = fuse.Owner{Uid: perm.UID, Gid: perm.GID}
	out.SetTimes(&n.Time, &n.Time, &n.Time)
}

// folder is the root, a guest, a point, or the folder with a point's configuration files.
type folder struct{ node }

var (
	_ fs.NodeLookuper  = (*folder)(nil)
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
	if name == statsName && place == (tree.Place{}) {
		return x.lookupStats(ctx, out), 0
	}
	n, err := x.fsys.catalog.find(ctx, place, name)
	if err != nil {
		return nil, x.fsys.errno(place, name, err)
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
	x.fsys.fillAttr(&out.Attr, n)
	out.SetAttrTimeout(timeout(n))
	out.SetEntryTimeout(timeout(n))
	// go-fuse finds a node that it already has by its inode number, and drops this one then.
	return x.NewInode(ctx, child, fs.StableAttr{Mode: fileType(n.Kind), Ino: n.Ino}), 0
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

func (x *link) Readlink(ctx context.Context) ([]byte, syscall.Errno) {
	n, err := x.now(ctx)
	if err != nil {
		return nil, x.errno(err)
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
		return nil, 0, x.errno(err)
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
		return nil, h.node.errno(err)
	}
	h.node.fsys.stats.read(kindFile, n)
	return fuse.ReadResultData(dest[:n]), 0
}

func (h *fileHandle) Release(context.Context) syscall.Errno {
	_ = h.f.Close() // nothing was written
	return 0
}

// disk is a disk of a point, or a partition of one.
type disk struct{ node }

var _ fs.NodeOpener = (*disk)(nil)

func (x *disk) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY || flags&syscall.O_TRUNC != 0 {
		return nil, 0, syscall.EROFS
	}
	x.fsys.disks.handles.Add(1)
	o, err := x.fsys.disks.acquire(x.in, x.n.Disk)
	if err != nil {
		x.fsys.disks.handles.Add(-1)
		if passes(err) {
			return nil, 0, x.errno(err)
		}
		// Also where a layer is missing, which must not look like a disk that isn't there.
		x.complain("can't be opened", err)
		return nil, 0, syscall.EIO
	}
	h := &diskHandle{open: o, data: o, kind: kindDisk, node: x}
	if p := x.n.Partition; p != nil {
		h.data, h.kind = section{o, p.Offset, p.Size}, kindPartition
	} else {
		h.file = o.file()
	}
	flags = fuse.FOPEN_NOFLUSH // there is nothing to flush
	if o.now.Load().set.Kind() == source.Qmchain {
		// What the kernel has of a disk stays right for good: another content would be another point, and inode. Other programs
		// write to their images again, under the same names.
		flags |= fuse.FOPEN_KEEP_CACHE
	}
	return h, flags, 0
}

// passes tells whether a disk can't be opened for a reason that is not its own.
func passes(err error) bool {
	return errors.Is(err, errGone) || errors.Is(err, errUnmounted) || errors.Is(err, source.ErrAway) || errors.Is(err, repo.ErrLocked)
}

func (x *disk) complain(what string, err error) {
	x.fsys.log.error(diskFields(x.in, x.n.Disk), fmt.Sprintf("point %s/%s: disk %s %s: %v", x.in.Guest, x.in.Point, x.n.Disk, what, err))
}

type diskHandle struct {
	open  *openDisk
	data  data // the disk, or the part of it that the node is
	kind  readKind
	node  *disk
	file  *os.File // that the disk is, if the kernel may read that itself
	holes holes
}

var (
	_ fs.FileReader          = (*diskHandle)(nil)
	_ fs.FileLseeker         = (*diskHandle)(nil)
	_ fs.FileReleaser        = (*diskHandle)(nil)
	_ fs.FilePassthroughFder = (*diskHandle)(nil)
)

// Read reads into go-fuse's own buffer, and all of it or nothing: the kernel takes less for the end of the file, and
// would cut it off there. After an error in a long read-ahead it comes back for the page that is needed.
func (h *diskHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := h.data.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, h.errno("can't be read", err)
	}
	h.node.fsys.stats.read(h.kind, n)
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
	pos, ok, err := h.holes.seek(ctx, h.data, int64(min(off, 1<<62)), whence == seekData)
	switch {
	case err != nil:
		return 0, h.errno("can't be looked through for holes", err)
	case !ok:
		return 0, syscall.ENXIO
	}
	return uint64(pos), 0
}

func (h *diskHandle) errno(what string, err error) syscall.Errno {
	if errors.Is(err, context.Canceled) {
		return syscall.EINTR
	}
	h.node.complain(what, err)
	return syscall.EIO
}

// PassthroughFd has the kernel read the file without us, from Linux 6.9 on and as root. Otherwise go-fuse goes on without,
// and says nothing.
func (h *diskHandle) PassthroughFd() (int, bool) {
	if h.file == nil {
		return 0, false
	}
	return int(h.file.Fd()), true
}

func (h *diskHandle) Release(context.Context) syscall.Errno {
	if h.file != nil {
		_ = h.file.Close() // nothing was written
	}
	h.node.fsys.disks.release(h.open)
	h.node.fsys.disks.handles.Add(-1)
	return 0
}
