package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"qmchain/fusefs"
)

// privatePrefix begins the names of private folders.
const privatePrefix = "qmchain-vm-"

// lockName is a file in a private folder that is locked as long as its process lives.
const lockName = ".lock"

// privateDir makes a folder of this process's own in parent, and removes those that killed processes have left there, with
// the mounts in them.
func privateDir(ctx context.Context, parent string) (dir string, remove func() error, err error) {
	sweepPrivate(ctx, parent)
	if dir, err = os.MkdirTemp(parent, privatePrefix); err != nil {
		return "", nil, err
	}
	// It gets its name when it is locked: at no moment does it look like a dead process's.
	f, err := os.OpenFile(filepath.Join(dir, lockName+".new"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, lockName))
	}
	remove = func() error { return errors.Join(os.RemoveAll(dir), f.Close()) }
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("%s: %w", dir, err), remove())
	}
	return dir, remove, nil
}

// sweepPrivate removes what killed processes have left. What it can't remove stays: it is in nobody's way.
func sweepPrivate(ctx context.Context, parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, privatePrefix+"*"))
	for _, dir := range dirs {
		f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			err := fusefs.Unmount(ctx, mountDir(dir), true)
			if err == nil || errors.Is(err, fusefs.ErrNotMounted) || errors.Is(err, os.ErrNotExist) {
				_ = os.RemoveAll(dir)
			}
		}
		_ = f.Close()
	}
}
