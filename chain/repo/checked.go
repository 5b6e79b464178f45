package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/internal/durable"
)

const (
	checkedFile     = ".checked.json"
	checkedLockFile = ".checked.lock"

	// checkedLockLimit is more than it takes to write the file, which is all that the lock is held for.
	checkedLockLimit = 10 * time.Second
	maxChecked       = 16 << 20
	maxRecordedWhy   = 1 << 10
)

// Checked is what was last found when a guest's points were verified and drilled. It stands in a file in the guest's folder, and
// is no part of any point: it tells which backups were ever tried, and Damaged says which are not to be relied on.
type Checked struct {
	Format   int        `json:"format"`
	Verified []Verified `json:"verified"`
	Drilled  []Drilled  `json:"drilled"`
}

// Verified says what a point was found to be. What could not be found out, for a share that hiccups or a merge under way, is
// not recorded.
type Verified struct {
	Point chain.ID  `json:"point"`
	Time  time.Time `json:"time"` // at which the look began: what was put right meanwhile may not have been seen
	// Tables says that the images' tables were checked with qemu-img, and Deep that the disks were read; of a point that is not good
	// whether that was needed to find it out. Where it was not, any look tells whether it is good again.
	Tables bool   `json:"tables"`
	Deep   bool   `json:"deep"`
	Good   bool   `json:"good"`
	Why    string `json:"why,omitempty"` // it is not good: the disks, and the files
	// Disks are those that are damaged. Where there are none though it is not good, all of the point's are.
	Disks []DamagedDisk `json:"disks,omitempty"`
}

// DamagedDisk is a disk that can't be read as it was, and the images that are the reason: its own, or ones below. Of those below
// the ones can be left out of which their own points' records tell.
type DamagedDisk struct {
	Name   string           `json:"name"`
	Images []chain.ImageRef `json:"images"`
}

// covers reports whether v looked at all of a point that o did, and no earlier. A superficial look that finds nothing says nothing
// of what a thorough one has found.
func (v Verified) covers(o Verified) bool {
	return v.Point == o.Point && !v.Time.Before(o.Time) && v.asThorough(o)
}

func (v Verified) asThorough(o Verified) bool {
	return (v.Tables || !o.Tables) && (v.Deep || !o.Deep)
}

// damageIn reports whether it is damage in images of such points.
func (v Verified) damageIn(points map[chain.ID]bool) bool {
	named := func(i chain.ImageRef) bool { return points[i.Point] }
	return !v.Good && (points[v.Point] || slices.ContainsFunc(v.Disks, func(d DamagedDisk) bool { return slices.ContainsFunc(d.Images, named) }))
}

// Drilled says whether a point has started as a guest.
type Drilled struct {
	Point   chain.ID  `json:"point"`
	Time    time.Time `json:"time"`
	Passed  bool      `json:"passed"`
	Why     string    `json:"why"`     // what was seen, or what was not
	Seconds float64   `json:"seconds"` // it took
}

// Checked returns what was found so far: nothing, where nobody has looked. A record that can't be understood wraps
// chain.ErrDamaged.
func (g *Guest) Checked() (*Checked, error) {
	text, err := readFile(filepath.Join(g.Dir, checkedFile), maxChecked)
	if errors.Is(err, fs.ErrNotExist) {
		return &Checked{Format: chain.FormatVersion}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("guest %s: what was checked: %w", g.Name, err)
	}
	var c Checked
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("guest %s: what was checked: %s: %w: %w", g.Name, checkedFile, chain.ErrDamaged, err)
	}
	if c.Format != chain.FormatVersion {
		return nil, fmt.Errorf("guest %s: what was checked: %s has format %d: this version of qmchain knows format %d", g.Name, checkedFile, c.Format, chain.FormatVersion)
	}
	return &c, nil
}

// NoteChecked records what was found, and forgets of points that are gone; but no damage of images that are still needed. A record
// that is damaged is begun anew. One that would be too large to be read again is not written, which is an error.
func (g *Guest) NoteChecked(ctx context.Context, found Checked) error {
	if len(found.Verified)+len(found.Drilled) == 0 {
		return nil
	}
	lock, err := g.lock(ctx, checkedLockFile, checkedLockLimit)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	c, err := g.Checked()
	if errors.Is(err, chain.ErrDamaged) {
		c, err = &Checked{Format: chain.FormatVersion}, nil
	}
	if err != nil {
		return err
	}
	folders, err := g.Folders()
	if err != nil {
		return err
	}
	have, needed := make(map[chain.ID]bool, len(folders)), make(map[chain.ID]bool, len(folders))
	for _, f := range folders {
		have[f.ID], needed[f.ID] = !f.Base, true
	}
	c.add(found, have, needed)
	return g.putChecked(c)
}

// putChecked writes what was found. The caller holds the lock.
func (g *Guest) putChecked(c *Checked) error {
	text, err := json.MarshalIndent(c, "", " ")
	if err != nil {
		return err
	}
	text = append(text, '\n')
	if len(text) > maxChecked {
		return fmt.Errorf("guest %s: what was checked: %s would have %d bytes, more than the %d that it can have", g.Name, checkedFile, len(text), maxChecked)
	}
	if err := g.dropTemporaryChecked(); err != nil {
		return err
	}
	if err := g.Repo.FS.WriteFile(filepath.Join(g.Dir, checkedFile), text, fileMode); err != nil {
		return fmt.Errorf("guest %s: what was checked: %w", g.Name, err)
	}
	return nil
}

// add takes in what was found; have says which points there are, and needed which have images: also those that were removed, but
// are bases of others.
func (c *Checked) add(found Checked, have, needed map[chain.ID]bool) {
	verified, drilled := map[chain.ID][]Verified{}, map[chain.ID]bool{}
	for _, v := range found.Verified {
		verified[v.Point] = append(verified[v.Point], v)
	}
	for _, d := range found.Drilled {
		drilled[d.Point] = true
	}
	old := *c
	c.Verified, c.Drilled = []Verified{}, []Drilled{}
	for _, o := range old.Verified {
		// What was found good keeps older damage below it from counting for what is read through it.
		if (have[o.Point] || o.damageIn(needed) || o.Good && needed[o.Point]) && !slices.ContainsFunc(verified[o.Point], func(v Verified) bool { return v.covers(o) }) {
			c.Verified = append(c.Verified, o)
		}
	}
	for _, o := range old.Drilled {
		if have[o.Point] && !drilled[o.Point] {
			c.Drilled = append(c.Drilled, o)
		}
	}
	for _, v := range found.Verified {
		if have[v.Point] && !slices.ContainsFunc(old.Verified, func(o Verified) bool { return v.Time.Before(o.Time) && o.covers(v) }) {
			v.Why = shortened(v.Why, maxRecordedWhy)
			c.Verified = append(c.Verified, v)
		}
	}
	for _, d := range found.Drilled {
		if have[d.Point] {
			c.Drilled = append(c.Drilled, d)
		}
	}
	slices.SortStableFunc(c.Verified, func(a, b Verified) int { return strings.Compare(string(a.Point), string(b.Point)) })
	slices.SortStableFunc(c.Drilled, func(a, b Drilled) int { return strings.Compare(string(a.Point), string(b.Point)) })
}

// dropTemporaryChecked removes what one who was killed in mid-write has left. The caller holds the lock.
func (g *Guest) dropTemporaryChecked() error {
	entries, err := os.ReadDir(g.Dir)
	if err != nil {
		return fmt.Errorf("guest %s: %w", g.Name, err)
	}
	for _, e := range entries {
		if durable.Temporary(e.Name()) && strings.Contains(e.Name(), checkedFile) {
			if err := g.Repo.FS.Remove(filepath.Join(g.Dir, e.Name())); err != nil {
				return fmt.Errorf("guest %s: %w", g.Name, err)
			}
		}
	}
	return nil
}
