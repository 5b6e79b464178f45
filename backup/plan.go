package backup

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/qmp"
)

// Auto asks for an increment of each disk where that is safe, and else for a full.
const Auto chain.Level = "auto"

// ErrNotFound is wrapped where something that was asked for does not exist.
var ErrNotFound = chain.ErrNoPoint

// ErrOtherGuest is returned where the repository's points are those of another guest.
var ErrOtherGuest = errors.New("another guest")

// Request is what the user asked for.
type Request struct {
	Level   chain.Level // Auto, or one of chain's
	Disks   []string    // only these; empty: all
	Exclude []string    // not these
	// Skip are disks to leave out, with the reason, that need not be there; Disks goes before it.
	Skip      map[string]string
	NewChain  Rotation // with Auto: when to begin a new chain
	Threshold int64    // make no point if all disks are increments and these hold less, in bytes
	Note      string
	Adopt     bool // go on though the newest point is another guest's
	// Bitmaps is chain.KindPersistent or chain.KindMemory, for the disks that can have either; empty: in memory where the disk's
	// image has internal snapshots, as QEMU does not go back to one while a persistent bitmap is in the image.
	// Of a stopped guest's disk there is no bitmap in memory: its next point is a full.
	Bitmaps string
}

// PlannedDisk is what will be done with one disk.
type PlannedDisk struct {
	Disk
	Level     chain.Level
	Reason    string       // why this level
	Unplanned bool         // a full where an increment was to be expected
	Parent    *chain.Layer // of an increment
	Old       string       // the bitmap that tells what an increment copies
	New       string       // the bitmap that records from this point on; empty where tracking stays as it is
	Kind      string       // chain.KindPersistent or chain.KindMemory
	Estimate  int64        // bytes to copy: what the bitmap has marked, or what the guest's image has allocated
	Stray     []string     // bitmaps of ours that no point of the repository explains; left alone
}

// Plan is what a run will do.
type Plan struct {
	ID    chain.ID
	Disks []PlannedDisk
	Left  []Disk // with the reason in Disk.Left
}

// Estimate is how much will be copied, in bytes.
func (p *Plan) Estimate() int64 {
	var sum int64
	for _, d := range p.Disks {
		sum += d.Estimate
	}
	return sum
}

// below reports whether the plan is one of increments alone that hold less than threshold.
func (p *Plan) below(threshold int64) bool {
	return p.Estimate() < threshold && !slices.ContainsFunc(p.Disks, func(d PlannedDisk) bool { return !d.Level.Overlay() })
}

// planner holds what planning depends on. It does no input or output of its own but through sound.
type planner struct {
	repo   string // the short id of the repository
	points chain.Points
	guest  chain.GuestIdentity
	now    time.Time
	memory bool // bitmaps in memory are of use: the QEMU process goes on after the run
	// refused says of bitmaps that were saved when the guest stopped why they are not there any more.
	refused refusals
	// sound checks that the image files of a disk in a point are all there and are what their manifests say, and that verify has
	// found no damage in them.
	sound func(chain.Layer) error
}

// plan decides what to do with each disk.
func (p planner) plan(id chain.ID, disks []Disk, req Request) (*Plan, error) {
	if err := p.checkGuest(req); err != nil {
		return nil, err
	}
	for _, name := range slices.Concat(req.Disks, req.Exclude) {
		if !slices.ContainsFunc(disks, func(d Disk) bool { return d.Name == name }) {
			return nil, fmt.Errorf("the guest has no disk %q, only %s: %w", name, diskNames(disks), ErrNotFound)
		}
	}
	plan := &Plan{ID: id}
	for _, d := range disks {
		asked := slices.Contains(req.Disks, d.Name)
		switch {
		case slices.Contains(req.Exclude, d.Name) || len(req.Disks) > 0 && !asked:
			d.Left = "not asked for"
		case !asked && d.Left == "" && req.Skip[d.Name] != "":
			d.Left = req.Skip[d.Name]
		case d.Left != "" && asked:
			return nil, fmt.Errorf("disk %s can't be backed up: %s: %w", d.Name, d.Left, ErrNotFound)
		}
		if d.Left != "" {
			plan.Left = append(plan.Left, d)
			continue
		}
		if d.busy != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, d.busy)
		}
		pd, err := p.disk(id, d)
		if err == nil {
			pd, err = pd.ofKind(req, p).atLevel(req, p)
		}
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		}
		plan.Disks = append(plan.Disks, pd)
	}
	if len(plan.Disks) == 0 {
		return nil, fmt.Errorf("the guest has no disk that can be backed up: %w", ErrNotFound)
	}
	return plan, nil
}

func (p planner) checkGuest(req Request) error {
	latest := p.points.Latest()
	if latest == nil || req.Adopt || latest.Guest.UUID == "" || p.guest.UUID == "" || latest.Guest.UUID == p.guest.UUID {
		return nil
	}
	return fmt.Errorf("%w: the newest point %s is of the guest with UUID %s, but the running one has %s", ErrOtherGuest, latest.ID, latest.Guest.UUID, p.guest.UUID)
}

func diskNames(disks []Disk) string {
	var names []string
	for _, d := range disks {
		names = append(names, d.Name)
	}
	return strings.Join(names, ", ")
}

// ofKind chooses where the disk's next bitmap is. One of the other kind that is there now goes once the new point stands.
func (pd PlannedDisk) ofKind(req Request, p planner) PlannedDisk {
	if pd.Kind == chain.KindPersistent && (req.Bitmaps == chain.KindMemory || req.Bitmaps == "" && pd.snapshots) {
		pd.Kind = chain.KindMemory
	}
	return pd
}

// notStored says why the disk's bitmap is not stored in its image.
func (pd PlannedDisk) notStored(req Request) string {
	switch {
	case !pd.storable():
		return "its image can't store bitmaps"
	case req.Bitmaps == chain.KindMemory:
		return "its bitmaps are to be in memory alone"
	}
	return "its image has internal snapshots, and a bitmap in it would keep QEMU from going back to one"
}

// atLevel makes of a disk's plan for Auto one for the level that was asked for.
func (pd PlannedDisk) atLevel(req Request, p planner) (PlannedDisk, error) {
	if pd.Kind == chain.KindMemory && !p.memory {
		pd.New = ""
		if pd.Level == chain.Full && pd.Unplanned && !p.marked(pd.Disk) {
			pd = pd.full("it can't be tracked while the guest is stopped: " + pd.notStored(req))
		}
	}
	switch req.Level {
	case chain.Full:
		pd = pd.full("asked for")
	case chain.Copy:
		pd = pd.full("asked for")
		pd.Level, pd.New = chain.Copy, ""
	case chain.Inc, chain.Diff:
		if pd.Level != chain.Inc {
			return pd, fmt.Errorf("an increment is not possible: %s", pd.Reason)
		}
		if pd.Level = req.Level; pd.Level == chain.Diff {
			pd.New = ""
		}
	default:
		if pd.Level != chain.Inc {
			break
		}
		layers, err := p.points.Layers(pd.Parent.Point, pd.Parent.Disk.Name)
		if err != nil {
			return pd, err
		}
		if reason := req.NewChain.due(layers, p.now); reason != "" {
			pd = pd.full(reason)
		}
	}
	return pd, nil
}

// storable tells whether the disk's image can store bitmaps.
func (d *Disk) storable() bool { return d.Driver == "qcow2" && d.compat != "0.10" }

// disk plans one disk for the level Auto.
func (p planner) disk(id chain.ID, d Disk) (PlannedDisk, error) {
	pd := PlannedDisk{Disk: d, Kind: chain.KindMemory, Estimate: d.allocated}
	pd.New = chain.BitmapName{Repo: p.repo, Point: id, Disk: d.Name}.String()
	if d.storable() {
		pd.Kind = chain.KindPersistent
	}

	var reasons []string
	var parents []candidate
	for i := range d.bitmaps {
		b := &d.bitmaps[i]
		name, ours := chain.ParseBitmapName(b.Name)
		if !ours || name.Repo != p.repo {
			continue
		}
		if p.points.Find(name.Point) == nil {
			pd.Stray = append(pd.Stray, b.Name)
		}
		parent, reason := p.points.Tracked(name)
		switch {
		case parent == nil:
		case b.Inconsistent:
			reason = "its bitmap is inconsistent: QEMU did not end cleanly"
		case !b.Recording:
			reason = "its bitmap does not record"
		case b.Busy:
			reason = "its bitmap is in use by another job"
		default:
			parents = append(parents, candidate{b.Name, b.Count, parent})
			continue
		}
		reasons = append(reasons, reason)
	}
	if len(parents) == 0 {
		switch {
		case len(reasons) > 0:
			return pd.unplanned(strings.Join(reasons, "; ")), nil
		case p.known(d.Name, false):
			return pd.unplanned("no bitmap records on it since its last point" + p.refusal(d.Name)), nil
		case p.known(d.Name, true):
			return pd.full("first point of this disk after those that were imported"), nil
		default:
			return pd.full("first point of this disk"), nil
		}
	}

	// The newest is what tracks; an older one was left by a run that died right after its commit.
	newest := slices.MaxFunc(parents, func(a, b candidate) int {
		return strings.Compare(string(a.layer.Point.ID), string(b.layer.Point.ID))
	})
	parent := newest.layer
	was := parent.Point.Guest
	if was.UUID == "" && was.VMGenID == "" && was.VMName == "" {
		// The first points were taken while the guest was stopped: its images did not tell whose they are.
		was.UUID, was.VMGenID = p.guest.UUID, p.guest.VMGenID
	}
	switch {
	case was.UUID != p.guest.UUID:
		return pd.unplanned("its last point is another guest's"), nil
	case was.VMGenID != p.guest.VMGenID:
		return pd.unplanned("the guest was rolled back, restored or copied since its last point (its vmgenid is another one)"), nil
	case d.Size < parent.Disk.VirtualSize:
		return pd.unplanned(fmt.Sprintf("it has shrunk since its last point, from %d to %d bytes", parent.Disk.VirtualSize, d.Size)), nil
	case d.Size > parent.Disk.VirtualSize && d.Driver != "qcow2":
		// A volume that grows can have old data in its new part, which no bitmap has marked.
		return pd.unplanned(fmt.Sprintf("it has grown since its last point, from %d to %d bytes, and is not qcow2", parent.Disk.VirtualSize, d.Size)), nil
	}
	switch err := p.sound(*parent); {
	case errors.Is(err, chain.ErrDamaged):
		return pd.unplanned(fmt.Sprintf("its chain can't be built on: %v", err)), nil
	case err != nil:
		return pd, err // a share that hiccups is no reason for a new chain
	}
	pd.Level, pd.Parent, pd.Old, pd.Estimate = chain.Inc, parent, newest.bitmap, newest.count
	return pd, nil
}

// marked tells whether a disk has a bitmap of this repository's.
func (p planner) marked(d Disk) bool {
	return slices.ContainsFunc(d.bitmaps, func(b qmp.DirtyBitmap) bool {
		name, ours := chain.ParseBitmapName(b.Name)
		return ours && name.Repo == p.repo
	})
}

// candidate is a bitmap that records from an image of the repository.
type candidate struct {
	bitmap string
	count  int64 // bytes marked
	layer  *chain.Layer
}

// refusal says why what was saved of the bitmap that tracks a disk is not there, if it was saved at all.
func (p planner) refusal(disk string) string {
	for _, bitmap := range slices.Sorted(maps.Keys(p.refused)) {
		name, ours := chain.ParseBitmapName(bitmap)
		if !ours || name.Repo != p.repo || name.Disk != disk {
			continue
		}
		if parent, _ := p.points.Tracked(name); parent != nil {
			return ": " + p.refused[bitmap]
		}
	}
	return ""
}

// known reports whether the repository has a disk of that name in points that increments could go on from: imported ones, or
// those of runs. Only after the latter an increment is to be expected.
func (p planner) known(disk string, imported bool) bool {
	return slices.ContainsFunc(p.points, func(m *chain.Manifest) bool {
		d := m.Disk(disk)
		return d != nil && d.Level.Tracked() && (m.QEMU == "") == imported
	})
}

func (pd PlannedDisk) full(reason string) PlannedDisk {
	pd.Level, pd.Reason, pd.Parent, pd.Old, pd.Unplanned, pd.Estimate = chain.Full, reason, nil, "", false, pd.allocated
	return pd
}

func (pd PlannedDisk) unplanned(reason string) PlannedDisk {
	pd = pd.full(reason)
	pd.Unplanned = true
	return pd
}
