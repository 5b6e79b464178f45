package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/fusefs/partition"
	"qmchain/fusefs/tree"
)

// listAge is how long a guest's list of points is used without a look at the set. That look is one lstat for each point
// at least, which on a network file system can be a round trip each.
const listAge = time.Second

// maxListed bounds how many points the lists of all guests together have, of those that were looked at last. A list that was
// dropped is made again.
const maxListed = 10_000

// errGone is returned for a folder of the tree that is no longer there: the point was removed, or another one has
// taken its id.
var errGone = errors.New("no longer there")

// catalog knows what is in the set.
type catalog struct {
	home *home
	log  logrus.FieldLogger
	now  func() time.Time

	// partitions returns what partition tables say of disks of a point; nil: nobody looks.
	partitions func(ctx context.Context, p tree.Place, disks []string) map[string]found

	rootFolder rootFolder

	maxListed int

	mu     sync.Mutex
	guests map[string]*guestList
	recent []*guestList // those that have a list, the one that was made last at the end

	looks, kept atomic.Uint64 // for a guest's points: at the set; that found a list young enough
}

func newCatalog(set source.Set, log logrus.FieldLogger, now func() time.Time) *catalog {
	return &catalog{home: newHome(set, log), log: log, now: now, maxListed: maxListed, guests: map[string]*guestList{}}
}

// guestList keeps what was read of one guest. Its lock is held while the set is read, so that many who ask at once cause
// one reading, and a slow guest's folder does not hold up another's.
type guestList struct {
	mu      sync.Mutex
	current atomic.Pointer[listing] // nil: to be made
	said    map[string]bool         // what the log was told of the last look

	points int // in current; under the catalog's lock
}

// listing is what a guest had at one time. It is not changed afterwards, but for what it remembers.
type listing struct {
	guest  string
	at     time.Time
	folder tree.Stat
	stamp  stamp
	from   *source.Points
	set    source.Set
	points []tree.Point     // that are shown, oldest first
	byID   map[chain.ID]int // in points
	wrong  []chain.Problem

	mu       sync.Mutex
	remember map[*chain.Disk]remembered // of its image file
	passed   map[string][]pointFile     // by uuid of a point

	verified sync.Once
	damaged  repo.Damaged
	unknown  error // why what is damaged is not known
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

// list returns what a folder of the tree holds. A point's partitions are among it as far as they are found in time.
func (c *catalog) list(ctx context.Context, p tree.Place) ([]tree.Node, error) {
	nodes, err := c.listNow(ctx, p)
	return nodes, c.certain(len(nodes) == 0, err)
}

// find returns one node of a folder. Its error is fs.ErrNotExist only if that is certain now.
func (c *catalog) find(ctx context.Context, p tree.Place, name string) (tree.Node, error) {
	n, err := c.findNow(ctx, p, name)
	return n, c.certain(false, err)
}

// certain makes sure that the set is there if something in it seems not to be: what is below a share that was unmounted
// must not pass for a set without points.
func (c *catalog) certain(nothing bool, err error) error {
	if nothing && err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, errGone) {
		if _, away := c.home.now(); away != nil {
			return away
		}
	}
	return err
}

func (c *catalog) listNow(ctx context.Context, p tree.Place) ([]tree.Node, error) {
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
	if c.partitions != nil {
		contents.Partitions = map[string][]partition.Partition{}
		var disks []string
		for _, d := range point.Manifest.Disks {
			disks = append(disks, d.Name)
		}
		for disk, f := range c.partitions(ctx, p, disks) {
			contents.Partitions[disk] = f.parts // what went wrong is in the log
		}
	}
	return tree.PointContents(p.Guest, contents), nil
}

func (c *catalog) findNow(ctx context.Context, p tree.Place, name string) (tree.Node, error) {
	switch {
	case p.Guest == "":
		return c.findGuest(name)
	case p.Point == "":
		return c.findPoint(p.Guest, name)
	case p.Files:
		nodes, err := c.listNow(ctx, p)
		return pick(nodes, name, err)
	}
	l, point, err := c.point(p)
	if err != nil {
		return tree.Node{}, err
	}
	contents, err := c.contents(l, point)
	if err != nil {
		return tree.Node{}, err
	}
	// Only a name that says so costs a look into a disk, and only into that one.
	disk, ok := tree.PartitionDisk(point.Manifest, name)
	if ok && c.partitions != nil {
		f := c.partitions(ctx, p, []string{disk})[disk]
		if f.err != nil {
			return tree.Node{}, f.err
		}
		contents.Partitions = map[string][]partition.Partition{disk: f.parts}
	}
	return pick(tree.PointContents(p.Guest, contents), name, nil)
}

func pick(nodes []tree.Node, name string, err error) (tree.Node, error) {
	if err != nil {
		return tree.Node{}, err
	}
	n, ok := tree.Find(nodes, name)
	if !ok {
		return tree.Node{}, fs.ErrNotExist
	}
	return n, nil
}

// attributes returns the extended attributes of a node that is in that folder.
func (c *catalog) attributes(in tree.Place, n tree.Node) (tree.Attributes, error) {
	switch {
	case n.Kind == tree.Dir && n.Place.Guest != "" && n.Place.Point == "":
		l, err := c.guest(n.Place.Guest, false)
		if err != nil {
			return nil, err
		}
		return tree.GuestAttributes(l.guest, string(l.set.Kind()), l.points), nil
	case n.Kind == tree.Dir && n.Place.Point != "" && !n.Place.Files:
		_, point, err := c.point(n.Place)
		if err != nil {
			return nil, err
		}
		return tree.PointAttributes(n.Place.Guest, point.Manifest), nil
	case n.Kind != tree.Disk:
		return nil, nil
	}
	l, point, err := c.point(in)
	if err != nil {
		return nil, err
	}
	d := point.Manifest.Disk(n.Disk)
	if d == nil {
		return nil, fmt.Errorf("%s/%s: disk %s: %w", in.Guest, in.Point, n.Disk, errGone)
	}
	at, _ := l.from.Image(chain.Layer{Point: point.Manifest, Disk: d})
	return tree.DiskAttributes(in.Guest, point.Manifest, d, at.Name, l.warning(point.Manifest, d.Name), n.Partition), nil
}

// rootPatience is how long the attributes of the root wait for a look at the set's directory.
const rootPatience = 500 * time.Millisecond

// root is the mount's own folder. While the set is out of reach it is as it was: umount(8), mountpoint(1) and who lists the
// folder above ask for it, and are to have an answer. Only the first answer can fail.
func (c *catalog) root() (tree.Node, error) {
	r := &c.rootFolder
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.looking == nil { // else the last look has not come back: no second one that hangs
		looking := make(chan error, 1)
		r.looking = looking
		go func() {
			_, err := c.home.now()
			var info fs.FileInfo
			if err == nil {
				info, err = os.Stat(c.home.dir)
			}
			if err == nil {
				n := tree.Root(statOf(info))
				r.last.Store(&n)
			}
			looking <- err
		}()
	}
	var err error
	select {
	case err = <-r.looking:
		r.looking = nil
	case <-time.After(rootPatience):
		err = fmt.Errorf("%s: %w", c.home.dir, source.ErrAway)
	}
	if n := r.last.Load(); n != nil {
		return *n, nil
	}
	return tree.Node{}, err
}

// rootFolder is what is known of the root.
type rootFolder struct {
	mu      sync.Mutex
	looking chan error // of the look that is under way, if any
	last    atomic.Pointer[tree.Node]
}

func (c *catalog) listRoot() ([]tree.Node, error) {
	set, err := c.home.now()
	if err != nil {
		return nil, err
	}
	names, err := set.Guests()
	if err != nil {
		return nil, err
	}
	nodes := make([]tree.Node, 0, len(names))
	for _, name := range names {
		n, err := c.findGuest(name)
		switch {
		case err == nil:
			nodes = append(nodes, n)
		case errors.Is(err, source.ErrAway): // of several sets one: its guests don't go, but can't be looked at
			nodes = append(nodes, tree.Guest(name, tree.Stat{}))
		case !errors.Is(err, fs.ErrNotExist):
			c.log.WithField("guest", name).WithError(err).Warnf("guest %s is not shown", name) // and the others are
		}
	}
	return nodes, nil
}

func (c *catalog) findGuest(name string) (tree.Node, error) {
	set, err := c.home.now()
	if err != nil {
		return tree.Node{}, err
	}
	if source.Hangs(set, name) { // its folder is there to see, and who goes into it waits
		return c.seen(name), nil
	}
	g, err := set.Guest(name)
	if errors.Is(err, source.ErrAway) {
		return tree.Node{}, err
	}
	if err != nil {
		return tree.Node{}, fs.ErrNotExist // nothing can have that name
	}
	info, err := c.statDir(g.Dir())
	if err != nil {
		return tree.Node{}, err
	}
	return tree.Guest(name, statOf(info)), nil
}

// seen is a guest's folder as it was when it was looked at last.
func (c *catalog) seen(name string) tree.Node {
	c.mu.Lock()
	list := c.guests[name]
	c.mu.Unlock()
	if list != nil {
		if l := list.current.Load(); l != nil {
			return tree.Guest(name, l.folder)
		}
	}
	return tree.Guest(name, tree.Stat{})
}

// statDir looks at a folder of the set. To the set's own directory, which in a foreign set is the guest's and the points'
// too, a link may lead: the user has named it.
func (c *catalog) statDir(path string) (fs.FileInfo, error) {
	if path == c.home.dir {
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
	set, err := c.home.now()
	if err != nil {
		return nil, err
	}
	g, err := set.Guest(name)
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
		list.current.Store(nil)
		return nil, err
	}
	if l := list.current.Load(); !fresh && l != nil && l.set == g.Set() && l.stamp == stampOf(info) && c.now().Sub(l.at) < listAge {
		c.kept.Add(1)
		return l, nil
	}
	c.looks.Add(1)
	l := &listing{
		guest: name, at: c.now(), folder: statOf(info), stamp: stampOf(info), set: g.Set(), byID: map[chain.ID]int{},
		remember: map[*chain.Disk]remembered{}, passed: map[string][]pointFile{},
	}
	if l.from, err = g.Points(); err != nil {
		c.home.doubt(err)
		return nil, err
	}
	l.wrong = l.from.Problems
	for _, m := range l.from.All.Kept() {
		info, err := c.statDir(l.from.Folder(m))
		switch {
		case err == nil:
			l.byID[m.ID] = len(l.points)
			l.points = append(l.points, tree.Point{Manifest: m, Folder: statOf(info).Perm})
		case !errors.Is(err, fs.ErrNotExist): // removed meanwhile
			l.wrong = append(slices.Clip(l.wrong), chain.Problem{Point: string(m.ID), Err: err})
		}
	}
	if err := c.there(name); err != nil {
		return nil, err // what was not found may only be out of sight
	}
	list.tell(c.log, l)
	list.current.Store(l)
	c.made(list, len(l.points))
	return l, nil
}

// there returns an error if a guest's set is not in its place.
func (c *catalog) there(guest string) error {
	set, err := c.home.now()
	if err == nil {
		_, err = set.Guest(guest)
	}
	return err
}

// made notes that a list was made just now, and drops others if they are too many.
func (c *catalog) made(list *guestList, points int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent = append(slices.DeleteFunc(c.recent, func(l *guestList) bool { return l == list }), list)
	list.points = points
	sum := 0
	for _, l := range c.recent {
		sum += l.points
	}
	for sum > c.maxListed && len(c.recent) > 1 {
		c.recent[0].current.Store(nil) // who uses it just now goes on
		sum -= c.recent[0].points
		c.recent = c.recent[1:]
	}
}

// tell logs what is wrong with the points, and only what the last look has not found already. What makes many disks
// doubtful is said once.
func (list *guestList) tell(log logrus.FieldLogger, l *listing) {
	said := make(map[string]bool, len(list.said))
	say := func(p chain.Problem, key, text string) {
		if !said[key] && !list.said[key] {
			fields := logrus.Fields{"guest": l.guest, "point": p.Point}
			if p.Disk != "" {
				fields["disk"] = p.Disk
			}
			log.WithFields(fields).Warn(text)
		}
		said[key] = true
	}
	for _, p := range l.wrong {
		text := fmt.Sprintf("point %s/%s can't be read and is not shown: %v", l.guest, p.Point, p.Err)
		if p.Disk != "" {
			text = fmt.Sprintf("point %s/%s: disk %s can't be read: %v", l.guest, p.Point, p.Disk, p.Err)
		}
		say(p, text, text)
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
		say(w, why, fmt.Sprintf("point %s/%s: disk %s%s: %s", l.guest, w.Point, w.Disk, more, why))
	}
	list.said = said
}

// find returns the point of that id.
func (l *listing) find(id chain.ID) (tree.Point, bool) {
	i, ok := l.byID[id]
	if !ok {
		return tree.Point{}, false
	}
	return l.points[i], true
}

// warning is what there is to know of a disk that can be read.
func (l *listing) warning(m *chain.Manifest, disk string) string {
	if found, _ := l.damage(); found != nil {
		if v, ok := found[m.Ref(disk)]; ok {
			return v.String()
		}
	}
	for _, w := range l.from.Warnings {
		if w.Point == string(m.ID) && w.Disk == disk {
			return w.Err.Error()
		}
	}
	return ""
}

// damage is what verify has found. It is looked at when the first disk of the list is opened, or asked about: to list points
// needs none of it.
func (l *listing) damage() (repo.Damaged, error) {
	l.verified.Do(func() {
		if len(l.from.All) > 0 {
			l.damaged, l.unknown = source.Damaged(l.set, l.from.All[0].Guest.Name, l.from)
		}
	})
	return l.damaged, l.unknown
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
			nodes = append(nodes, tree.GuestFile(l.guest, p.Manifest.UUID, f.path, f.stat))
		}
	}
	return nodes, nil
}

// image looks at an image file, once for each listing: points of a chain share most of theirs.
func (l *listing) image(layer chain.Layer) (tree.Stat, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.remember[layer.Disk]
	if !ok {
		if at, is := l.from.Image(layer); is {
			if info, err := os.Lstat(at.Path); err == nil {
				r = remembered{statOf(info), true}
			}
		}
		l.remember[layer.Disk] = r
	}
	return r.stat, r.ok
}
