package inside

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Entry is a file of a guest, as its folder lists it. Symbolic links are not followed.
type Entry struct {
	Name     string // any bytes but NUL and slash
	Mode     fs.FileMode
	Size     int64
	UID, GID uint32
	Time     time.Time // of the last change of the content
	Target   string    // of a symbolic link
}

// maxEntries bounds a folder, which a damaged or hostile file system can make endless.
const maxEntries = 1 << 24

// List returns what is in a folder, by name, or the one file that a path names. Links on the way are followed, and one at the
// end if it leads to a folder. Progress is called now and then.
func List(ctx context.Context, root *os.File, name string, progress func()) ([]Entry, error) {
	dir, err := OpenAt(root, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOTDIR) {
		dir, err = OpenAt(root, path.Dir(name), unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		e, err := entry(dir, path.Base(name))
		return []Entry{e}, err
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var list []Entry
	for {
		names, err := dir.Readdirnames(256)
		for _, n := range names {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			progress()
			e, err := entry(dir, n)
			if err != nil {
				return nil, err
			}
			list = append(list, e)
		}
		switch {
		case errors.Is(err, io.EOF):
			slices.SortFunc(list, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
			return list, nil
		case err != nil:
			return nil, fmt.Errorf("folder %s: %w", name, err)
		case len(list) > maxEntries:
			return nil, fmt.Errorf("folder %s: more than %d files", name, maxEntries)
		}
	}
}

// entry looks at one file of a folder.
func entry(dir *os.File, name string) (Entry, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return Entry{}, &os.PathError{Op: "stat", Path: path.Join(dir.Name(), name), Err: err}
	}
	e := Entry{Name: name, Mode: fileMode(st.Mode), Size: st.Size, UID: st.Uid, GID: st.Gid, Time: time.Unix(st.Mtim.Unix())}
	if e.Mode&fs.ModeSymlink != 0 {
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(dir.Fd()), name, b)
		if err != nil {
			return Entry{}, &os.PathError{Op: "readlink", Path: path.Join(dir.Name(), name), Err: err}
		}
		e.Target = string(b[:n])
	}
	return e, nil
}

// fileMode is the Go form of stat(2)'s mode.
func fileMode(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	for _, b := range []struct {
		bit  uint32
		mode fs.FileMode
	}{{unix.S_ISUID, fs.ModeSetuid}, {unix.S_ISGID, fs.ModeSetgid}, {unix.S_ISVTX, fs.ModeSticky}} {
		if m&b.bit != 0 {
			mode |= b.mode
		}
	}
	switch m & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFBLK:
		mode |= fs.ModeDevice
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	}
	return mode
}

// ErrNotFile means that a path is no regular file.
var ErrNotFile = errors.New("not a regular file")

// OpenFile opens a regular file of a guest; symbolic links are followed within the guest.
func OpenFile(root *os.File, name string) (*os.File, error) {
	f, err := OpenAt(root, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &os.PathError{Op: "open", Path: name, Err: ErrNotFile}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Copier copies files of a guest to the host. It never replaces anything, and follows no link but those on the way to what
// is copied.
type Copier struct {
	Root      *os.File // of the guest's files
	Recursive bool     // folders too
	Preserve  bool     // owners, modes with set-uid and the like, and times; else modes as far as the umask lets them
	Progress  func()
	// Skipped is told of what is no file, folder or link, and so is not copied.
	Skipped func(path string)
}

// Copy copies one file, or a folder with all that is in it, to a new name on the host.
func (c Copier) Copy(ctx context.Context, from, to string) error {
	top, err := os.OpenRoot(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer top.Close()
	from = path.Clean("/" + from)
	parent, err := OpenAt(c.Root, path.Dir(from), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer parent.Close()
	e, err := entry(parent, cmp.Or(strings.TrimPrefix(path.Base(from), "/"), "."))
	if err != nil {
		return err
	}
	if !c.Recursive && e.Mode&fs.ModeSymlink != 0 {
		f, err := OpenFile(c.Root, from)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		e.Mode, e.Target = info.Mode(), ""
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			e.UID, e.GID, e.Time = st.Uid, st.Gid, info.ModTime()
		}
		return c.file(ctx, top, f, e, filepath.Base(to))
	}
	if !c.Recursive && e.Mode.IsDir() {
		return &os.PathError{Op: "copy", Path: from, Err: unix.EISDIR}
	}
	return c.entry(ctx, top, e, from, filepath.Base(to))
}

// entry copies what a path of the guest is to a new name below top.
func (c Copier) entry(ctx context.Context, top *os.Root, e Entry, from, to string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.Progress()
	switch {
	case e.Mode.IsDir():
		return c.folder(ctx, top, e, from, to)
	case e.Mode&fs.ModeSymlink != 0:
		if err := top.Symlink(e.Target, to); err != nil {
			return err
		}
		if c.Preserve {
			return top.Lchown(to, int(e.UID), int(e.GID))
		}
		return nil
	case e.Mode.IsRegular():
		f, err := c.open(from, unix.O_RDONLY)
		if err != nil {
			return err
		}
		defer f.Close()
		return c.file(ctx, top, f, e, to)
	}
	c.Skipped(from)
	return nil
}

// open opens a path that a listing gave, on which there are no links.
func (c Copier) open(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat2(int(c.Root.Fd()), name, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_NOFOLLOW),
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (c Copier) folder(ctx context.Context, top *os.Root, e Entry, from, to string) error {
	// Its owner must be able to fill it.
	if err := top.Mkdir(to, e.Mode.Perm()|0o700); err != nil {
		return err
	}
	list, err := List(ctx, c.Root, from, c.Progress)
	if err != nil {
		return err
	}
	for _, child := range list {
		// A folder with a name that leads elsewhere is a damaged or a hostile one.
		if child.Name == "" || child.Name == "." || child.Name == ".." || strings.Contains(child.Name, "/") {
			return fmt.Errorf("folder %s: %q is no name", from, child.Name)
		}
		if err := c.entry(ctx, top, child, path.Join(from, child.Name), filepath.Join(to, child.Name)); err != nil {
			return err
		}
	}
	return c.preserve(top, e, to)
}

// zeroBlock is the unit in which zeroes become holes.
const zeroBlock = 64 << 10

var zeroes [zeroBlock]byte

// file copies the content of f. A file that can't be copied whole is removed.
func (c Copier) file(ctx context.Context, top *os.Root, f *os.File, e Entry, to string) (err error) {
	out, err := top.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, e.Mode.Perm())
	if err != nil {
		return err
	}
	defer func() {
		if closing := out.Close(); err == nil {
			err = closing
		}
		if err != nil {
			_ = top.Remove(to)
		}
	}()
	size := int64(0)
	buf := make([]byte, 1<<20)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := io.ReadFull(f, buf)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		c.Progress()
		for block := range slices.Chunk(buf[:n], zeroBlock) {
			if string(block) != string(zeroes[:len(block)]) {
				if _, err := out.WriteAt(block, size); err != nil {
					return err
				}
			}
			size += int64(len(block))
		}
		if n < len(buf) {
			break
		}
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	return c.preserve(top, e, to)
}

// preserve gives what was copied the owner, mode and time that it has in the guest, if that is wanted. Giving away what is
// set-uid takes that bit, so the mode comes last.
func (c Copier) preserve(top *os.Root, e Entry, to string) error {
	if !c.Preserve {
		return nil
	}
	if err := top.Lchown(to, int(e.UID), int(e.GID)); err != nil {
		return err
	}
	if err := top.Chmod(to, e.Mode&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return top.Chtimes(to, e.Time, e.Time)
}
