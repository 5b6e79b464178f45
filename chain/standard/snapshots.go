package standard

import (
	"context"
	"fmt"

	"qmchain/chain"
	"qmchain/chain/image"
)

// state is a point of a disk's chain, as one of the snapshots.
type state struct {
	point *chain.Manifest
	disk  string // its name in that point
	links []link
}

func (s state) size() int64 { return s.point.Disk(s.disk).VirtualSize }

// statesOf returns the points that have the same full as a disk, up to it: those it descends from, and those that branch off.
// One that branches off and can't be read is left out, and a doubt.
func (j *Job) statesOf(d *disk) ([]state, error) {
	full := d.links[0].file.Name
	var all []state
	for _, m := range j.points.All.Kept() {
		if m.ID > d.point.ID {
			break
		}
		name, direct := j.diskOn(full, m, d)
		if name == "" {
			continue
		}
		s := state{point: m, disk: name}
		var err error
		if s.links, err = j.chainOf(m, name); err == nil {
			var img image.Image
			if img, err = j.points.OpenDisk(j.pool, m, name); err == nil {
				err = img.Close()
			}
		}
		switch {
		case err != nil && direct:
			return nil, err
		case err != nil:
			j.Plan.Doubts = append(j.Plan.Doubts, fmt.Errorf("%s, disk %s, is left out: %w", m.ID, name, err))
		default:
			all = append(all, s)
			if m != d.point {
				j.doubt(m, []string{name})
			}
		}
	}
	return all, nil
}

// diskOn returns the disk of a point that is read through a full: the one that d was made on, if there is one.
func (j *Job) diskOn(full string, m *chain.Manifest, d *disk) (name string, direct bool) {
	for _, l := range d.links {
		if l.Point == m {
			return l.Disk.Name, true
		}
	}
	for i := range m.Disks {
		layers, err := j.points.All.Layers(m, m.Disks[i].Name)
		if err != nil {
			continue // it does not descend from what is there
		}
		if root, ok := j.points.Image(layers[0]); ok && root.Name == full {
			return m.Disks[i].Name, false
		}
	}
	return "", false
}

// planSnapshots plans one image of a disk with a snapshot for each point.
func (j *Job) planSnapshots(ctx context.Context, d *disk) error {
	all, err := j.statesOf(d)
	if err != nil {
		return err
	}
	o := j.out
	name := d.name + ".qcow2"
	path := o.staged(name)
	j.Plan.Results = append(j.Plan.Results, Result{d.name, d.point.ID, o.final(name)})
	for i, s := range all {
		if i == 0 {
			img, err := j.points.OpenDisk(j.pool, s.point, s.disk)
			if err != nil {
				return err
			}
			data, err := dataOf(ctx, img)
			_ = img.Close()
			if err != nil {
				return err
			}
			if err := j.exportStep(d.name, name, s.point, s.disk, data); err != nil {
				return err
			}
		} else if err := j.changesStep(ctx, d.name, name, all[i-1], s); err != nil {
			return err
		}
		id := string(s.point.ID)
		j.add(Step{Action: Snapshot, Disk: d.name, File: o.final(name), From: id}, func(ctx context.Context, _ func(int64)) error {
			if err := o.fs.Step("snapshot", path); err != nil {
				return err
			}
			return j.snapshot(ctx, path, id)
		})
	}
	return nil
}

// changesStep adds the step that makes an image that holds one point hold the next one.
func (j *Job) changesStep(ctx context.Context, disk, name string, from, to state) error {
	o := j.out
	where, err := j.differ(ctx, from.links, to.links)
	if err != nil {
		return err
	}
	var bytes int64
	for _, s := range where {
		bytes += max(0, min(s.end, to.size())-s.off)
	}
	const tables = 4 << 20
	o.need += bytes + bytes/64 + tables
	source := fmt.Sprintf("%s/%s/%s", j.guest.Name(), to.point.ID, to.disk)
	j.add(Step{Action: Write, Disk: disk, File: o.final(name), From: source, Bytes: bytes}, func(ctx context.Context, progress func(int64)) error {
		path := o.staged(name)
		before, err := j.points.OpenDisk(j.pool, from.point, from.disk)
		if err != nil {
			return err
		}
		defer before.Close()
		img, err := j.points.OpenDisk(j.pool, to.point, to.disk)
		if err != nil {
			return err
		}
		defer img.Close()
		if err := o.fs.Step("write", path); err != nil {
			return err
		}
		if img.Size() > before.Size() {
			if err := j.resize(ctx, path, img.Size()); err != nil {
				return err
			}
		}
		if err := j.applyTo(ctx, path, max(before.Size(), img.Size()), before, img, where, progress); err != nil {
			return err
		}
		if img.Size() < before.Size() {
			return j.resize(ctx, path, img.Size())
		}
		return nil
	})
	return nil
}

// applyTo is apply with a writer of its own, to an image with a disk of size bytes.
func (j *Job) applyTo(ctx context.Context, path string, size int64, before, img image.Image, where spans, progress func(int64)) error {
	if len(where) == 0 {
		return nil
	}
	w, err := j.openWriter(ctx, path)
	if err != nil {
		return err
	}
	err = j.apply(ctx, w, before, img, where, progress)
	if err == nil {
		// A disk that shrinks may grow again: what is left in its last cluster must not be seen then.
		if end := min((img.Size()+cluster-1)&^(cluster-1), size); end > img.Size() {
			err = w.zero(ctx, img.Size(), int(end-img.Size()))
		}
	}
	if err != nil {
		_ = w.abort()
		return err
	}
	return w.close(ctx)
}
