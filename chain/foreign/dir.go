package foreign

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"qmchain/chain"
)

const (
	maxEntries = 1 << 18 // in one folder
	maxText    = 1 << 20 // bytes of a file with JSON, XML or a check sum
)

// dir is a set's directory. Paths are relative to it, with slashes.
type dir struct {
	path string
	root *os.Root

	// What was read of files that did not change since.
	mu    sync.Mutex
	known map[string]known
	next  map[string]known // of the look that is under way
}

// known is what was read of a file, or the error.
type known struct {
	stamp stamp
	value any
	err   error
}

// stamp tells one state of a file from another.
type stamp struct {
	dev, ino uint64
	size     int64
	mtime    syscall.Timespec
	ctime    syscall.Timespec
}

func stampOf(info fs.FileInfo) stamp {
	st := info.Sys().(*syscall.Stat_t)
	return stamp{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// entry is a name in a folder.
type entry struct {
	name string
	info fs.FileInfo // of the name itself: links are not followed
}

func (e entry) isFile() bool     { return e.info.Mode().IsRegular() }
func (e entry) isDir() bool      { return e.info.IsDir() }
func (e entry) mtime() time.Time { return e.info.ModTime() }

// list returns what is in a folder of the set, sorted. Names that can't be shown are
// left out.
func (d *dir) list(rel string) ([]entry, error) {
	f, err := d.root.Open(rel)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := f.ReadDir(maxEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if len(all) > maxEntries {
		return nil, fmt.Errorf("%s: more than %d files", rel, maxEntries)
	}
	entries := make([]entry, 0, len(all))
	for _, e := range all {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !printable(e.Name()) {
			continue
		}
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry{e.Name(), info})
	}
	slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	return entries, nil
}

// printable reports whether a name can be shown: valid UTF-8, and nothing that moves
// the cursor of a terminal.
func printable(name string) bool {
	return utf8.ValidString(name) && !strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) })
}

// open opens a regular file of which list has returned the entry.
func (d *dir) open(rel string, e entry) (*os.File, error) {
	f, err := d.root.OpenFile(rel, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || !os.SameFile(info, e.info)) {
		err = fmt.Errorf("%s: another file has taken its place", rel)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// look returns what read makes of a file, which is read again only when it has changed.
// What is kept is marked as such by the kind of reading.
func look[T any](d *dir, kind, rel string, e entry, read func(f *os.File) (T, error)) (T, error) {
	key := kind + "\x00" + rel
	now := stampOf(e.info)
	d.mu.Lock()
	k, ok := d.known[key]
	d.mu.Unlock()
	if !ok || k.stamp != now {
		k = known{stamp: now}
		f, err := d.open(rel, e)
		if err != nil {
			var none T
			return none, err
		}
		k.value, k.err = read(f)
		_ = f.Close()
	}
	// An error of the file system may pass.
	if k.err == nil || errors.Is(k.err, chain.ErrDamaged) {
		d.mu.Lock()
		d.next[key] = k
		d.mu.Unlock()
	}
	return k.value.(T), k.err
}

// text reads a small file.
func (d *dir) text(rel string, e entry) ([]byte, error) {
	f, err := d.open(rel, e)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readText(f)
}

func readText(f *os.File) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(f, maxText+1))
	if err == nil && len(text) > maxText {
		err = fmt.Errorf("%w: more than %d bytes", chain.ErrDamaged, maxText)
	}
	return text, err
}

// find returns the entry of that name.
func find(entries []entry, name string) (entry, bool) {
	i, ok := slices.BinarySearchFunc(entries, name, func(e entry, name string) int { return strings.Compare(e.name, name) })
	if !ok {
		return entry{}, false
	}
	return entries[i], true
}
