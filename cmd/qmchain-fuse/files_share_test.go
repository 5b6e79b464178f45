package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// hangingShare passes a folder through, as a share does. Reads of the images in it can hang, until a signal to the reader or
// for hangLimit.
type hangingShare struct {
	point string

	mu   sync.Mutex
	when string
}

// hangLimit is above all limits of the program, and lets a test that fails come to its end.
const hangLimit = 90 * time.Second

// shareType is what its mount has as its type, behind "fuse.".
const shareType = "qmchain-test-share"

func mkShare(ts *testscript.TestScript, _ bool, args []string) {
	s := ts.Value("share").(*hangingShare)
	s.point = ts.Getenv("POINT")
	root, err := fs.NewLoopbackRoot(ts.MkAbs(args[0]))
	ts.Check(err)
	dir := ts.MkAbs(args[1])
	ts.Check(os.Mkdir(dir, 0o700))
	server, err := fs.Mount(dir, &shareNode{root.(*fs.LoopbackNode), s}, &fs.Options{MountOptions: fuse.MountOptions{
		Name: shareType, DisabledCapabilities: fuse.CAP_PASSTHROUGH, DisableXAttrs: true,
	}})
	ts.Check(err)
	ts.Defer(func() {
		s.set("not")
		_ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH)
		server.Wait()
	})
}

func setShare(ts *testscript.TestScript, _ bool, args []string) {
	ts.Value("share").(*hangingShare).set(args[0])
}

func (s *hangingShare) set(when string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.when = when
}

func (s *hangingShare) hangs() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.when == "now" || s.when == "mounting" && hasLoop(s.point)
}

// hasLoop tells whether there is a loop device on a volume of a point.
func hasLoop(point string) bool {
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range loops {
		if name, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(name), "/qmchain 110 "+point) {
			return true
		}
	}
	return false
}

type shareNode struct {
	*fs.LoopbackNode
	share *hangingShare
}

var (
	_ fs.NodeWrapChilder = (*shareNode)(nil)
	_ fs.NodeOpener      = (*shareNode)(nil)
	_ fs.NodeReader      = (*shareNode)(nil)
)

func (n *shareNode) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &shareNode{ops.(*fs.LoopbackNode), n.share}
}

func (n *shareNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f, _, e := n.LoopbackNode.Open(ctx, flags)
	return f, fuse.FOPEN_DIRECT_IO, e // each read is to be asked for
}

func (n *shareNode) Read(ctx context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if strings.HasSuffix(n.Path(nil), ".qcow2") {
		for deadline := time.Now().Add(hangLimit); n.share.hangs() && time.Now().Before(deadline); {
			select {
			case <-ctx.Done():
				return nil, syscall.EINTR
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return f.(fs.FileReader).Read(ctx, dest, off)
}
