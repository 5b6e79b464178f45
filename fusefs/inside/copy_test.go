package inside

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// root opens a folder as if it were a guest's root.
func root(t testing.TB, dir string) *os.File {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// No link leads out of a guest, and what is no file is not read.
func TestOpen(t *testing.T) {
	t.Parallel()
	host := t.TempDir()
	guest := filepath.Join(host, "guest")
	if err := errors.Join(
		os.WriteFile(filepath.Join(host, "secret"), []byte("the host's"), 0o600),
		os.Mkdir(guest, 0o700),
		os.WriteFile(filepath.Join(guest, "file"), []byte("the guest's"), 0o600),
		os.Symlink("../secret", filepath.Join(guest, "above")),
		os.Symlink(filepath.Join(host, "secret"), filepath.Join(guest, "absolute")),
		os.Symlink("/file", filepath.Join(guest, "inside")),
		os.Symlink("..", filepath.Join(guest, "up")),
		os.Symlink("loop", filepath.Join(guest, "loop")),
		os.Symlink("/proc/self/root", filepath.Join(guest, "out")),
		unix.Mkfifo(filepath.Join(guest, "pipe"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	r := root(t, guest)
	for path, want := range map[string]error{
		"/file": nil, "file": nil, "/inside": nil, "/up/file": nil, "/../../file": nil,
		"/above": fs.ErrNotExist, "/absolute": fs.ErrNotExist, "/up/secret": fs.ErrNotExist, "/../secret": fs.ErrNotExist,
		"/out/etc/hostname": fs.ErrNotExist, "/loop": unix.ELOOP, "/pipe": ErrNotFile, "/": ErrNotFile,
	} {
		f, err := OpenFile(r, path)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
		if err == nil {
			_ = f.Close()
		}
	}
	for _, link := range []string{"/above", "/absolute"} {
		to := filepath.Join(host, "copied")
		if err := (Copier{Root: r, Progress: func() {}}).Copy(t.Context(), link, to); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("copy of %s: %v", link, err)
		}
	}
}

// A copy that is broken off leaves no half of a file.
func TestCopyEnds(t *testing.T) {
	t.Parallel()
	guest, to := t.TempDir(), filepath.Join(t.TempDir(), "copied")
	if err := os.WriteFile(filepath.Join(guest, "big"), make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	n := 0
	err := Copier{Root: root(t, guest), Progress: func() {
		if n++; n == 3 {
			cancel(why)
		}
	}}.Copy(ctx, "/big", to)
	if !errors.Is(err, why) {
		t.Errorf("ended with %v", err)
	}
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	if err := (Copier{Root: root(t, guest), Progress: func() {}}).Copy(t.Context(), "/big", to); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(to, &st); err != nil || st.Size != 5<<20 || st.Blocks > 100 {
		t.Errorf("a file of zeroes: %d bytes, %d blocks, %v", st.Size, st.Blocks, err)
	}
}

// Folders whose process is gone are removed once they are old enough; others are not.
func TestTemp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	now := time.Now()
	used, err := NewTemp(t.Context(), dir, now)
	if err != nil {
		t.Fatal(err)
	}
	left, err := NewTemp(t.Context(), dir, now)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(left.locked.Close(), os.WriteFile(filepath.Join(left.Dir, "nbd"), nil, 0o600), os.Symlink(dir, filepath.Join(left.Dir, socketsNote))); err != nil {
		t.Fatal(err)
	}
	count := func(want int) {
		t.Helper()
		if n, err := os.ReadDir(dir); err != nil || len(n) != want {
			t.Errorf("%d folders, want %d: %v", len(n), want, err)
		}
	}
	next, err := NewTemp(t.Context(), dir, now)
	if err != nil {
		t.Fatal(err)
	}
	count(3)
	last, err := NewTemp(t.Context(), dir, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	count(3)
	if _, err := os.Lstat(left.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	for _, temp := range []*Temp{used, next, last} {
		if err := temp.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	count(0)
}
