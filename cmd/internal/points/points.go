// Package points finds what users name: the folder of a set of points, a guest in it, a point of that guest, and disks of the
// point. A name that is not there is met with one that may have been meant.
//
// A set is a repository, or a directory with backups of qmpbackup or virtnbdbackup.
package points

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/cmd/internal/similar"
	"qmchain/internal/ui"
)

// Flags are the flags of commands that read a point.
type Flags struct {
	Repo  string   `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	Disk  []string `conf:"no" placeholder:"D" help:"Only this disk. Can be given several times."`
	Point string   `arg:"" help:"The point: GUEST/latest, GUEST/ID, or GUEST/ and the beginning of an id."`
}

// Point is a point whose disks can be opened.
type Point struct {
	*chain.Manifest
	Set  source.Set
	From *source.Points // the guest's, among them this one

	pool *image.Pool
}

// Disk is a disk that is open.
type Disk struct {
	Name string
	image.Image
}

// Parse reads the name of a point.
func Parse(name string) (chain.Ref, error) {
	ref, err := chain.ParseRef(name)
	if err != nil {
		if chain.CheckGuestName(name) == nil {
			err = ui.Hint(err, fmt.Sprintf("%s/latest is the newest point of guest %s", name, name))
		}
		return chain.Ref{}, ui.Exit(ui.ExitUsage, err)
	}
	return ref, nil
}

// Open finds a point in the set in dir. It is the only place that knows where points come from. Pool bounds what is kept of
// the images that are read; where it does not say how many files may be open, half of what the system allows may be. The
// point is to be closed.
func Open(dir, name string, pool image.PoolOptions) (_ *Point, err error) {
	ref, err := Parse(name)
	if err != nil {
		return nil, err
	}
	set, err := OpenSet(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = set.Close()
		}
	}()
	points, err := Of(set, ref.Guest)
	if err != nil {
		return nil, err
	}
	m, err := points.All.Resolve(ref.Point)
	for _, p := range points.Problems {
		if p.Disk == "" && meant(ref.Point, p.Point, m) {
			return nil, fmt.Errorf("%s: that is a point that can't be read: %w", name, p.Err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", ref.Guest, MeantPoint(err, ref.Point, points.All))
	}
	if pool.MaxFiles == 0 {
		pool.MaxFiles = maxFiles()
	}
	return &Point{m, set, points, image.NewPool(pool)}, nil
}

// maxFiles is how many images may be open: half of what the system allows.
func maxFiles() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0 // the pool's default
	}
	return int(min(limit.Cur/2, 2048))
}

// meant reports whether a user who asks for a point by ref may mean the unreadable one, where found is what else it can
// mean. Silently taking the one before for the latest would be to show, or restore, old data.
func meant(ref, unreadable string, found *chain.Manifest) bool {
	if ref == "latest" {
		return found == nil || unreadable > string(found.ID)
	}
	return strings.HasPrefix(unreadable, ref)
}

// Of looks at the points of a guest, of which there is at least one, though perhaps none that can be read. Else the error
// wraps chain.ErrNoPoint.
func Of(set source.Set, guest string) (*source.Points, error) {
	if err := chain.CheckGuestName(guest); err != nil {
		return nil, ui.Exit(ui.ExitUsage, err)
	}
	g, err := set.Guest(guest)
	if err != nil {
		return nil, MeantGuest(err, guest, set.Guests)
	}
	points, err := g.Points()
	if err != nil {
		return nil, err
	}
	if len(points.All)+len(points.Problems) == 0 {
		return nil, MeantGuest(fmt.Errorf("guest %s has no point in %s: %w", guest, set.Dir(), chain.ErrNoPoint), guest, set.Guests)
	}
	return points, nil
}

// MeantGuest gives an error that wraps chain.ErrNoPoint for a guest the name that may have been meant, or else all names.
func MeantGuest(err error, guest string, all func() ([]string, error)) error {
	if !errors.Is(err, chain.ErrNoPoint) {
		return err
	}
	names, listErr := all()
	if listErr != nil {
		return err
	}
	err = asking(err, guest, names)
	if ui.HintOf(err) == "" && len(names) > 0 && len(names) <= maxNamed {
		err = ui.Hint(err, "there is "+strings.Join(names, ", "))
	}
	return err
}

// maxNamed is how many guests are named where none is like the one that was asked for.
const maxNamed = 10

// MeantPoint does the same for a point, as the user named it, of a guest's points.
func MeantPoint(err error, name string, all chain.Points) error {
	known := []string{"latest"}
	for _, m := range all.Kept() {
		known = append(known, string(m.ID))
	}
	return asking(err, name, known)
}

func asking(err error, name string, known []string) error {
	if question := similar.Question(name, known); question != "" {
		return ui.Hint(err, question)
	}
	return err
}

// Close closes the set. Disks are to be closed before.
func (p *Point) Close() error { return p.Set.Close() }

// Name is how users call it.
func (p *Point) Name() string { return p.Guest.Name + "/" + string(p.ID) }

// Choose returns the disks that are asked for, all if none is.
func (p *Point) Choose(names []string) ([]string, error) {
	var all []string
	for _, d := range p.Disks {
		all = append(all, d.Name)
	}
	if len(names) == 0 {
		return all, nil
	}
	for i, name := range names {
		if !slices.Contains(all, name) {
			return nil, asking(fmt.Errorf("point %s has no disk %q, only %s: %w", p.Name(), name, strings.Join(all, ", "), chain.ErrNoPoint), name, all)
		}
		if slices.Contains(names[:i], name) {
			return nil, ui.Exit(ui.ExitUsage, fmt.Errorf("disk %s is given twice", name))
		}
	}
	return names, nil
}

// OpenDisks opens disks; closeAll closes them.
func (p *Point) OpenDisks(names []string) (disks []Disk, closeAll func(), err error) {
	closeAll = func() {
		for _, d := range disks {
			_ = d.Close() // nothing was written
		}
	}
	for _, name := range names {
		img, err := p.From.OpenDisk(p.pool, p.Manifest, name)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		disks = append(disks, Disk{name, img})
	}
	return disks, closeAll, nil
}

// Damage returns what verify has found wrong with the images that disks are read from, though they can be opened: by the
// disk, errors that wrap chain.ErrDamaged. It looks at no image. Its own error says that what was found is not known.
func (p *Point) Damage(names []string) (found map[string]repo.Verified, err error) {
	damaged, err := source.Damaged(p.Set, p.Guest.Name, p.From)
	found = map[string]repo.Verified{}
	for _, name := range names {
		if v, ok := damaged[p.Ref(name)]; ok {
			found[name] = v
		}
	}
	return found, err
}

// Doubts returns what speaks against disks being what the guest had, though they can be read.
func (p *Point) Doubts(names []string) (doubts []error) {
	for _, w := range p.From.Warnings {
		if w.Point == string(p.ID) && (w.Disk == "" || slices.Contains(names, w.Disk)) {
			doubts = append(doubts, fmt.Errorf("disk %s: %w", w.Disk, w.Err))
		}
	}
	return doubts
}
