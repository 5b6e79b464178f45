package chain

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Points are the points of one guest, oldest first; among them those that were removed but are the bases of others.
type Points []*Manifest

// ErrNoPoint is wrapped where a point or a disk that was asked for does not exist.
var ErrNoPoint = errors.New("not found")

// Sort puts the points in order.
func (ps Points) Sort() {
	slices.SortFunc(ps, func(a, b *Manifest) int { return strings.Compare(string(a.ID), string(b.ID)) })
}

// Find returns the point of that id, or nil.
func (ps Points) Find(id ID) *Manifest {
	i, ok := slices.BinarySearchFunc(ps, id, func(m *Manifest, id ID) int { return strings.Compare(string(m.ID), string(id)) })
	if !ok {
		return nil
	}
	return ps[i]
}

// Latest returns the newest point, or nil.
func (ps Points) Latest() *Manifest {
	for _, m := range slices.Backward(ps) {
		if !m.Base {
			return m
		}
	}
	return nil
}

// Kept returns the points without those that are only bases of others.
func (ps Points) Kept() Points {
	if !slices.ContainsFunc(ps, func(m *Manifest) bool { return m.Base }) {
		return ps
	}
	var kept Points
	for _, m := range ps {
		if !m.Base {
			kept = append(kept, m)
		}
	}
	return kept
}

// AmbiguousError says that a name can mean several points. It wraps ErrNoPoint, which it does not say: there are too many.
type AmbiguousError struct{ Name, One, Other string }

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%q can mean %s or %s: name more of it", e.Name, e.One, e.Other)
}

func (e *AmbiguousError) Unwrap() error { return ErrNoPoint }

// Resolve finds the point that the user named: "latest", an id, or a prefix that only one id has.
func (ps Points) Resolve(name string) (*Manifest, error) {
	if name == "latest" {
		if m := ps.Latest(); m != nil {
			return m, nil
		}
		return nil, fmt.Errorf("the guest has no point: %w", ErrNoPoint)
	}
	var found *Manifest
	for _, m := range ps.Kept() {
		if !strings.HasPrefix(string(m.ID), name) {
			continue
		}
		if found != nil {
			return nil, &AmbiguousError{name, string(found.ID), string(m.ID)}
		}
		found = m
	}
	if found == nil {
		return nil, fmt.Errorf("no point %q: %w", name, ErrNoPoint)
	}
	return found, nil
}

// Layer is one image that a disk is read from.
type Layer struct {
	Point *Manifest
	Disk  *Disk
}

// Layers returns the images that make up a disk in a point, the full first. A parent that is missing, or is another one
// than the child was made on, is an error that wraps ErrDamaged; a disk that the point does not have wraps ErrNoPoint.
func (ps Points) Layers(point *Manifest, disk string) ([]Layer, error) {
	d := point.Disk(disk)
	if d == nil {
		return nil, fmt.Errorf("point %s has no disk %q: %w", point.ID, disk, ErrNoPoint)
	}
	layers := []Layer{{point, d}}
	for d.Level.Overlay() { // ends: Validate has seen that every parent is older than its child
		child, ref := point, *d.Parent
		point = ps.Find(ref.Point)
		if point == nil {
			return nil, fmt.Errorf("point %s needs point %s, which is missing: %w", child.ID, ref.Point, ErrDamaged)
		}
		if point.UUID != ref.UUID {
			return nil, fmt.Errorf("point %s was made on another point %s than the one that is there now: %w", child.ID, ref.Point, ErrDamaged)
		}
		d = point.Disk(ref.Disk)
		if d == nil {
			return nil, fmt.Errorf("point %s needs disk %q of point %s, which is missing: %w", child.ID, ref.Disk, ref.Point, ErrDamaged)
		}
		layers = append(layers, Layer{point, d})
	}
	slices.Reverse(layers)
	return layers, nil
}
