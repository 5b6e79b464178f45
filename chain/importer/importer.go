package importer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/chain/virtnbd"
)

// maxGuestFile bounds the files of a guest that are kept with a point, in bytes.
const maxGuestFile = 16 << 20

var (
	// ErrDiffers is wrapped where an imported point reads as something else than the set's.
	ErrDiffers = errors.New("the imported disk reads as something else")
	// ErrNotForeign is wrapped where a set is a repository of ours.
	ErrNotForeign = errors.New("it is a qmchain repository")
)

// Config is what an import needs.
type Config struct {
	Set    source.Set
	Guest  string   // the guest's name in the repository; empty: its name in the set
	Points []string // ids, beginnings of ids, or "latest", as of GUEST/ID; empty: all
	// Open opens the repository, or makes it.
	Open     func() (*repo.Repo, error)
	LockWait time.Duration // how long to wait for those who make or remove points of the guest
	Verify   bool          // compare each imported disk, every byte, with the set's
	QemuNbd  string        // the program; empty: qemu-nbd
	Log      logrus.FieldLogger
	// Progress, if not nil, is told which point and disk it is at, and how many bytes of all disks are done.
	Progress func(at string, done, total int64)
}

// Imported is one point of the set.
type Imported struct {
	Guest    string
	ID       chain.ID
	There    bool     // it was imported before
	Skipped  bool     // it was not imported at all
	Problems []string // what was left out of it, and why, and what is doubtful in it
}

// Import imports points. It returns what became of each that it came to, also with an error. What was begun when it failed
// is undone; what was imported before stays, and another import goes on there.
func Import(ctx context.Context, cfg Config) ([]Imported, error) {
	im := &importing{Config: cfg, checked: map[string]error{}}
	if im.QemuNbd == "" {
		im.QemuNbd = "qemu-nbd"
	}
	err := im.run(ctx)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return im.done, err
}

// importing is one call of Import.
type importing struct {
	Config
	points *source.Points // of the set
	names  map[string]string
	pool   *image.Pool
	guest  *repo.Guest
	lock   *repo.Lock
	there  chain.Points // in the repository
	done   []Imported

	checked map[string]error // files whose check sums were looked at

	passed, total int64 // bytes of disks
}

// progress is what is told how far a disk is.
func (im *importing) progress(at string) func(done int64) {
	return func(done int64) {
		if im.Progress != nil {
			im.Progress(at, im.passed+done, im.total)
		}
	}
}

func (im *importing) run(ctx context.Context) error {
	if im.Set.Kind() == source.Qmchain {
		return fmt.Errorf("%s: %w", im.Set.Dir(), ErrNotForeign)
	}
	asked, err := im.look()
	if err != nil {
		return err
	}
	r, err := im.Open()
	if err != nil {
		return err
	}
	if im.guest, err = r.Guest(im.Guest); err != nil {
		return err
	}
	unlock, err := im.enter(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	im.pool = image.NewPool(image.PoolOptions{})
	for _, m := range asked {
		im.total += size(m)
	}
	if im.Verify {
		im.total *= 2
	}
	for _, m := range asked {
		before := im.passed
		p := &point{importing: im, from: m, result: Imported{Guest: im.Guest, ID: m.ID}}
		if err := p.run(ctx); err != nil {
			return fmt.Errorf("%s/%s: %w", im.Guest, m.ID, err)
		}
		for _, text := range p.result.Problems {
			im.Log.Warnf("%s/%s: %s", im.Guest, m.ID, text)
		}
		im.done = append(im.done, p.result)
		if im.passed = before + size(m); im.Verify {
			im.passed += size(m)
		}
	}
	return nil
}

// size is that of all disks of a point, in bytes.
func size(m *chain.Manifest) (sum int64) {
	for _, d := range m.Disks {
		sum += d.VirtualSize
	}
	return sum
}

// look reads the set and chooses points.
func (im *importing) look() (asked []*chain.Manifest, err error) {
	guests, err := im.Set.Guests()
	if err != nil {
		return nil, err
	}
	g, err := im.Set.Guest(guests[0]) // there is but one
	if err != nil {
		return nil, err
	}
	if im.Guest == "" {
		im.Guest = g.Name()
	}
	if im.points, err = g.Points(); err != nil {
		return nil, err
	}
	if im.names, err = diskNames(im.points.All); err != nil {
		return nil, err
	}
	if len(im.Points) == 0 {
		if len(im.points.All) == 0 {
			return nil, fmt.Errorf("%s has no point: %w", im.Set.Dir(), chain.ErrNoPoint)
		}
		return im.points.All, nil
	}
	for _, name := range im.Points {
		if guest, id, ok := strings.Cut(name, "/"); ok {
			if guest != g.Name() {
				return nil, fmt.Errorf("%s holds backups of %s, not of %s: %w", im.Set.Dir(), g.Name(), guest, chain.ErrNoPoint)
			}
			name = id
		}
		m, err := im.points.All.Resolve(name)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(asked, m) {
			asked = append(asked, m)
		}
	}
	slices.SortFunc(asked, func(a, b *chain.Manifest) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return asked, nil
}

// diskNames are the names of the set's disks here: disks there can be called anything.
func diskNames(points chain.Points) (map[string]string, error) {
	names, from := map[string]string{}, map[string]string{}
	for _, m := range points {
		for _, d := range m.Disks {
			name := strings.Map(func(r rune) rune {
				if r < 128 && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("._-", r)) {
					return r
				}
				return '_'
			}, d.Name)
			if chain.CheckDiskName(name) != nil {
				name = "disk-" + name
			}
			name = name[:min(len(name), 64)]
			if other, ok := from[name]; ok && other != d.Name {
				return nil, fmt.Errorf("disks %q and %q would both be called %s", other, d.Name, name)
			}
			from[name], names[d.Name] = d.Name, name
		}
	}
	return names, nil
}

// enter takes the guest's locks and looks at what is there.
func (im *importing) enter(ctx context.Context) (unlock func(), err error) {
	lock, err := im.guest.Lock(ctx, im.LockWait)
	if err != nil {
		return nil, err
	}
	prune, err := im.guest.LockPrune(ctx, im.LockWait)
	if err != nil {
		lock.Unlock()
		return nil, err
	}
	im.lock = lock
	unlock = func() { prune.Unlock(); lock.Unlock() }
	err = errors.Join(im.guest.Sync(), im.guest.RemoveIncoming())
	var problems []repo.Problem
	if err == nil {
		im.there, problems, err = im.guest.Points()
	}
	for _, p := range problems {
		if !errors.Is(p.Err, chain.ErrDamaged) {
			err = p.Err // it can't be read just now
		} else {
			im.Log.Warnf("point left out: %v", p.Err)
		}
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// point is the import of one point.
type point struct {
	*importing
	from   *chain.Manifest // in the set
	to     *chain.Manifest // here
	in     *repo.Incoming
	result Imported
}

func (p *point) problem(format string, args ...any) {
	p.result.Problems = append(p.result.Problems, plain(fmt.Sprintf(format, args...)))
}

// plain makes one line of a text, with nothing in it that has a power over terminals: names in a set can be anything.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, strings.ReplaceAll(s, "\n", "; "))
}

// run imports the point. What keeps it or a part of it from being imported, but nothing else, becomes part of the result.
func (p *point) run(ctx context.Context) error {
	if there := p.there.Find(p.from.ID); there != nil {
		p.result.There = there.UUID == p.from.UUID
		if p.result.Skipped = !p.result.There; p.result.Skipped {
			p.problem("not imported: another point is there under this id")
		}
		return nil
	}
	p.to = &chain.Manifest{
		Format: chain.FormatVersion, ID: p.from.ID, UUID: p.from.UUID, Time: p.from.Time, Guest: p.from.Guest,
		Consistency: chain.Unknown,
	}
	p.to.Guest.Name = p.Guest
	if err := repo.CheckGuest(p.there, p.to); err != nil {
		return err
	}
	err := p.make(ctx)
	if p.in != nil {
		if err != nil || p.result.Skipped {
			return errors.Join(err, p.in.Abort())
		}
		p.in.Close()
	}
	return err
}

func (p *point) make(ctx context.Context) error {
	for i := range p.from.Disks {
		d := &p.from.Disks[i]
		err := p.disk(ctx, d)
		if damaged(err) {
			p.problem("disk %s is not imported: %v", d.Name, err)
			continue
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		for _, w := range p.points.Warnings {
			if w.Point == string(p.from.ID) && w.Disk == d.Name {
				p.problem("disk %s: %v", d.Name, w.Err)
			}
		}
	}
	if p.result.Skipped = len(p.to.Disks) == 0; p.result.Skipped {
		return nil
	}
	if err := p.files(); err != nil {
		return err
	}
	p.to.Note = p.note()
	text, err := p.to.Encode()
	if err != nil {
		return err
	}
	if err := p.in.Commit(p.lock, p.to, text); err != nil {
		return err
	}
	p.there = append(p.there, p.to)
	p.there.Sort()
	return nil
}

// maxNote bounds a note, in bytes.
const maxNote = 2000

func (p *point) note() string {
	dir, err := filepath.Abs(p.Set.Dir())
	if err != nil {
		dir = p.Set.Dir()
	}
	parts := append([]string{fmt.Sprintf("imported from %s, %s", p.Set.Kind(), dir)}, p.result.Problems...)
	if p.from.Note != "" {
		parts = slices.Insert(parts, 0, p.from.Note)
	}
	note := plain(strings.Join(parts, "; "))
	return strings.ToValidUTF8(note[:min(len(note), maxNote)], "")
}

// damaged tells what is wrong with a set, and stays so, from all else.
func damaged(err error) bool {
	var own ownError
	if errors.As(err, &own) {
		return false
	}
	for _, e := range []error{
		chain.ErrDamaged, image.ErrChanged, image.ErrNotRegular, qcow2.ErrCorrupt, qcow2.ErrNotQcow2, qcow2.ErrUnsupported,
		virtnbd.ErrCorrupt, virtnbd.ErrNotStream, virtnbd.ErrUnsupported,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// disk imports one disk. What is wrong with it in the set is found by damaged, and nothing of it is left then.
func (p *point) disk(ctx context.Context, d *chain.Disk) error {
	for _, problem := range p.points.Problems {
		if problem.Point == string(p.from.ID) && problem.Disk == d.Name {
			return problem.Err
		}
	}
	if d.VirtualSize <= 0 || d.VirtualSize%512 != 0 {
		return fmt.Errorf("%w: a disk of %d bytes", chain.ErrDamaged, d.VirtualSize)
	}
	if err := p.checkSums(ctx, d.Name); err != nil {
		return err
	}
	now, err := p.points.OpenDisk(p.pool, p.from, d.Name)
	if err != nil {
		return err
	}
	defer now.Close()
	if p.in == nil {
		folder := repo.FolderOf(p.to)
		if p.in, err = p.guest.BeginIncoming(folder, p.to.UUID); err != nil {
			return err
		}
	}
	made := chain.Disk{
		Name: p.names[d.Name], Level: chain.Full, Reason: plain(fmt.Sprintf("imported from %s (%s)", d.File, d.Level)),
		SourceFormat: d.SourceFormat, VirtualSize: d.VirtualSize, File: chain.ImageFile(p.to.ID, p.names[d.Name]),
	}
	old, where, err := p.below(now, d, &made)
	if err != nil {
		return err
	}
	defer where.close()
	if old != nil {
		defer old.Close()
	}
	err = p.image(ctx, &made, &difference{now: now, old: old, size: d.VirtualSize, where: where})
	if damaged(err) {
		if dropErr := p.guest.DropImage(p.to.ID, made.Name); dropErr != nil {
			return dropErr
		}
	}
	if err != nil {
		return err
	}
	p.to.Disks = append(p.to.Disks, made)
	if p.Verify {
		return p.verify(ctx, now, made)
	}
	return nil
}

// checkSums makes sure that no file that a disk is read from has changed since it was written, as far as the set can tell.
func (p *point) checkSums(ctx context.Context, disk string) error {
	layers, err := p.points.All.Layers(p.from, disk)
	if err != nil {
		return err
	}
	for _, l := range layers {
		err, ok := p.checked[l.Disk.File]
		if !ok {
			err = p.points.CheckSums(ctx, l.Point, l.Disk.Name)
			if errors.Is(err, foreign.ErrNoSum) {
				err = nil
			}
			if err == nil || damaged(err) {
				p.checked[l.Disk.File] = err
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// below chooses what a disk's image is made on, the newest older one that was imported, and says so in made. It returns that
// one, nil for a full, and where the disk can differ from it.
func (p *point) below(now image.Image, d *chain.Disk, made *chain.Disk) (old image.Image, where places, err error) {
	for _, m := range slices.Backward(p.there) {
		parent := m.Disk(made.Name)
		before := p.points.All.Find(m.ID)
		if m.Base || m.ID >= p.to.ID || parent == nil || before == nil || before.UUID != m.UUID {
			continue
		}
		if parent.VirtualSize > made.VirtualSize {
			made.Reason += "; a full, as the disk has shrunk"
			break
		}
		old, err = p.guest.OpenDisk(p.pool, p.there, m, made.Name)
		if errors.Is(err, chain.ErrDamaged) {
			p.problem("disk %s: a full, as %s can't be built on: %v", d.Name, m.ID, err)
			break
		}
		if err != nil {
			return nil, nil, err
		}
		if where, err = shared(p.points, p.from, before, d.Name); err != nil {
			_ = old.Close()
			return nil, nil, err
		}
		if where == nil {
			where = anywhere{now, old}
		}
		ref := m.Ref(made.Name)
		made.Level, made.Parent = chain.Inc, &ref
		return old, where, nil
	}
	return nil, anywhere{now: now}, nil
}

// image makes the image of a disk.
func (p *point) image(ctx context.Context, made *chain.Disk, d *difference) error {
	path, err := p.in.CreateImage(ctx, made.Name, made.VirtualSize, made.Parent, repo.ImageOptions{ClusterSize: cluster})
	if err != nil {
		return err
	}
	t, err := openTarget(ctx, p.QemuNbd, path, made.VirtualSize)
	if err != nil {
		return err
	}
	defer t.abort()
	d.out, d.progress = t, p.progress(fmt.Sprintf("%s %s", p.to.ID, made.Name))
	if err := d.write(ctx); err != nil {
		return err
	}
	p.passed += made.VirtualSize
	if err := t.finish(ctx); err != nil {
		return err
	}
	made.Bytes, made.Sums, err = p.in.Finish(ctx, made.Name)
	return err
}

// verify compares a disk with what it was made of.
func (p *point) verify(ctx context.Context, now image.Image, made chain.Disk) error {
	img, err := p.in.OpenDisk(p.pool, p.there, p.to, made.Name)
	if err != nil {
		return ownError{err}
	}
	defer img.Close()
	// What differs would be written.
	d := &difference{
		now: now, old: img, size: made.VirtualSize, where: anywhere{now, img}, out: refuse{},
		progress: p.progress(fmt.Sprintf("%s %s, check", p.to.ID, made.Name)),
	}
	err = d.write(ctx)
	p.passed += made.VirtualSize
	return err
}

// refuse is where nothing is to be written.
type refuse struct{}

func (refuse) write(_ context.Context, p []byte, off int64) error {
	return fmt.Errorf("%w: bytes %d to %d", ErrDiffers, off, off+int64(len(p)))
}

func (refuse) zero(_ context.Context, off, length int64) error {
	return fmt.Errorf("%w: bytes %d to %d", ErrDiffers, off, off+length)
}

// files keeps the guest's configuration files.
func (p *point) files() error {
	files, err := p.points.Files(p.from)
	if err != nil {
		return err
	}
	for _, rel := range files {
		name := strings.Map(func(r rune) rune {
			if r == '/' || !unicode.IsPrint(r) {
				return '_'
			}
			return r
		}, rel)
		data, err := readFile(filepath.Join(p.points.Folder(p.from), rel))
		if err == nil {
			err = repo.CheckGuestFile(name)
		}
		if err != nil {
			p.problem("file %s is not imported: %v", rel, err)
			continue
		}
		if err := p.in.WriteGuestFile(name, data); err != nil {
			return err
		}
	}
	return nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxGuestFile {
		return nil, fmt.Errorf("it is no regular file, or has more than %d bytes", maxGuestFile)
	}
	return io.ReadAll(io.LimitReader(f, maxGuestFile))
}
