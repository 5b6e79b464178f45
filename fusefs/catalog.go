package fusefs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/fusefs/tree"
)

// listAge is how long a guest's list of points is used without a look at the repository. That look is one lstat for each
// point at least, which on a network file system can be a round trip each.
const listAge = time.Second

// errGone is returned for a folder of the tree that is no longer there: the point was removed, or another one has
// taken its id.
var errGone = errors.New("no longer there")

// catalog knows what is in the repository.
type catalog struct {
	repo *repo.Repo
	log  logrus.FieldLogger
	now  func() time.Time

	mu     sync.Mutex
	guests map[string]*guestList
}

func newCatalog(r *repo.Repo, log logrus.FieldLogger, now func() time.Time) *catalog {
	return &catalog{repo: r, log: log, now: now, guests: map[string]*guestList{}}
}

// guestList keeps what was read of one guest. Its lock is held while the repository is read, so that many who ask at
// once cause one reading, and a slow guest's folder does not hold up another's.
type guestList struct {
	mu      sync.Mutex
	current *listing
	known   map[chain.ID]manifest
}

// listing is a guest's folder as it was at one time. It is not changed afterwards, but for what it remembers.
type listing struct {
	guest    *repo.Guest
	at       time.Time
	folder   tree.Stat
	stamp    stamp
	points   []tree.Point
	lineage  chain.Points
	mu       sync.Mutex
	remember map[string]remembered // by path of an image file
}

type remembered struct {
	stat tree.Stat
	ok   bool
}

// manifest is what one reading of a manifest gave, and of which file.
type manifest struct {
	stamp stamp
	m     *chain.Manifest
	err   error
}

// lasting reports whether another reading of the same file would give the same.
func (m manifest) lasting() bool { return m.err == nil || errors.Is(m.err, chain.ErrDamaged) }

// stamp tells one state of a file or folder from another. The zero stamp is that of what is not there.
type stamp struct {
	ino          uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func stampOf(info fs.FileInfo) stamp {
	st := info.Sys().(*syscall.Stat_t)
	return stamp{ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

func statOf(info fs.FileInfo) tree.Stat {
	st := info.Sys().(*syscall.Stat_t)
	return tree.Stat{
		Perm:   tree.Perm{Mode: info.Mode().Perm(), UID: st.Uid, GID: st.Gid},
		Size:   st.Size,
		Blocks: st.Blocks,
		Time:   info.ModTime(),
	}
}

// list returns what a folder of the tree holds.
func (c *catalog) list(p tree.Place) ([]tree.Node, error) {
	switch {
	case p.Guest == "":
		return c.listRoot()
	case p.Point == "":
		l, err := c.guest(p.Guest, false)
		if err != nil {
			return nil, err
		}
		return tree.Points(p.Guest, l.folder, l.points), nil
	}
	l, point, err := c.point(p)
	if err != nil {
		return nil, err
	}
	if p.Files {
		return listFiles(l.guest.PointDir(p.Point), p.UUID)
	}
	contents, err := l.contents(point)
	if err != nil {
		return nil, err
	}
	return tree.PointContents(p.Guest, contents), nil
}

// find returns one node of a folder. Its error is fs.ErrNotExist only if that is certain now.
func (c *catalog) find(p tree.Place, name string) (tree.Node, error) {
	switch {
	case p.Guest == "":
		return c.findGuest(name)
	case p.Point == "":
		return c.findPoint(p.Guest, name)
	}
	nodes, err := c.list(p)
	if err != nil {
		return tree.Node{}, err
	}
	n, ok := tree.Find(nodes, name)
	if !ok {
		return tree.Node{}, fs.ErrNotExist
	}
	return n, nil
}

// root is the mount's own folder.
func (c *catalog) root() (tree.Node, error) {
	info, err := os.Stat(c.repo.Dir)
	if err != nil {
		return tree.Node{}, err
	}
	return tree.Root(statOf(info)), nil
}

func (c *catalog) listRoot() ([]tree.Node, error) {
	names, err := c.repo.Guests()
	if err != nil {
		return nil, err
	}
	nodes := make([]tree.Node, 0, len(names))
	for _, name := range names {
		n, err := c.findGuest(name)
		switch {
		case err == nil:
			nodes = append(nodes, n)
		case !errors.Is(err, fs.ErrNotExist):
			c.log.WithError(err).Warnf("guest %s is not shown", name) // and the others are
		}
	}
	return nodes, nil
}

func (c *catalog) findGuest(name string) (tree.Node, error) {
	g, err := c.repo.Guest(name)
	if err != nil {
		return tree.Node{}, fs.ErrNotExist // nothing can have that name
	}
	info, err := lstatDir(g.Dir)
	if err != nil {
		return tree.Node{}, err
	}
	return tree.Guest(name, statOf(info)), nil
}

// lstatDir looks at a folder; anything else of that name is as good as nothing.
func lstatDir(path string) (fs.FileInfo, error) {
	info, err := os.Lstat(path)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is no folder: %w", path, fs.ErrNotExist)
	}
	return info, err
}

func (c *catalog) findPoint(guest, name string) (tree.Node, error) {
	if name == tree.LatestName {
		l, err := c.guest(guest, false)
		if err != nil {
			return tree.Node{}, err
		}
		if n, ok := tree.Latest(guest, l.folder, l.points); ok {
			return n, nil
		}
		return tree.Node{}, fs.ErrNotExist
	}
	id, err := chain.ParseID(name)
	if err != nil {
		return tree.Node{}, fs.ErrNotExist // nothing can have that name
	}
	for _, fresh := range []bool{false, true} {
		l, err := c.guest(guest, fresh)
		if err != nil {
			return tree.Node{}, err
		}
		if p, ok := l.find(id); ok {
			return tree.PointFolder(guest, p), nil
		}
	}
	return tree.Node{}, fs.ErrNotExist
}

// point finds the point that a place is in.
func (c *catalog) point(p tree.Place) (*listing, tree.Point, error) {
	for _, fresh := range []bool{false, true} {
		l, err := c.guest(p.Guest, fresh)
		if err != nil {
			return nil, tree.Point{}, err
		}
		if point, ok := l.find(p.Point); ok && point.Manifest.UUID == p.UUID {
			return l, point, nil
		}
	}
	return nil, tree.Point{}, fmt.Errorf("%s/%s: %w", p.Guest, p.Point, errGone)
}

// guest returns a guest's points. Without fresh, that may be a list of up to listAge ago, if the folder's own stamp says
// that no point came or went since.
func (c *catalog) guest(name string, fresh bool) (*listing, error) {
	g, err := c.repo.Guest(name)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	list := c.guests[name]
	if list == nil {
		list = &guestList{}
		c.guests[name] = list
	}
	c.mu.Unlock()

	list.mu.Lock()
	defer list.mu.Unlock()
	info, err := lstatDir(g.Dir) // before the folder is read: what changes meanwhile shows next time
	if err != nil {
		list.current, list.known = nil, nil
		return nil, err
	}
	if l := list.current; !fresh && l != nil && l.stamp == stampOf(info) && c.now().Sub(l.at) < listAge {
		return l, nil
	}
	l := &listing{guest: g, at: c.now(), folder: statOf(info), stamp: stampOf(info), remember: map[string]remembered{}}
	if err := list.read(l, c.log); err != nil {
		return nil, err
	}
	list.current = l
	return l, nil
}

// read fills l. A manifest is read again only if its file is not the one that was read before.
func (list *guestList) read(l *listing, log logrus.FieldLogger) error {
	entries, err := os.ReadDir(l.guest.Dir) // sorted by name, as ids are by age
	if err != nil {
		return fmt.Errorf("guest %s: %w", l.guest.Name, err)
	}
	known := make(map[chain.ID]manifest, len(list.known))
	for _, e := range entries {
		id, err := chain.ParseID(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		folder, now, err := look(l.guest.PointDir(id))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		read, ok := list.known[id]
		if same := ok && read.stamp == now; !same || !read.lasting() {
			var m *chain.Manifest
			if err == nil {
				m, err = l.guest.Point(id)
			}
			if err != nil && (!same || err.Error() != read.err.Error()) {
				log.WithError(err).Warnf("point %s/%s can't be read and is not shown", l.guest.Name, id)
			}
			read = manifest{now, m, err}
		}
		known[id] = read
		if read.err == nil {
			l.points = append(l.points, tree.Point{Manifest: read.m, Folder: folder})
			l.lineage = append(l.lineage, read.m)
		}
	}
	list.known = known
	return nil
}

// look looks at a point's folder and at the manifest in it. A manifest that is missing is for repo to complain of.
func look(dir string) (tree.Perm, stamp, error) {
	info, err := lstatDir(dir)
	if err != nil {
		return tree.Perm{}, stamp{}, err
	}
	file, err := os.Lstat(filepath.Join(dir, chain.ManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return statOf(info).Perm, stamp{}, nil
	}
	if err != nil {
		return tree.Perm{}, stamp{}, err
	}
	return statOf(info).Perm, stampOf(file), nil
}

// find returns the point of that id.
func (l *listing) find(id chain.ID) (tree.Point, bool) {
	for _, p := range l.points {
		if p.Manifest.ID == id {
			return p, true
		}
	}
	return tree.Point{}, false
}

// contents looks at what is in a point's folder.
func (l *listing) contents(p tree.Point) (tree.Contents, error) {
	dir := l.guest.PointDir(p.Manifest.ID)
	file, err := os.Lstat(filepath.Join(dir, chain.ManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%s/%s: %w", l.guest.Name, p.Manifest.ID, errGone)
	}
	if err != nil {
		return tree.Contents{}, err
	}
	c := tree.Contents{Point: p, Lineage: l.lineage, Manifest: statOf(file), Image: l.image}
	if info, err := lstatDir(filepath.Join(dir, tree.FilesFolder)); err == nil {
		s := statOf(info)
		c.Files = &s
	}
	return c, nil
}

// image looks at an image file, once for each listing: points of a chain share most of theirs.
func (l *listing) image(layer chain.Layer) (tree.Stat, bool) {
	path := l.guest.ImagePath(layer.Point.ID, layer.Disk.Name)
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.remember[path]
	if !ok {
		if info, err := os.Lstat(path); err == nil {
			r = remembered{statOf(info), true}
		}
		l.remember[path] = r
	}
	return r.stat, r.ok
}

// listFiles lists a point's configuration files: regular files only, as nothing else belongs there.
func listFiles(dir, uuid string) ([]tree.Node, error) {
	entries, err := os.ReadDir(filepath.Join(dir, tree.FilesFolder))
	if err != nil {
		return nil, err
	}
	var nodes []tree.Node
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		nodes = append(nodes, tree.GuestFile(uuid, e.Name(), statOf(info)))
	}
	return nodes, nil
}
