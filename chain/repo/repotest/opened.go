package repotest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Watch counts how often files in a folder, and in all folders below it, are opened from now on, by whomever. The function
// that it returns says so of each file since its last call, by its path relative to the folder. Folders are not counted.
func Watch(tb TB, dir string) (opened func() map[string]int) {
	tb.Helper()
	w, err := watch(dir)
	if err != nil {
		tb.Fatalf("repotest: watch %s: %v", dir, err)
	}
	return func() map[string]int {
		tb.Helper()
		found, err := w.opened()
		if err != nil {
			tb.Fatalf("repotest: watch %s: %v", dir, err)
		}
		return found
	}
}

// watcher is an inotify(7) descriptor with a watch of each folder.
type watcher struct {
	f       *os.File
	folders map[int32]string
}

func watch(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	w := &watcher{os.NewFile(uintptr(fd), "inotify"), map[int32]string{}} // which closes it when nobody has it any more
	return w, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		relative, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		id, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN|unix.IN_ONLYDIR)
		w.folders[int32(id)] = relative
		return err
	})
}

func (w *watcher) opened() (map[string]int, error) {
	found := map[string]int{}
	conn, err := w.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 1<<20)
	for {
		var n int
		var readErr error
		if err := conn.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), buf) }); err != nil {
			return nil, err
		}
		if errors.Is(readErr, unix.EAGAIN) {
			return found, nil
		}
		if readErr != nil {
			return nil, readErr
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&rest[0]))
			name := unix.ByteSliceToString(rest[unix.SizeofInotifyEvent:][:e.Len])
			rest = rest[unix.SizeofInotifyEvent+int(e.Len):]
			if e.Mask&unix.IN_Q_OVERFLOW != 0 {
				return nil, errors.New("more was opened than the kernel has counted")
			}
			if e.Mask&unix.IN_ISDIR == 0 && name != "" {
				found[filepath.Join(w.folders[e.Wd], name)]++
			}
		}
	}
}
