package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain"
)

// Hold keeps the images of a point, or of a base, from being merged and removed until release is called: who removes
// points then leaves them for the next time. It waits for at most wait for somebody who does that just now, and wraps
// ErrLocked then; chain.ErrNoPoint is wrapped where the folder is no longer there.
//
// Where the file system knows no locks, or the repository was copied without its lock files and can only be read, there is
// nothing to hold.
func (g *Guest) Hold(ctx context.Context, folder Folder, wait time.Duration) (release func(), err error) {
	gone := func() error { return fmt.Errorf("%s/%s was removed just now: %w", g.Name, folder.ID, chain.ErrNoPoint) }
	f, err := os.OpenFile(filepath.Join(g.FolderDir(folder), readLockFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		if !exists(g.FolderDir(folder)) {
			return nil, gone()
		}
		return func() {}, nil // see above
	}
	for began := time.Now(); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		if time.Since(began) >= wait {
			err = fmt.Errorf("%s/%s: somebody merges or removes its images just now: %w", g.Name, folder.ID, ErrLocked)
		} else {
			err = sleep(ctx, 50*time.Millisecond)
		}
		if err != nil {
			_ = f.Close()
			return nil, err
		}
	}
	if !exists(g.FolderDir(folder)) {
		_ = f.Close()
		return nil, gone()
	}
	return func() { unlock(f) }, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
