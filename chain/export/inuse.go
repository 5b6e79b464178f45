package export

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// opener names a process of others that has a file open which match is true of, "" if none is seen. Only files are looked
// at to which a path leads that maybe is true of: to look at one on a dead file system can hang. Without the right to look
// at others' processes only the own user's are seen.
func opener(maybe func(path string) bool, match func(*unix.Stat_t) bool) string {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is sound
	self := "/proc/" + strconv.Itoa(os.Getpid()) + "/"
	for _, fd := range fds {
		if strings.HasPrefix(fd, self) {
			continue
		}
		if to, err := os.Readlink(fd); err != nil || !maybe(to) {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(fd, &st) != nil || !match(&st) {
			continue
		}
		process := filepath.Dir(filepath.Dir(fd))
		name, _ := os.ReadFile(filepath.Join(process, "comm"))
		return fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(name)), filepath.Base(process))
	}
	return ""
}

// openFile is who has a file open.
func openFile(path string, info fs.FileInfo) string {
	want, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return opener(
		func(to string) bool { return filepath.Base(to) == filepath.Base(path) },
		func(st *unix.Stat_t) bool { return st.Dev == want.Dev && st.Ino == want.Ino },
	)
}

// openDevice is who has a block device open, or one that shares space with it.
func openDevice(device uint64) string {
	devices := overlapping(device)
	return opener(
		func(to string) bool { return strings.HasPrefix(to, "/dev/") },
		func(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFBLK && devices[st.Rdev] },
	)
}

// overlapping are the numbers of the devices that share space with one: itself, its partitions, or the disk that it is a
// partition of.
func overlapping(device uint64) map[uint64]bool {
	found := map[uint64]bool{device: true}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(device), unix.Minor(device)))
	if err != nil {
		return found // a kernel without sysfs
	}
	with := []string{filepath.Dir(dir)}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		with, _ = filepath.Glob(filepath.Join(dir, "*", "partition")) // the pattern is sound
		for i := range with {
			with[i] = filepath.Dir(with[i])
		}
	}
	for _, dir := range with {
		text, err := os.ReadFile(filepath.Join(dir, "dev"))
		var major, minor uint32
		if _, scanErr := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err == nil && scanErr == nil {
			found[unix.Mkdev(major, minor)] = true
		}
	}
	return found
}
