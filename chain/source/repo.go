package source

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

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
)

// maxKnown bounds how many manifests, of all guests together, are kept for the next look: those of the guests that were looked
// at last. One of two disks takes a kilobyte. What was forgotten is read again.
const maxKnown = 10_000

// repoSet is a qmchain repository.
type repoSet struct {
	repo *repo.Repo

	maxKnown int

	mu     sync.Mutex
	guests map[string]*repoGuest
	recent []recent // guests that know something, the one that was looked at last at the end
}

// recent is a guest that was looked at.
type recent struct {
	guest *repoGuest
	known int // manifests
}

var (
	_ Set    = (*repoSet)(nil)
	_ Guest  = (*repoGuest)(nil)
	_ Reader = (*repoPoints)(nil)
)

func newRepoSet(r *repo.Repo) *repoSet {
	return &repoSet{repo: r, maxKnown: maxKnown, guests: map[string]*repoGuest{}}
}

// Repository returns the qmchain repository that a set is; nil if it is a foreign one.
func Repository(s Set) *repo.Repo {
	if r, ok := s.(*repoSet); ok {
		return r.repo
	}
	return nil
}

// Damaged is what verify has found damaged of a guest's points, and not found good since. It looks at no image. Of a foreign set
// nobody keeps it.
func Damaged(s Set, guest string, of *Points) (repo.Damaged, error) {
	r := Repository(s)
	if r == nil {
		return nil, nil
	}
	g, err := r.Guest(guest)
	if err != nil {
		return nil, err
	}
	return g.Damaged(of.All)
}

func (s *repoSet) Dir() string               { return s.repo.Dir }
func (s *repoSet) Kind() Kind                { return Qmchain }
func (s *repoSet) Guests() ([]string, error) { return s.repo.Guests() }
func (s *repoSet) Close() error              { return nil }

func (s *repoSet) Guest(name string) (Guest, error) {
	g, err := s.repo.Guest(name)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.guests[name] == nil {
		s.guests[name] = &repoGuest{set: s, guest: g}
	}
	return s.guests[name], nil
}

// looked notes that a guest was looked at just now, and has others forget what is too much.
func (s *repoSet) looked(g *repoGuest, known int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recent = slices.DeleteFunc(s.recent, func(r recent) bool { return r.guest == g })
	s.recent = append(s.recent, recent{g, known})
	sum := 0
	for _, r := range s.recent {
		sum += r.known
	}
	for sum > s.maxKnown && len(s.recent) > 1 { // one that has more is looked at quickly all the same
		s.recent[0].guest.known.Store(nil)
		sum -= s.recent[0].known
		s.recent = s.recent[1:]
	}
}

// repoGuest is one guest's folder.
type repoGuest struct {
	set   *repoSet
	guest *repo.Guest

	mu    sync.Mutex // of one look at a time
	known atomic.Pointer[repo.Known]
}

func (g *repoGuest) Name() string { return g.guest.Name }
func (g *repoGuest) Set() Set     { return g.set }
func (g *repoGuest) Dir() string  { return g.guest.Dir }

func (g *repoGuest) Points() (*Points, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	known := g.known.Load()
	if known == nil {
		known = &repo.Known{}
	}
	all, problems, err := g.guest.Look(known)
	if err != nil {
		return nil, err
	}
	g.known.Store(known)
	g.set.looked(g, known.Len())
	p := &Points{All: all, Reader: &repoPoints{g.guest, all}}
	for _, bad := range problems {
		p.Problems = append(p.Problems, chain.Problem{Point: bad.Point, Err: bad.Err})
	}
	return p, nil
}

// repoPoints reads points of a repository.
type repoPoints struct {
	guest *repo.Guest
	all   chain.Points
}

func (p *repoPoints) Folder(point *chain.Manifest) string {
	return p.guest.FolderDir(repo.FolderOf(point))
}

// filesFolder is the folder with the guest's configuration in a point.
const filesFolder = "guest"

func (p *repoPoints) Files(point *chain.Manifest) ([]string, error) {
	files := []string{chain.ManifestFile}
	entries, err := os.ReadDir(filepath.Join(p.Folder(point), filesFolder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s/%s: %w", p.guest.Name, point.ID, err)
	}
	for _, e := range entries {
		if e.Type().IsRegular() {
			files = append(files, filepath.Join(filesFolder, e.Name()))
		}
	}
	return files, nil
}

func (p *repoPoints) Image(l chain.Layer) (image.Layer, bool) {
	return image.Layer{
		Path:   p.guest.ImagePath(l.Point.ID, l.Disk.Name),
		Name:   p.guest.Name + "/" + repo.ImagesFolder + "/" + l.Disk.File,
		Format: image.Qcow2, Bytes: l.Disk.Bytes,
	}, true
}

func (p *repoPoints) OpenDisk(pool *image.Pool, point *chain.Manifest, disk string) (image.Image, error) {
	return p.guest.OpenDisk(pool, p.all, point, disk)
}

func (p *repoPoints) CheckSums(ctx context.Context, point *chain.Manifest, disk string) error {
	return p.guest.CheckSums(ctx, point, disk)
}
