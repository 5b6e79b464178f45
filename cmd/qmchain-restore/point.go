package main

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/source"
	"qmchain/internal/ui"
)

// pointFlags are the flags of all commands that read a point.
type pointFlags struct {
	Repo  string   `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	Disk  []string `placeholder:"D" help:"Only this disk. Can be given several times."`
	Point string   `arg:"" help:"The point: GUEST/latest, GUEST/ID, or GUEST/ and the beginning of an id."`
}

// point is a point whose disks can be opened.
type point struct {
	*chain.Manifest
	set  source.Set
	from *source.Points
	pool *image.Pool
}

// name is how users call it.
func (p *point) name() string { return p.Guest.Name + "/" + string(p.ID) }

// openPoint finds a point. It is the only place that knows where points come from. The point is to be closed.
func openPoint(dir, name string) (_ *point, err error) {
	ref, err := chain.ParseRef(name)
	if err != nil {
		return nil, ui.Exit(ui.ExitUsage, err)
	}
	set, err := source.Open(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = set.Close()
		}
	}()
	g, err := set.Guest(ref.Guest)
	if err != nil {
		return nil, err
	}
	points, err := g.Points()
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
		return nil, fmt.Errorf("guest %s: %w", ref.Guest, err)
	}
	// One run reads everything once: there is little to keep, but the files of a long chain are better left open.
	pool := image.NewPool(image.PoolOptions{MaxFiles: maxFiles(), MaxMeta: 32 << 20, MaxClusters: 16 << 20})
	return &point{m, set, points, pool}, nil
}

// maxFiles is how many images may be open: half of what the system allows.
func maxFiles() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0 // the pool's default
	}
	return int(min(limit.Cur/2, 2048))
}

func (p *point) close() error { return p.set.Close() }

// meant reports whether a user who asks for a point by ref may mean the unreadable one, where found is what else it can
// mean. Silently taking the one before for the latest would be a restore of old data.
func meant(ref, unreadable string, found *chain.Manifest) bool {
	if ref == "latest" {
		return found == nil || unreadable > string(found.ID)
	}
	return strings.HasPrefix(unreadable, ref)
}

// choose returns the disks that are asked for, all if none is.
func (p *point) choose(names []string) ([]string, error) {
	var all []string
	for _, d := range p.Disks {
		all = append(all, d.Name)
	}
	if len(names) == 0 {
		return all, nil
	}
	for i, name := range names {
		if !slices.Contains(all, name) {
			return nil, fmt.Errorf("point %s has no disk %q, only %s: %w", p.name(), name, strings.Join(all, ", "), chain.ErrNoPoint)
		}
		if slices.Contains(names[:i], name) {
			return nil, ui.Exit(ui.ExitUsage, fmt.Errorf("disk %s is given twice", name))
		}
	}
	return names, nil
}

// openDisk is a disk that is open.
type openDisk struct {
	name string
	image.Image
}

// openDisks opens disks; closeAll closes them.
func (p *point) openDisks(names []string) (disks []openDisk, closeAll func(), err error) {
	closeAll = func() {
		for _, d := range disks {
			_ = d.Close() // nothing was written
		}
	}
	for _, name := range names {
		img, err := p.from.OpenDisk(p.pool, p.Manifest, name)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		disks = append(disks, openDisk{name, img})
	}
	return disks, closeAll, nil
}

// doubts returns what speaks against disks being what the guest had, though they can be read.
func (p *point) doubts(names []string) (doubts []error) {
	for _, w := range p.from.Warnings {
		if w.Point == string(p.ID) && (w.Disk == "" || slices.Contains(names, w.Disk)) {
			doubts = append(doubts, fmt.Errorf("disk %s: %w", w.Disk, w.Err))
		}
	}
	return doubts
}
