package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// slowFolder makes the test binary the server of a slow file system over that folder, at the place that slowPlace tells.
const (
	slowFolder = "QMCHAIN_BENCH_SLOW_FOLDER"
	slowPlace  = "QMCHAIN_BENCH_SLOW_PLACE"
)

// TestMain serves the slow file system from a process of its own: one that waits for its own file system when it is killed
// would never end. Readers are such processes too.
func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv(readerJob); ok {
		if err := serveReads(text, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	folder, ok := os.LookupEnv(slowFolder)
	if !ok {
		os.Exit(m.Run())
	}
	if err := serveSlow(folder, os.Getenv(slowPlace), os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// slowMount is a folder to which lineRate bytes a second can be written. The kernel does not cache them: each write(2)
// waits.
type slowMount struct {
	dir    string
	asks   io.WriteCloser
	answer *bufio.Reader
}

// newSlowMount mounts one until the benchmark ends, or dies.
func newSlowMount(b *testing.B) *slowMount {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	m := &slowMount{dir: b.TempDir()}
	server := exec.Command(self)
	server.Env = append(os.Environ(), slowFolder+"="+b.TempDir(), slowPlace+"="+m.dir)
	server.Stderr = os.Stderr
	// In a group of its own, what interrupts or kills the benchmark does not end it before it has unmounted.
	server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := server.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if m.asks, err = server.StdinPipe(); err != nil {
		b.Fatal(err)
	}
	if err := server.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = m.asks.Close()
		if err := server.Wait(); err != nil {
			b.Errorf("slow file system: %v", err)
		}
	})
	m.answer = bufio.NewReader(out)
	m.sent(b) // it answers when it is mounted
	return m
}

// sent is how many bytes were written so far.
func (m *slowMount) sent(b *testing.B) (n int64) {
	b.Helper()
	if _, err := fmt.Fprintln(m.asks); err != nil {
		b.Fatal(err)
	}
	if _, err := fmt.Fscanln(m.answer, &n); err != nil {
		b.Fatal(err)
	}
	return n
}

// serveSlow serves the file system until its input ends, which it does when the benchmark does. It answers each line with
// the number of bytes written.
func serveSlow(folder, place string, in io.Reader, out io.Writer) error {
	inner, err := fs.NewLoopbackRoot(folder)
	if err != nil {
		return err
	}
	loopback, l := inner.(*fs.LoopbackNode), &line{rate: lineRate}
	root := &slowNode{loopback, l}
	loopback.RootData.RootNode = root
	_, err = fs.Mount(place, root, &fs.Options{
		MountOptions: fuse.MountOptions{FsName: "qmchain-bench", Name: "slow", DirectMount: true},
	})
	if err != nil {
		return err
	}
	for asks := bufio.NewScanner(in); asks.Scan(); {
		fmt.Fprintln(out, l.total())
	}
	// Whoever may still have a file open there gets an error as soon as this process has ended.
	return os.NewSyscallError("umount", unix.Unmount(place, unix.MNT_DETACH))
}

// line is a line to a slow storage: what is sent goes one after the other.
type line struct {
	rate int64 // bytes per second

	mu   sync.Mutex
	free time.Time // when the last of what was sent will be through
	all  int64     // bytes
}

// send returns when n more bytes are through.
func (l *line) send(n int) {
	l.mu.Lock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(n) * time.Second / time.Duration(l.rate))
	through := l.free
	l.all += int64(n)
	l.mu.Unlock()
	time.Sleep(time.Until(through))
}

func (l *line) total() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all
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
