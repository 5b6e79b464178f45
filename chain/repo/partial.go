package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"qmchain/chain"
	"qmchain/internal/child"
)

const (
	partialPrefix = "."
	partialSuffix = ".partial"

	// defaultClusterSize of images. Larger clusters make increments larger: QEMU copies whole ones.
	defaultClusterSize = 64 << 10

	// createLimit bounds qemu-img create, which only writes a few clusters.
	createLimit = 2 * time.Minute
)

// Partial is a point in the making. CreateImage and Finish can be called for several disks at once.
type Partial struct {
	guest *Guest
	// ID and UUID of the point to be.
	ID   chain.ID
	UUID string
	// Dir is its folder until the commit. Its images are in the guest's folder of images from the beginning.
	Dir string

	// images are the images' files, open from their making to their sync: an error that the kernel meets when it writes back
	// what QEMU has written is then told to us, whoever else is told.
	mu     sync.Mutex
	images map[string]*os.File
}

// Begin makes the folder of a new point, and with it the point's uuid. The folder is there before any image is, and tells
// of them after a crash.
func (g *Guest) Begin(id chain.ID) (*Partial, error) {
	p := &Partial{guest: g, ID: id, UUID: NewUUID(), Dir: g.partialDir(id), images: make(map[string]*os.File)}
	if err := g.Repo.FS.Mkdir(p.Dir, dirMode); err != nil {
		return nil, fmt.Errorf("guest %s: begin a point: %w", g.Name, err)
	}
	if err := g.Repo.FS.Step("create", filepath.Join(p.Dir, readLockFile)); err != nil {
		return nil, fmt.Errorf("guest %s: begin a point: %w", g.Name, err)
	}
	// Should a power cut take it away: it is only a help.
	if err := os.WriteFile(filepath.Join(p.Dir, readLockFile), nil, fileMode); err != nil {
		return nil, fmt.Errorf("guest %s: begin a point: %w", g.Name, err)
	}
	if !exists(g.ImagesDir()) {
		if err := g.Repo.FS.Mkdir(g.ImagesDir(), dirMode); err != nil {
			return nil, fmt.Errorf("guest %s: begin a point: %w", g.Name, err)
		}
	}
	return p, nil
}

func (g *Guest) partialDir(id chain.ID) string {
	return filepath.Join(g.Dir, partialPrefix+string(id)+partialSuffix)
}

// Partials returns the ids of all points in the making: those of killed runs for one who holds the guest's lock.
func (g *Guest) Partials() ([]chain.ID, error) {
	entries, err := os.ReadDir(g.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", g.Name, err)
	}
	var ids []chain.ID
	for _, e := range entries {
		if id, ok := hiddenID(e, partialSuffix); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// RemovePartial removes a point in the making: its images, and then the folder that tells of them.
func (g *Guest) RemovePartial(id chain.ID) error {
	// Should there be a finished point of this id, as in a folder that was copied about, then the images are its.
	if !exists(g.PointDir(id)) && !exists(g.baseDir(id)) {
		if err := g.removeImages(id); err != nil {
			return fmt.Errorf("guest %s: remove unfinished point %s: %w", g.Name, id, err)
		}
	}
	if err := g.Repo.FS.RemoveAll(g.partialDir(id)); err != nil {
		return fmt.Errorf("guest %s: remove unfinished point %s: %w", g.Name, id, err)
	}
	return nil
}

// Strays returns the names of files in the folder of images that belong to no point, finished or not: a point's folder was
// removed by hand.
func (g *Guest) Strays() ([]string, error) {
	entries, err := os.ReadDir(g.ImagesDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", g.Name, err)
	}
	var strays []string
	for _, e := range entries {
		name, _, _ := strings.Cut(e.Name(), ".")
		id, err := chain.ParseID(name)
		if err == nil && g.known(id) || !exists(filepath.Join(g.ImagesDir(), e.Name())) {
			continue
		}
		// A folder that is renamed meanwhile can be missed at both names.
		if err == nil && g.known(id) {
			continue
		}
		strays = append(strays, e.Name())
	}
	return strays, nil
}

// known reports whether there is a folder of that id: of a point, of one in the making, or of a base.
func (g *Guest) known(id chain.ID) bool {
	return exists(g.partialDir(id)) || exists(g.PointDir(id)) || exists(g.baseDir(id))
}

// checkImagesDir makes sure that the folder of images is one, and no link to another place.
func (g *Guest) checkImagesDir() error {
	info, err := os.Lstat(g.ImagesDir())
	if err == nil && !info.IsDir() {
		return fmt.Errorf("%w: %s is not a folder", chain.ErrDamaged, g.ImagesDir())
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// removeImages removes all images of a point.
func (g *Guest) removeImages(id chain.ID) error {
	if err := g.checkImagesDir(); err != nil {
		return err
	}
	entries, err := os.ReadDir(g.ImagesDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), string(id)+".") {
			if err := g.Repo.FS.Remove(filepath.Join(g.ImagesDir(), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Sync brings the names in the guest's folder to disk: a rename by a run that died right after it may not be there yet.
func (g *Guest) Sync() error {
	if err := g.Repo.FS.SyncDir(g.Dir); err != nil {
		return fmt.Errorf("guest %s: %w", g.Name, err)
	}
	return nil
}

// identity is what an image carries in its header, so that two images that were swapped are told apart for certain.
func identity(ref chain.ImageRef) []byte { return []byte(ref.UUID + "/" + ref.Disk) }

// ImageOptions are the settings of a new image.
type ImageOptions struct {
	ClusterSize int64  // in bytes; 0: 64 KiB
	Compression string // of compressed clusters: "zlib" or "zstd"; "": zlib
}

// CreateImage makes the empty image of a disk of size bytes, an overlay on parent if that is not nil, and returns its
// path. The parent is not opened: that it is there and sound is for the caller to know.
func (p *Partial) CreateImage(ctx context.Context, disk string, size int64, parent *chain.ImageRef, opts ImageOptions) (string, error) {
	path := p.guest.ImagePath(p.ID, disk)
	format := fmt.Sprintf("compat=1.1,cluster_size=%d", cmp.Or(opts.ClusterSize, defaultClusterSize))
	if opts.Compression != "" {
		format += ",compression_type=" + opts.Compression
	}
	args := []string{"create", "-q", "-f", "qcow2", "-o", format}
	if parent != nil {
		args = append(args, "-u", "-b", chain.BackingFile(*parent), "-F", "qcow2")
	}
	args = append(args, path, strconv.FormatInt(size, 10))
	fsys := p.guest.Repo.FS
	if err := p.guest.checkImagesDir(); err != nil {
		return "", fmt.Errorf("disk %s: %w", disk, err)
	}
	if exists(path) {
		return "", fmt.Errorf("disk %s: its image %s is there already", disk, path)
	}
	if err := fsys.Step("create", path); err != nil {
		return "", err
	}
	if _, err := child.Run(ctx, createLimit, p.guest.Repo.QemuImg, args...); err != nil {
		return "", fmt.Errorf("disk %s: make its image: %w", disk, err)
	}
	if err := os.Chmod(path, fileMode); err != nil {
		return "", fmt.Errorf("disk %s: %w", disk, err)
	}
	if err := fsys.Step("write", path); err != nil {
		return "", err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("disk %s: %w", disk, err)
	}
	p.mu.Lock()
	p.images[disk] = f
	p.mu.Unlock()
	if err := SetIdentity(f, chain.ImageRef{UUID: p.UUID, Disk: disk}); err != nil {
		return "", fmt.Errorf("disk %s: %w", disk, err)
	}
	return path, nil
}

// Close closes the files of the images that were not finished.
func (p *Partial) Close() {
	for _, f := range p.images {
		_ = f.Close()
	}
}

// Finish brings the image of a disk to disk and writes its check sums. It returns the image's size in bytes. It can be
// called once.
func (p *Partial) Finish(ctx context.Context, disk string) (int64, chain.Sums, error) {
	path := p.guest.ImagePath(p.ID, disk)
	fsys := p.guest.Repo.FS
	if err := fsys.Step("sync", path); err != nil {
		return 0, chain.Sums{}, fmt.Errorf("disk %s: %w", disk, err)
	}
	p.mu.Lock()
	f := p.images[disk]
	delete(p.images, disk)
	p.mu.Unlock()
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, chain.Sums{}, fmt.Errorf("disk %s: %w", disk, err)
	}
	size := info.Size()
	// The one waits for the disk, the other needs the processors.
	synced := make(chan error, 1)
	go func() { synced <- f.Sync() }()
	computed, err := ComputeSums(ctx, f, size, nil, nil)
	if err := <-synced; err != nil {
		return 0, chain.Sums{}, fmt.Errorf("disk %s: %w", disk, err)
	}
	if err != nil {
		return 0, chain.Sums{}, fmt.Errorf("disk %s: check sums: %w", disk, err)
	}
	text := computed.Text()
	sums := chain.Sums{File: chain.SumsFile(disk, 0), SHA256: digest(text)}
	if err := fsys.WriteFile(filepath.Join(p.Dir, sums.File), text, fileMode); err != nil {
		return 0, chain.Sums{}, fmt.Errorf("disk %s: %w", disk, err)
	}
	return size, sums, nil
}

// ErrMoved is wrapped where the guest's folder is not what it was when the run began: another one has written to it.
var ErrMoved = errors.New("the guest's folder has changed meanwhile")

// Commit writes the manifest and makes the folder a point. No point may have come that is newer than tip, the newest when
// the run began ("" for none), none of its parents may have gone, and the lock must still hold: all that is checked right
// before.
//
// An error after the rename may leave the point in place though it is not known to be on disk: the caller then looks
// whether it is there, and must not take it for a failure that changed nothing. Committed tells.
func (p *Partial) Commit(lock *Lock, tip chain.ID, m *chain.Manifest) error {
	if m.ID != p.ID || m.UUID != p.UUID {
		return fmt.Errorf("manifest of %s does not belong to %s", m.ID, p.Dir)
	}
	text, err := m.Encode()
	if err != nil {
		return fmt.Errorf("guest %s: manifest of %s: %w", p.guest.Name, p.ID, err)
	}
	fsys := p.guest.Repo.FS
	if err := fsys.SyncDir(p.guest.ImagesDir()); err != nil {
		return fmt.Errorf("guest %s: images of %s: %w", p.guest.Name, p.ID, err)
	}
	if err := fsys.WriteFile(filepath.Join(p.Dir, chain.ManifestFile), text, fileMode); err != nil {
		return fmt.Errorf("guest %s: manifest of %s: %w", p.guest.Name, p.ID, err)
	}
	if err := lock.Check(); err != nil {
		return fmt.Errorf("guest %s: %w", p.guest.Name, err)
	}
	names, err := p.guest.lockNames()
	if err != nil {
		return err
	}
	defer names.Unlock()
	now, err := p.guest.Tip()
	if err != nil {
		return err
	}
	if now > tip { // less where the newest was removed meanwhile
		return fmt.Errorf("guest %s: newest point is %q, was %q: %w", p.guest.Name, now, tip, ErrMoved)
	}
	for _, d := range m.Disks {
		if d.Parent != nil && !exists(p.guest.PointDir(d.Parent.Point)) {
			return fmt.Errorf("guest %s: disk %s: its parent, point %s, was removed: %w", p.guest.Name, d.Name, d.Parent.Point, ErrMoved)
		}
	}
	if err := fsys.Rename(p.Dir, p.guest.PointDir(p.ID)); err != nil {
		return fmt.Errorf("guest %s: commit %s: %w", p.guest.Name, p.ID, err)
	}
	return nil
}

// Committed reports whether the point is in place.
func (p *Partial) Committed() bool {
	_, err := os.Stat(filepath.Join(p.guest.PointDir(p.ID), chain.ManifestFile))
	return err == nil
}
