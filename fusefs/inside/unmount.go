package inside

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/internal/mountinfo"
)

// ErrBusy means that a file of the mount is in use.
var ErrBusy = errors.New("in use")

// Mounted tells whether files of a point are mounted at dir, by this package, on top of what else is there. It does not
// look at dir itself: the mount may not answer.
func Mounted(dir string) (bool, error) {
	m, err := topMount(dir)
	return err == nil && ours(m), err
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

// ours tells whether this package has mounted it.
func ours(m mountinfo.Entry) bool {
	return m.Type == "fuse."+Subtype || isOurLoop(m.Source)
}

// topMount is what was mounted last at a path. It is empty where nothing is mounted.
func topMount(path string) (mountinfo.Entry, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return mountinfo.Entry{}, err
	}
	// The last element is not looked at: see Mounted.
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return mountinfo.Entry{}, err
	}
	mounts, err := mountinfo.Read()
	top, _ := mountinfo.Top(mounts, filepath.Join(parent, filepath.Base(path)))
	return top, err
}
