package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// fileMode: an image holds all that its guest does.
const fileMode = 0o600

// staged is a file that is written under another name than it is to have.
type staged struct {
	plan *Plan
	path string
	// file is open from the file's making to its sync, so that no error of writing it back is missed; and it holds the lock
	// that tells others that somebody is at work.
	file      *os.File
	committed bool
}

// stage makes the staging file of a plan, empty. That of a dead writer is taken over; that of a living one is ErrInUse.
func stage(p *Plan) (*staged, error) {
	s := &staged{plan: p, path: staging(p.Output)}
	if err := p.opts.FS.Step("create", s.path); err != nil {
		return nil, err
	}
	// Who holds the lock may rename or remove the file at any time: then the lock is one of a file that is away.
	for range 10 {
		file, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, fileMode)
		if err != nil {
			return nil, err
		}
		if err := own(file, s.path); err != nil {
			_ = file.Close()
			if errors.Is(err, errMoved) {
				continue
			}
			return nil, err
		}
		s.file = file
		if err := s.empty(); err != nil {
			_ = s.close()
			return nil, err
		}
		return s, nil
	}
	return nil, fmt.Errorf("%w: others make and remove %s", ErrInUse, s.path)
}

var errMoved = errors.New("the file was moved away")

// own locks a staging file.
func own(file *os.File, path string) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w: it is no file", path, ErrKind)
	}
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: somebody else is writing it (%s)", ErrInUse, path)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", path, err)
	}
	now, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(now, info) {
		return errMoved
	}
	return err
}

func (s *staged) empty() error {
	if err := s.file.Truncate(0); err != nil {
		return err
	}
	return s.file.Chmod(fileMode)
}

// sync brings the file to stable storage.
func (s *staged) sync() error {
	if err := s.plan.opts.FS.Step("sync", s.path); err != nil {
		return err
	}
	return s.file.Sync()
}

// commit renames the file to the name it is to have.
func (s *staged) commit(context.Context, bool) error {
	fsys, to := s.plan.opts.FS, s.plan.Output
	if err := fsys.Step("rename", to); err != nil {
		return err
	}
	if err := s.rename(to); err != nil {
		return err
	}
	s.committed = true
	if err := fsys.SyncDir(filepath.Dir(to)); err != nil {
		return fmt.Errorf("it is whole, but a power cut may take its name: %w", err)
	}
	return nil
}

// rename leaves alone what has come to be there meanwhile, unless by request.
func (s *staged) rename(to string) error {
	if s.plan.opts.Force {
		return os.Rename(s.path, to)
	}
	err := unix.Renameat2(unix.AT_FDCWD, s.path, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, unix.EEXIST):
		return ErrExists
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		// A file system that can't: NFS, for one.
		if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(ErrExists, err)
		}
		return os.Rename(s.path, to)
	case err != nil:
		return &os.LinkError{Op: "rename", Old: s.path, New: to, Err: err}
	}
	return nil
}

// close removes the file if it was not committed. The lock is held until then: else it might be somebody else's already.
func (s *staged) close() error {
	var err error
	if !s.committed {
		err = s.plan.opts.FS.Remove(s.path)
	}
	return errors.Join(err, s.file.Close())
}

func (s *staged) from() int64      { return 0 }
func (s *staged) unfinished() bool { return false } // nobody sees it

// rawFile is a raw file that is being written.
type rawFile struct{ *staged }

func startFile(_ context.Context, p *Plan) (output, error) {
	s, err := stage(p)
	if err != nil {
		return nil, err
	}
	if err := s.file.Truncate(p.Size); err != nil {
		return nil, errors.Join(fmt.Errorf("a file of %d bytes: %w", p.Size, err), s.close())
	}
	return rawFile{s}, nil
}

func (f rawFile) write(ctx context.Context, progress func(int64)) error {
	c := copying{
		plan: f.plan, dst: &newFile{File: f.file}, progress: progress,
		before: func() error { return f.plan.opts.FS.Step("write", f.path) },
	}
	if err := c.run(ctx, 0, f.plan.Size); err != nil {
		return err
	}
	return f.sync()
}

func (f rawFile) reader(context.Context) (image.Image, error) { return readBack(f.path, f.plan.Size) }

// newFile is a file all of which is a hole to begin with.
type newFile struct {
	*os.File
	// mu is held by who writes: most file systems let in one at a time, and the others would spend the processor's time on
	// waiting for their turn.
	mu sync.Mutex
}

func (f *newFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.File.WriteAt(p, off)
}

func (*newFile) zero(int64, int64) error { return nil }
func (*newFile) leastZero() int          { return page }

func (f *newFile) flush(off, length int64) { flush(f.File, off, length) }

// flush: not all files can; then all goes at the sync.
func flush(f *os.File, off, length int64) {
	_ = unix.SyncFileRange(int(f.Fd()), off, length, unix.SYNC_FILE_RANGE_WRITE)
}
