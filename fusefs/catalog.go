package fusefs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/source"
	"qmchain/fusefs/tree"
)

// listAge is how long a guest's list of points is used without a look at the set. That look is one lstat for each point
// at least, which on a network file system can be a round trip each.
const listAge = time.Second

// errGone is returned for a folder of the tree that is no longer there: the point was removed, or another one has
// taken its id.
var errGone = errors.New("no longer there")

// catalog knows what is in the set.
type catalog struct {
	set source.Set
	log logrus.FieldLogger
	now func() time.Time

	mu     sync.Mutex
	guests map[string]*guestList
}

func newCatalog(set source.Set, log logrus.FieldLogger, now func() time.Time) *catalog {
	return &catalog{set: set, log: log, now: now, guests: map[string]*guestList{}}
}

// guestList keeps what was read of one guest. Its lock is held while the set is read, so that many who ask at once cause
// one reading, and a slow guest's folder does not hold up another's.
type guestList struct {
	mu      sync.Mutex
	current *listing
	said    map[string]bool // what the log was told of the last look
}

// listing is what a guest had at one time. It is not changed afterwards, but for what it remembers.
type listing struct {
	guest  string
	at     time.Time
	folder tree.Stat
	stamp  stamp
	from   *source.Points
	points []tree.Point // that are shown, oldest first
	wrong  []chain.Problem

	mu       sync.Mutex
	remember map[string]remembered  // by path of an image file
	passed   map[string][]pointFile // by uuid of a point
}

type remembered struct {
	stat tree.Stat
	ok   bool
}

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
		return l.listFiles(point)
	}
	contents, err := c.contents(l, point)
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
	info, err := os.Stat(c.set.Dir())
	if err != nil {
		return tree.Node{}, err
	}
	return tree.Root(statOf(info)), nil
}

func (c *catalog) listRoot() ([]tree.Node, error) {
	names, err := c.set.Guests()
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
	g, err := c.set.Guest(name)
	if err != nil {
		return tree.Node{}, fs.ErrNotExist // nothing can have that name
	}
	info, err := c.statDir(g.Dir())
	if err != nil {
		return tree.Node{}, err
	}
	return tree.Guest(name, statOf(info)), nil
}

// statDir looks at a folder of the set. To the set's own directory, which in a foreign set is the guest's and the points'
// too, a link may lead: the user has named it.
func (c *catalog) statDir(path string) (fs.FileInfo, error) {
	if path == c.set.Dir() {
		return os.Stat(path)
	}
	return lstatDir(path)
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
	g, err := c.set.Guest(name)
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
	info, err := c.statDir(g.Dir()) // before the points are read: what changes meanwhile shows next time
	if err != nil {
		list.current = nil
		return nil, err
	}
	if l := list.current; !fresh && l != nil && l.stamp == stampOf(info) && c.now().Sub(l.at) < listAge {
		return l, nil
	}
	l := &listing{
		guest: name, at: c.now(), folder: statOf(info), stamp: stampOf(info),
		remember: map[string]remembered{}, passed: map[string][]pointFile{},
	}
	if l.from, err = g.Points(); err != nil {
		return nil, err
	}
	l.wrong = l.from.Problems
	for _, m := range l.from.All.Kept() {
		info, err := c.statDir(l.from.Folder(m))
		switch {
		case err == nil:
			l.points = append(l.points, tree.Point{Manifest: m, Folder: statOf(info).Perm})
		case !errors.Is(err, fs.ErrNotExist): // removed meanwhile
			l.wrong = append(slices.Clip(l.wrong), chain.Problem{Point: string(m.ID), Err: err})
		}
	}
	list.tell(c.log, l)
	list.current = l
	return l, nil
}

// tell logs what is wrong with the points, and only what the last look has not found already. What makes many disks
// doubtful is said once.
func (list *guestList) tell(log logrus.FieldLogger, l *listing) {
	said := make(map[string]bool, len(list.said))
	say := func(key, text string) {
		if !said[key] && !list.said[key] {
			log.Warn(text)
		}
		said[key] = true
	}
	for _, p := range l.wrong {
		text := fmt.Sprintf("point %s/%s can't be read and is not shown: %v", l.guest, p.Point, p.Err)
		if p.Disk != "" {
			text = fmt.Sprintf("point %s/%s: disk %s can't be read: %v", l.guest, p.Point, p.Disk, p.Err)
		}
		say(text, text)
	}
	disks := map[string]int{}
	for _, w := range l.from.Warnings {
		disks[w.Err.Error()]++
	}
	for _, w := range l.from.Warnings {
		why, more := w.Err.Error(), ""
		if n := disks[why]; n > 1 {
			more = fmt.Sprintf(", and %d more disks or points", n-1)
		}
		say(why, fmt.Sprintf("point %s/%s: disk %s%s: %s", l.guest, w.Point, w.Disk, more, why))
	}
	list.said = said
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

// contents looks at what there is of a point.
func (c *catalog) contents(l *listing, p tree.Point) (tree.Contents, error) {
	out := tree.Contents{Point: p, Lineage: l.from.All, Image: l.image}
	files, err := l.files(p.Manifest)
	if err != nil {
		return tree.Contents{}, err
	}
	for _, f := range files {
		if f.path == chain.ManifestFile {
			out.Manifest = &f.stat
			continue
		}
		if out.Files != nil {
			continue
		}
		info, err := c.statDir(filepath.Join(l.from.Folder(p.Manifest), filepath.Dir(f.path)))
		if err != nil {
			return tree.Contents{}, fmt.Errorf("%s/%s: %w", l.guest, p.Manifest.ID, err)
		}
		s := statOf(info)
		out.Files = &s
	}
	return out, nil
}

// pointFile is a file of a point that is no image.
type pointFile struct {
	path string // in the point's folder
	stat tree.Stat
}

// files looks at the files of a point that are passed through, once for each listing: each name that is looked up in a
// point needs them. They are regular files that no link leads out of the point's folder to.
func (l *listing) files(m *chain.Manifest) ([]pointFile, error) {
	l.mu.Lock()
	files, ok := l.passed[m.UUID]
	l.mu.Unlock()
	if ok {
		return files, nil
	}
	files, err := lookAt(l.from, m)
	if errors.Is(err, fs.ErrNotExist) {
		err = errGone
	}
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", l.guest, m.ID, err)
	}
	l.mu.Lock()
	l.passed[m.UUID] = files
	l.mu.Unlock()
	return files, nil
}

func lookAt(from *source.Points, m *chain.Manifest) ([]pointFile, error) {
	paths, err := from.Files(m)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(from.Folder(m))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var files []pointFile
	for _, path := range paths {
		info, err := root.Lstat(path)
		switch {
		case path == chain.ManifestFile && err != nil:
			return nil, err
		case err == nil && info.Mode().IsRegular():
			files = append(files, pointFile{path, statOf(info)})
		}
	}
	return files, nil
}

// listFiles lists a point's configuration files.
func (l *listing) listFiles(p tree.Point) ([]tree.Node, error) {
	files, err := l.files(p.Manifest)
	if err != nil {
		return nil, err
	}
	var nodes []tree.Node
	for _, f := range files {
		if f.path != chain.ManifestFile {
			nodes = append(nodes, tree.GuestFile(p.Manifest.UUID, f.path, f.stat))
		}
	}
	return nodes, nil
}

// image looks at an image file, once for each listing: points of a chain share most of theirs.
func (l *listing) image(layer chain.Layer) (tree.Stat, bool) {
	at, ok := l.from.Image(layer)
	if !ok {
		return tree.Stat{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.remember[at.Path]
	if !ok {
		if info, err := os.Lstat(at.Path); err == nil {
			r = remembered{statOf(info), true}
		}
		l.remember[at.Path] = r
	}
	return r.stat, r.ok
}
