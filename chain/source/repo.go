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
	"syscall"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
)

// repoSet is a qmchain repository.
type repoSet struct {
	repo *repo.Repo

	mu     sync.Mutex
	guests map[string]*repoGuest
}

var (
	_ Set    = (*repoSet)(nil)
	_ Guest  = (*repoGuest)(nil)
	_ Reader = (*repoPoints)(nil)
)

func newRepoSet(r *repo.Repo) *repoSet { return &repoSet{repo: r, guests: map[string]*repoGuest{}} }

// Repository returns the qmchain repository that a set is; nil if it is a foreign one.
func Repository(s Set) *repo.Repo {
	if r, ok := s.(*repoSet); ok {
		return r.repo
	}
	return nil
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
		s.guests[name] = &repoGuest{guest: g}
	}
	return s.guests[name], nil
}

// repoGuest is one guest's folder.
type repoGuest struct {
	guest *repo.Guest

	mu    sync.Mutex // of one look at a time
	known map[repo.Folder]manifest
}

// manifest is what one reading of a manifest gave, and of which file.
type manifest struct {
	stamp stamp
	m     *chain.Manifest
	err   error
}

// stamp tells one state of a file from another.
type stamp struct {
	ino          uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func (g *repoGuest) Name() string { return g.guest.Name }
func (g *repoGuest) Dir() string  { return g.guest.Dir }

// Points reads only manifests that it has not read yet, or that have changed: on a share
// each costs a few round trips, and a mount asks often.
func (g *repoGuest) Points() (*Points, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	folders, err := g.guest.Folders()
	if err != nil {
		return nil, err
	}
	p := &Points{}
	known := make(map[repo.Folder]manifest, len(g.known))
	seen := map[chain.ID]bool{}
	for _, f := range folders {
		m, err := g.read(f, known)
		if errors.Is(err, errGone) && !f.Base {
			// It was removed meanwhile; other points may need it.
			f = repo.FolderOf(&chain.Manifest{ID: f.ID, Base: true})
			m, err = g.read(f, known)
		}
		switch {
		case errors.Is(err, errGone) || seen[f.ID]:
		case err != nil:
			p.Problems = append(p.Problems, chain.Problem{Point: f.Name, Err: err})
		default:
			seen[f.ID] = true
			p.All = append(p.All, m)
		}
	}
	g.known = known
	p.All.Sort()
	p.Reader = &repoPoints{g.guest, p.All}
	return p, nil
}

// errGone is returned for a folder that is not there any more.
var errGone = errors.New("no longer there")

// read reads a manifest, or takes it from what is known, and adds it to what will be.
func (g *repoGuest) read(f repo.Folder, known map[repo.Folder]manifest) (*chain.Manifest, error) {
	dir := g.guest.FolderDir(f)
	now, err := stampOf(filepath.Join(dir, chain.ManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			return nil, errGone
		}
		return g.guest.Read(f) // which knows what to say of it
	}
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", g.guest.Name, f.ID, err)
	}
	k, ok := g.known[f]
	if !ok || k.stamp != now {
		k = manifest{stamp: now}
		k.m, k.err = g.guest.Decode(f)
	}
	if k.err == nil && slices.ContainsFunc(k.m.Disks, func(d chain.Disk) bool { return d.Next != nil }) {
		// Which of two images is there now does not show in the manifest's file.
		return g.guest.Read(f)
	}
	if k.err == nil || errors.Is(k.err, chain.ErrDamaged) {
		known[f] = k
	}
	return k.m, k.err
}

func stampOf(path string) (stamp, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return stamp{}, err
	}
	st := info.Sys().(*syscall.Stat_t)
	return stamp{ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil
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
		Name:   filepath.Join(p.guest.Name, repo.ImagesFolder, l.Disk.File),
		Format: image.Qcow2, Bytes: l.Disk.Bytes,
	}, true
}

func (p *repoPoints) OpenDisk(pool *image.Pool, point *chain.Manifest, disk string) (image.Image, error) {
	return p.guest.OpenDisk(pool, p.all, point, disk)
}

func (p *repoPoints) CheckSums(ctx context.Context, point *chain.Manifest, disk string) error {
	return p.guest.CheckSums(ctx, point, disk)
}
