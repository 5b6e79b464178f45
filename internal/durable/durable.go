// Package durable changes a file system so that what it reports as done survives a crash of the machine.
//
// A file is written under a temporary name, synced, renamed to its own name, and its folder is synced (Linux keeps a
// rename only once the folder is on disk). A folder is renamed, made and removed with the same care. Every change to the
// repository goes through this one package, so that one hook sees every step: tests use it to fail or to die before
// step k, for every k.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// FS makes durable changes. The zero value is ready for use.
type FS struct {
	// Before, if not nil, is called before every single change with its kind ("create", "write", "sync", "rename",
	// "mkdir", "remove", …) and the path that it changes. An error from it takes the place of the change.
	Before func(op, path string) error
}

// Serial returns f with its hook called by one goroutine at a time.
func (f FS) Serial() FS {
	before := f.Before
	if before == nil {
		return f
	}
	var mu sync.Mutex
	return FS{Before: func(op, path string) error {
		mu.Lock()
		defer mu.Unlock()
		return before(op, path)
	}}
}

// Step announces a change that is about to be made by other means than this package, a child process for one, so that
// it is counted like all others.
func (f FS) Step(op, path string) error {
	if f.Before == nil {
		return nil
	}
	if err := f.Before(op, path); err != nil {
		return &fs.PathError{Op: op, Path: path, Err: err}
	}
	return nil
}

const temporary = ".tmp-"

// Temporary reports whether a file of that name is one that WriteFile is writing, or has left when it was killed.
func Temporary(name string) bool { return strings.HasPrefix(name, temporary) }

// WriteFile makes the file path with exactly data in it, or leaves what was there: a reader sees the old file or the
// whole new one, also after a crash.
func (f FS) WriteFile(path string, data []byte, perm fs.FileMode) error {
	return f.write(path, data, perm, f.Rename)
}

// WriteNew is WriteFile of a file that is not there: of several who do it at once one succeeds. The error of the others is
// fs.ErrExist. Where the file system can neither rename without replacing nor link, the last one succeeds too.
func (f FS) WriteNew(path string, data []byte, perm fs.FileMode) error {
	return f.write(path, data, perm, f.renameNew)
}

func (f FS) write(path string, data []byte, perm fs.FileMode, rename func(from, to string) error) (err error) {
	if err := f.Step("create", path); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), temporary+filepath.Base(path)+"-*")
	if err != nil {
		var failed *fs.PathError
		if errors.As(err, &failed) {
			failed.Path = path // the temporary name says nothing to who gave this one
		}
		return err
	}
	defer func() {
		if err != nil {
			_ = tmp.Close()
			_ = os.Remove(tmp.Name())
		}
	}()
	if err := tmp.Chmod(perm); err != nil {
		return err
	}
	if err := f.Step("write", path); err != nil {
		return err
	}
	if _, err := tmp.Write(data); err != nil {
		return err
	}
	if err := f.Step("sync", path); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return rename(tmp.Name(), path)
}

// Rename renames a file or a folder and syncs the folder that holds the new name. Both names must be in one folder or
// the caller syncs the other one too.
func (f FS) Rename(from, to string) error {
	if err := f.Step("rename", to); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return f.SyncDir(filepath.Dir(to))
}

// renameNew is Rename to a name that is not there.
func (f FS) renameNew(from, to string) error {
	if err := f.Step("rename", to); err != nil {
		return err
	}
	var err error
	for _, move := range moves {
		err = move(from, to)
		// NFS and most of FUSE know no such rename, some no links.
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			break
		}
	}
	if err != nil {
		return &fs.PathError{Op: "create", Path: to, Err: err}
	}
	return f.SyncDir(filepath.Dir(to))
}

// moves are ways to rename to a name that is not there, the best first.
var moves = [...]func(from, to string) error{
	func(from, to string) error {
		return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	},
	func(from, to string) error {
		if err := unix.Link(from, to); err != nil {
			return err
		}
		_ = os.Remove(from) // one that stays is known as temporary
		return nil
	},
	func(from, to string) error {
		if _, err := os.Lstat(to); err == nil {
			return fs.ErrExist
		}
		return os.Rename(from, to)
	},
}

// Mkdir makes a folder and syncs the folder that holds it. It is an error if it exists.
func (f FS) Mkdir(path string, perm fs.FileMode) error {
	if err := f.Step("mkdir", path); err != nil {
		return err
	}
	if err := os.Mkdir(path, perm); err != nil {
		return err
	}
	return f.SyncDir(filepath.Dir(path))
}

// Remove removes a file or an empty folder and syncs the folder that held it. It is no error if it is gone already.
func (f FS) Remove(path string) error {
	if err := f.Step("remove", path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.SyncDir(filepath.Dir(path))
}

// RemoveAll removes a folder and the files in it, one level deep and deeper, each a step of its own. Symbolic links
// are removed, never followed.
func (f FS) RemoveAll(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return f.Remove(path)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := filepath.Join(path, e.Name())
		if e.IsDir() {
			if err := f.RemoveAll(p); err != nil {
				return err
			}
			continue
		}
		if err := f.Step("remove", p); err != nil {
			return err
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return f.Remove(path)
}

// SyncDir syncs a folder: the names in it are then on disk.
func (f FS) SyncDir(path string) error {
	if err := f.Step("syncdir", path); err != nil {
		return err
	}
	return syncPath(path)
}

func syncPath(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		_ = file.Close()
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return file.Close()
}
