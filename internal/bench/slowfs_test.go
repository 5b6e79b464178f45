package bench

import (
	"context"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// line is a line to a slow storage: what is sent goes one after the other.
type line struct {
	rate int64 // bytes per second

	mu   sync.Mutex
	free time.Time // when the last of what was sent will be through
	sent int64     // bytes
}

// send returns when n more bytes are through.
func (l *line) send(n int) {
	l.mu.Lock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(n) * time.Second / time.Duration(l.rate))
	through := l.free
	l.sent += int64(n)
	l.mu.Unlock()
	time.Sleep(time.Until(through))
}

func (l *line) total() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

// slowMount mounts a folder of its own as a file system on which writes take their time. The kernel does not cache them:
// each write(2) waits. It is unmounted when the benchmark ends.
func slowMount(b *testing.B, rate int64) (dir string, l *line) {
	b.Helper()
	inner, err := fs.NewLoopbackRoot(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	dir, l = b.TempDir(), &line{rate: rate}
	loopback := inner.(*fs.LoopbackNode)
	root := &slowNode{loopback, l}
	loopback.RootData.RootNode = root
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{FsName: "qmchain-bench", Name: "slow", DirectMount: true},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			b.Errorf("%s: %v", dir, err)
		}
	})
	return dir, l
}

type slowNode struct {
	*fs.LoopbackNode
	line *line
}

var (
	_ fs.NodeWrapChilder = (*slowNode)(nil)
	_ fs.NodeOpener      = (*slowNode)(nil)
	_ fs.NodeCreater     = (*slowNode)(nil)
)

func (n *slowNode) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &slowNode{ops.(*fs.LoopbackNode), n.line}
}

func (n *slowNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f, fuseFlags, errno := n.LoopbackNode.Open(ctx, flags)
	return n.slow(f), fuseFlags, errno
}

func (n *slowNode) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	inode, f, fuseFlags, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	return inode, n.slow(f), fuseFlags, errno
}

// slow wraps a file, and what is nil because of an error stays so.
func (n *slowNode) slow(f fs.FileHandle) fs.FileHandle {
	if file, ok := f.(*fs.LoopbackFile); ok {
		return &slowFile{file, n.line}
	}
	return f
}

type slowFile struct {
	*fs.LoopbackFile
	line *line
}

var (
	_ fs.FileWriter          = (*slowFile)(nil)
	_ fs.FileAllocater       = (*slowFile)(nil)
	_ fs.FilePassthroughFder = (*slowFile)(nil)
)

func (f *slowFile) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	f.line.send(len(data))
	return f.LoopbackFile.Write(ctx, data, off)
}

// Allocate, which zeroing is too, sends a request without data.
func (f *slowFile) Allocate(ctx context.Context, off, size uint64, mode uint32) syscall.Errno {
	f.line.send(4096)
	return f.LoopbackFile.Allocate(ctx, off, size, mode)
}

// PassthroughFd keeps the kernel from writing to the file below by itself.
func (f *slowFile) PassthroughFd() (int, bool) { return 0, false }
