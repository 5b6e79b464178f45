// Package repo keeps backup points in a directory, format 1.
//
//	REPO/qmchain.json                         the format and the repository's random id
//	REPO/110/                                 one folder for each guest
//	REPO/110/images/                          the images of all points, ID.DISK.qcow2
//	REPO/110/20261120T101523Z-3f9c/           a point: point.json, and for each disk DISK.sums
//	REPO/110/.20261120T111523Z-81aa.partial/  a point in the making, or what a killed run left; never read
//	REPO/110/.20261119T101523Z-77b0.base/     a point that was removed, whose images points that are kept still need
//	REPO/110/.lock                            held by the one who makes points; .prune.lock, .names.lock: see Lock
//	REPO/110/.checked.json                    what verify and drill have last found; no part of any point: see Checked
//
// A point comes into being by one rename of its folder, after every file of it is on disk: an image is part of a point
// only if a point's manifest names it. Nothing of a point is changed afterwards. Folders are 0700 and files 0600: images
// hold all that their guests do.
//
// The images of a guest share one folder because QEMU joins the folders of all backing files of a chain to one path,
// ".../A/../B/../C", which the system bounds: with a folder for each point no program of QEMU's could open a chain of
// more than some 160.
package repo

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"qmchain/chain"
	"qmchain/internal/durable"
)

// ImagesFolder is the name of the folder with the images of all points of a guest.
const ImagesFolder = "images"

const (
	// HeadFile is what makes a directory a repository, in each of its formats.
	HeadFile = "qmchain.json"
	dirMode  = 0o700
	fileMode = 0o600
)

// ErrNotRepository is wrapped where a folder is no repository and can't be made one.
var ErrNotRepository = errors.New("not a qmchain repository")

// Repo is a repository.
type Repo struct {
	// Dir is the repository's folder.
	Dir string
	// ID is its random id, 32 hex digits.
	ID string
	// FS makes all changes.
	FS durable.FS
	// QemuImg is the program that makes images.
	QemuImg string
}

// ShortID is the part of the id that bitmap names carry.
func (r *Repo) ShortID() string { return r.ID[:8] }

type head struct {
	Format int    `json:"format"`
	ID     string `json:"id"`
}

// Open opens an existing repository.
func Open(dir string, fsys durable.FS) (*Repo, error) {
	text, err := readFile(filepath.Join(dir, HeadFile), 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Stat(dir); statErr != nil {
			return nil, fmt.Errorf("repository %s: %w", dir, statErr)
		}
		return nil, fmt.Errorf("%s: %w: it has no %s", dir, ErrNotRepository, HeadFile)
	}
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", dir, err)
	}
	var h head
	if err := json.Unmarshal(text, &h); err != nil {
		return nil, fmt.Errorf("%s/%s: %w: %w", dir, HeadFile, chain.ErrDamaged, err)
	}
	if h.Format != chain.FormatVersion {
		return nil, fmt.Errorf("repository %s has format %d: this version of qmchain knows format %d", dir, h.Format, chain.FormatVersion)
	}
	if b, err := hex.DecodeString(h.ID); err != nil || len(b) != 16 {
		return nil, fmt.Errorf("%s/%s: %w: %q is not a repository's id", dir, HeadFile, chain.ErrDamaged, h.ID)
	}
	return &Repo{Dir: dir, ID: h.ID, FS: fsys.Serial(), QemuImg: "qemu-img"}, nil
}

// OpenOrCreate opens a repository, or makes one in an existing empty folder. A folder with other things in it is an
// error: most likely the share that should be there is not mounted.
func OpenOrCreate(dir string, fsys durable.FS) (*Repo, error) {
	r, err := Open(dir, fsys)
	if !errors.Is(err, ErrNotRepository) {
		return r, err
	}
	planned, err := Planned(dir)
	if err != nil {
		if r, openErr := Open(dir, fsys); openErr == nil {
			return r, nil // another first run has made it meanwhile, and has gone on
		}
		return nil, err
	}
	h := head{Format: chain.FormatVersion, ID: planned.ID}
	text, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return nil, err
	}
	// Of several first runs at once one makes it, for all.
	if err := fsys.WriteNew(filepath.Join(dir, HeadFile), append(text, '\n'), fileMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("repository %s can't be made: %w", dir, err)
	}
	return Open(dir, fsys)
}

// Planned returns the repository that OpenOrCreate would make in a folder, or says why it would not. Nothing is written.
func Planned(dir string) (*Repo, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", dir, err)
	}
	for _, e := range entries {
		// lost+found is there in every new ext4; a temporary file is our own making, cut off or under way.
		if e.Name() != "lost+found" && !strings.HasPrefix(e.Name(), ".tmp-"+HeadFile) {
			return nil, fmt.Errorf("%s: %w: it has no %s, and is not empty (%s is there), so none is made", dir, ErrNotRepository, HeadFile, e.Name())
		}
	}
	return &Repo{Dir: dir, ID: NewUUID(), QemuImg: "qemu-img"}, nil
}

// NewUUID returns 128 random bits as 32 hex digits.
func NewUUID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// Guests returns the names of all guests that have a folder, sorted.
func (r *Repo) Guests() ([]string, error) {
	entries, err := os.ReadDir(r.Dir)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", r.Dir, err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && chain.CheckGuestName(e.Name()) == nil && e.Name() != "lost+found" {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Guest returns the folder of a guest, which need not exist yet.
func (r *Repo) Guest(name string) (*Guest, error) {
	if err := chain.CheckGuestName(name); err != nil {
		return nil, err
	}
	return &Guest{Repo: r, Name: name, Dir: filepath.Join(r.Dir, name)}, nil
}

// Guest is one guest's folder.
type Guest struct {
	Repo *Repo
	Name string
	Dir  string
}

// Problem says what is wrong with one point.
type Problem struct {
	Point string // the folder's name
	Err   error
}

// Tip returns the id of the newest point, readable or not; "" if there is none.
func (g *Guest) Tip() (chain.ID, error) {
	entries, err := os.ReadDir(g.Dir) // sorted by name, as ids are by age
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("guest %s: %w", g.Name, err)
	}
	for _, e := range slices.Backward(entries) {
		if id, err := chain.ParseID(e.Name()); err == nil && e.IsDir() {
			return id, nil
		}
	}
	return "", nil
}

// Point reads one manifest. It must be where it says it belongs.
func (g *Guest) Point(id chain.ID) (*chain.Manifest, error) {
	return g.Read(Folder{ID: id, Name: string(id)})
}

// PointDir is the folder of a point.
func (g *Guest) PointDir(id chain.ID) string { return filepath.Join(g.Dir, string(id)) }

// ImagesDir is the folder of the guest's images.
func (g *Guest) ImagesDir() string { return filepath.Join(g.Dir, ImagesFolder) }

// ImagePath is the path of an image.
func (g *Guest) ImagePath(id chain.ID, disk string) string {
	return g.Dir + "/" + ImagesFolder + "/" + chain.ImageFile(id, disk)
}
