package standard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/chain/source"
	"qmchain/chain/virtnbd"
)

// disk is a disk of the point asked for.
type disk struct {
	name  string
	point *chain.Manifest
	img   image.Image // of the point, open until the job is closed
	links []link      // the full first
}

func (d *disk) last() link { return d.links[len(d.links)-1] }

// link is one image file of a chain.
type link struct {
	chain.Layer
	file image.Layer
	fileState
}

// fileState is what was seen of a file.
type fileState struct {
	stamp stamp
	bytes int64 // that it takes on the disk, or has; the less of them
	names uint64
}

// stamp tells one state of a file from another. How much it takes changes by itself, when what is in memory goes to the disk.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func stateOf(info fs.FileInfo) fileState {
	st := info.Sys().(*syscall.Stat_t)
	return fileState{
		stamp: stamp{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim},
		bytes: min(st.Blocks*512, st.Size), names: uint64(st.Nlink), //nolint:unconvert // 32 bits on arm64 //nolint:unconvert // of another type on arm64
	}
}

// openFile opens a file of the set for reading, following no link. The path is relative to the set.
func (j *Job) openFile(rel string) (*os.File, fileState, error) {
	root, err := os.OpenRoot(j.req.Set.Dir())
	if err != nil {
		return nil, fileState{}, err
	}
	defer root.Close()
	f, err := root.OpenFile(rel, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fileState{}, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w", rel, image.ErrNotRegular)
	}
	if err != nil {
		_ = f.Close()
		return nil, fileState{}, err
	}
	return f, stateOf(info), nil
}

// look finds the point, and the disks of it with their chains.
func (j *Job) look() error {
	var err error
	if j.points, err = j.guest.Points(); err != nil {
		return err
	}
	if j.damaged, err = source.Damaged(j.req.Set, j.guest.Name(), j.points); err != nil {
		j.req.Log.Warnf("what verify has found is not known: %v", err)
	}
	until, err := j.resolve(j.req.Until)
	if err != nil {
		return err
	}
	names, err := choose(until, j.req.Disks)
	if err != nil {
		return err
	}
	for _, name := range names {
		d, err := j.lookAtDisk(until, name)
		if err != nil {
			return err
		}
		j.disks = append(j.disks, d)
	}
	j.Plan.Guest, j.Plan.Until = j.guest.Name(), until.ID
	j.doubt(until, names)
	return nil
}

// resolve finds the point that is asked for. That there is one that can't be read is an error where it may be the one.
func (j *Job) resolve(ref string) (*chain.Manifest, error) {
	name := j.guest.Name()
	ref = strings.TrimPrefix(ref, name+"/")
	all := j.points.All
	if len(all) == 0 && len(j.points.Problems) == 0 {
		return nil, fmt.Errorf("guest %s has no point: %w", name, chain.ErrNoPoint)
	}
	var m *chain.Manifest
	var err error
	if ref == "" {
		ref = "latest"
		m = newestInChain(all)
	}
	if m == nil {
		m, err = all.Resolve(ref)
	}
	for _, p := range j.points.Problems {
		if p.Disk != "" {
			continue // its point is there, and the disk is found out about when it is opened
		}
		if ref == "latest" && (m == nil || p.Point > string(m.ID)) || strings.HasPrefix(p.Point, ref) {
			return nil, fmt.Errorf("guest %s: a point that may be meant can't be read: %w", name, p.Err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", name, err)
	}
	return m, nil
}

// newestInChain is the newest point that others can be made on, or that was made on others.
func newestInChain(all chain.Points) *chain.Manifest {
	for _, m := range slices.Backward(all.Kept()) {
		if slices.ContainsFunc(m.Disks, func(d chain.Disk) bool { return d.Level != chain.Copy }) {
			return m
		}
	}
	return nil
}

// choose returns the disks of a point that are asked for, all if none is.
func choose(m *chain.Manifest, names []string) ([]string, error) {
	var all []string
	for _, d := range m.Disks {
		all = append(all, d.Name)
	}
	if len(names) == 0 {
		return all, nil
	}
	for _, name := range names {
		if !slices.Contains(all, name) {
			return nil, fmt.Errorf("point %s has no disk %q, only %s: %w", m.ID, name, strings.Join(all, ", "), chain.ErrNoPoint)
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(names))), nil
}

// lookAtDisk opens a disk and finds its chain. What is refused or missing is an error.
func (j *Job) lookAtDisk(m *chain.Manifest, name string) (*disk, error) {
	img, err := j.points.OpenDisk(j.pool, m, name)
	if err != nil {
		return nil, err
	}
	j.release = append(j.release, func() { _ = img.Close() })
	d := &disk{name: name, point: m, img: img}
	d.links, err = j.chainOf(m, name)
	return d, err
}

// chainOf returns the links of a disk in a point.
func (j *Job) chainOf(m *chain.Manifest, name string) ([]link, error) {
	layers, err := j.points.All.Layers(m, name)
	if err != nil {
		return nil, err
	}
	var links []link
	for _, l := range layers {
		link, err := j.linkOf(l)
		if err != nil {
			return nil, err
		}
		links = append(links, link)
	}
	return links, nil
}

// linkOf finds the file of one layer.
func (j *Job) linkOf(l chain.Layer) (link, error) {
	file, ok := j.points.Image(l)
	if !ok {
		return link{}, fmt.Errorf("%s/%s: disk %s: %w: it has no image", j.guest.Name(), l.Point.ID, l.Disk.Name, chain.ErrDamaged)
	}
	state, ok := j.states[file.Name]
	if !ok {
		f, now, err := j.openFile(file.Name)
		if err != nil {
			return link{}, fmt.Errorf("%s: %w", file.Name, err)
		}
		_ = f.Close()
		state, j.states[file.Name] = now, now
	}
	// While an image is merged with the one above, which hides what is written, it can have any size.
	if file.Bytes >= 0 && state.stamp.size != file.Bytes && l.Disk.Merging == nil {
		return link{}, fmt.Errorf("%s: %w: it has %d bytes, not %d", file.Name, image.ErrChanged, state.stamp.size, file.Bytes)
	}
	return link{l, file, state}, nil
}

// doubt adds what speaks against disks of a point to the plan.
func (j *Job) doubt(m *chain.Manifest, names []string) {
	for _, w := range j.points.Warnings {
		if w.Point == string(m.ID) && (w.Disk == "" || slices.Contains(names, w.Disk)) {
			j.Plan.Doubts = append(j.Plan.Doubts, fmt.Errorf("%s, disk %s: %w", w.Point, w.Disk, w.Err))
		}
	}
	for _, name := range names {
		if v, ok := j.damaged[m.Ref(name)]; ok {
			j.Plan.Damage = append(j.Plan.Damage, fmt.Errorf("%s, disk %s: %w", m.ID, name, v.Err()))
		}
	}
}

// unchanged makes sure that the files that were read are still what they were.
func (j *Job) unchanged(links []link) error {
	for _, l := range links {
		f, state, err := j.openFile(l.file.Name)
		if err == nil {
			_ = f.Close()
		}
		if errors.Is(err, fs.ErrNotExist) || err == nil && state.stamp != l.stamp {
			return fmt.Errorf("%s was changed meanwhile: %w", l.file.Name, ErrBusy)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mapped is a file that says what it holds.
type mapped interface {
	Map(off, length int64, dst []qcow2.Run) ([]qcow2.Run, error)
	Span() int64
	Next(off int64) int64
	Size() int64
}

// runs calls f with all that a link's own file holds: with zeroes that hide what is below, too. A raw file holds all of it.
func (j *Job) runs(ctx context.Context, l link, f func(qcow2.Run) error) error {
	file, state, err := j.openFile(l.file.Name)
	if err != nil {
		return err
	}
	defer file.Close()
	var img mapped
	switch l.file.Format {
	case image.Raw:
		return f(qcow2.Run{Len: l.Disk.VirtualSize, Kind: qcow2.Data})
	case image.Qcow2:
		img, err = qcow2.Open(file, state.stamp.size, qcow2.Options{Snapshot: l.file.Snapshot})
	default:
		img, err = virtnbd.Open(file, state.stamp.size)
	}
	if err == nil {
		err = walk(ctx, img, f)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", l.file.Name, err)
	}
	return nil
}

// walk calls f with all that an image holds.
func walk(ctx context.Context, img mapped, f func(qcow2.Run) error) error {
	var runs []qcow2.Run
	span := img.Span()
	for off := img.Next(0); off < img.Size(); off = img.Next(off) {
		if err := ctx.Err(); err != nil {
			return err
		}
		end := min((off/span+1)*span, img.Size())
		var err error
		if runs, err = img.Map(off, end-off, runs[:0]); err != nil {
			return err
		}
		for _, r := range runs {
			if r.Kind == qcow2.Unallocated {
				continue
			}
			if err := r.Err(); err != nil {
				return err
			}
			if err := f(r); err != nil {
				return err
			}
		}
		off = end
	}
	return nil
}

// name is how a link's file is called in its own folder.
func (l link) name() string { return filepath.Base(l.file.Name) }
