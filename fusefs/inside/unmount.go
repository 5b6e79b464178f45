package inside

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrBusy means that a file of the mount is in use.
var ErrBusy = errors.New("in use")

// Mounted tells whether files of a point are mounted at dir, by this package, on top of what else is there. It does not
// look at dir itself: the mount may not answer.
func Mounted(dir string) (bool, error) {
	m, err := topMount(dir)
	return err == nil && m.ours(), err
}

// Unmount ends the mount at dir, which must be one of this package's. Lazy also ends one that is in use; what is open then
// works until it is closed. It wraps ErrBusy.
func Unmount(ctx context.Context, dir string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(dir, flags)
	if errors.Is(err, unix.EPERM) {
		return unmountAsUser(ctx, dir, lazy)
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s: %w", dir, ErrBusy)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// helperLimit bounds a run of fusermount3, which makes a few system calls.
const helperLimit = 20 * time.Second

// unmountAsUser has fusermount3 do it, which may for the user's own mounts.
func unmountAsUser(ctx context.Context, dir string, lazy bool) error {
	ctx, cancel := context.WithTimeout(ctx, helperLimit)
	defer cancel()
	args := []string{"-u", "--", dir}
	if lazy {
		args = []string{"-u", "-z", "--", dir}
	}
	out, err := exec.CommandContext(ctx, "fusermount3", args...).CombinedOutput()
	switch {
	case err == nil:
		return nil
	case strings.Contains(string(out), "busy"):
		return fmt.Errorf("%s: %w", dir, ErrBusy)
	}
	return fmt.Errorf("unmount %s: %w: %s", dir, err, strings.TrimSpace(string(out)))
}

// Detach takes away what this package has mounted at dir, whether it is in use or not. A mount that is not there any more is
// no error.
func Detach(ctx context.Context, dir string) error {
	ours, err := Mounted(dir)
	if err != nil || !ours {
		return err
	}
	return Unmount(ctx, dir, true)
}

// mountEntry is what is needed of a line of /proc/self/mountinfo, proc_pid_mountinfo(5).
type mountEntry struct {
	device, fsType, source string
}

func (m mountEntry) ours() bool {
	return m.fsType == "fuse."+Subtype || isOurLoop(m.source)
}

// topMount is what was mounted last at a path. It is empty where nothing is mounted.
func topMount(path string) (mountEntry, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return mountEntry{}, err
	}
	// The last element is not looked at: see Mounted.
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return mountEntry{}, err
	}
	path = filepath.Join(parent, filepath.Base(path))
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return mountEntry{}, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	var top mountEntry
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if ok && len(left) >= 6 && len(right) >= 2 && unescape(left[4]) == path {
			top = mountEntry{left[2], right[0], unescape(right[1])}
		}
	}
	return top, lines.Err()
}

// unescape undoes what the kernel does to blanks and backslashes: three octal digits.
func unescape(s string) string {
	var b strings.Builder
	for {
		before, after, ok := strings.Cut(s, `\`)
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		c, err := strconv.ParseUint(after[:min(3, len(after))], 8, 8)
		if err != nil {
			b.WriteByte('\\')
			s = after
			continue
		}
		b.WriteByte(byte(c))
		s = after[3:]
	}
}
