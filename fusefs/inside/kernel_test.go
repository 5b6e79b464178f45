package inside

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// The server of a kernel mount is this test program once more, which gets the path of a raw disk here.
const (
	serveDisk = "QMCHAIN_TEST_SERVE_DISK"
	serveTemp = "QMCHAIN_TEST_SERVE_TEMP" // empty: read-only
	serveName = "QMCHAIN_TEST_SERVE_NAME"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(serveDisk); path != "" {
		if err := serveRaw(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func serveRaw(path string) error {
	img, err := image.NewPool(image.PoolOptions{}).Open(-1, image.Layer{Path: path, Name: "scsi0", Format: image.Raw, Bytes: -1})
	if err != nil {
		return err
	}
	temp := os.Getenv(serveTemp)
	return File{
		Volume: Volume{Disk: "scsi0", img: img}, SkipJournal: temp == "", Source: os.Getenv(serveName), Temp: temp, Log: quiet(),
	}.Serve(context.Background())
}

// kernel is a mount of the volume that is the whole of the raw disk at path.
func kernel(t testing.TB, path string, v Volume, skip bool) Kernel {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Stderr = os.Stderr
	temp := t.TempDir()
	if skip {
		temp = ""
	}
	cmd.Env = append(os.Environ(), serveDisk+"="+path, serveTemp+"="+temp, serveName+"="+t.Name())
	return Kernel{Volume: v, SkipJournal: skip, Source: t.Name(), Server: cmd}
}

// loops returns the loop devices of a source.
func loops(t testing.TB, source string) (names []string) {
	t.Helper()
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if name, err := os.ReadFile(f); err == nil && string(name) == "/"+fileMark+source+"\n" {
			names = append(names, f)
		}
	}
	return names
}

func noLoops(t testing.TB, source string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); len(loops(t, source)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("left: %v", loops(t, source))
		}
	}
}

func TestKernel(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"ext2", "ext4", "xfs", "btrfs"} {
		for _, skip := range []bool{false, true} {
			path := makeFile(t, makers[kind].size)
			makers[kind].make(t, path, tree(t))
			before := sum(t, path)
			v, err := Choose(find(t, disk(t, "scsi0", path)), Want{})
			if err != nil {
				t.Fatal(err)
			}
			source := t.Name()
			view, err := kernel(t, path, v, skip).Mount(t.Context())
			if err != nil {
				t.Fatalf("%s: %v", kind, err)
			}
			if len(loops(t, source)) != 1 {
				t.Errorf("%s: loop devices: %v", kind, loops(t, source))
			}
			got, err := readFile(t.Context(), view, "/etc/fstab")
			if err != nil || got != "of a guest\n" {
				t.Errorf("%s: %q, %v", kind, got, err)
			}
			if err := unix.Mkdirat(int(view.Root().Fd()), "new", 0o700); err != unix.EROFS {
				t.Errorf("%s: mkdir: %v", kind, err)
			}
			view.Close()
			select {
			case <-view.Done():
			default:
				t.Errorf("%s: not at its end", kind)
			}
			noLoops(t, source)
			if sum(t, path) != before {
				t.Errorf("%s: the disk has changed", kind)
			}
		}
	}
}

// The journal is replayed, or left alone, and the disk stays as it is.
func TestKernelJournal(t *testing.T) {
	t.Parallel()
	path := dirty(t)
	before := sum(t, path)
	v, err := Choose(find(t, disk(t, "scsi0", path)), Want{})
	if err != nil {
		t.Fatal(err)
	}
	for _, skip := range []bool{false, true} {
		view, err := kernel(t, path, v, skip).Mount(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got, err := readFile(t.Context(), view, "/late")
		if !skip && (err != nil || got != "in the journal\n") {
			t.Errorf("replayed: %q, %v", got, err)
		}
		if skip && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("skipped: %q, %v", got, err)
		}
		view.Close()
	}
	noLoops(t, t.Name())
	if sum(t, path) != before {
		t.Error("the disk has changed")
	}
}

// At a mount point it stays until it is unmounted, and lazily until the last file is closed.
func TestKernelMountPoint(t *testing.T) {
	t.Parallel()
	path := makeFile(t, 16<<20)
	makers["ext4"].make(t, path, tree(t))
	v, err := Choose(find(t, disk(t, "scsi0", path)), Want{})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), `a b\c`)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	k := kernel(t, path, v, false)
	k.Dir = dir
	view, err := k.Mount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(view.Close)
	if ours, err := Mounted(dir); err != nil || !ours {
		t.Errorf("mounted: %v, %v", ours, err)
	}
	f, err := os.Open(filepath.Join(dir, "etc/fstab"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Flags&(unix.ST_RDONLY|unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC) != unix.ST_RDONLY|unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC {
		t.Errorf("flags %#x, %v", st.Flags, err)
	}
	if err := Unmount(t.Context(), dir, false); !errors.Is(err, ErrBusy) {
		t.Errorf("in use: %v", err)
	}
	if err := Unmount(t.Context(), dir, true); err != nil {
		t.Fatal(err)
	}
	select {
	case <-view.Done():
		t.Error("ended while a file is open")
	case <-time.After(200 * time.Millisecond):
	}
	if _, err := f.Read(make([]byte, 10)); err != nil {
		t.Errorf("read: %v", err)
	}
	_ = f.Close()
	select {
	case <-view.Done():
	case <-time.After(time.Minute):
		t.Error("no end")
	}
	noLoops(t, t.Name())
	if ours, err := Mounted(dir); err != nil || ours {
		t.Errorf("mounted: %v, %v", ours, err)
	}
}

// The death of the server is the end of the mount: who waits for it gets an error, and is told why.
func TestKernelServerDies(t *testing.T) {
	t.Parallel()
	path := makeFile(t, 16<<20)
	makers["ext4"].make(t, path, tree(t))
	v, err := Choose(find(t, disk(t, "scsi0", path)), Want{})
	if err != nil {
		t.Fatal(err)
	}
	k := kernel(t, path, v, false)
	view, err := k.Mount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	if err := k.Server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-view.Done():
	case <-time.After(time.Minute):
		t.Fatal("no end")
	}
	if view.Err() == nil {
		t.Error("ended without an error")
	}
	if got, err := readFile(t.Context(), view, "/etc/fstab"); err == nil {
		t.Errorf("read %q", got)
	}
	view.Close()
	noLoops(t, t.Name())
}

// A server that does not answer holds up neither a mount nor its end, once the context has ended.
func TestKernelServerHangs(t *testing.T) {
	t.Parallel()
	path := makeFile(t, 16<<20)
	makers["ext4"].make(t, path, tree(t))
	v, err := Choose(find(t, disk(t, "scsi0", path)), Want{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	k := kernel(t, path, v, false)
	k.Server.Path, k.Server.Args = "/bin/sh", []string{"sh", "-c", "exec sleep 600"}
	time.AfterFunc(200*time.Millisecond, func() { cancel(why) })
	began := time.Now()
	if _, err := k.Mount(ctx); !errors.Is(err, why) {
		t.Errorf("mount: %v", err)
	}

	k = kernel(t, path, v, false)
	view, err := k.Mount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Server.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	view.Close()
	select {
	case <-view.Done():
	default:
		t.Error("not at its end")
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("took %s", took)
	}
	noLoops(t, t.Name())
}

func TestSecluded(t *testing.T) {
	t.Parallel()
	top, err := os.MkdirTemp("", "qmchain-secluded-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(top) })
	dir := filepath.Join(top, "between/mnt")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		top  os.FileMode
		uid  int // of top
		want bool
	}{
		{0o700, 0, true}, {0o744, 0, true}, {0o755, 0, false}, {0o710, 0, false}, {0o701, 0, false}, {0o700, 65534, false},
	} {
		for path, mode := range map[string]os.FileMode{top: test.top, filepath.Dir(dir): 0o755} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chown(top, test.uid, 0); err != nil {
			t.Fatal(err)
		}
		if got, err := Secluded(dir); err != nil || got != test.want {
			t.Errorf("%o of %d: %v, %v", test.top, test.uid, got, err)
		}
	}
}
