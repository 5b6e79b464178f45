package fusefs

import (
	"context"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// entries is a folder that is open to be listed. The list is made when the first of it is read.
//
// With the names the kernel takes all that there is to know of each entry (READDIRPLUS), which spares `ls -l` of a thousand
// points a thousand requests. But what it has been told of it remembers for as long as it has room, and so must we: a
// kilobyte of each entry. So of the few files in a point it gets the names alone, and asks for those that are looked at.
// Of a repository with 100,000 points, a program that walks through all of it would else be told of half a million.
type entries struct {
	folder *folder
	list   []fuse.DirEntry
	next   int
}

var (
	_ fs.NodeOpendirHandler = (*folder)(nil)
	_ fs.FileReaddirenter   = (*entries)(nil)
	_ fs.FileSeekdirer      = (*entries)(nil)
	_ fs.FileLookuper       = (*entries)(nil)
)

func (x *folder) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return &entries{folder: x}, 0, 0
}

// Readdirent and all else is called by one at a time.
func (e *entries) Readdirent(ctx context.Context) (*fuse.DirEntry, syscall.Errno) {
	if errno := e.make(ctx); errno != 0 {
		return nil, errno
	}
	if e.next == len(e.list) {
		return nil, 0
	}
	entry := e.list[e.next]
	e.next++
	entry.Off = uint64(e.next)
	return &entry, 0
}

func (e *entries) Seekdir(ctx context.Context, off uint64) syscall.Errno {
	if off == 0 {
		e.list = nil // rewinddir(3): what there is now
	}
	if errno := e.make(ctx); errno != 0 {
		return errno
	}
	if off > uint64(len(e.list)) {
		return syscall.EINVAL
	}
	e.next = int(off)
	return 0
}

func (e *entries) make(ctx context.Context) syscall.Errno {
	if e.list != nil {
		return 0
	}
	nodes, err := e.folder.fsys.catalog.list(ctx, e.folder.n.Place)
	if err != nil {
		return e.folder.errno(err)
	}
	e.list = make([]fuse.DirEntry, 0, len(nodes)+2)
	e.list = append(e.list,
		fuse.DirEntry{Mode: syscall.S_IFDIR, Name: ".", Ino: e.folder.n.Ino},
		fuse.DirEntry{Mode: syscall.S_IFDIR, Name: ".."},
	)
	for _, n := range nodes {
		e.list = append(e.list, fuse.DirEntry{Mode: fileType(n.Kind), Name: n.Name, Ino: n.Ino})
	}
	return 0
}

// Lookup is for READDIRPLUS. The kernel takes no answer for "not told", as the protocol has it.
func (e *entries) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if e.folder.n.Place.Point != "" {
		return nil, syscall.ENOSYS
	}
	return e.folder.Lookup(ctx, name, out)
}
