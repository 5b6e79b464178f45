package fusefs_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"qmchain/chain/image"
	"qmchain/fusefs"
)

// ended waits for the end of a mount and returns what Wait does.
func ended(t *testing.T, m *mount, limit time.Duration) error {
	t.Helper()
	select {
	case <-m.Done():
		return m.Wait()
	case <-time.After(limit):
		t.Fatalf("not ended within %s; log:\n%s", limit, m.log)
		return nil
	}
}

func TestUnmountFromOutside(t *testing.T) {
	t.Parallel()
	m := mountRepo(t, smallGuest(t).Repo)
	_ = must(os.ReadFile(m.path("110", "latest", "scsi0.raw")))(t)
	run(t, "umount", m.dir)
	if err := ended(t, m, time.Minute); err != nil {
		t.Error(err)
	}
	if line := mountLine(t, m.dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
	// The place is free again at once.
	if again, err := tryMount(t, smallGuest(t).Repo.Dir, m.dir, image.PoolOptions{}); err != nil {
		t.Error(err)
	} else if err := again.Unmount(t.Context()); err != nil {
		t.Error(err)
	}
}

// Nothing of a mount is left in the process that made it. Not parallel: it looks at all that the process does.
func TestNothingIsLeft(t *testing.T) {
	g := smallGuest(t)
	m := mountRepo(t, g.Repo)
	_ = must(os.ReadFile(m.path("110", "latest", "scsi0.raw")))(t)
	if err := m.Unmount(t.Context()); err != nil {
		t.Fatal(err)
	}
	running := func() string {
		b := make([]byte, 1<<20)
		return string(b[:runtime.Stack(b, true)])
	}
	eventually(t, "no goroutines of the mount", func() bool {
		stacks := running()
		return !strings.Contains(stacks, "qmchain/fusefs.(*") && !strings.Contains(stacks, "go-fuse")
	})
	for _, e := range must(os.ReadDir("/proc/self/fd"))(t) {
		to, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if to == "/dev/fuse" || strings.HasPrefix(to, m.dir) || strings.HasPrefix(to, g.Repo.Dir) {
			t.Errorf("%s is still open", to)
		}
	}
}

// A mount that is detached with files open serves them to their end, and not longer.
func TestDetachedFromOutside(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	m := mountRepo(t, g.Repo)
	disk := must(os.Open(m.path("110", "latest", "scsi0.raw")))(t)
	run(t, "umount", "-l", m.dir)
	time.Sleep(1500 * time.Millisecond)
	got := make([]byte, smallSize)
	if _, err := disk.ReadAt(got, 0); err != nil {
		t.Errorf("read after umount -l: %v", err)
	}
	equal(t, "disk", got, g.Want(g.Points.Latest().ID, "scsi0"))
	select {
	case <-m.Done():
		t.Fatal("ended with a file open")
	default:
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
	if err := ended(t, m, time.Minute); err != nil {
		t.Error(err)
	}
}

// The case in which the kernel does not tell: another mount namespace has a copy of the mount.
func TestUnmountWithACopyInAnotherNamespace(t *testing.T) {
	t.Parallel()
	m := mountRepo(t, smallGuest(t).Repo)
	// It keeps this one mount, and lets go of those of other tests.
	other := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `
		awk -v keep="$0" '$3 == "fuse.qmchain" && $2 != keep { print $2 }' /proc/mounts | xargs -r umount -l
		echo ready
		exec sleep 60`, m.dir)
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	run(t, "umount", m.dir)
	err = ended(t, m, time.Minute)
	if err != nil && !errors.Is(err, fusefs.ErrBusy) {
		t.Error(err)
	}
	if !strings.Contains(m.log.String(), "another mount namespace") {
		t.Errorf("the log does not say why:\n%s", m.log)
	}
}

// umount -f breaks the connection and, with a file open, leaves the mount: it must not stay as a dead one.
func TestAbortedFromOutside(t *testing.T) {
	t.Parallel()
	m := mountRepo(t, smallGuest(t).Repo)
	disk := must(os.Open(m.path("110", "latest", "scsi0.raw")))(t)
	defer disk.Close()
	if err := unix.Unmount(m.dir, unix.MNT_FORCE); err != nil && !errors.Is(err, unix.EBUSY) {
		t.Fatal(err)
	}
	if err := ended(t, m, time.Minute); err != nil {
		t.Error(err)
	}
	if line := mountLine(t, m.dir); line != "" {
		t.Errorf("a dead mount is left: %s", line)
	}
	_ = must(os.ReadDir(m.dir))(t)
}

func TestUnmountWithAFileOpen(t *testing.T) {
	t.Parallel()
	m := mountRepo(t, smallGuest(t).Repo)
	disk := must(os.Open(m.path("110", "latest", "scsi0.raw")))(t)
	defer disk.Close()
	loop := strings.TrimSpace(run(t, "losetup", "-r", "--show", "-f", m.path("110", "latest", "scsi0.raw")))
	t.Cleanup(func() { run(t, "losetup", "-d", loop) })
	began := time.Now()
	if err := m.Unmount(t.Context()); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("took %s", took)
	}
	if line := mountLine(t, m.dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
	if !strings.Contains(m.log.String(), "in use") {
		t.Errorf("the log does not say so:\n%s", m.log)
	}
	if _, err := disk.ReadAt(make([]byte, 4096), 512<<10); err == nil {
		t.Error("a read after the end succeeded")
	}
	if n := openUnder(t, m.dir); n != 0 {
		t.Errorf("%d image files still open", n)
	}
}

// What somebody mounted on top is not ours to take away.
func TestUnmountWhenCovered(t *testing.T) {
	t.Parallel()
	m := mountRepo(t, smallGuest(t).Repo)
	if err := unix.Mount("cover", m.dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	uncover := func() error { return unix.Unmount(m.dir, 0) }
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := m.Unmount(ctx); !errors.Is(err, fusefs.ErrBusy) {
		t.Errorf("unmount: %v", err)
	}
	if line := mountLine(t, m.dir); !strings.Contains(line, "qmchain") {
		t.Errorf("mounted is %s", line)
	}
	if err := uncover(); err != nil {
		t.Fatalf("the cover is gone: %v", err)
	}
}

// gate is a file system that passes a folder through, and holds reads of files up as long as it is closed.
type gate struct {
	*fs.LoopbackNode
	open *atomic.Pointer[chan struct{}]
}

var (
	_ fs.NodeReader      = (*gate)(nil)
	_ fs.NodeWrapChilder = (*gate)(nil)
)

func (g *gate) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &gate{ops.(*fs.LoopbackNode), g.open}
}

func (g *gate) Read(ctx context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	<-*g.open.Load()
	return f.(fs.FileReader).Read(ctx, dest, off)
}

// A repository on storage that does not answer any more must not keep the server from ending, nor those who read.
func TestUnmountWhileTheRepositoryHangs(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	opened, closed := make(chan struct{}), make(chan struct{})
	close(opened)
	var open atomic.Pointer[chan struct{}]
	open.Store(&opened)
	root := &gate{must(fs.NewLoopbackRoot(g.Repo.Dir))(t).(*fs.LoopbackNode), &open}
	slow := t.TempDir()
	server, err := fs.Mount(slow, root, &fs.Options{MountOptions: fuse.MountOptions{
		// The kernel is to ask for each page, and not to help itself.
		MaxReadAhead: 4096, DisabledCapabilities: fuse.CAP_PASSTHROUGH,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(slow, unix.MNT_FORCE|unix.MNT_DETACH)
		server.Wait()
	})
	set := openSet(t, slow)
	dir := t.TempDir()
	log := &logBuffer{}
	m, err := fusefs.Mount(t.Context(), fusefs.Options{Set: set, Dir: dir, Log: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH) })
	disk := must(os.Open(filepath.Join(dir, "110", "latest", "scsi0.raw")))(t)
	defer disk.Close()

	open.Store(&closed)
	read := make(chan error, 1)
	go func() {
		_, err := disk.ReadAt(make([]byte, 4096), smallSize-4096)
		read <- err
	}()
	select {
	case err := <-read:
		t.Fatalf("the read came back: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	began := time.Now()
	err = m.Unmount(t.Context())
	if !errors.Is(err, fusefs.ErrHangs) {
		t.Errorf("unmount: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("unmount took %s", took)
	}
	select {
	case err := <-read:
		if err == nil {
			t.Error("the read succeeded")
		}
	case <-time.After(30 * time.Second):
		t.Error("who reads still waits")
	}
	if line := mountLine(t, dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
	close(closed)
}

func TestMountRefused(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mounted := mountRepo(t, g.Repo)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(g.Repo.Dir, link); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, dir string
		want      error
	}{
		{"mount point missing", filepath.Join(t.TempDir(), "missing"), os.ErrNotExist},
		{"its folder missing", filepath.Join(t.TempDir(), "missing", "missing"), os.ErrNotExist},
		{"mount point a file", file, unix.ENOTDIR},
		{"within the repository", filepath.Join(g.Repo.Dir, "110"), fusefs.ErrNested},
		{"the repository itself", g.Repo.Dir, fusefs.ErrNested},
		{"the repository by another name", link, fusefs.ErrNested},
		{"the repository within it", filepath.Dir(g.Repo.Dir), fusefs.ErrNested},
		{"mounted already", mounted.dir, fusefs.ErrMounted},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, err := tryMount(t, g.Repo.Dir, test.dir, image.PoolOptions{})
			if !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			if m != nil {
				t.Error("mounted")
			}
		})
	}
	// Nothing of it has touched the mount that is there.
	_ = must(os.ReadFile(mounted.path("110", "latest", "scsi0.raw")))(t)
}

// Two at the same place at the same time: one wins.
func TestMountRace(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	set := openSet(t, g.Repo.Dir)
	dir := t.TempDir()
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH) == nil { // each that won
			continue
		}
	})
	errs := make(chan error)
	for range 4 {
		go func() {
			_, err := fusefs.Mount(t.Context(), fusefs.Options{Set: set, Dir: dir, Log: (&logBuffer{}).logger()})
			errs <- err
		}()
	}
	won := 0
	for range 4 {
		err := <-errs
		if err == nil {
			won++
		} else if !errors.Is(err, fusefs.ErrMounted) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d won", won)
	}
	if err := fusefs.Unmount(t.Context(), dir, false); err != nil {
		t.Error(err)
	}
	if line := mountLine(t, dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}

func TestUnmountWhatIsNotMounted(t *testing.T) {
	t.Parallel()
	for _, dir := range []string{t.TempDir(), "/proc", filepath.Join(t.TempDir(), "missing")} {
		if err := fusefs.Unmount(t.Context(), dir, false); !errors.Is(err, fusefs.ErrNotMounted) {
			t.Errorf("%s: %v", dir, err)
		}
	}
}
