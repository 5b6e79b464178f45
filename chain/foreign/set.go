package foreign

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/chain/virtnbd"
)

// Kind is the program that wrote a set.
type Kind string

// The programs whose sets are read.
const (
	Qmpbackup     Kind = "qmpbackup"
	Virtnbdbackup Kind = "virtnbdbackup"
)

var (
	// ErrNotSet is wrapped where a directory holds no backups of these programs.
	ErrNotSet = errors.New("no backups of qmpbackup or virtnbdbackup")

	// ErrOrder is wrapped by the warning that nothing proves what an image was made
	// on: qmpbackup's fulls without a time stamp can be replaced under their
	// increments.
	ErrOrder = errors.New("what the increments were made on can't be proven")

	// ErrZeroes is wrapped by the warning that what the guest has zeroed or discarded
	// may be back: virtnbdbackup 2.x leaves it out of increments, and they show no
	// sign of it.
	ErrZeroes = errors.New("what the guest has deleted may be back")

	// ErrSize is wrapped by the warning that a file may be cut off: a raw image does not
	// say how long it should be, and the guest's disk has another size.
	ErrSize = errors.New("it may be cut off")

	// ErrNoSum is wrapped where an image has no check sum to compare it with.
	ErrNoSum = errors.New("no check sum")
)

// Set is a directory with backups of one guest. Its methods may be called
// concurrently.
type Set struct {
	kind  Kind
	guest string
	dir   *dir

	mu sync.Mutex // of one look at a time
}

// Open opens the set in a directory; whose it is, and that it is one, its files
// say. A directory without any wraps ErrNotSet.
func Open(path string) (*Set, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("backup set %s: %w", path, err)
	}
	s := &Set{dir: &dir{path: path, root: root}}
	if err := s.detect(); err != nil {
		_ = root.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func (s *Set) detect() error {
	var kinds []Kind
	s.dir.begin()
	for _, k := range []Kind{Qmpbackup, Virtnbdbackup} {
		found, err := s.is(k)
		if err != nil {
			return err
		}
		if found {
			kinds = append(kinds, k)
		}
	}
	switch len(kinds) {
	case 0:
		return ErrNotSet
	case 1:
	default:
		return fmt.Errorf("it holds backups of %s and of %s: which are meant?", kinds[0], kinds[1])
	}
	s.kind = kinds[0]
	name := ""
	if s.kind == Virtnbdbackup {
		var err error
		if name, err = virtnbdDomain(s.dir); err != nil {
			return err
		}
	}
	if name == "" {
		whole, err := filepath.Abs(s.dir.path)
		if err != nil {
			return err
		}
		if whole, err = filepath.EvalSymlinks(whole); err != nil {
			return err
		}
		name = filepath.Base(whole)
	}
	s.guest = guestName(name)
	return nil
}

func (s *Set) is(k Kind) (bool, error) {
	if k == Qmpbackup {
		return isQmpbackup(s.dir)
	}
	return isVirtnbd(s.dir)
}

// Dir is the set's directory.
func (s *Set) Dir() string { return s.dir.path }

// Kind is the program that wrote the set.
func (s *Set) Kind() Kind { return s.kind }

// Guest is the name of the guest: that of the domain where the set knows it, else
// the folder's. What can't be in a guest's name is replaced by '_'.
func (s *Set) Guest() string { return s.guest }

// Close gives up the directory. Images that are open stay so.
func (s *Set) Close() error { return s.dir.root.Close() }

var badInName = regexp.MustCompile(`[^A-Za-z0-9._-]`)

// guestName makes a guest's name of any other.
func guestName(name string) string {
	name = badInName.ReplaceAllString(name, "_")
	if len(name) > 64 {
		name = name[:64]
	}
	if chain.CheckGuestName(name) == nil {
		return name
	}
	// The first character, or a number that is no VMID.
	return "guest-" + name[:min(len(name), 64-len("guest-"))]
}

// Points looks at what is in the set now.
func (s *Set) Points() (*Points, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dir.begin()
	var runs []*run
	var err error
	if s.kind == Qmpbackup {
		runs, err = qmpbackupRuns(s.dir)
	} else {
		runs, err = virtnbdRuns(s.dir)
	}
	if err != nil {
		return nil, fmt.Errorf("backup set %s: %w", s.dir.path, err)
	}
	s.dir.end()
	return newPoints(s, runs), nil
}

// begin begins a look at the set, end forgets what was not looked at.
func (d *dir) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.next = map[string]known{}
}

func (d *dir) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.known, d.next = d.next, map[string]known{}
}

// damage wraps chain.ErrDamaged around what says that a file is not what it should
// be. All other errors say that it could not be read just now.
func damage(err error) error {
	for _, e := range []error{
		fs.ErrNotExist, syscall.ELOOP, image.ErrChanged, image.ErrNotRegular,
		qcow2.ErrNotQcow2, qcow2.ErrCorrupt, qcow2.ErrUnsupported,
		virtnbd.ErrNotStream, virtnbd.ErrCorrupt, virtnbd.ErrUnsupported,
		io.ErrUnexpectedEOF,
	} {
		if errors.Is(err, e) && !errors.Is(err, chain.ErrDamaged) {
			return fmt.Errorf("%w: %w", chain.ErrDamaged, err)
		}
	}
	return err
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", chain.ErrDamaged, fmt.Sprintf(format, args...))
}

// Image names the file that a layer's disk is in, without those below it.
func (p *Points) Image(l chain.Layer) (image.Layer, bool) {
	s := p.stored[ref{l.Point.UUID, l.Disk.Name}]
	if s == nil {
		return image.Layer{}, false
	}
	return p.set.layer(s), true
}

// Folder is the path of the set's directory.
func (p *Points) Folder(*chain.Manifest) string { return p.set.dir.path }

// Files returns the paths of the guest's configuration files of a point, relative to
// the set's directory.
func (p *Points) Files(point *chain.Manifest) ([]string, error) { return p.files[point.UUID], nil }

// OpenDisk opens a disk of a point as a read-only image. Errors: chain.ErrNoPoint,
// chain.ErrDamaged for what is refused or has changed since the look, those of reading.
func (p *Points) OpenDisk(pool *image.Pool, point *chain.Manifest, disk string) (image.Image, error) {
	fail := func(err error) (image.Image, error) {
		return nil, fmt.Errorf("%s/%s: disk %s: %w", p.set.guest, point.ID, disk, err)
	}
	s := p.stored[ref{point.UUID, disk}]
	if s == nil {
		return fail(chain.ErrNoPoint)
	}
	if s.bad != nil {
		return fail(fmt.Errorf("%s: %w", s.file, s.bad))
	}
	var layers []image.Layer
	for l := s; l != nil; l = l.parent {
		layers = append(layers, p.set.layer(l))
	}
	slices.Reverse(layers)
	for _, l := range layers {
		if err := p.set.inside(l.Name); err != nil {
			return fail(damage(err))
		}
	}
	img, err := pool.Open(s.size, layers...)
	if err != nil {
		return fail(damage(err))
	}
	return img, nil
}

// inside makes sure that no folder on the way to a file is a link by now.
func (s *Set) inside(rel string) error {
	for at := filepath.Dir(rel); at != "."; at = filepath.Dir(at) {
		info, err := s.dir.root.Lstat(at)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return fmt.Errorf("%s: %w: no folder any more", at, image.ErrChanged)
		}
	}
	return nil
}

// layer is the file of an image, with the check that it is still the one that was
// looked at.
func (s *Set) layer(l *stored) image.Layer {
	return image.Layer{
		Path: filepath.Join(s.dir.path, l.file), Name: l.file, Format: l.format, Snapshot: l.snapshot, Bytes: l.bytes,
		Check: func(h *qcow2.Header) error {
			if h.BackingFile != l.backing {
				return damaged("its header names the backing file %q by now, not %q", h.BackingFile, l.backing)
			}
			return nil
		},
		CheckStream: func(m *virtnbd.Meta) error {
			if *m != l.meta {
				return damaged("its metadata is another one by now")
			}
			return nil
		},
	}
}

// CheckSums compares the image file of a disk in a point, but not those below it, with
// the check sum that the set has of it. ErrNoSum is wrapped where it has none,
// chain.ErrDamaged where they differ.
func (p *Points) CheckSums(ctx context.Context, point *chain.Manifest, disk string) error {
	s := p.stored[ref{point.UUID, disk}]
	if s == nil {
		return fmt.Errorf("%s/%s: disk %s: %w", p.set.guest, point.ID, disk, chain.ErrNoPoint)
	}
	if s.sum == "" {
		return fmt.Errorf("%s: %w", s.file, ErrNoSum)
	}
	if err := p.set.verify(ctx, s); err != nil {
		return fmt.Errorf("%s: %w", s.file, damage(err))
	}
	return nil
}

// short is a file's own name, for messages that tell of others in its folder.
func short(file string) string { return file[strings.LastIndexByte(file, '/')+1:] }
