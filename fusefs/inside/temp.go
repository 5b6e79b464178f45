package inside

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Temp is a folder for what runs beside this process. It is locked as long as the process that made it lives, so that a
// later one can tell what a kill has left.
type Temp struct {
	Dir    string
	locked *os.File
}

const (
	tempName = "qmchain-files-"
	// tempAge is how old a folder without a lock is at least before it counts as left behind: it takes a moment from
	// its making to its lock.
	tempAge = time.Minute
)

// NewTemp makes a folder in dir, such as os.TempDir, and removes what processes that are gone have left there. The path must
// leave room for the name of a unix socket.
func NewTemp(ctx context.Context, dir string, now time.Time) (*Temp, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	sweep(ctx, dir, now)
	path, err := os.MkdirTemp(dir, tempName)
	if err != nil {
		return nil, fmt.Errorf("folder for temporary files: %w", err)
	}
	locked, err := lockDir(path)
	if err != nil {
		_ = os.Remove(path)
		return nil, fmt.Errorf("folder for temporary files: %w", err)
	}
	return &Temp{path, locked}, nil
}

// Remove removes it with all that is in it. Nothing must be running in it.
func (t *Temp) Remove(ctx context.Context) error {
	err := removeTemp(ctx, t.Dir)
	return errors.Join(err, t.locked.Close())
}

func removeTemp(ctx context.Context, dir string) error {
	removeSockets(dir)
	// Where there was no mount namespace for it.
	if err := Detach(ctx, filepath.Join(dir, hiddenMount)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.RemoveAll(dir)
}

// sweep removes this user's folders that nobody has locked. What can't be removed stays for the next time.
func sweep(ctx context.Context, dir string, now time.Time) {
	old, _ := filepath.Glob(filepath.Join(dir, tempName+"*"))
	for _, path := range old {
		info, err := os.Lstat(path)
		if err != nil || !info.IsDir() || now.Sub(info.ModTime()) < tempAge {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Geteuid() {
			continue
		}
		RemoveAbandoned(ctx, path)
	}
}

// RemoveAbandoned removes the folder of a Temp if its process is gone; false: it is not.
func RemoveAbandoned(ctx context.Context, dir string) bool {
	locked, err := lockDir(dir)
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	_ = removeTemp(ctx, dir) // what can't be removed is for the next one to try
	_ = locked.Close()
	return true
}

// lockDir takes the lock of a folder, if nobody has it.
func lockDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
