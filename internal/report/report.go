package report

import (
	"time"

	"qmchain/chain"
	"qmchain/chain/source"
)

// Report is what was found of a set.
type Report struct {
	Set     string      `json:"set"`
	Kind    source.Kind `json:"kind"`
	Host    string      `json:"host"`    // that looked
	Version string      `json:"version"` // of the program
	Created time.Time   `json:"created"`
	MaxAge  float64     `json:"max_age_seconds"` // that the newest point of a guest may have
	State   State       `json:"state"`           // the worst of all guests'
	Points  int         `json:"points"`
	Bytes   int64       `json:"bytes"`
	Guests  []*Guest    `json:"guests"` // by name
}

// State says how somebody is to take what was found.
type State string

// The states, from the best to the worst.
const (
	Good    State = "good"
	Warning State = "warning"
	Bad     State = "bad"
)

func worse(a, b State) State {
	if a == Bad || b == Bad {
		return Bad
	}
	if a == Warning || b == Warning {
		return Warning
	}
	return Good
}

// Guest is one guest of the set.
type Guest struct {
	Name    string   `json:"guest"`
	VMName  string   `json:"vm_name"` // when the newest point was made
	State   State    `json:"state"`
	Remarks []Remark `json:"remarks"`
	// Unreadable is set if not all of it could be looked at, which may pass.
	Unreadable bool  `json:"unreadable"`
	Bytes      int64 `json:"bytes"`        // of all images, of removed points' too
	Size       int64 `json:"virtual_size"` // of the newest point's disks
	// Last is the newest point of which no damage is known; nil, if there is none.
	Last     *time.Time `json:"last,omitempty"`
	Verified *Verified  `json:"verified,omitempty"` // last; nil: never
	Drilled  *Drilled   `json:"drilled,omitempty"`  // last; nil: never
	Points   []Point    `json:"points"`             // oldest first
}

// Remark is something worth telling of a guest.
type Remark struct {
	State State  `json:"state"` // Bad or Warning
	Text  string `json:"text"`
}

// Point is a point, one that can't be read, or one that was removed and that others need.
type Point struct {
	ID          string            `json:"id"` // or its folder's name
	Time        time.Time         `json:"time"`
	Level       chain.Level       `json:"level"` // "" if it can't be read
	Consistency chain.Consistency `json:"consistency"`
	Note        string            `json:"note"`
	Protected   bool              `json:"protected"`
	Removed     bool              `json:"removed"`
	Bytes       int64             `json:"bytes"`
	Disks       []Disk            `json:"disks"`
	Parents     []string          `json:"parents"` // points that it was made on
	Damage      []string          `json:"damage"`  // what is known of it
	Unreadable  bool              `json:"unreadable"`
	Verified    *Verified         `json:"verified,omitempty"`
	Drilled     *Drilled          `json:"drilled,omitempty"`
}

// Disk is a disk of a point.
type Disk struct {
	Name   string      `json:"name"`
	Level  chain.Level `json:"level"`
	Reason string      `json:"reason"` // why this level
	Size   int64       `json:"virtual_size"`
	Bytes  int64       `json:"bytes"`
}

// Verified says what verify has found of a point.
type Verified struct {
	Point chain.ID  `json:"point"`
	Time  time.Time `json:"time"`
	Deep  bool      `json:"deep"`
	Good  bool      `json:"good"`
	Why   string    `json:"why"`
}

// Drilled says whether a point has started as a guest.
type Drilled struct {
	Point  chain.ID  `json:"point"`
	Time   time.Time `json:"time"`
	Passed bool      `json:"passed"`
	Why    string    `json:"why"`
}

// damaged reports whether the point is known not to be whole.
func (p *Point) damaged() bool { return len(p.Damage) > 0 }

// kept are the points without those that were removed.
func (g *Guest) kept() int {
	n := 0
	for i := range g.Points {
		if !g.Points[i].Removed {
			n++
		}
	}
	return n
}
