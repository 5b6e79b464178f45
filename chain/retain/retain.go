package retain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/repo"
)

// ErrKept is wrapped where a point that must be kept was to be removed.
var ErrKept = errors.New("must be kept")

// Remover removes points of one guest. It needs the guest's prune lock.
type Remover struct {
	Guest *repo.Guest
	Log   logrus.FieldLogger
	// RateLimit bounds the writing of a merge, in bytes per second; 0: no limit.
	RateLimit int64

	known repo.Known // points are looked at before each step
}

// Remove makes bases of the points, so that they are gone for all who list points. Sweep then does what can be done to get
// their space back. A protected point, or a tracking parent unless force is set, is refused before anything is changed.
func (r *Remover) Remove(points chain.Points, force bool, ids ...chain.ID) error {
	for _, id := range ids {
		m := points.Find(id)
		if m == nil || m.Base {
			return fmt.Errorf("%s/%s: %w", r.Guest.Name, id, chain.ErrNoPoint)
		}
		if m.Protected {
			return fmt.Errorf("%s/%s is protected and %w", r.Guest.Name, id, ErrKept)
		}
		if disk := trackedDisk(points, m); disk != "" && !force {
			return fmt.Errorf("%s/%s %w: the increments of %s go on from it", r.Guest.Name, id, ErrKept, disk)
		}
	}
	for _, id := range ids {
		if err := r.Guest.Hide(id); err != nil {
			return err
		}
	}
	return nil
}

// Left is a base that Sweep could not do away with.
type Left struct {
	ID  chain.ID
	Why string
}

// Sweep does away with bases: images that nobody needs are removed, those that one child needs are merged with it. It returns
// those that are left, with the reason. What a crash has left half-done is finished first.
func (r *Remover) Sweep(ctx context.Context) ([]Left, error) {
	if err := r.Guest.DropRemoved(); err != nil {
		return nil, err
	}
	bases, err := r.bases()
	if err != nil {
		return nil, err
	}
	// What nobody needs goes first, the newest before what it was made on: all of a chain that is not kept goes without a merge,
	// and nothing is left to lie on what remains.
	byAge := slices.SortedFunc(slices.Values(bases), oldestFirst)
	gone := map[repo.Folder]bool{}
	for _, f := range slices.Backward(byAge) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		why, err := r.sweepBase(ctx, f, false)
		gone[f] = why == "" && err == nil // an error comes again below
	}
	var left []Left
	var failed error
	for _, f := range bases {
		if gone[f] {
			continue
		}
		if err := ctx.Err(); err != nil {
			return left, err
		}
		why, err := r.sweepBase(ctx, f, true)
		if err != nil {
			// The other chains are no worse for it.
			failed = errors.Join(failed, err)
			why = err.Error()
		}
		if why != "" {
			left = append(left, Left{f.ID, why})
		}
	}
	return left, failed
}

func oldestFirst(a, b repo.Folder) int { return strings.Compare(string(a.ID), string(b.ID)) }

// bases returns the bases in the order in which they are to go, and settles what a crash has left: manifests that say what
// is to be next. Where a merge has begun it comes first, as its child must not be merged itself before. Then come the oldest:
// what each child holds is written once on its way into the full.
func (r *Remover) bases() ([]repo.Folder, error) {
	folders, err := r.Guest.Folders()
	if err != nil {
		return nil, err
	}
	var begun, rest []repo.Folder
	for _, f := range folders {
		if err := r.Guest.DropTemporary(f); err != nil {
			return nil, err
		}
		m, err := r.Guest.Decode(f)
		if err != nil {
			r.Log.Warn(err) // it is no child of anything that is removed: sweepBase makes sure
			continue
		}
		if slices.ContainsFunc(m.Disks, func(d chain.Disk) bool { return d.Next != nil }) {
			if err := settle(r.Guest, f); err != nil {
				return nil, err
			}
		}
		for _, d := range m.Disks {
			if d.Generation > 0 {
				if err := r.Guest.DropSums(f, d.Name, d.Generation-1); err != nil {
					return nil, err
				}
			}
		}
		switch {
		case f.Base && slices.ContainsFunc(m.Disks, func(d chain.Disk) bool { return d.Merging != nil }):
			begun = append(begun, f)
		case f.Base:
			rest = append(rest, f)
		}
	}
	slices.SortFunc(begun, oldestFirst)
	slices.SortFunc(rest, oldestFirst)
	return append(begun, rest...), nil
}

// sweepBase does away with one base; why says what keeps it. Unless mayMerge, all that needs it does.
func (r *Remover) sweepBase(ctx context.Context, f repo.Folder, mayMerge bool) (why string, err error) {
	release, err := r.Guest.Claim(f)
	if errors.Is(err, repo.ErrLocked) {
		return "it is being read", nil
	}
	if err != nil {
		return "", err
	}
	defer release()
	base, err := r.Guest.Decode(f)
	if err != nil {
		return "", err
	}
	for i := range base.Disks {
		d := &base.Disks[i]
		points, problems, err := r.Guest.Look(&r.known)
		if err != nil {
			return "", err
		}
		if len(problems) > 0 {
			// What can't be read can be a child.
			return fmt.Sprintf("a point can't be read, and may need it: %v", problems[0].Err), nil
		}
		switch children := childrenOf(r.Guest, points, base.Ref(d.Name)); {
		case len(children) == 0:
			if err := r.Guest.DropImage(f.ID, d.Name); err != nil {
				return "", err
			}
		case !mayMerge:
			why = fmt.Sprintf("disk %s of %s is read through it", d.Name, children[0].Point.ID)
		case len(children) == 1 && children[0].Disk.Merging != nil:
			why = fmt.Sprintf("disk %s of %s is to be merged itself before", children[0].Disk.Name, children[0].Point.ID)
		case len(children) == 1:
			m := merge{guest: r.Guest, log: r.Log, rate: r.RateLimit, base: f, baseDisk: d, child: children[0]}
			if w, err := m.run(ctx, points); err != nil {
				return "", fmt.Errorf("%s/%s: disk %s: merge it into %s: %w", r.Guest.Name, f.ID, d.Name, children[0].Point.ID, err)
			} else if w != "" {
				why = w
			}
		default:
			why = fmt.Sprintf("disk %s of %s and of %s is read through it", d.Name, children[0].Point.ID, children[1].Point.ID)
		}
	}
	if why != "" {
		return why, nil
	}
	return "", r.Guest.DropBase(f.ID)
}

// childrenOf are the images that lie on one.
func childrenOf(g *repo.Guest, points chain.Points, ref chain.ImageRef) []chain.Layer {
	var children []chain.Layer
	for _, m := range points {
		for i := range m.Disks {
			if d := &m.Disks[i]; d.Parent != nil && *d.Parent == ref && !spent(g, points, m, d) {
				children = append(children, chain.Layer{Point: m, Disk: d})
			}
		}
	}
	return children
}

// spent reports whether a disk of a base is done with, and the base is left for the sake of another disk: its image was
// removed or has become that of its child. One that has begun to be merged nobody reads any more.
func spent(g *repo.Guest, points chain.Points, base *chain.Manifest, d *chain.Disk) bool {
	if !base.Base || len(childrenOf(g, points, base.Ref(d.Name))) > 0 {
		return false
	}
	if d.Merging != nil {
		return true
	}
	_, err := os.Lstat(g.ImagePath(base.ID, d.Name))
	return errors.Is(err, fs.ErrNotExist)
}

// Unfinished says what a crash has left half-done: merges that have begun, and manifests that were being written. Sweep puts an
// end to them. Without the prune lock it can be what another one is at.
func Unfinished(g *repo.Guest) ([]string, error) {
	points, _, err := g.Points()
	if err != nil {
		return nil, err
	}
	folders, err := g.Folders()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, f := range folders {
		names, err := g.Temporary(f)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it has just gone
			return nil, err
		}
		for _, name := range names {
			found = append(found, fmt.Sprintf("%s: %s is left of a change that was cut off", f.Name, name))
		}
		m, err := g.Decode(f)
		if err != nil {
			continue // for who reads points to complain of
		}
		for i := range m.Disks {
			switch d := &m.Disks[i]; {
			case d.Merging != nil && !spent(g, points, m, d):
				found = append(found, fmt.Sprintf("removed point %s: disk %s is not yet merged into %s", f.ID, d.Name, d.Merging.Point))
			case d.Next != nil:
				found = append(found, fmt.Sprintf("point %s: the merge of disk %s has not come to its end", f.ID, d.Name))
			}
		}
	}
	return found, nil
}
