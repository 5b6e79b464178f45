// Package source is where points are read from, whoever wrote them: a qmchain
// repository, or a set of qmpbackup or virtnbdbackup. What lists, checks, restores and
// mounts points works on it and need not know which it is.
//
// Open tells by the files in a directory whose it is, never by its name.
package source

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
)

// Kind is the program that writes a set.
type Kind string

// Whose a set can be.
const (
	Qmchain       Kind = "qmchain"
	Qmpbackup     Kind = Kind(foreign.Qmpbackup)
	Virtnbdbackup Kind = Kind(foreign.Virtnbdbackup)
)

// Set is a directory with points. Its methods may be called concurrently, and those of
// its guests too.
type Set interface {
	// Dir is the directory's path, as it was given.
	Dir() string
	Kind() Kind
	// Guests returns the names of all guests, sorted.
	Guests() ([]string, error)
	// Guest returns the guest of that name; each time the same, which remembers what it
	// has read. A repository's guest need not exist: it has no points then. A foreign set
	// has but one, and any other wraps chain.ErrNoPoint.
	Guest(name string) (Guest, error)
	Close() error
}

// Guest is one guest of a set.
type Guest interface {
	Name() string
	// Set is the one that it is in; of a guest of several sets the one with it.
	Set() Set
	// Dir is the folder that its points come and go in.
	Dir() string
	// Points looks at what points there are now. What has not changed since the last look
	// is not read again.
	Points() (*Points, error)
}

// Points is what a guest had when it was looked at. It does not change.
type Points struct {
	// All points that can be told from one another, oldest first, and those that were
	// removed but that others need: All.Kept leaves these out. A foreign point's manifest
	// has what its set knows: no sums, tracking, QEMU or consistency, and files relative to
	// the set.
	All chain.Points
	// Problems are points that can't be read and are not in All, and disks of points that
	// are refused. They wrap chain.ErrDamaged, but where something can't be read just now.
	Problems []chain.Problem
	// Warnings are disks that can be read, but that may not be what the guest had: they
	// wrap foreign.ErrOrder, foreign.ErrZeroes or foreign.ErrSize.
	Warnings []chain.Problem

	Reader
}

// Reader reads what is in points.
type Reader interface {
	// Folder is the path of the folder that a point's own files are in.
	Folder(point *chain.Manifest) string
	// Files returns the paths of those that are not images, relative to the folder: of
	// the manifest, if it is a file, and of the guest's configuration.
	Files(point *chain.Manifest) ([]string, error)
	// Image names the file that one layer is in, by its path and relative to the set, and
	// its format; false if it has none.
	Image(layer chain.Layer) (image.Layer, bool)
	// OpenDisk opens a disk of a point as a read-only image. What is missing wraps
	// chain.ErrNoPoint; what is refused, or is not what it was, chain.ErrDamaged.
	OpenDisk(pool *image.Pool, point *chain.Manifest, disk string) (image.Image, error)
	// CheckSums compares the image of a disk in a point, but not those below it, with the
	// check sums that are stored with it: what differs wraps chain.ErrDamaged,
	// foreign.ErrNoSum says that there are none.
	CheckSums(ctx context.Context, point *chain.Manifest, disk string) error
}

// Open opens the set in a directory. A directory without one wraps
// repo.ErrNotRepository.
func Open(dir string) (Set, error) {
	r, err := repo.Open(dir, durable.FS{})
	if err == nil {
		return newRepoSet(r), nil
	}
	if !errors.Is(err, repo.ErrNotRepository) {
		return nil, err
	}
	s, err := foreign.Open(dir)
	if errors.Is(err, foreign.ErrNotSet) {
		return nil, fmt.Errorf("%s: %w: there is neither qmchain.json nor a backup of qmpbackup or virtnbdbackup", dir, repo.ErrNotRepository)
	}
	if err != nil {
		return nil, err
	}
	return &foreignSet{s}, nil
}

// foreignSet is a set with one guest.
type foreignSet struct{ set *foreign.Set }

var (
	_ Set    = (*foreignSet)(nil)
	_ Guest  = (*foreignGuest)(nil)
	_ Reader = (*foreign.Points)(nil)
)

func (s *foreignSet) Dir() string               { return s.set.Dir() }
func (s *foreignSet) Kind() Kind                { return Kind(s.set.Kind()) }
func (s *foreignSet) Guests() ([]string, error) { return []string{s.set.Guest()}, nil }
func (s *foreignSet) Close() error              { return s.set.Close() }

func (s *foreignSet) Guest(name string) (Guest, error) {
	if name != s.set.Guest() {
		return nil, fmt.Errorf("guest %q: %w: %s holds backups of %s", name, chain.ErrNoPoint, filepath.Base(s.set.Dir()), s.set.Guest())
	}
	return (*foreignGuest)(s), nil
}

// foreignGuest is the guest of a foreignSet.
type foreignGuest foreignSet

func (g *foreignGuest) Name() string { return g.set.Guest() }
func (g *foreignGuest) Set() Set     { return (*foreignSet)(g) }
func (g *foreignGuest) Dir() string  { return g.set.Dir() }

func (g *foreignGuest) Points() (*Points, error) {
	p, err := g.set.Points()
	if err != nil {
		return nil, err
	}
	return &Points{All: p.All, Problems: p.Problems, Warnings: p.Warnings, Reader: p}, nil
}
