package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"qmchain/chain"
	"qmchain/qmp"
)

// freshBitmap records from the start of QEMU on until what was saved is merged with it. A bitmap gets its tracking name only in
// the transaction that makes it whole: half of one would be a gap that nobody sees.
const freshBitmap = "qmchain-fresh"

// restore merges what was saved back into a guest that has started, disk by disk, where it is proven that nothing was written
// since. What is refused is gone, and remembered with the reason. It returns the names of the bitmaps that are there again.
func (c *carrier) restore(ctx context.Context) (merged []string, err error) {
	if !c.kept.has(c.guest) {
		return nil, nil
	}
	if !c.kept.isThere(c.guest, savedFile) {
		return nil, c.kept.clear(c.guest) // whoever claimed it has died: the guest's lock is ours
	}
	v, err := look(ctx, c.qmp)
	if err != nil {
		return nil, err
	}
	g, err := c.kept.read(c.guest, savedFile)
	switch {
	case errors.Is(err, chain.ErrDamaged):
		c.log.Warn(err)
		return nil, c.kept.clear(c.guest)
	case err != nil:
		return nil, err
	case v.status == "inmigrate":
		return nil, fmt.Errorf("the guest is being migrated here: %w", ErrBusy)
	case g.Guest.UUID != v.guest.UUID:
		return nil, fmt.Errorf("what is kept under the name %s is of the guest with UUID %s: %w", c.guest, g.Guest.UUID, ErrOtherGuest)
	case v.hasAny(g):
		c.log.Info("the guest has not ended since its bitmaps were saved")
		return nil, c.kept.clear(c.guest)
	}
	refused := c.kept.refusals(c.guest) // of the saving
	if g, err = c.kept.claim(c.guest); err != nil {
		return nil, err
	}
	refuse := func(err error, disks ...savedDisk) {
		for _, d := range disks {
			c.log.Warnf("saved bitmaps of %s are of no use: %v", d.path(), err)
			for _, b := range d.Bitmaps {
				refused[b.Name] = fmt.Sprintf("what was saved when the guest stopped is of no use: %v", err)
			}
		}
	}
	defer func() {
		err = errors.Join(err, c.kept.writeRefusals(c.guest, refused), c.kept.clear(c.guest))
	}()
	if g.Guest.VMGenID != v.guest.VMGenID {
		refuse(errors.New("the guest was rolled back, restored or copied (its vmgenid is another one)"), g.Disks...)
		return nil, nil
	}
	now, err := c.candidates(ctx, v)
	if err != nil {
		refuse(err, g.Disks...)
		return nil, err
	}
	for i, d := range g.Disks {
		at, err := c.find(ctx, v, d, now)
		if err == nil {
			err = c.restoreDisk(ctx, d, at, i)
		}
		if err != nil {
			refuse(err, d)
			continue
		}
		for _, b := range d.Bitmaps {
			merged = append(merged, b.Name)
		}
	}
	for _, n := range now {
		if n.fresh {
			err = errors.Join(err, c.tidy(ctx, step{"block-dirty-bitmap-remove", map[string]any{"node": n.disk.format, "name": freshBitmap}}))
		}
	}
	return merged, err
}

// hasAny reports whether a saved bitmap is still there: then the QEMU process is the one that it was saved from.
func (v *view) hasAny(g *savedGuest) bool {
	for _, d := range g.Disks {
		for _, b := range d.Bitmaps {
			for _, n := range v.nodes {
				if slices.ContainsFunc(n.info.DirtyBitmaps, func(have qmp.DirtyBitmap) bool { return have.Name == b.Name && tracked(have) }) {
					return true
				}
			}
		}
	}
	return false
}

// current is a disk that the guest has now.
type current struct {
	disk    Disk
	volumes []volume
	err     error // why it can't be one of those that were saved
	fresh   bool  // it has a freshBitmap
}

// candidates are the guest's disks, each with a fresh bitmap. The volumes are read first: what the guest writes after the
// reading and before its bitmap records shows in QEMU's counters.
func (c *carrier) candidates(ctx context.Context, v *view) ([]*current, error) {
	disks, err := v.disks()
	if err != nil {
		return nil, err
	}
	pid, pidErr := c.pid()
	var all []*current
	var actions []qmp.Action
	for _, d := range disks {
		if d.Left != "" {
			continue
		}
		n := &current{disk: d, err: cmp.Or(d.busy, pidErr)}
		all = append(all, n)
		if n.err == nil {
			n.volumes, n.err = v.volumes(ctx, pid, d.format)
		}
		if n.err != nil {
			continue
		}
		if slices.ContainsFunc(d.bitmaps, func(b qmp.DirtyBitmap) bool { return b.Name == freshBitmap }) {
			actions = append(actions, qmp.BitmapRemove(d.format, freshBitmap))
		}
		n.fresh = true
		actions = append(actions, qmp.BitmapAdd(d.format, freshBitmap, false, false))
	}
	if len(actions) == 0 {
		return all, nil
	}
	return all, c.qmp.Transaction(ctx, actions...)
}

// find finds the disk that was saved among those that the guest has now, whatever its name is.
func (c *carrier) find(ctx context.Context, v *view, d savedDisk, all []*current) (*current, error) {
	var found []*current
	for _, n := range all {
		if n.err == nil && slices.EqualFunc(n.volumes, d.Volumes, volume.equal) {
			found = append(found, n)
		}
	}
	if len(found) == 1 {
		n, image := found[0], v.nodes[found[0].disk.format]
		switch {
		case n.disk.Size != d.Size:
			return nil, fmt.Errorf("its size has changed from %d to %d bytes", d.Size, n.disk.Size)
		case image.driver != d.Driver || windowOf(image) != d.Window:
			return nil, errors.New("its image is used in another way than before")
		}
		return n, c.checkUntouched(ctx, v, n.disk)
	}
	if len(found) > 1 {
		return nil, errors.New("several disks use its image")
	}
	// All that is left to say is why.
	for _, n := range all {
		last := len(n.volumes) - 1
		switch {
		case n.err != nil && n.disk.File == d.path():
			return nil, n.err
		case n.err != nil || n.volumes[last].Path != d.path():
			continue
		}
		reason := changed
		for i, old := range d.Volumes[:min(len(d.Volumes), len(n.volumes))] {
			if text := old.change(n.volumes[i]); text != "" {
				reason = text
			}
		}
		return nil, cmp.Or(c.checkUntouched(ctx, v, n.disk), errors.New(reason))
	}
	return nil, errors.New("the guest has no such disk any more")
}

// windowOf tells a disk that is only a part of its file, such as a raw one with an offset, from others there: QEMU names it by
// all options that make up its bytes.
func windowOf(n *node) string {
	if strings.HasPrefix(n.filename, "json:") {
		return n.filename
	}
	return ""
}

// restoreDisk merges the saved bitmaps of one disk with its fresh one.
func (c *carrier) restoreDisk(ctx context.Context, d savedDisk, at *current, i int) (err error) {
	path, err := filepath.Abs(c.kept.path(c.guest, d.Sidecar))
	if err != nil {
		return err
	}
	digest, err := sum(path)
	if err != nil || digest != d.SHA256 {
		return fmt.Errorf("its sidecar %s is not what was saved: %w", path, cmp.Or(err, chain.ErrDamaged))
	}
	side, format := nodeName(keepPrefix, i), at.disk.format
	if err := c.qmp.BlockdevAdd(ctx, imageOptions(side, map[string]any{"driver": "file", "filename": path}, true)); err != nil {
		return err
	}
	defer func() {
		if delErr := c.tidy(ctx, del(side)); delErr != nil {
			c.log.Warn(delErr) // the next run takes it away
		}
	}()
	after, err := lookBlock(ctx, c.qmp)
	if err != nil {
		return err
	}
	var actions []qmp.Action
	for _, b := range d.Bitmaps {
		if !slices.ContainsFunc(after.nodes[side].info.DirtyBitmaps, func(have qmp.DirtyBitmap) bool {
			return have.Name == b.Name && have.Count == b.Count && have.Granularity == b.Granularity && !have.Inconsistent
		}) {
			return fmt.Errorf("its sidecar %s does not hold bitmap %s as it was saved: %w", path, b.Name, chain.ErrDamaged)
		}
		actions = append(actions, addBitmap(format, b.Name, b.Granularity, false),
			qmp.BitmapMerge(format, b.Name, qmp.BitmapRef{Node: format, Name: freshBitmap}, qmp.BitmapRef{Node: side, Name: b.Name}))
	}
	return c.qmp.Transaction(ctx, actions...)
}

// checkUntouched makes sure that nothing was written to a disk between QEMU's start and the adding of its fresh bitmap, which
// is there by now. A device's counters tell of the guest's requests, also of those that failed. wr_highest_offset is a node's,
// and tells of whoever writes through it: block jobs, exports, the monitor. Neither a reset of the guest nor anything else
// sets them back while the device and the node exist; a device that was plugged anew after QEMU's start has an image whose
// times tell.
func (c *carrier) checkUntouched(ctx context.Context, v *view, d Disk) error {
	var devices, nodes []blockStats
	if err := c.qmp.Execute(ctx, "query-blockstats", nil, &devices); err != nil {
		return err
	}
	if err := c.qmp.Execute(ctx, "query-blockstats", map[string]any{"query-nodes": true}, &nodes); err != nil {
		return err
	}
	if export, err := exported(ctx, c.qmp); err != nil {
		return err
	} else if export != "" {
		return fmt.Errorf("QEMU exports disks to others (%s): %w", export, ErrBusy)
	}
	counted := false
	for _, s := range devices {
		if s.Node != d.top {
			continue
		}
		counted = true
		if n := s.Stats; n.Writes+n.FailedWrites+n.InvalidWrites+n.Unmaps+n.FailedUnmaps+n.InvalidUnmaps > 0 {
			return errWritten
		}
	}
	if !counted {
		return fmt.Errorf("QEMU has no counters of it: %w", errNoProof)
	}
	below := make(map[string]bool)
	v.below(d.top, below)
	for _, s := range nodes {
		if below[s.Node] && s.Stats.HighestWrite+s.Specific.Discards+s.Specific.FailedDiscards > 0 {
			return errWritten
		}
		delete(below, s.Node)
	}
	if len(below) > 0 {
		return fmt.Errorf("QEMU has no counters of its nodes %s: %w", strings.Join(slices.Sorted(maps.Keys(below)), ", "), errNoProof)
	}
	return nil
}

var errWritten = errors.New("the guest had written to it before they could be merged back; was it started without a keeper?")

// blockStats is an entry of query-blockstats.
type blockStats struct {
	Node  string `json:"node-name"`
	Stats struct {
		Writes        uint64 `json:"wr_operations"`
		FailedWrites  uint64 `json:"failed_wr_operations"`
		InvalidWrites uint64 `json:"invalid_wr_operations"`
		Unmaps        uint64 `json:"unmap_operations"`
		FailedUnmaps  uint64 `json:"failed_unmap_operations"`
		InvalidUnmaps uint64 `json:"invalid_unmap_operations"`
		HighestWrite  uint64 `json:"wr_highest_offset"`
	} `json:"stats"`
	Specific struct { // of file and host_device
		Discards       uint64 `json:"discard-nb-ok"`
		FailedDiscards uint64 `json:"discard-nb-failed"`
	} `json:"driver-specific"`
}

// below adds a node and all that it is made of to set.
func (v *view) below(name string, set map[string]bool) {
	n := v.nodes[name]
	if n == nil || set[name] {
		return
	}
	set[name] = true
	for _, child := range n.children {
		v.below(child, set)
	}
}
