package standard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/chain/source"
)

const (
	setLockFile = ".qmchain-lock"
	partSuffix  = ".partial" // of what qmpbackup has not finished

	fullSnapshot = "FULL-BACKUP"
	snapshotTime = "2006-01-02-15:04:05"
)

// dated is the name of a full that tells its time: only of such ones the snapshots are known as points.
var dated = regexp.MustCompile(`^FULL-[0-9]{1,12}-`)

// inPlace is a set that is changed.
type inPlace struct {
	job    *Job
	dir    string // absolute
	begun  *journal
	merges []*merging
}

// path is that of a file of the set.
func (p *inPlace) path(rel string) string { return filepath.Join(p.dir, filepath.FromSlash(rel)) }

func (j *Job) openInPlace(ctx context.Context) error {
	if j.req.Set.Kind() != source.Qmpbackup {
		return fmt.Errorf("%s is of %s: %w", j.req.Set.Dir(), j.req.Set.Kind(), ErrForeign)
	}
	dir, err := filepath.Abs(j.req.Set.Dir())
	if err != nil {
		return err
	}
	p := &inPlace{job: j, dir: dir}
	j.place, j.Plan.InPlace = p, true
	if err := p.checkQuiet(); err != nil {
		return err
	}
	if p.begun, err = readJournal(dir); err != nil {
		return err
	}
	if p.begun != nil {
		if err := p.begun.asks(j.req); err != nil {
			return err
		}
		return p.resume()
	}
	if err := j.look(); err != nil {
		return err
	}
	if len(j.Plan.Doubts) > 0 && j.req.Command != Rebase {
		return fmt.Errorf("%w: %w", ErrCannot, j.Plan.Doubts[0]) // what would show it is lost by merging
	}
	for _, d := range j.disks {
		for _, l := range d.links {
			if l.file.Format != image.Qcow2 {
				continue
			}
			if err := j.check(ctx, p.path(l.file.Name), l.stamp.size); err != nil {
				return fmt.Errorf("%s: %w", l.file.Name, err)
			}
		}
		if j.req.Command == Rebase {
			err = j.planRebaseInPlace(d)
		} else {
			err = p.planMerge(ctx, d)
		}
		if err != nil {
			return err
		}
	}
	return p.planMerges()
}

// checkQuiet makes sure that no backup is being written: qmpbackup gives its files their names at the end.
func (p *inPlace) checkQuiet() error {
	return filepath.WalkDir(p.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(p.dir, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir() && strings.Count(rel, "/") > 1:
			return fs.SkipDir // deeper than the disks of a month there are none
		case strings.HasSuffix(d.Name(), partSuffix) && d.Type().IsRegular():
			return fmt.Errorf("%s is there: a backup is being written, or one has failed: %w", rel, ErrBusy)
		}
		return nil
	})
}

// merging is a full that takes in increments.
type merging struct {
	disk  string
	base  link
	links []link // that are to be merged still, the oldest first
	again bool   // an earlier call was cut off
	noted journalDisk
	// next gets the full as its backing file in the end; "": none does.
	next string
	link string // the symbolic link that leads to one of the links
}

// planMerge plans what is merged of a disk, and finds what is in the way.
func (p *inPlace) planMerge(ctx context.Context, d *disk) error {
	j := p.job
	base := d.links[0]
	m := &merging{disk: d.name, base: base, links: d.links[1:]}
	p.merges = append(p.merges, m)
	j.Plan.Results = append(j.Plan.Results, Result{d.name, d.point.ID, p.path(base.file.Name)})
	if len(m.links) == 0 {
		return nil
	}
	if err := p.checkBase(base); err != nil {
		return fmt.Errorf("%s: %w", base.file.Name, err)
	}
	size := base.Disk.VirtualSize
	for _, l := range m.links {
		if l.Disk.VirtualSize < size {
			return fmt.Errorf("%s: %w: the disk is smaller in it than before, and what was cut off could show again", l.file.Name, ErrCannot)
		}
		size = l.Disk.VirtualSize
		m.noted.Merge = append(m.noted.Merge, l.file.Name)
	}
	m.noted.Name, m.noted.Base = d.name, base.file.Name
	next, ok, err := p.naming(d.last())
	if err != nil {
		return err
	}
	if ok {
		m.next, m.noted.Next = next.file.Name, next.file.Name
	}
	m.link = p.leading(m.noted)
	return p.checkRoom(ctx, m)
}

// checkBase finds what keeps a full from being merged into.
func (p *inPlace) checkBase(base link) error {
	h, err := p.job.header(base)
	if err != nil {
		return err
	}
	if base.names > 1 {
		return hardLinked()
	}
	if p.job.req.Command == Commit {
		if h.Snapshots > 0 {
			return fmt.Errorf("%w: it has internal snapshots, which would not be of what is merged", ErrCannot)
		}
		return nil
	}
	switch {
	case !dated.MatchString(base.name()):
		return fmt.Errorf("%w: its name has no time stamp, and snapshots of such a full are not known as points", ErrCannot)
	case h.Version < 3:
		return fmt.Errorf("%w: it is a qcow2 image of version %d, which has no place for the mark of what snapshots are called", ErrCannot, h.Version)
	case h.Snapshots > 0 && string(h.Identity()) != foreign.UTCSnapshots:
		return fmt.Errorf("%w: it has internal snapshots, of times in an unknown zone", ErrCannot)
	}
	return nil
}

func hardLinked() error {
	return fmt.Errorf("%w: it has other names (hard links), and what those name would change with it", ErrCannot)
}

// naming returns the increment that was made on a link, if it says so in its header. One that names the link though another
// comes in between contradicts itself, and must go on doing so.
func (p *inPlace) naming(below link) (above link, ok bool, err error) {
	ref := below.Point.Ref(below.Disk.Name)
	for _, l := range p.increments(below.Disk.Name) {
		if l.file.Format != image.Qcow2 || l.Disk.Parent == nil || *l.Disk.Parent != ref {
			continue
		}
		h, err := p.job.header(l)
		if errors.Is(err, chain.ErrDamaged) {
			continue // nobody reads it anyway
		}
		if err != nil {
			return link{}, false, err
		}
		if path.Base(h.BackingFile) != below.name() {
			continue
		}
		if l.names > 1 {
			return link{}, false, fmt.Errorf("%s: %w", l.file.Name, hardLinked())
		}
		return l, true, nil
	}
	return link{}, false, nil
}

// increments returns all of a disk that the set lists, readable or not.
func (p *inPlace) increments(disk string) (links []link) {
	for _, m := range p.job.points.All {
		d := m.Disk(disk)
		if d == nil || d.Level != chain.Inc {
			continue
		}
		if l, err := p.job.linkOf(chain.Layer{Point: m, Disk: d}); err == nil {
			links = append(links, l)
		}
	}
	return links
}

// linkPath is the path of the symbolic link of a disk whose images are in that folder.
func (p *inPlace) linkPath(disk, folder string) string {
	for _, m := range p.job.points.All {
		for _, d := range m.Disks {
			if d.Name != disk && path.Dir(d.File) == folder {
				return path.Join(folder, disk+".image")
			}
		}
	}
	return path.Join(folder, "image")
}

// leading returns the path of the symbolic link if it leads to an image that is merged, else "".
func (p *inPlace) leading(d journalDisk) string {
	rel := p.linkPath(d.Name, path.Dir(d.Base))
	target, err := os.Readlink(p.path(rel))
	if err != nil || !slices.ContainsFunc(d.Merge, func(file string) bool { return path.Base(file) == path.Base(target) }) {
		return ""
	}
	return rel
}

// checkRoom makes sure that there is space for what a full takes in. Each increment goes before the next one is merged.
func (p *inPlace) checkRoom(ctx context.Context, m *merging) error {
	j := p.job
	f, state, err := j.openFile(m.base.file.Name)
	if err != nil {
		return err
	}
	defer f.Close()
	base, err := qcow2.Open(f, state.stamp.size, qcow2.Options{})
	if err != nil {
		return err
	}
	const tables = 4 << 20
	var used, most int64
	for _, l := range m.links {
		var grows int64
		err := j.runs(ctx, l, func(r qcow2.Run) error {
			if r.Kind == qcow2.Zero {
				return nil
			}
			grows += r.Len
			if j.req.Command == Snapshots || r.Off >= base.Size() {
				return nil // what is there is kept for a snapshot
			}
			there, err := base.Map(r.Off, r.Len, nil)
			for _, h := range there {
				if h.Kind == qcow2.Data {
					grows -= h.Len
				}
			}
			return err
		})
		if err != nil {
			return err
		}
		used += grows + grows/64 + tables
		most = max(most, used)
		used -= l.bytes
	}
	free, err := freeSpace(p.dir)
	if err != nil {
		return err
	}
	if most > free {
		return fmt.Errorf("%s: %w: it may grow by %s, and %s are free", m.base.file.Name, ErrNoSpace, humanize.IBytes(uint64(most)), humanize.IBytes(uint64(free)))
	}
	return nil
}

// resume plans what an earlier call has not got to. Names of files count only if the set has such images.
func (p *inPlace) resume() error {
	j := p.job
	var err error
	if j.points, err = j.guest.Points(); err != nil {
		return err
	}
	j.Plan.Guest, j.Plan.Until = j.guest.Name(), p.begun.Until
	for _, note := range p.begun.Disks {
		base, ok := p.full(note)
		if !ok {
			return fmt.Errorf("%s: %w: %s, of disk %s, is missing", journalFile, chain.ErrDamaged, note.Base, note.Name)
		}
		m := &merging{disk: note.Name, base: base, again: true, noted: note}
		known := p.increments(note.Name)
		for _, file := range note.Merge {
			i := slices.IndexFunc(known, func(l link) bool { return l.file.Name == file })
			if i >= 0 {
				m.links = append(m.links, known[i])
				continue
			}
			if _, err := os.Lstat(p.path(file)); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s: %w: %s is no increment of disk %s", journalFile, chain.ErrDamaged, file, note.Name)
			}
		}
		if slices.ContainsFunc(known, func(l link) bool { return l.file.Name == note.Next }) {
			m.next = note.Next
		}
		m.link = p.leading(note)
		j.Plan.Results = append(j.Plan.Results, Result{note.Name, p.begun.Until, p.path(note.Base)})
		p.merges = append(p.merges, m)
	}
	return p.planMerges()
}

// full finds a full by its file.
func (p *inPlace) full(note journalDisk) (link, bool) {
	for _, m := range p.job.points.All {
		d := m.Disk(note.Name)
		if d == nil || d.Level != chain.Full || d.File != note.Base {
			continue
		}
		if l, err := p.job.linkOf(chain.Layer{Point: m, Disk: d}); err == nil {
			l.file.Snapshot = ""
			return l, true
		}
	}
	return link{}, false
}

// planMerges plans the steps of all merges.
func (p *inPlace) planMerges() error {
	j := p.job
	for _, m := range p.merges {
		if len(m.noted.Merge) == 0 {
			continue
		}
		base := p.path(m.base.file.Name)
		if m.again {
			p.repairStep(m)
		}
		names, err := p.snapshotNames(m)
		if err != nil {
			return err
		}
		if j.req.Command == Snapshots {
			h, err := j.header(m.base)
			if err != nil {
				return err
			}
			if string(h.Identity()) != foreign.UTCSnapshots {
				j.add(Step{Action: Mark, Disk: m.disk, File: base}, func(context.Context, func(int64)) error { return p.mark(base) })
			}
			if !slices.Contains(names, fullSnapshot) {
				p.snapshotStep(m, fullSnapshot)
			}
		}
		for _, l := range m.links {
			// Once this one is merged, or gone, its name would contradict the order of the images.
			above, ok, err := p.naming(l)
			if err != nil {
				return err
			}
			if ok {
				p.backingStep(m.disk, above.file.Name, "", image.Qcow2)
			}
			name := l.Point.Time.UTC().Format(snapshotTime)
			if j.req.Command != Snapshots || !slices.Contains(names, name) {
				p.mergeStep(m, l)
				if j.req.Command == Snapshots {
					p.snapshotStep(m, name)
				}
			}
			p.removeStep(m, l)
		}
		if m.next != "" {
			p.backingStep(m.disk, m.next, backingName(m.base.name()), image.Qcow2)
		}
		if m.link != "" {
			if err := p.linkStep(m.disk, m.link, m.base.name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// snapshotNames returns what the snapshots of a full are called.
func (p *inPlace) snapshotNames(m *merging) (names []string, err error) {
	f, state, err := p.job.openFile(m.base.file.Name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h, err := qcow2.ReadHeader(f, state.stamp.size)
	if err != nil {
		return nil, err
	}
	all, err := qcow2.ReadSnapshots(f, state.stamp.size, h)
	for _, s := range all {
		names = append(names, s.Name)
	}
	return names, err
}

// backingStep adds the step that changes a header in place.
func (p *inPlace) backingStep(disk, rel, backing string, format image.Format) {
	j, file := p.job, p.path(rel)
	j.add(Step{Action: Backing, Disk: disk, File: file, From: backing}, func(ctx context.Context, _ func(int64)) error {
		info, err := os.Lstat(file)
		if err != nil {
			return err
		}
		if stateOf(info).names > 1 {
			return hardLinked()
		}
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := j.req.FS.Step("rebase", file); err != nil {
			return err
		}
		if err := j.rebase(ctx, file, backing, format); err != nil {
			return err
		}
		return p.sync(f, info.ModTime())
	})
}

// sync brings a changed file to stable storage, and sets its time: qmprestore orders files by it.
func (p *inPlace) sync(f *os.File, at time.Time) error {
	if err := p.job.req.FS.Step("sync", f.Name()); err != nil {
		return err
	}
	if err := os.Chtimes(f.Name(), time.Time{}, at); err != nil {
		return err
	}
	return f.Sync()
}

// linkStep adds the step that makes or replaces a symbolic link; there is none if it is right already.
func (p *inPlace) linkStep(disk, rel, target string) error {
	file := p.path(rel)
	now, err := os.Readlink(file)
	if err == nil && now == target {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w: it is no symbolic link", rel, ErrCannot)
	}
	fsys := p.job.req.FS
	p.job.add(Step{Action: Link, Disk: disk, File: file, From: target}, func(context.Context, func(int64)) error {
		temporary := filepath.Join(filepath.Dir(file), ".qmchain-link")
		if err := fsys.Step("symlink", temporary); err != nil {
			return err
		}
		if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(target, temporary); err != nil {
			return err
		}
		return fsys.Rename(temporary, file)
	})
	return nil
}
