package fusefs_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
	"qmchain/chain/repo/repotest"
	"qmchain/fusefs"
)

// share is a file system that passes a folder through, as a share does, and that can hang, fail, lose what is open, be
// unmounted, and be mounted again.
type share struct {
	t    *testing.T
	dir  string
	from string

	mu     sync.Mutex
	open   chan struct{} // closed as long as nothing hangs
	all    bool          // what hangs is all, and not reads alone
	fails  syscall.Errno
	serial int                   // of the server
	opened map[fs.FileHandle]int // by which
	server *fuse.Server
}

func newShare(t *testing.T, from string) *share {
	t.Helper()
	return newShareAt(t, from, t.TempDir())
}

func newShareAt(t *testing.T, from, dir string) *share {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := &share{t: t, dir: dir, from: from, open: make(chan struct{}), opened: map[fs.FileHandle]int{}}
	close(s.open)
	s.mount()
	t.Cleanup(func() {
		s.hang(false)
		s.unmount()
	})
	return s
}

func (s *share) mount() {
	s.t.Helper()
	root := must(fs.NewLoopbackRoot(s.from))(s.t).(*fs.LoopbackNode)
	server, err := fs.Mount(s.dir, &shareNode{root, s}, &fs.Options{MountOptions: fuse.MountOptions{
		DisabledCapabilities: fuse.CAP_PASSTHROUGH, DisableXAttrs: true, DisableSplice: true,
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.server = server
}

// unmount takes the share away while files in it may be open, which are lost.
func (s *share) unmount() {
	_ = unix.Unmount(s.dir, unix.MNT_FORCE|unix.MNT_DETACH)
	s.server.Wait()
}

// hang has reads of files hang, or go on.
func (s *share) hang(yes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.open:
		if yes {
			s.open = make(chan struct{})
		}
	default:
		if !yes {
			close(s.open)
		}
	}
}

// hangAll has everything hang, or go on.
func (s *share) hangAll(yes bool) {
	s.mu.Lock()
	s.all = yes
	s.mu.Unlock()
	s.hang(yes)
}

// fail has all requests fail, until it is called with 0.
func (s *share) fail(errno syscall.Errno) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails = errno
}

// restart makes what is open stale.
func (s *share) restart() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serial++
}

func (s *share) errno() syscall.Errno {
	s.mu.Lock()
	open, all, e := s.open, s.all, s.fails
	s.mu.Unlock()
	if all {
		<-open
	}
	return e
}

type shareNode struct {
	*fs.LoopbackNode
	share *share
}

var (
	_ fs.NodeWrapChilder    = (*shareNode)(nil)
	_ fs.NodeLookuper       = (*shareNode)(nil)
	_ fs.NodeGetattrer      = (*shareNode)(nil)
	_ fs.NodeOpendirHandler = (*shareNode)(nil)
	_ fs.NodeOpener         = (*shareNode)(nil)
	_ fs.NodeReader         = (*shareNode)(nil)
)

func (n *shareNode) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &shareNode{ops.(*fs.LoopbackNode), n.share}
}

func (n *shareNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if e := n.share.errno(); e != 0 {
		return nil, e
	}
	return n.LoopbackNode.Lookup(ctx, name, out)
}

func (n *shareNode) Getattr(ctx context.Context, f fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	if e := n.share.errno(); e != 0 {
		return e
	}
	return n.LoopbackNode.Getattr(ctx, f, out)
}

func (n *shareNode) OpendirHandle(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if e := n.share.errno(); e != 0 {
		return nil, 0, e
	}
	return n.LoopbackNode.OpendirHandle(ctx, flags)
}

func (n *shareNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if e := n.share.errno(); e != 0 {
		return nil, 0, e
	}
	f, _, e := n.LoopbackNode.Open(ctx, flags)
	if e == 0 {
		n.share.mu.Lock()
		n.share.opened[f] = n.share.serial
		n.share.mu.Unlock()
	}
	return f, fuse.FOPEN_DIRECT_IO, e // each read is to be asked for
}

func (n *shareNode) Read(ctx context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	s := n.share
	s.mu.Lock()
	open, e := s.open, s.fails
	if s.opened[f] != s.serial {
		e = syscall.ESTALE
	}
	s.mu.Unlock()
	<-open
	if e != 0 {
		return nil, e
	}
	return f.(fs.FileReader).Read(ctx, dest, off)
}

func mountSetOf(t *testing.T, dir string) *mount { return mountSet(t, dir, image.PoolOptions{}) }

// drop has the kernel forget what it has of a file, so that the next read is the server's.
func drop(t *testing.T, f *os.File) {
	t.Helper()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// The repository's share goes away in every way that one can, and comes back: errors meanwhile, and afterwards all is as
// before, in the mount that is there and for who has a disk open.
func TestRepositoryGoesAndComesBack(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name       string
		away, back func(s *share)
		errors     bool // there is a time in which nothing can be read
	}{
		{"it fails for a while", func(s *share) { s.fail(unix.EIO) }, func(s *share) { s.fail(0) }, true},
		{"it is stale for a while", func(s *share) { s.fail(unix.ESTALE) }, func(s *share) { s.fail(0) }, true},
		{"what is open is stale for good", func(s *share) { s.restart() }, func(*share) {}, false},
		{"it is unmounted and mounted again", func(s *share) { s.unmount() }, func(s *share) { s.mount() }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			g := smallGuest(t)
			s := newShare(t, g.Repo.Dir)
			m := mountSetOf(t, s.dir)
			newest := g.Points.Latest().ID
			want := g.Want(newest, "scsi0")
			path := m.path("110", string(newest), "scsi0.raw")
			disk := must(os.Open(path))(t)
			defer disk.Close()
			other := must(os.Open(m.path("110", string(g.Points[0].ID), "scsi0.raw")))(t) // shares a layer
			defer other.Close()
			read := func(f *os.File) ([]byte, error) {
				drop(t, f)
				got := make([]byte, smallSize)
				_, err := f.ReadAt(got, 0)
				return got, err
			}
			for _, f := range []*os.File{disk, other} {
				if _, err := read(f); err != nil {
					t.Fatal(err)
				}
			}

			test.away(s)
			if test.errors {
				time.Sleep(1100 * time.Millisecond) // what the kernel may keep of names
				if _, err := read(disk); err == nil {
					t.Error("a read of the open disk succeeds")
				}
				if got := counter(t, m, "qmchain_fuse_repository_reachable{"); got != "0" {
					t.Errorf("reachable: %s", got)
				}
				_ = must(os.Stat(m.dir))(t)
				for _, path := range []string{m.dir, m.path("110"), m.path("110", string(newest))} {
					if list, err := os.ReadDir(path); err == nil {
						t.Errorf("%s lists %v", path, list)
					}
				}
				for _, path := range []string{m.path("110"), m.path("111"), path + "x"} {
					if _, err := os.Stat(path); err == nil || errors.Is(err, os.ErrNotExist) {
						t.Errorf("stat %s: %v; want an error, and not that it is missing", path, err)
					}
				}
				if !strings.Contains(m.log.String(), "out of reach") {
					t.Errorf("the log says nothing of it:\n%s", m.log)
				}
			}
			test.back(s)
			for _, f := range []*os.File{disk, other} {
				eventually(t, "the open disk can be read", func() bool {
					_, err := read(f)
					return err == nil
				})
			}
			got, err := read(disk)
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "open disk", got, want)
			equal(t, "disk", must(os.ReadFile(path))(t), want)
			if names := run(t, "ls", m.path("110")); !strings.Contains(names, string(newest)) {
				t.Errorf("listed are %q", names)
			}
			if _, err := os.Stat(m.path("111")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("guest that is not there: %v", err)
			}
			if test.errors && !strings.Contains(m.log.String(), "there again") {
				t.Errorf("the log does not say that it is back:\n%s", m.log)
			}
		})
	}
}

// A foreign set is opened anew where its share is mounted again.
func TestForeignSetGoesAndComesBack(t *testing.T) {
	t.Parallel()
	const set = "virtnbdbackup/v1-chain"
	s := newShare(t, filepath.Join(foreigntest.Unpack(t, set+"/"), set))
	m := mountSetOf(t, s.dir)
	guest := strings.TrimSpace(run(t, "ls", m.dir))
	path := m.path(guest, "latest", "vda.raw")
	want := must(os.ReadFile(path))(t)
	s.unmount()
	eventually(t, "errors", func() bool {
		_, err := os.Stat(path)
		return err != nil && !errors.Is(err, os.ErrNotExist)
	})
	s.mount()
	eventually(t, "it can be read again", func() bool {
		got, err := os.ReadFile(path)
		return err == nil && bytes.Equal(got, want)
	})
}

// Another repository in the place of the one that was mounted is not shown as that.
func TestAnotherRepositoryInItsPlace(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	s := newShare(t, g.Repo.Dir)
	m := mountSetOf(t, s.dir)
	_ = must(os.ReadDir(m.path("110")))(t)
	s.unmount()
	s.from = repotest.New(t, t.TempDir()).Dir
	s.mount()
	time.Sleep(1100 * time.Millisecond)
	if list, err := os.ReadDir(m.dir); err == nil {
		t.Errorf("lists %v", list)
	}
	if !strings.Contains(m.log.String(), "other backups") {
		t.Errorf("the log does not say why:\n%s", m.log)
	}
	if err := m.Unmount(t.Context()); err != nil {
		t.Error(err)
	}
}

// A share that hangs in everything holds up those who look, and neither the end of the mount nor theirs then.
func TestUnmountWhileTheShareHangs(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	s := newShare(t, g.Repo.Dir)
	dir := t.TempDir()
	log := &logBuffer{}
	m, err := fusefs.Mount(t.Context(), fusefs.Options{Set: openSet(t, s.dir), Dir: dir, Log: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH) })
	_ = must(os.ReadDir(filepath.Join(dir, "110")))(t)
	s.hangAll(true)
	defer s.hangAll(false)
	time.Sleep(1100 * time.Millisecond)
	listed := make(chan error)
	go func() {
		_, err := os.ReadDir(filepath.Join(dir, "110"))
		listed <- err
	}()
	select {
	case err := <-listed:
		t.Errorf("the list came back: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	// Who only asks for the mount's root, as umount(8) does, is not held up; the counters can be read.
	began := time.Now()
	for range 5 {
		run(t, "stat", dir)
		if text := run(t, "cat", filepath.Join(dir, ".stats")); !strings.Contains(text, `requests_under_way{mount="`+dir+`",op="readdir"} 0`) {
			t.Error("no counters")
		}
		time.Sleep(200 * time.Millisecond)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("looks at the root took %s", took)
	}
	began = time.Now()
	if err := m.Unmount(t.Context()); !errors.Is(err, fusefs.ErrHangs) {
		t.Errorf("unmount: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("took %s", took)
	}
	select {
	case err := <-listed:
		if err == nil {
			t.Error("the list succeeded")
		}
	case <-time.After(30 * time.Second):
		t.Error("who lists still waits")
	}
	if line := mountLine(t, dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}

// Of several sets one hangs: what is of the others is read and listed meanwhile, and the mount ends as it should.
func TestOneOfSeveralHangs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	g := smallGuest(t)
	hanging := newShareAt(t, g.Repo.Dir, filepath.Join(dir, "hanging"))
	run(t, "cp", "-a", g.Repo.Dir, filepath.Join(dir, "well"))
	m := mountSetOf(t, dir)
	want := must(digestOf(m.path("well.110", "latest", "scsi0.raw")))(t)
	if got := must(digestOf(m.path("hanging.110", "latest", "scsi0.raw")))(t); got != want {
		t.Error("the copy differs")
	}
	hanging.hangAll(true)
	defer hanging.hangAll(false)
	time.Sleep(1100 * time.Millisecond) // what is known holds for a second
	for range 2 {
		listed := make(chan []string, 1)
		go func() { listed <- namesIn(m.dir) }()
		select {
		case names := <-listed:
			if !slices.Equal(names, []string{"hanging.110", "well.110"}) {
				t.Errorf("there is %q", names)
			}
		case <-time.After(time.Minute):
			t.Fatal("the list does not come")
		}
		if got := must(digestOf(m.path("well.110", "latest", "scsi0.raw")))(t); got != want {
			t.Error("other content while another set hangs")
		}
	}
	began := time.Now()
	if err := m.Unmount(t.Context()); err != nil && !errors.Is(err, fusefs.ErrHangs) {
		t.Errorf("unmount: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
}

// namesIn lists the folders in a folder, with a look at each.
func namesIn(dir string) (names []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if info, err := os.Stat(filepath.Join(dir, e.Name())); err == nil && info.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}
