package verify

import (
	"slices"

	"qmchain/chain"
)

// State is what became of a disk or a point.
type State string

// The states, from the best to the worst. That of several things is the worst of theirs.
const (
	Good    State = "good"
	Merging State = "merging" // not all of it could be verified, as an image is just being merged
	Unknown State = "unknown" // not all of it could be read just now
	Damaged State = "damaged"
)

var states = []State{Good, Merging, Unknown, Damaged}

// Worse returns the worse of two states.
func Worse(a, b State) State {
	return states[max(slices.Index(states, a), slices.Index(states, b))]
}

// Kind says what a finding means.
type Kind string

const (
	Damage      Kind = "damage"
	Unreadable  Kind = "unreadable" // something could not be read, and that may pass
	BeingMerged Kind = "merging"
	Leak        Kind = "leak"       // clusters that take space in an image for nothing
	Unfinished  Kind = "unfinished" // a point in the making, or what is left of one
	NoSums      Kind = "no-sums"    // there is nothing to compare files with
	Warning     Kind = "warning"    // of a foreign set: a disk may not be what the guest had
)

// kinds are in the order in which findings are reported.
var kinds = []Kind{Damage, Unreadable, Warning, BeingMerged, Leak, Unfinished, NoSums}

func (k Kind) state() State {
	switch k {
	case Damage:
		return Damaged
	case Unreadable:
		return Unknown
	case BeingMerged:
		return Merging
	}
	return Good
}

// Guest is what was found of a guest.
type Guest struct {
	Guest    string    `json:"guest"`
	State    State     `json:"state"`
	Points   []Point   `json:"points"` // that were asked for, oldest first
	Findings []Finding `json:"findings"`
	Files    int       `json:"files"` // that were compared with their check sums
	Bytes    int64     `json:"bytes"` // of them
}

// Point is one that was asked for.
type Point struct {
	ID    string `json:"id"` // or its folder's name, if it can't be read
	State State  `json:"state"`
	Disks []Disk `json:"disks"` // none if it can't be read
}

// Disk is one of a point.
type Disk struct {
	Name  string   `json:"name"`
	State State    `json:"state"`
	Files []string `json:"files"` // that are the reason if it is not good
	// Images are those whose damage is the reason.
	Images []chain.ImageRef `json:"-"`
	// Tables and Deep say that qemu-img check has found some of it, or reading: a look without them may not find it.
	Tables bool `json:"-"`
	Deep   bool `json:"-"`
}

// Finding is what was found of one file.
type Finding struct {
	Kind    Kind      `json:"kind"`
	File    string    `json:"file"` // relative to the set; "" if it is about no single one
	Text    string    `json:"text"`
	Affects []DiskRef `json:"affects"` // disks that were asked for
}

// DiskRef names a disk of a point.
type DiskRef struct {
	Point string `json:"point"`
	Disk  string `json:"disk"` // "" is all of the point
}

// Has reports whether there is a finding of that kind.
func (g *Guest) Has(k Kind) bool {
	return slices.ContainsFunc(g.Findings, func(f Finding) bool { return f.Kind == k })
}

// report says what v's targets have become.
func (v *view) report() *Guest {
	g := &Guest{Guest: v.guest, State: Good, Points: []Point{}, Findings: []Finding{}}
	found := map[fault]int{} // index in g.Findings
	note := func(f fault, r ...DiskRef) {
		i, ok := found[f]
		if !ok {
			i = len(g.Findings)
			found[f] = i
			g.Findings = append(g.Findings, Finding{Kind: f.kind, File: f.file, Text: f.text, Affects: []DiskRef{}})
		}
		for _, r := range r {
			if !slices.Contains(g.Findings[i].Affects, r) {
				g.Findings[i].Affects = append(g.Findings[i].Affects, r)
			}
		}
	}
	for _, p := range v.lost {
		f := v.lostFault(p)
		note(f, DiskRef{Point: p.Point})
		if !v.isBase(p.Point) {
			g.Points = append(g.Points, Point{ID: p.Point, State: f.kind.state(), Disks: []Disk{}})
		}
	}
	for _, m := range v.asked {
		p := Point{ID: string(m.ID), State: Good}
		for i := range m.Disks {
			d := Disk{Name: m.Disks[i].Name, State: Good, Files: []string{}}
			for t := v.targets[ref{m.UUID, d.Name}]; t != nil; t = t.parent {
				d.Tables, d.Deep = d.Tables || t.tables, d.Deep || t.deep
				for _, f := range t.faults {
					note(f, DiskRef{p.ID, d.Name})
					state := f.kind.state()
					d.State = Worse(d.State, state)
					if state != Good && !slices.Contains(d.Files, f.file) {
						d.Files = append(d.Files, f.file)
					}
					if at := t.Point.Ref(t.Disk.Name); state == Damaged && !slices.Contains(d.Images, at) {
						d.Images = append(d.Images, at)
					}
				}
			}
			p.State = Worse(p.State, d.State)
			p.Disks = append(p.Disks, d)
		}
		g.Points = append(g.Points, p)
	}
	for _, w := range v.points.Warnings {
		if v.asks(w.Point) {
			note(fault{Warning, "", w.Err.Error()}, DiskRef{w.Point, w.Disk})
		}
	}
	for _, f := range v.other {
		note(f)
	}
	slices.SortStableFunc(g.Points, func(a, b Point) int { return compareIDs(a.ID, b.ID) })
	slices.SortStableFunc(g.Findings, func(a, b Finding) int { return slices.Index(kinds, a.Kind) - slices.Index(kinds, b.Kind) })
	for _, f := range g.Findings {
		g.State = Worse(g.State, f.Kind.state())
	}
	return g
}
