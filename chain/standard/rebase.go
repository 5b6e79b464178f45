package standard

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
)

// planRebase plans the links of a disk as files of the output.
func (j *Job) planRebase(ctx context.Context, d *disk) error {
	var below string // the name of the link below
	var format image.Format
	for i, l := range d.links {
		name := fmt.Sprintf("%s.%s.qcow2", l.Point.ID, l.Disk.Name)
		var err error
		switch {
		case l.file.Format == image.Raw:
			name = fmt.Sprintf("%s.%s.raw", l.Point.ID, l.Disk.Name)
			err = j.copyStep(d.name, name, l)
		case l.file.Format == image.Qcow2 && l.file.Snapshot == "":
			if err = j.copyStep(d.name, name, l); err == nil {
				err = j.backingStep(d.name, name, l, below, format)
			}
		case i == 0: // a stream, or a snapshot
			var data int64
			if data, err = j.dataIn(ctx, l); err == nil {
				err = j.exportStep(d.name, name, l.Point, l.Disk.Name, data)
			}
		default:
			err = j.overlayStep(d, i, name, below, format)
		}
		if err != nil {
			return err
		}
		below, format = name, image.Qcow2
		if l.file.Format == image.Raw {
			format = image.Raw
		}
	}
	link := d.name + ".image"
	j.Plan.Results = append(j.Plan.Results, Result{d.name, d.point.ID, j.out.final(link)})
	return j.linkStep(d.name, link, below)
}

// dataIn is how much data there is in a full.
func (j *Job) dataIn(ctx context.Context, l link) (int64, error) {
	img, err := j.points.OpenDisk(j.pool, l.Point, l.Disk.Name)
	if err != nil {
		return 0, err
	}
	defer img.Close()
	return dataOf(ctx, img)
}

// copyStep adds the step that copies a link's file.
func (j *Job) copyStep(disk, name string, l link) error {
	o := j.out
	if err := o.add(name); err != nil {
		return err
	}
	bytes := l.bytes
	o.need += bytes
	o.cloned += bytes
	o.probe = l.file.Name
	j.add(Step{Action: Copy, Disk: disk, File: o.final(name), From: l.file.Name, Bytes: bytes}, func(ctx context.Context, progress func(int64)) error {
		src, state, err := j.openFile(l.file.Name)
		if err != nil {
			return err
		}
		defer src.Close()
		if state.stamp != l.stamp {
			return fmt.Errorf("%s was changed meanwhile: %w", l.file.Name, ErrBusy)
		}
		if err := o.fs.Step("create", o.staged(name)); err != nil {
			return err
		}
		dst, err := os.OpenFile(o.staged(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, fileMode)
		if err != nil {
			return err
		}
		o.open = append(o.open, dst)
		if !clone(dst, src) {
			if err := copySparse(ctx, dst, src, state.stamp.size, &j.limit, progress); err != nil {
				return err
			}
		}
		if l.file.Format != image.Qcow2 {
			return nil
		}
		// What contradicts itself would be found only when that part of it is read.
		return j.check(ctx, o.staged(name), bytes)
	})
	return nil
}

// backingStep adds the step that makes the header of a copy name the one below, if it does not yet.
func (j *Job) backingStep(disk, name string, l link, below string, format image.Format) error {
	h, err := j.header(l)
	if err != nil {
		return err
	}
	o, backing := j.out, backingName(below)
	if says(h, backing, format) {
		return nil
	}
	j.add(Step{Action: Backing, Disk: disk, File: o.final(name), From: backing}, func(ctx context.Context, _ func(int64)) error {
		if err := o.fs.Step("rebase", o.staged(name)); err != nil {
			return err
		}
		return j.rebase(ctx, o.staged(name), backing, format)
	})
	return nil
}

// says reports whether a header names a backing file and its format.
func says(h *qcow2.Header, backing string, format image.Format) bool {
	if backing == "" {
		return h.BackingFile == ""
	}
	return h.BackingFile == backing && h.BackingFormat == format.String()
}

// header reads the header of a link's file, which must be one that can be read further: QEMU follows what others name.
func (j *Job) header(l link) (*qcow2.Header, error) {
	f, state, err := j.openFile(l.file.Name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.file.Name, err)
	}
	defer f.Close()
	img, err := qcow2.Open(f, state.stamp.size, qcow2.Options{})
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", l.file.Name, chain.ErrDamaged, err)
	}
	return img.Header(), nil
}

// overlayStep adds the step that writes a link that is no qcow2 image as one.
func (j *Job) overlayStep(d *disk, i int, name, below string, format image.Format) error {
	o := j.out
	if err := o.add(name); err != nil {
		return err
	}
	l, parent := d.links[i], d.links[i-1]
	bytes := l.stamp.size
	const tables = 4 << 20
	// What is compressed becomes larger, but nobody knows how much before it is read.
	o.need += bytes + bytes/64 + tables
	j.add(Step{Action: Write, Disk: d.name, File: o.final(name), From: l.file.Name, Bytes: bytes}, func(ctx context.Context, progress func(int64)) error {
		path := o.staged(name)
		if err := o.fs.Step("create", path); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, fileMode) // which qemu-img would make for all to read
		if err != nil {
			return err
		}
		o.open = append(o.open, f)
		if err := j.create(ctx, path, l.Disk.VirtualSize, backingName(below), format); err != nil {
			return err
		}
		before, err := j.points.OpenDisk(j.pool, parent.Point, parent.Disk.Name)
		if err != nil {
			return err
		}
		defer before.Close()
		img, err := j.points.OpenDisk(j.pool, l.Point, l.Disk.Name)
		if err != nil {
			return err
		}
		defer img.Close()
		where, err := j.held(ctx, l)
		if err != nil {
			return err
		}
		return j.applyTo(ctx, path, img.Size(), before, img, where, progress)
	})
	return nil
}

// planRebaseInPlace plans the headers of a disk's increments, and the symbolic link.
func (j *Job) planRebaseInPlace(d *disk) error {
	p := j.place
	for i, l := range d.links {
		if i == 0 {
			continue
		}
		below := d.links[i-1]
		h, err := j.header(l)
		if err != nil {
			return err
		}
		backing := backingName(below.name())
		if says(h, backing, below.file.Format) {
			continue
		}
		p.backingStep(d.name, l.file.Name, backing, below.file.Format)
	}
	last := d.last()
	link := p.linkPath(d.name, filepath.Dir(last.file.Name))
	j.Plan.Results = append(j.Plan.Results, Result{d.name, d.point.ID, filepath.Join(p.dir, link)})
	return p.linkStep(d.name, link, last.name())
}
