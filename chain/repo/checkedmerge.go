package repo

import (
	"context"
	"slices"

	"qmchain/chain"
)

// MergedChecked has what was found damaged of an image told of the one that takes it in: a merge writes to a part of it, and what
// is wrong elsewhere goes on to exist. It may be called as soon as all that is kept and is read through from is read through to.
// Calling it again changes nothing, and where nothing was found nothing is written.
func (g *Guest) MergedChecked(ctx context.Context, from, to chain.ImageRef) error {
	c, err := g.Checked()
	if err != nil {
		return err
	}
	if !c.merged(from, to) {
		return nil
	}
	lock, err := g.lock(ctx, checkedLockFile, checkedLockLimit)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	if c, err = g.Checked(); err != nil {
		return err
	}
	if !c.merged(from, to) {
		return nil
	}
	return g.putChecked(c)
}

// merged has records name to where they name from, and reports whether that changes any. Each goes on to say where and when it was
// found; that from itself was found good since it does not outlive it.
func (c *Checked) merged(from, to chain.ImageRef) (changed bool) {
	same := func(a, b chain.ImageRef) bool { return a.Point == b.Point && a.Disk == b.Disk }
	for _, v := range c.Verified {
		if v.Good || c.cleared(from.Point, v) {
			continue
		}
		if len(v.Disks) == 0 && v.Point == from.Point {
			// Disks that are not merged are still there: that all are damaged stays said of them.
			v.Disks = []DamagedDisk{{Name: from.Disk, Images: []chain.ImageRef{to}}}
			if !slices.ContainsFunc(c.Verified, func(o Verified) bool { return o.Point == v.Point && o.Time.Equal(v.Time) && o.names(to) }) {
				c.Verified, changed = append(c.Verified, v), true
			}
			continue
		}
		for i := range v.Disks {
			d := &v.Disks[i]
			// A record names the disk of its own point without saying so.
			own := v.Point == from.Point && d.Name == from.Disk
			if !own && !slices.ContainsFunc(d.Images, func(r chain.ImageRef) bool { return same(r, from) }) {
				continue
			}
			images := slices.DeleteFunc(slices.Clone(d.Images), func(r chain.ImageRef) bool { return same(r, from) || same(r, to) })
			if images = append(images, to); !slices.Equal(images, d.Images) {
				d.Images, changed = images, true
			}
		}
	}
	return changed
}

func (v Verified) names(ref chain.ImageRef) bool {
	return slices.ContainsFunc(v.Disks, func(d DamagedDisk) bool { return slices.Contains(d.Images, ref) })
}

// cleared reports whether a point was found good since.
func (c *Checked) cleared(point chain.ID, found Verified) bool {
	return slices.ContainsFunc(c.Verified, func(v Verified) bool { return v.Point == point && v.Clears(found) })
}
