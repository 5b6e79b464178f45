package report

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/source"
)

// Options say how to look at a set.
type Options struct {
	Now           time.Time
	MaxAge        time.Duration // that the newest point of a guest may have
	Guests        []string      // only these; all, if there are none
	Host, Version string        // for the page's head
}

// Look finds out how the backups in a set are. What is wrong with a guest is told as a remark; the error says that the set
// could not be looked at, or that it has no such guest (chain.ErrNoPoint).
func Look(ctx context.Context, set source.Set, o Options) (*Report, error) {
	r := &Report{
		Set: set.Dir(), Kind: set.Kind(), Host: o.Host, Version: o.Version, Created: o.Now.UTC().Truncate(time.Second),
		MaxAge: o.MaxAge.Seconds(), State: Good, Guests: []*Guest{},
	}
	names := o.Guests
	if len(names) == 0 {
		var err error
		if names, err = set.Guests(); err != nil {
			return nil, err
		}
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		g, err := lookAt(set, name, o)
		if err != nil {
			return nil, err
		}
		r.Guests = append(r.Guests, g)
		r.State = worse(r.State, g.State)
		r.Points += g.kept()
		r.Bytes += g.Bytes
	}
	return r, nil
}

// maxLooks bounds how often a guest is looked at whose points change meanwhile.
const maxLooks = 3

// lookAt finds out how one guest's backups are.
func lookAt(set source.Set, name string, o Options) (*Guest, error) {
	from, err := set.Guest(name)
	if err != nil {
		return nil, err
	}
	var g *Guest
	points, err := from.Points()
	for looks := 1; ; looks++ {
		g = &Guest{Name: name, State: Good, Remarks: []Remark{}, Points: []Point{}}
		if err != nil {
			break
		}
		g.add(points, set.Kind() == source.Qmchain)
		if looks == maxLooks || set.Kind() != source.Qmchain || !slices.ContainsFunc(g.Points, func(p Point) bool { return p.damaged() }) {
			break
		}
		// What goes while it is looked at is not missing.
		then := points
		if points, err = from.Points(); err == nil && slices.Equal(points.All, then.All) {
			break
		}
	}
	if err != nil {
		g.unread(err)
		return g, nil
	}
	if len(o.Guests) > 0 && len(g.Points) == 0 {
		return nil, fmt.Errorf("guest %s has no point in %s: %w", name, set.Dir(), chain.ErrNoPoint)
	}
	if r := source.Repository(set); r != nil {
		guest, err := r.Guest(name)
		if err != nil {
			return nil, err
		}
		g.addChecked(guest, points.All)
		g.unfinished(guest)
	}
	for _, w := range points.Warnings {
		g.remark(Warning, "%s, disk %s: %v", w.Point, w.Disk, w.Err)
	}
	g.judge(o)
	return g, nil
}

func (g *Guest) remark(state State, format string, args ...any) {
	g.Remarks = append(g.Remarks, Remark{state, fmt.Sprintf(format, args...)})
	g.State = worse(g.State, state)
}

func (g *Guest) unread(err error) {
	g.Unreadable = true
	g.remark(Bad, "it can't be looked at: %v", err)
}

// add gives a new guest the points that were found.
func (g *Guest) add(from *source.Points, images bool) {
	at := map[chain.ID]int{} // index in g.Points
	faulty := map[diskOf]fault{}
	files := map[string]bool{}
	passing := map[chain.ID]bool{} // what can't be read just now
	for _, p := range from.Problems {
		if f, ok := repo.ParseFolder(p.Point); ok && p.Disk == "" && !errors.Is(p.Err, chain.ErrDamaged) {
			passing[f.ID] = true
		}
	}
	for _, m := range from.All { // parents first
		p := Point{
			ID: string(m.ID), Time: m.Time.UTC(), Level: m.Level(), Consistency: m.Consistency, Note: m.Note, Protected: m.Protected,
			Removed: m.Base, Disks: []Disk{}, Parents: []string{}, Damage: []string{},
		}
		for i := range m.Disks {
			d := &m.Disks[i]
			p.Disks = append(p.Disks, Disk{d.Name, d.Level, d.Reason, d.VirtualSize, d.Bytes})
			p.Bytes += d.Bytes
			// A foreign set's file can hold several disks' images.
			if l, ok := from.Image(chain.Layer{Point: m, Disk: d}); !ok || !files[l.Name] {
				g.Bytes += d.Bytes
				files[l.Name] = true
			}
			if d.Parent != nil && !slices.Contains(p.Parents, string(d.Parent.Point)) {
				p.Parents = append(p.Parents, string(d.Parent.Point))
			}
			f := below(from.All, d, faulty, passing)
			if f.why == "" && images {
				f.why = missing(from, m, d)
			}
			faulty[diskOf{m.ID, d.Name}] = f
			switch {
			case f.passes:
				p.Unreadable = true
			case f.why != "":
				p.Damage = append(p.Damage, fmt.Sprintf("disk %s: %s", d.Name, f.why))
			}
		}
		at[m.ID] = len(g.Points)
		g.Points = append(g.Points, p)
		g.VMName = m.Guest.VMName
	}
	for _, problem := range from.Problems {
		f, ok := repo.ParseFolder(problem.Point)
		if !ok {
			f = repo.Folder{ID: chain.ID(problem.Point)}
		}
		i, ok := at[f.ID]
		if !ok {
			i = len(g.Points)
			at[f.ID] = i
			g.Points = append(g.Points, Point{
				ID: string(f.ID), Time: f.ID.Time(), Removed: f.Base, Disks: []Disk{}, Parents: []string{}, Damage: []string{}, Unreadable: true,
			})
		}
		text := problem.Err.Error()
		if problem.Disk != "" {
			text = fmt.Sprintf("disk %s: %s", problem.Disk, text)
		}
		if errors.Is(problem.Err, chain.ErrDamaged) {
			g.Points[i].Damage = append(g.Points[i].Damage, text)
		} else {
			g.Unreadable = true
			g.remark(Bad, "%s can't be read just now: %s", f.ID, text)
		}
	}
	slices.SortStableFunc(g.Points, func(a, b Point) int { return strings.Compare(a.ID, b.ID) })
}

// diskOf is a disk of a point.
type diskOf struct {
	point chain.ID
	disk  string
}

// fault is why a disk can't be read.
type fault struct {
	why    string // "": it can
	passes bool   // it may be read another time
}

// below says what is missing below a disk. It is chain.Points.Layers for all points at once: those of a long chain have too
// many layers to look for all of each.
func below(all chain.Points, d *chain.Disk, faulty map[diskOf]fault, passing map[chain.ID]bool) fault {
	if d.Parent == nil {
		return fault{}
	}
	parent := all.Find(d.Parent.Point)
	switch {
	case parent == nil && passing[d.Parent.Point]:
		return fault{"what it was made on can't be read just now", true}
	case parent == nil:
		return fault{why: fmt.Sprintf("the point %s that it was made on is missing", d.Parent.Point)}
	case parent.UUID != d.Parent.UUID:
		return fault{why: fmt.Sprintf("it was made on another point %s than the one that is there", d.Parent.Point)}
	case parent.Disk(d.Parent.Disk) == nil:
		return fault{why: fmt.Sprintf("point %s has no disk %s, which it was made on", d.Parent.Point, d.Parent.Disk)}
	}
	f := faulty[diskOf{parent.ID, d.Parent.Disk}]
	if f.why != "" && !f.passes {
		f.why = fmt.Sprintf("the point %s that it was made on is not whole", parent.ID)
	}
	return f
}

// missing says whether a disk's own image is there, and is as large as it was; "" is that it is.
func missing(from *source.Points, m *chain.Manifest, d *chain.Disk) string {
	l, ok := from.Image(chain.Layer{Point: m, Disk: d})
	if !ok {
		return ""
	}
	info, err := os.Lstat(l.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Sprintf("its image %s is missing", l.Name)
	case err != nil:
		return "" // which says nothing of the image
	case !info.Mode().IsRegular():
		return fmt.Sprintf("its image %s is no regular file", l.Name)
	case info.Size() != d.Bytes && d.Merging == nil:
		return fmt.Sprintf("its image %s has %d bytes, not %d", l.Name, info.Size(), d.Bytes)
	}
	return ""
}

// addChecked takes in what verify and drill have found. What is damaged is worked out as for all who read points.
func (g *Guest) addChecked(guest *repo.Guest, points chain.Points) {
	checked, err := guest.Checked()
	if err != nil {
		g.remark(Warning, "when it was verified and drilled can't be told: %v", err)
		return
	}
	byID := map[string]*Point{}
	for i := range g.Points {
		if !g.Points[i].Removed {
			byID[g.Points[i].ID] = &g.Points[i]
		}
	}
	for _, v := range checked.Verified {
		p := byID[string(v.Point)]
		if p == nil {
			continue
		}
		one := Verified{Point: v.Point, Time: v.Time.UTC(), Deep: v.Deep, Good: v.Good, Why: v.Why}
		// Of two looks, of which none saw all that the other did, the one that found damage counts.
		if p.Verified == nil || p.Verified.Good && (!one.Good || one.Time.After(p.Verified.Time)) {
			p.Verified = &one
		}
		if g.Verified == nil || one.Time.After(g.Verified.Time) || one.Time.Equal(g.Verified.Time) && (!one.Good || g.Verified.Good && one.Point > g.Verified.Point) {
			g.Verified = &one
		}
	}
	damaged := checked.Damaged(points)
	for _, m := range points {
		p := byID[string(m.ID)]
		if p == nil {
			continue
		}
		for i := range m.Disks {
			if v, ok := damaged[m.Ref(m.Disks[i].Name)]; ok {
				p.Damage = append(p.Damage, fmt.Sprintf("disk %s: verify found on %s, at %s: %s", m.Disks[i].Name, minute(v.Time), v.Point, v.Why))
			}
		}
	}
	for _, d := range checked.Drilled {
		p := byID[string(d.Point)]
		if p == nil {
			continue
		}
		one := Drilled{Point: d.Point, Time: d.Time.UTC(), Passed: d.Passed, Why: d.Why}
		p.Drilled = &one
		if g.Drilled == nil || one.Time.After(g.Drilled.Time) {
			g.Drilled = &one
		}
	}
}

// unfinished tells of runs that have not ended.
func (g *Guest) unfinished(guest *repo.Guest) {
	partials, err := guest.Partials()
	if err != nil {
		g.unread(err)
		return
	}
	for _, id := range partials {
		g.remark(Warning, "a run that began on %s is under way, or was cut off", minute(id.Time()))
	}
}

// judge says what is to be told of all that was found.
func (g *Guest) judge(o Options) {
	damaged := 0
	var newest *Point
	for i := range g.Points {
		p := &g.Points[i]
		if p.Removed {
			continue
		}
		if p.damaged() {
			damaged++
		} else if !p.Unreadable {
			newest = p
			g.Last = &p.Time
		}
	}
	if damaged > 0 {
		g.remark(Bad, "%d of %s not whole", damaged, counted(g.kept(), "point is", "points are"))
	}
	if newest == nil {
		g.remark(Bad, "there is no point that is known to be whole")
	} else if age := o.Now.Sub(newest.Time); age > o.MaxAge {
		g.remark(Bad, "the newest point that is whole is %s old, more than %s", span(age), span(o.MaxAge))
	} else if age < -time.Minute {
		g.remark(Warning, "the newest point is of the future: the clock here or there is wrong")
	}
	for _, p := range slices.Backward(g.Points) {
		if p.Removed || p.Level == "" {
			continue
		}
		for _, d := range p.Disks {
			g.Size += d.Size
		}
		break
	}
	if d := g.Drilled; d != nil && !d.Passed {
		g.remark(Bad, "the last drill failed: %s: %s", d.Point, d.Why)
	}
	slices.SortStableFunc(g.Remarks, func(a, b Remark) int { return strings.Compare(string(a.State), string(b.State)) }) // bad first
}
