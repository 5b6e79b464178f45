package foreign

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/virtnbd"
)

// lastSecond bounds times: ids have four digits for the year, and room for more points
// after the last one.
const lastSecond = 253370764799 // of the year 9998

// run is one backup.
type run struct {
	key    string    // names it for good in its set
	time   time.Time // of its own, to the second
	images []*stored
	guest  chain.GuestIdentity // as far as it is known
	files  []string            // configuration files
	note   string

	id    chain.ID
	state state
}

// stored is one disk of a run.
type stored struct {
	run    *run
	disk   string
	level  chain.Level
	reason string
	parent *stored // that it was made on

	file     string // relative to the set
	format   image.Format
	snapshot string // in a qcow2 file
	sum      string // the file with its check sum, "" if there is none
	source   string // format of the guest's image
	size     int64  // virtual
	bytes    int64  // of the file
	backing  string // as its header has it
	meta     virtnbd.Meta

	checkpoint string // by which others name it as their parent
	stable     string // what tells its content from another under the same name, if anything does

	refused  error
	warnings []error

	// Worked out once, from those below too.
	state state
	bad   error
	warns []error
}

// state is that of something that is worked out from what is below it.
type state int

const (
	todo state = iota
	doing
	done
)

// ref names a disk of a point.
type ref struct{ uuid, disk string }

// Points is what a set had when it was looked at. It does not change.
type Points struct {
	// All points, oldest first. Manifests have what the set knows; a file's path is
	// relative to the set.
	All chain.Points
	// Problems are the disks that are refused. They wrap chain.ErrDamaged, but where a file
	// can't be read just now.
	Problems []chain.Problem
	// Warnings are those of disks: they wrap ErrOrder, ErrZeroes or ErrSize.
	Warnings []chain.Problem

	set    *Set
	stored map[ref]*stored
	files  map[string][]string // by uuid
}

// newPoints makes points of runs.
func newPoints(set *Set, runs []*run) *Points {
	p := &Points{set: set, stored: map[ref]*stored{}, files: map[string][]string{}}
	runs = slices.DeleteFunc(runs, func(r *run) bool { return len(r.images) == 0 })
	slices.SortFunc(runs, func(a, b *run) int { return strings.Compare(a.key, b.key) })
	for _, r := range runs {
		slices.SortFunc(r.images, func(a, b *stored) int { return strings.Compare(a.disk, b.disk) })
		for _, s := range r.images {
			s.resolve()
		}
	}
	ids := map[chain.ID]bool{}
	uuids := map[*stored]string{}
	for _, r := range runs {
		r.identify(set.kind, ids)
	}
	slices.SortFunc(runs, func(a, b *run) int { return strings.Compare(string(a.id), string(b.id)) })
	for _, r := range runs { // parents before their children, as ids are
		m := r.manifest(set, uuids)
		p.All = append(p.All, m)
		p.files[m.UUID] = r.files
		for _, s := range r.images {
			p.stored[ref{m.UUID, s.disk}] = s
			if s.bad != nil {
				p.Problems = append(p.Problems, chain.Problem{Point: string(r.id), Disk: s.disk, Err: fmt.Errorf("%s: %w", s.file, s.bad)})
			}
			for _, w := range s.warns {
				p.Warnings = append(p.Warnings, chain.Problem{Point: string(r.id), Disk: s.disk, Err: w})
			}
		}
	}
	return p
}

// resolve works out whether s can be read, from itself and what it was made on.
func (s *stored) resolve() {
	var path []*stored
	for at := s; at != nil && at.state == todo; at = at.parent {
		at.state = doing
		path = append(path, at)
		if at.parent != nil && at.parent.state == doing {
			if at.refused == nil {
				at.refused = damaged("it was made on what was made on it")
			}
			at.parent = nil
		}
	}
	for _, at := range slices.Backward(path) {
		at.settle()
	}
}

// settle is resolve for what is made on something that is resolved.
func (s *stored) settle() {
	s.state = done
	s.bad, s.warns = s.refused, s.warnings
	p := s.parent
	if p == nil {
		if s.level.Overlay() && s.bad == nil {
			s.bad = damaged("nothing is there that it was made on")
		}
		return
	}
	var below belowError
	switch {
	case s.bad != nil || p.bad == nil:
	case errors.As(p.bad, &below):
		s.bad = below
	default:
		s.bad = belowError{p.file, p.bad}
	}
	for _, w := range p.warns {
		if !slices.Contains(s.warns, w) {
			s.warns = append(slices.Clip(s.warns), w)
		}
	}
}

// belowError is what is wrong with a file that others were made on.
type belowError struct {
	file string
	err  error
}

func (e belowError) Error() string { return fmt.Sprintf("it needs %s: %v", e.file, e.err) }
func (e belowError) Unwrap() error { return e.err }

// identify gives r its id: its own time, or as much more as it needs to be newer than
// what its disks were made on, and not to be the id of another.
func (r *run) identify(kind Kind, taken map[chain.ID]bool) {
	if r.state != todo {
		return
	}
	r.state = doing
	if at := r.time.Unix(); at < 0 || at > lastSecond {
		r.time = time.Unix(min(max(0, at), lastSecond), 0).UTC()
	}
	sum := digest(string(kind), r.key)
	id := chain.NewID(r.time, "", uint16(sum[0])<<8|uint16(sum[1]))
	for _, s := range r.images {
		if s.parent == nil || s.parent.run.state == doing {
			continue
		}
		s.parent.run.identify(kind, taken)
		if parent := s.parent.run.id; id <= parent {
			id = chain.NewID(r.time, parent, uint16(sum[0])<<8|uint16(sum[1]))
		}
	}
	for taken[id] {
		id = chain.NewID(r.time, id, uint16(sum[0])<<8|uint16(sum[1]))
	}
	taken[id] = true
	r.id, r.state = id, done
}

// digest hashes a list of strings.
func digest(parts ...string) []byte {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return h.Sum(nil)
}

// manifest makes r's manifest. uuids are those of the runs that disks can have been made
// on; that of r is added.
func (r *run) manifest(set *Set, uuids map[*stored]string) *chain.Manifest {
	parts := []string{string(set.kind), r.key}
	for _, s := range r.images {
		parts = append(parts, s.disk, s.file, s.snapshot, s.stable, uuids[s.parent])
	}
	m := &chain.Manifest{ID: r.id, UUID: hex.EncodeToString(digest(parts...)[:16]), Time: r.time, Guest: r.guest, Note: r.note}
	m.Guest.Name = set.guest
	for _, s := range r.images {
		uuids[s] = m.UUID
		d := chain.Disk{
			Name: s.disk, Level: s.level, Reason: s.reason, SourceFormat: s.source,
			VirtualSize: s.size, File: s.file, Bytes: s.bytes,
		}
		switch {
		case s.parent != nil:
			d.Parent = &chain.ImageRef{Point: s.parent.run.id, UUID: uuids[s.parent], Disk: s.parent.disk}
		case s.level.Overlay():
			d.Parent = &chain.ImageRef{} // names nothing, so that it is missed
		}
		m.Disks = append(m.Disks, d)
	}
	return m
}
