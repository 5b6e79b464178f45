package inside

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
	for deadline := time.Now().Add(10 * time.Second); len(loops(t, source)) > 0; time.Sleep(10 * time.Millisecond) {
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
			source := t.Name() + kind
			view, err := Kernel{Volume: v, SkipJournal: skip, Source: source, Temp: t.TempDir(), Log: quiet()}.Mount(t.Context())
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
		view, err := Kernel{Volume: v, SkipJournal: skip, Source: t.Name(), Temp: t.TempDir(), Log: quiet()}.Mount(t.Context())
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
	view, err := Kernel{Volume: v, Dir: dir, Source: t.Name(), Temp: t.TempDir(), Log: quiet()}.Mount(t.Context())
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
	case <-time.After(10 * time.Second):
		t.Error("no end")
	}
	noLoops(t, t.Name())
	if ours, err := Mounted(dir); err != nil || ours {
		t.Errorf("mounted: %v, %v", ours, err)
	}
}
