package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"
)

// ErrLocked is wrapped where somebody else holds a lock for longer than the caller wants to wait.
var ErrLocked = errors.New("locked")

// The locks of a guest's folder: of the one who makes points, of the one who removes some, and of the moments in which a
// point comes or goes.
const (
	lockFile      = ".lock"
	pruneLockFile = ".prune.lock"
	namesLockFile = ".names.lock"

	namesLockLimit = time.Minute
)

// Lock is the right to write to a guest's folder. It is a flock(2), which works on local file systems, and over NFS and
// CephFS between hosts. The kernel gives it back when its holder dies.
type Lock struct {
	flock *flock.Flock
	path  string
}

// Lock takes the guest's lock, making the guest's folder if it is not there, and waits for at most wait.
func (g *Guest) Lock(ctx context.Context, wait time.Duration) (*Lock, error) {
	if _, err := os.Stat(g.Dir); errors.Is(err, fs.ErrNotExist) {
		if err := g.Repo.FS.Mkdir(g.Dir, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("guest %s: %w", g.Name, err)
		}
	}
	return g.lock(ctx, lockFile, wait)
}

// LockPrune takes the lock of the one who removes points, and waits for at most wait.
func (g *Guest) LockPrune(ctx context.Context, wait time.Duration) (*Lock, error) {
	return g.lock(ctx, pruneLockFile, wait)
}

// lockNames takes the lock of the moments in which a point comes or goes.
func (g *Guest) lockNames() (*Lock, error) {
	return g.lock(context.Background(), namesLockFile, namesLockLimit)
}

func (g *Guest) lock(ctx context.Context, name string, wait time.Duration) (*Lock, error) {
	path := filepath.Join(g.Dir, name)
	l := &Lock{flock.New(path, flock.SetFlag(os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW), flock.SetPermissions(fileMode)), path}
	waitCtx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	ok, err := l.flock.TryLock()
	if !ok && err == nil && wait > 0 {
		ok, err = l.flock.TryLockContext(waitCtx, 100*time.Millisecond)
	}
	switch {
	case ctx.Err() != nil:
		if ok {
			l.Unlock()
		}
		return nil, ctx.Err()
	case errors.Is(err, context.DeadlineExceeded), err == nil && !ok:
		return nil, fmt.Errorf("guest %s: somebody else holds %s: %w", g.Name, path, ErrLocked)
	case err != nil:
		return nil, fmt.Errorf("guest %s: lock: %w", g.Name, err)
	}
	return l, nil
}

// Check makes sure that the lock is still the one that others see: the file behind the path has not been replaced or
// removed.
func (l *Lock) Check() error {
	now, err := os.Stat(l.path)
	if err != nil {
		return fmt.Errorf("lock lost: %w", err)
	}
	held, err := l.flock.Stat()
	if err != nil {
		return fmt.Errorf("lock lost: %w", err)
	}
	if !os.SameFile(now, held) {
		return fmt.Errorf("lock lost: %s was replaced", l.path)
	}
	return nil
}

// Unlock gives the lock back.
func (l *Lock) Unlock() {
	_ = l.flock.Unlock()
}
