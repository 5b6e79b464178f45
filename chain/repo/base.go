package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/internal/durable"
)

const (
	baseSuffix    = ".base"
	removedSuffix = ".removed"

	// readLockFile is in each point's folder. Who reads the point's disks holds it shared (flock(2)), so that who removes the
	// point knows. It does not protect those who read with other programs.
	readLockFile = ".lock"

	// readLockLimit is how long a reader waits for one who holds it alone, which is for moments.
	readLockLimit = 10 * time.Second
)

// Folder is a folder of a guest's that has a manifest: that of a point or of a base.
type Folder struct {
	ID   chain.ID
	Base bool
	Name string
}

// ParseFolder says what a folder of that name is; ok is false for those without a manifest.
func ParseFolder(name string) (f Folder, ok bool) {
	if id, err := chain.ParseID(name); err == nil {
		return Folder{ID: id, Name: name}, true
	}
	inner, ok := strings.CutSuffix(name, baseSuffix)
	if !ok {
		return Folder{}, false
	}
	if inner, ok = strings.CutPrefix(inner, partialPrefix); !ok {
		return Folder{}, false
	}
	id, err := chain.ParseID(inner)
	return Folder{ID: id, Base: true, Name: name}, err == nil
}

// hiddenID is the id in the name of a hidden folder with that suffix; ok is false for all else.
func hiddenID(e fs.DirEntry, suffix string) (id chain.ID, ok bool) {
	name, isHidden := strings.CutPrefix(e.Name(), partialPrefix)
	name, hasSuffix := strings.CutSuffix(name, suffix)
	if !isHidden || !hasSuffix || !e.IsDir() {
		return "", false
	}
	id, err := chain.ParseID(name)
	return id, err == nil
}

// FolderOf is the folder that a manifest was read from.
func FolderOf(m *chain.Manifest) Folder {
	if m.Base {
		return Folder{ID: m.ID, Base: true, Name: partialPrefix + string(m.ID) + baseSuffix}
	}
	return Folder{ID: m.ID, Name: string(m.ID)}
}

// baseDir is the folder of a point that was removed but is still needed.
func (g *Guest) baseDir(id chain.ID) string {
	return filepath.Join(g.Dir, partialPrefix+string(id)+baseSuffix)
}

// FolderDir is the path of a folder. Names here are plain: there is nothing that filepath.Join would have to clean, for each
// of many points.
func (g *Guest) FolderDir(f Folder) string { return g.Dir + "/" + f.Name }

// advanced reports whether a disk's image is that of the next generation. Where it can't be looked at nobody must take it for
// one or the other.
func (g *Guest) advanced(id chain.ID, d *chain.Disk) (bool, error) {
	f, err := os.OpenFile(g.ImagePath(id, d.Name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, damage(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() {
		return false, damage(image.ErrNotRegular)
	}
	h, err := qcow2.ReadHeader(f, info.Size())
	if err != nil {
		return false, damage(err)
	}
	switch h.BackingFile {
	case backingName(d.Next.Parent):
		return true, nil
	case backingName(d.Parent):
		return false, nil
	}
	return false, fmt.Errorf("%w: its image names the backing file %q", chain.ErrDamaged, h.BackingFile)
}

// backingName is what an image on parent has as its backing file; nil is none.
func backingName(parent *chain.ImageRef) string {
	if parent == nil {
		return ""
	}
	return chain.BackingFile(*parent)
}

// hold keeps a point's images from being changed or removed until release is called. Where the file system knows no locks, or
// the repository can only be read and was copied without its lock files, there is nothing to hold.
//
// A base is for those who remove points to look at, who hold it already.
func (g *Guest) hold(point *chain.Manifest) (release func(), err error) {
	if point.Base {
		return func() {}, nil
	}
	id := point.ID
	f, err := os.OpenFile(filepath.Join(g.PointDir(id), readLockFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		if !exists(g.PointDir(id)) {
			return nil, fmt.Errorf("%s/%s was removed just now: %w", g.Name, id, chain.ErrNoPoint)
		}
		return func() {}, nil
	}
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) && time.Since(began) < readLockLimit {
			continue
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			_ = f.Close()
			return nil, fmt.Errorf("%s/%s: somebody changes its images just now: %w", g.Name, id, ErrLocked)
		}
		break
	}
	if !exists(g.PointDir(id)) {
		_ = f.Close()
		return nil, fmt.Errorf("%s/%s was removed just now: %w", g.Name, id, chain.ErrNoPoint)
	}
	return func() { unlock(f) }, nil
}

// unlock gives a lock back at once. Closing alone would not while a child that is being made has the descriptor too.
func unlock(f *os.File) {
	_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
	_ = f.Close()
}

// Claim holds a point or a base alone: nobody reads its disks, or ErrLocked is wrapped.
func (g *Guest) Claim(f Folder) (release func(), err error) {
	lock, err := os.OpenFile(filepath.Join(g.FolderDir(f), readLockFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, fileMode)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", g.Name, f.ID, err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		_ = lock.Close()
		return nil, fmt.Errorf("%s/%s is being read: %w", g.Name, f.ID, ErrLocked)
	}
	return func() { unlock(lock) }, nil
}

// Hide makes a base of a point: for everybody but those who need its images it is gone. The caller holds the prune lock.
func (g *Guest) Hide(id chain.ID) error {
	names, err := g.lockNames()
	if err != nil {
		return err
	}
	defer names.Unlock()
	if err := g.Repo.FS.Rename(g.PointDir(id), g.baseDir(id)); err != nil {
		return fmt.Errorf("%s/%s: remove: %w", g.Name, id, err)
	}
	return nil
}

// Rewrite changes a manifest, unless it has something in it that this version does not know and would lose. change is given the manifest as it is in the file. The caller holds the prune lock.
func (g *Guest) Rewrite(f Folder, change func(*chain.Manifest) error) error {
	m, err := g.Decode(f)
	if err != nil {
		return err
	}
	if err := change(m); err != nil {
		return err
	}
	old, err := readFile(filepath.Join(g.FolderDir(f), chain.ManifestFile), chain.MaxManifest)
	if err == nil {
		err = chain.KnowsAll(old)
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", g.Name, f.ID, err)
	}
	text, err := m.Encode()
	if err != nil {
		return fmt.Errorf("%s/%s: %w", g.Name, f.ID, err)
	}
	if err := g.Repo.FS.WriteFile(filepath.Join(g.FolderDir(f), chain.ManifestFile), text, fileMode); err != nil {
		return fmt.Errorf("%s/%s: %w", g.Name, f.ID, err)
	}
	return nil
}

// DropImage removes the image of a base's disk, which nobody needs.
func (g *Guest) DropImage(id chain.ID, disk string) error {
	if err := g.checkImagesDir(); err != nil {
		return err
	}
	if err := g.Repo.FS.Remove(g.ImagePath(id, disk)); err != nil {
		return fmt.Errorf("%s/%s: disk %s: %w", g.Name, id, disk, err)
	}
	return nil
}

// DropBase removes the folder of a base, whose images are gone.
func (g *Guest) DropBase(id chain.ID) error {
	// A folder that has lost its manifest on the way must not be taken for a base.
	removed := filepath.Join(g.Dir, partialPrefix+string(id)+removedSuffix)
	err := g.Repo.FS.Rename(g.baseDir(id), removed)
	if err == nil {
		err = g.Repo.FS.RemoveAll(removed)
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", g.Name, id, err)
	}
	return nil
}

// DropRemoved removes what a DropBase that was cut off has left.
func (g *Guest) DropRemoved() error {
	entries, err := os.ReadDir(g.Dir)
	if err != nil {
		return fmt.Errorf("guest %s: %w", g.Name, err)
	}
	for _, e := range entries {
		if _, ok := hiddenID(e, removedSuffix); !ok {
			continue
		}
		if err := g.Repo.FS.RemoveAll(filepath.Join(g.Dir, e.Name())); err != nil {
			return fmt.Errorf("guest %s: %w", g.Name, err)
		}
	}
	return nil
}

// Temporary names the files that a Rewrite that was cut off has left in a folder; or those of one that is under way, unless the
// caller holds the prune lock, as does every Rewrite.
func (g *Guest) Temporary(f Folder) ([]string, error) {
	entries, err := os.ReadDir(g.FolderDir(f))
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", g.Name, err)
	}
	var names []string
	for _, e := range entries {
		if durable.Temporary(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// DropTemporary removes what a Rewrite that was cut off has left. The caller holds the prune lock.
func (g *Guest) DropTemporary(f Folder) error {
	names, err := g.Temporary(f)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := g.Repo.FS.Remove(filepath.Join(g.FolderDir(f), name)); err != nil {
			return fmt.Errorf("guest %s: %w", g.Name, err)
		}
	}
	return nil
}

// Folders lists the folders of points and bases, oldest first.
func (g *Guest) Folders() ([]Folder, error) {
	entries, err := os.ReadDir(g.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", g.Name, err)
	}
	var folders []Folder
	for _, e := range entries {
		if f, ok := ParseFolder(e.Name()); ok && e.IsDir() && !g.shadowed(f) {
			folders = append(folders, f)
		}
	}
	return folders, nil
}

// SetIdentity writes into an image whose it is. The caller syncs.
func SetIdentity(f *os.File, ref chain.ImageRef) error { return qcow2.SetIdentity(f, identity(ref)) }

// shadowed reports whether a base's folder has the id of a point that is there, as in a repository that was copied over
// another state of itself. The images are the point's.
func (g *Guest) shadowed(f Folder) bool { return f.Base && exists(g.PointDir(f.ID)) }

// touchedFile is the name of the file that remembers which blocks of a base's image a merge can change: numbers, one a line.
func touchedFile(disk string) string { return disk + ".touched" }

// WriteTouched remembers which blocks of a base's image a merge can change.
func (g *Guest) WriteTouched(f Folder, disk string, blocks map[int64]bool) error {
	var text strings.Builder
	for _, b := range slices.Sorted(maps.Keys(blocks)) {
		fmt.Fprintln(&text, b)
	}
	if err := g.Repo.FS.WriteFile(filepath.Join(g.FolderDir(f), touchedFile(disk)), []byte(text.String()), fileMode); err != nil {
		return fmt.Errorf("%s/%s: disk %s: %w", g.Name, f.ID, disk, err)
	}
	return nil
}

// ReadTouched adds to blocks what WriteTouched has remembered.
func (g *Guest) ReadTouched(f Folder, disk string, blocks map[int64]bool) error {
	text, err := readFile(filepath.Join(g.FolderDir(f), touchedFile(disk)), maxSumsFile)
	if err != nil {
		return fmt.Errorf("%s/%s: disk %s: %w", g.Name, f.ID, disk, err)
	}
	for line := range strings.Lines(string(text)) {
		b, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
		if err != nil {
			return fmt.Errorf("%s/%s: %w: %s: %w", g.Name, f.ID, chain.ErrDamaged, touchedFile(disk), err)
		}
		blocks[b] = true
	}
	return nil
}

// WriteSums writes the check sums of an image of that generation and returns what the manifest says of them.
func (g *Guest) WriteSums(f Folder, disk string, generation int, text []byte) (chain.Sums, error) {
	sums := chain.Sums{File: chain.SumsFile(disk, generation), SHA256: digest(text)}
	if err := g.Repo.FS.WriteFile(filepath.Join(g.FolderDir(f), sums.File), text, fileMode); err != nil {
		return chain.Sums{}, fmt.Errorf("%s/%s: disk %s: %w", g.Name, f.ID, disk, err)
	}
	return sums, nil
}

// DropSums removes the check sums of a generation that does not count, if they are there.
func (g *Guest) DropSums(f Folder, disk string, generation int) error {
	path := filepath.Join(g.FolderDir(f), chain.SumsFile(disk, generation))
	if !exists(path) {
		return nil
	}
	if err := g.Repo.FS.Remove(path); err != nil {
		return fmt.Errorf("%s/%s: disk %s: %w", g.Name, f.ID, disk, err)
	}
	return nil
}

// ReadSums reads an image's check sums, which must be those that its manifest seals.
func (g *Guest) ReadSums(ctx context.Context, f Folder, d *chain.Disk) (*Sums, error) {
	text, err := readFile(filepath.Join(g.FolderDir(f), d.Sums.File), maxSumsFile)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: disk %s: check sums: %w", g.Name, f.ID, d.Name, damage(err))
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if digest(text) != d.Sums.SHA256 {
		return nil, fmt.Errorf("%s/%s: disk %s: %w: its check sums are not those of its manifest", g.Name, f.ID, d.Name, chain.ErrDamaged)
	}
	sums, err := parseSums(text)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: disk %s: %w: %w", g.Name, f.ID, d.Name, chain.ErrDamaged, err)
	}
	return sums, nil
}
