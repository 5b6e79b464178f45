package verify

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/chain/virtnbd"
)

// fault is what is wrong with a file.
type fault struct {
	kind Kind
	file string // relative to the set
	text string
}

// ref names an image.
type ref struct{ uuid, disk string }

// target is an image that is to be checked.
type target struct {
	chain.Layer
	ref    ref
	at     image.Layer
	parent *target // nil if it needs none, or that is not there
	faults []fault // its own, and that its parent is not there
	done   bool    // it was checked in an earlier round

	// tables and deep say that damage was found by qemu-img check, or by reading disks.
	tables, deep bool
}

// faulty reports whether something is wrong with the image, or one below it, that keeps others from being opened.
func (t *target) faulty() bool {
	for ; t != nil; t = t.parent {
		if slices.ContainsFunc(t.faults, func(f fault) bool { return f.kind.state() != Good }) {
			return true
		}
	}
	return false
}

// view is one look at a guest's points, and what of it was asked for.
type view struct {
	guest   string
	dir     string // of the set
	points  *source.Points
	asks    func(point string) bool // by its id, or its folder's name
	asked   []*chain.Manifest       // oldest first; with the disks that were asked for
	lost    []chain.Problem         // points that were asked for and can't be read
	refused map[DiskRef]error
	targets map[ref]*target
	order   []*target // parents before their children
	other   []fault   // that concern no disk
}

// newView works out which images must be checked, for all disks of the points that are asked for, or only those that are named.
// It reads nothing.
func newView(set, guest string, points *source.Points, asks func(string) bool, disks []string) (*view, error) {
	v := &view{guest: guest, dir: set, points: points, asks: asks, targets: map[ref]*target{}, refused: map[DiskRef]error{}}
	for _, p := range points.Problems {
		if p.Disk != "" {
			v.refused[DiskRef{p.Point, p.Disk}] = p.Err
		} else if asks(p.Point) {
			v.lost = append(v.lost, p)
		}
	}
	for _, m := range points.All.Kept() {
		if !asks(string(m.ID)) {
			continue
		}
		asked := *m
		asked.Disks = nil
		for i := range m.Disks {
			if len(disks) > 0 && !slices.Contains(disks, m.Disks[i].Name) {
				continue
			}
			asked.Disks = append(asked.Disks, m.Disks[i])
			if err := v.add(m, &m.Disks[i]); err != nil {
				return nil, err
			}
		}
		v.asked = append(v.asked, &asked)
	}
	return v, nil
}

// add adds an image and all that it was made on.
func (v *view) add(m *chain.Manifest, d *chain.Disk) error {
	var lineage []*target // from the top down
	for {
		r := ref{m.UUID, d.Name}
		known := v.targets[r]
		if known != nil {
			v.join(lineage, known)
			return nil
		}
		if len(lineage) > len(v.points.All) {
			return fmt.Errorf("%s/%s: disk %s: %w: it was made on itself", v.guest, m.ID, d.Name, chain.ErrDamaged)
		}
		l := chain.Layer{Point: m, Disk: d}
		at, ok := v.points.Image(l)
		if !ok {
			return fmt.Errorf("%s/%s: disk %s has no file", v.guest, m.ID, d.Name)
		}
		t := &target{Layer: l, ref: r, at: at}
		lineage = append(lineage, t)
		parent, f := v.parent(d)
		if problem := v.problem(m, d); problem != nil {
			// A foreign disk can be refused for the sake of the one that it was made on, which has its own problem then.
			if parent == nil || v.problem(parent.Point, parent.Disk) == nil {
				t.faults = append(t.faults, fault{kindOf(problem), at.Name, reason(problem, at.Name)})
			}
		} else if f != nil {
			t.faults = append(t.faults, *f)
		}
		if parent == nil {
			v.join(lineage, nil)
			return nil
		}
		m, d = parent.Point, parent.Disk
	}
}

// join adds targets, each of which lies on the next, and the last on below.
func (v *view) join(lineage []*target, below *target) {
	for _, t := range slices.Backward(lineage) {
		t.parent = below
		v.targets[t.ref] = t
		v.order = append(v.order, t)
		below = t
	}
}

// parent returns what an image was made on, or why that is not there.
func (v *view) parent(d *chain.Disk) (*chain.Layer, *fault) {
	if !d.Level.Overlay() || d.Parent == nil {
		return nil, nil
	}
	m := v.points.All.Find(d.Parent.Point)
	if m == nil {
		return nil, v.missing(string(d.Parent.Point))
	}
	if m.UUID != d.Parent.UUID {
		return nil, &fault{Damage, v.manifestFile(m), "it is another point than the one that others were made on"}
	}
	if disk := m.Disk(d.Parent.Disk); disk != nil {
		return &chain.Layer{Point: m, Disk: disk}, nil
	}
	return nil, &fault{Damage, v.manifestFile(m), fmt.Sprintf("it has no disk %s, which others were made on", d.Parent.Disk)}
}

const pointMissing = "the point is missing, and others were made on it"

// missing says why a point is not there.
func (v *view) missing(id string) *fault {
	for _, p := range v.points.Problems {
		if p.Disk == "" && (p.Point == id || p.Point == baseFolder(id)) {
			f := v.lostFault(p)
			return &f
		}
	}
	return &fault{Damage, filepath.Join(v.guest, id), pointMissing}
}

func baseFolder(id string) string {
	return repo.FolderOf(&chain.Manifest{ID: chain.ID(id), Base: true}).Name
}

// isBase reports whether a folder is that of a point that was removed.
func (v *view) isBase(folder string) bool {
	f, ok := repo.ParseFolder(folder)
	return ok && f.Base
}

// lostFault is what is wrong with a point that can't be read.
func (v *view) lostFault(p chain.Problem) fault {
	file := filepath.Join(v.guest, p.Point, chain.ManifestFile)
	return fault{kindOf(p.Err), file, reason(p.Err, file)}
}

func (v *view) manifestFile(m *chain.Manifest) string {
	return v.relative(filepath.Join(v.points.Folder(m), chain.ManifestFile))
}

func (v *view) relative(path string) string {
	if rel, err := filepath.Rel(v.dir, path); err == nil {
		return rel
	}
	return path
}

// problem is why a foreign disk is refused; nil if it is not.
func (v *view) problem(m *chain.Manifest, d *chain.Disk) error {
	return v.refused[DiskRef{string(m.ID), d.Name}]
}

// kindOf tells what says that a file is not what it should be from what says that it could not be read just now.
func kindOf(err error) Kind {
	if errors.Is(err, repo.ErrLocked) {
		return BeingMerged
	}
	for _, e := range []error{
		chain.ErrDamaged, image.ErrChanged, image.ErrNotRegular, fs.ErrNotExist, io.ErrUnexpectedEOF,
		qcow2.ErrNotQcow2, qcow2.ErrCorrupt, qcow2.ErrUnsupported,
		virtnbd.ErrNotStream, virtnbd.ErrCorrupt, virtnbd.ErrUnsupported,
	} {
		if errors.Is(err, e) {
			return Damage
		}
	}
	return Unreadable
}

// isMissing is what is said of a file that is not there.
const isMissing = "it is missing"

// misses reports whether there are files that are not there: one look does not tell them from a share that is just mounted again.
func (v *view) misses() bool {
	return slices.ContainsFunc(v.points.Problems, func(p chain.Problem) bool { return errors.Is(p.Err, fs.ErrNotExist) }) ||
		slices.ContainsFunc(v.order, func(t *target) bool {
			return slices.ContainsFunc(t.faults, func(f fault) bool { return f.text == isMissing || f.text == pointMissing })
		})
}

// reason is what an error says of a file, without what else it names.
func reason(err error, file string) string {
	if errors.Is(err, fs.ErrNotExist) {
		return isMissing
	}
	text := err.Error()
	if i := strings.LastIndex(text, file+": "); i >= 0 {
		text = text[i+len(file)+2:]
	}
	damaged := chain.ErrDamaged.Error()
	if i := strings.LastIndex(text, damaged+": "); i >= 0 {
		text = text[i+len(damaged)+2:]
	}
	return strings.TrimSuffix(text, ": "+damaged)
}

// compareIDs compares ids of points, or the names of their folders.
func compareIDs(a, b string) int {
	return strings.Compare(strings.TrimLeft(a, "."), strings.TrimLeft(b, "."))
}
