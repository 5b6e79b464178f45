package repo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qmchain/chain"
)

// manifestReaders is how many manifests of a guest are read at once. From memory as many as there are processors would do;
// from a disk, or a share where each costs a few round trips, it is the waiting that is shared.
const manifestReaders = 16

// usualManifest is more than manifests have, in bytes, but for those of a guest with a hundred disks.
const usualManifest = 64 << 10

// Known is what was read of a guest's manifests: who looks again with it reads only those that are new or have changed. The
// zero value knows nothing.
type Known struct{ manifests map[string]manifest } // by their folders' names

// Len is the number of points and bases that are known.
func (k *Known) Len() int { return len(k.manifests) }

// manifest is what one reading of a manifest gave, and of which file.
type manifest struct {
	stamp stamp
	m     *chain.Manifest
	err   error
}

// stamp tells one state of a file from another. A manifest that is written anew is another file. The zero stamp is that of
// none.
type stamp struct {
	ino          uint64
	size         int64
	mtime, ctime unix.Timespec
}

func stampOf(st *unix.Stat_t) stamp {
	return stamp{ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// Points reads the manifests of all points, oldest first. A folder that looks like a point but can't be read as one is
// returned as a problem; points that descend from it fail when their layers are looked for.
//
// Of each manifest all is checked that can be said of it alone: its seal, its rules, and that it is where it belongs. Nothing
// else is looked at: not whether parents are there, nor images, sums and the guest's files. Layers does the first, OpenDisk
// the second but for the data, and CheckSums the rest.
func (g *Guest) Points() (chain.Points, []Problem, error) { return g.Look(nil) }

// Look is Points for who looks again and again: it does not read again what it knows, and knows afterwards what there is now.
func (g *Guest) Look(known *Known) (chain.Points, []Problem, error) {
	folders, err := g.Folders()
	if err != nil {
		return nil, nil, err
	}
	if known == nil {
		known = &Known{}
	}
	looks := g.lookAt(folders, known.manifests)
	known.manifests = make(map[string]manifest, len(looks))
	points := make(chain.Points, 0, len(looks))
	var problems []Problem
	seen := make(map[chain.ID]bool)
	for _, l := range looks {
		if l.read.stamp != (stamp{}) && (l.read.err == nil || errors.Is(l.read.err, chain.ErrDamaged)) {
			known.manifests[l.folder.Name] = l.read
		}
		switch {
		case l.gone || seen[l.folder.ID]: // the latter is there under both names
		case l.err != nil:
			problems = append(problems, Problem{l.folder.Name, l.err})
		default:
			seen[l.folder.ID] = true
			points = append(points, l.m)
		}
	}
	points.Sort()
	return points, problems, nil
}

// look is what was found in one folder.
type look struct {
	folder Folder
	gone   bool
	read   manifest        // as it is in the file
	m      *chain.Manifest // as it counts now
	err    error
}

// lookAt looks at all folders, several at once.
func (g *Guest) lookAt(folders []Folder, known map[string]manifest) []look {
	looks := make([]look, len(folders))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(len(folders), manifestReaders) {
		wg.Go(func() {
			var room []byte
			for i := next.Add(1) - 1; i < int64(len(folders)); i = next.Add(1) - 1 {
				looks[i] = g.look(folders[i], known, &room)
			}
		})
	}
	wg.Wait()
	return looks
}

func (g *Guest) look(f Folder, known map[string]manifest, room *[]byte) look {
	l := g.lookInto(f, known, room)
	if l.gone && !f.Base {
		// It has become a base meanwhile, perhaps: then points need it.
		l = g.lookInto(FolderOf(&chain.Manifest{ID: f.ID, Base: true}), known, room)
	}
	return l
}

func (g *Guest) lookInto(f Folder, known map[string]manifest, room *[]byte) look {
	l := look{folder: f}
	old, ok := known[f.Name]
	if ok {
		var now unix.Stat_t
		ok = unix.Lstat(g.manifestPath(f), &now) == nil && stampOf(&now) == old.stamp
	}
	if ok {
		l.read = old
	} else {
		l.read = g.readManifest(f, room)
	}
	l.m, l.err = l.read.m, l.read.err
	if l.err == nil {
		l.m, l.err = g.settled(l.m)
	}
	l.gone = errors.Is(l.err, fs.ErrNotExist) && !exists(g.FolderDir(f))
	return l
}

// Read reads the manifest of a point or a base. Where an image is about to get another generation it says what is there
// now.
func (g *Guest) Read(f Folder) (*chain.Manifest, error) {
	m, err := g.Decode(f)
	if err != nil {
		return nil, err
	}
	return g.settled(m)
}

// Decode reads a manifest as it is in its file, with what is under way. It is for who holds the prune lock.
func (g *Guest) Decode(f Folder) (*chain.Manifest, error) {
	read := g.readManifest(f, new([]byte))
	return read.m, read.err
}

// manifestPath is that of the manifest in a folder.
func (g *Guest) manifestPath(f Folder) string { return g.FolderDir(f) + "/" + chain.ManifestFile }

// readManifest reads a manifest as it is in its file. room is used for the text.
func (g *Guest) readManifest(f Folder, room *[]byte) (read manifest) {
	var text []byte
	var err error
	text, read.stamp, err = readInto(*room, g.manifestPath(f), chain.MaxManifest)
	if err != nil {
		read.err = fmt.Errorf("%s/%s: %w", g.Name, f.ID, damage(err))
		return read
	}
	if cap(text) <= usualManifest {
		*room = text[:0]
	}
	m, err := chain.DecodeManifest(text)
	if err != nil {
		read.err = fmt.Errorf("%s/%s: %w", g.Name, f.ID, err)
		return read
	}
	if m.ID != f.ID || m.Guest.Name != g.Name {
		read.err = fmt.Errorf("%s/%s: %w: its manifest is that of %s/%s", g.Name, f.ID, chain.ErrDamaged, m.Guest.Name, m.ID)
		return read
	}
	m.Base = f.Base
	for _, d := range m.Disks {
		if d.Merging != nil && !m.Base {
			read.err = fmt.Errorf("%s/%s: %w: disk %s is said to be merged, but it is no base", g.Name, f.ID, chain.ErrDamaged, d.Name)
			return read
		}
	}
	read.m = m
	return read
}

// settled is a manifest that says which of two generations of an image is there now, which does not show in its file.
func (g *Guest) settled(m *chain.Manifest) (*chain.Manifest, error) {
	if !slices.ContainsFunc(m.Disks, func(d chain.Disk) bool { return d.Next != nil }) {
		return m, nil
	}
	now := *m
	now.Disks = slices.Clone(m.Disks)
	for i := range now.Disks {
		d := &now.Disks[i]
		if d.Next == nil {
			continue
		}
		advanced, err := g.advanced(m.ID, d)
		if err != nil {
			return nil, fmt.Errorf("%s/%s: disk %s: %w", g.Name, m.ID, d.Name, err)
		}
		if advanced {
			d.Advance()
		}
		d.Next = nil
	}
	return &now, nil
}

// readFile reads a file of the repository, following no symbolic link in its last part and reading at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	text, _, err := readInto(nil, path, limit)
	return text, err
}

// readInto is readFile into room, if that is enough. It asks for no more of the system than it needs: of a repository with
// many points most of the time goes there.
func readInto(room []byte, path string, limit int64) ([]byte, stamp, error) {
	// O_NONBLOCK: a FIFO must not hang us.
	fd, err := retry(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, stamp{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if _, err := retry(func() (int, error) { return 0, unix.Fstat(fd, &st) }); err != nil {
		return nil, stamp{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, stamp{}, fmt.Errorf("%w: %s is not a regular file", chain.ErrDamaged, path)
	}
	if st.Size > limit {
		return nil, stamp{}, fmt.Errorf("%w: %s has %d bytes, more than the %d that it can have", chain.ErrDamaged, path, st.Size, limit)
	}
	text := slices.Grow(room[:0], int(st.Size))
	for int64(len(text)) < st.Size {
		n, err := retry(func() (int, error) { return unix.Read(fd, text[len(text):st.Size]) })
		if err != nil {
			return nil, stamp{}, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			break // it was cut off just now
		}
		text = text[:len(text)+n]
	}
	return text, stampOf(&st), nil
}

// retry makes a system call again that a signal has interrupted, as the Go runtime's own do on file systems of some kinds.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// exists reports whether there is something of that name.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
