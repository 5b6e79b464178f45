package verify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/source"
)

// Checker verifies the guests of a set.
type Checker struct {
	Set source.Set
	// Disks are those of the points that are asked for; all, if there are none.
	Disks []string
	// Deep reads the disks that are asked for.
	Deep bool
	// Jobs is how many pieces are read at a time; 0: as many as there are processors, 8 at most. Each takes 4 MiB.
	Jobs int
	// QemuImg is the program qemu-img; "" leaves its check out.
	QemuImg string
	// Progress, if set, is told of how many bytes of how many have been read. It is called by one at a time.
	Progress func(done, total int64)
}

// maxRounds bounds how often a guest is looked at whose points change all the time. All but the first are short.
const maxRounds = 10

// missingPause is waited before files that are missing are looked for once more, and taken for lost.
const missingPause = time.Second

// Guest verifies points of a guest: those that are named, as chain.Points.Resolve does it, or all. Its error says that
// the verification could not be done: it is wrong to take that for damage. A point that does not exist wraps
// chain.ErrNoPoint.
func (c *Checker) Guest(ctx context.Context, name string, points ...string) (*Guest, error) {
	g, err := c.Set.Guest(name)
	if err != nil {
		return nil, err
	}
	r := &run{
		Checker: c, guest: g, known: map[ref]known{}, deep: map[ref]chain.Points{},
		summed: map[string]int64{}, noSums: map[string]bool{},
	}
	if all := source.Repository(c.Set); all != nil {
		if r.repo, err = all.Guest(name); err != nil {
			return nil, err
		}
	}
	if r.jobs = c.Jobs; r.jobs <= 0 {
		r.jobs = min(runtime.GOMAXPROCS(0), 8)
	}
	now, err := g.Points()
	if err != nil {
		return nil, err
	}
	asks := func(string) bool { return true }
	if len(points) > 0 {
		var ids []string
		for _, p := range points {
			id, err := resolve(now, p)
			if err != nil {
				return nil, fmt.Errorf("guest %s: %w", name, err)
			}
			ids = append(ids, id)
		}
		asks = func(id string) bool { return slices.Contains(ids, id) }
	}
	waited := false
	for round := 1; ; round++ {
		v, err := newView(c.Set.Dir(), name, now, asks, c.Disks)
		if err != nil {
			return nil, err
		}
		if err := r.check(ctx, v); err != nil {
			return nil, err
		}
		if err := r.lookAround(v, len(points) == 0); err != nil {
			return nil, err
		}
		report := v.report()
		for _, n := range r.summed {
			report.Files++
			report.Bytes += n
		}
		if report.State == Good || round == maxRounds {
			return report, nil
		}
		then := now
		if now, err = g.Points(); err != nil {
			return nil, err
		}
		if !reflect.DeepEqual(then.All, now.All) || !reflect.DeepEqual(problems(then), problems(now)) {
			continue
		}
		if waited || !v.misses() {
			return report, nil
		}
		waited = true
		select {
		case <-time.After(missingPause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if now, err = g.Points(); err != nil {
			return nil, err
		}
	}
}

func problems(p *source.Points) (texts []string) {
	for _, p := range p.Problems {
		texts = append(texts, p.Point+"/"+p.Disk+": "+p.Err.Error())
	}
	return texts
}

// resolve finds the id of the point that the user named, whether it can be read or not.
func resolve(points *source.Points, name string) (string, error) {
	var ids []string
	for _, m := range points.All.Kept() {
		ids = append(ids, string(m.ID))
	}
	for _, p := range points.Problems {
		if _, err := chain.ParseID(p.Point); err == nil && p.Disk == "" {
			ids = append(ids, p.Point)
		}
	}
	if name == "latest" && len(ids) > 0 {
		return slices.Max(ids), nil
	}
	found := slices.DeleteFunc(ids, func(id string) bool { return !strings.HasPrefix(id, name) })
	switch {
	case name == "latest":
		return "", fmt.Errorf("it has no point: %w", chain.ErrNoPoint)
	case len(found) == 0:
		return "", fmt.Errorf("no point %q: %w", name, chain.ErrNoPoint)
	case len(found) > 1:
		return "", &chain.AmbiguousError{Name: name, One: found[0], Other: found[1]}
	}
	return found[0], nil
}

// known is what a round has found of an image.
type known struct {
	disk   chain.Disk // as its manifest had it
	faults []fault
}

// run is one verification of a guest.
type run struct {
	*Checker
	guest source.Guest
	repo  *repo.Guest // nil: the set is a foreign one
	jobs  int

	known map[ref]known
	deep  map[ref]chain.Points // disks that were read without a fault

	summed map[string]int64 // files that were compared with check sums, and their bytes
	noSums map[string]bool  // files that have none

	mu          sync.Mutex // of the targets' faults, and of what has been read of all that is to be
	done, total int64
}

// progress counts bytes that were read.
func (r *run) progress(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done += n
	if r.Progress != nil {
		r.Progress(min(r.done, r.total), r.total)
	}
}

// upTo counts what was left out.
func (r *run) upTo(done int64) { r.progress(done - r.done) }

// found notes a fault of an image.
func (r *run) found(t *target, f fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t.faults = append(t.faults, f)
}

// foundBy notes a fault of an image that not every look finds, and by which one damage was found.
func (r *run) foundBy(look *bool, t *target, f fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t.faults = append(t.faults, f)
	*look = *look || f.kind == Damage
}

// check finds out what is wrong with v's targets.
func (r *run) check(ctx context.Context, v *view) error {
	for _, t := range v.order {
		k, ok := r.known[t.ref]
		if ok && len(t.faults) == 0 && reflect.DeepEqual(k.disk, *t.Disk) && !(&target{faults: k.faults}).faulty() {
			t.faults, t.done = slices.Clip(k.faults), true
		}
	}
	if err := r.headers(ctx, v); err != nil {
		return err
	}
	files := v.files()
	for _, f := range files {
		r.total += f.at.Bytes
	}
	if r.Deep {
		for _, m := range v.asked {
			for _, d := range m.Disks {
				r.total += d.VirtualSize
			}
		}
	}
	r.progress(0)
	if err := r.contents(ctx, v, files); err != nil {
		return err
	}
	if r.Deep {
		if err := r.readDisks(ctx, v); err != nil {
			return err
		}
	}
	for _, t := range v.order {
		r.known[t.ref] = known{*t.Disk, t.faults}
	}
	return nil
}

// file is one of the set, and the images that are in it: several, if they are internal snapshots.
type file struct {
	at      image.Layer
	targets []*target
}

// files are those whose contents are to be checked. What is wrong with its header is not read any further.
func (v *view) files() []*file {
	var files []*file
	byPath := map[string]*file{}
	for _, t := range v.order {
		if t.done || slices.ContainsFunc(t.faults, func(f fault) bool { return f.file == t.at.Name }) {
			continue
		}
		f := byPath[t.at.Path]
		if f == nil {
			f = &file{at: t.at}
			byPath[t.at.Path] = f
			files = append(files, f)
		}
		f.targets = append(f.targets, t)
	}
	return files
}

// maxOpen is how many images are kept open, for those that are made on them.
const maxOpen = 16

// headers looks at the images' headers: what is wrong with one is told by the opening of its disk, if what it was made on can
// be opened. If not, its check sums must do.
func (r *run) headers(ctx context.Context, v *view) error {
	pool := image.NewPool(image.PoolOptions{})
	open := map[*target]image.Image{}
	closeAll := func() {
		for t, img := range open {
			_ = img.Close()
			delete(open, t)
		}
	}
	defer closeAll()
	for _, t := range v.order {
		if err := ctx.Err(); err != nil {
			return err
		}
		if t.Disk.Merging != nil && !t.done {
			r.found(t, fault{BeingMerged, t.at.Name, fmt.Sprintf("it is being merged into disk %s of %s: it can be verified when that is done", t.Disk.Merging.Disk, t.Disk.Merging.Point)})
		}
		if t.done || t.broken() {
			continue
		}
		img, err := v.points.OpenDisk(pool, t.Point, t.Disk.Name)
		if err != nil {
			at := t.named(err) // one below, if it has changed meanwhile
			r.found(at, fault{kindOf(err), at.at.Name, reason(err, at.at.Name)})
			continue
		}
		// The layers that they share are read but once.
		if below := open[t.parent]; below != nil {
			_ = below.Close()
			delete(open, t.parent)
		}
		if len(open) == maxOpen {
			closeAll()
		}
		open[t] = img
	}
	return nil
}

// broken reports whether a disk can't be opened for what is known already.
func (t *target) broken() bool {
	for ; t != nil; t = t.parent {
		if slices.ContainsFunc(t.faults, func(f fault) bool { return f.kind == Damage || f.kind == Unreadable }) {
			return true
		}
	}
	return false
}

// checksAtOnce is how many runs of qemu-img go on beside the reading.
const checksAtOnce = 2

// contents reads all files.
func (r *run) contents(ctx context.Context, v *view, files []*file) error {
	checks, checksCtx := errgroup.WithContext(ctx)
	checks.SetLimit(checksAtOnce)
	for _, f := range files {
		if err := r.content(ctx, v, f); err != nil {
			_ = checks.Wait() // which ends for the same reason
			return err
		}
		// What is none of ours any more has been told: qemu-img would open a FIFO, and follow a link.
		info, err := os.Lstat(f.at.Path)
		if err != nil || !info.Mode().IsRegular() || r.QemuImg == "" || f.at.Format != image.Qcow2 || f.targets[0].Disk.Merging != nil {
			continue
		}
		checks.Go(func() error { return r.qemuCheck(checksCtx, f) })
	}
	return checks.Wait()
}

// content reads one file.
func (r *run) content(ctx context.Context, v *view, f *file) error {
	defer r.upTo(r.done + f.at.Bytes)
	t := f.targets[0]
	if t.Disk.Merging != nil {
		return nil
	}
	faults, err := r.sums(ctx, v, t)
	if errors.Is(err, foreign.ErrNoSum) {
		r.noSums[f.at.Path] = true
		return nil
	}
	if err != nil {
		return err
	}
	for _, t := range f.targets {
		for _, bad := range faults {
			r.found(t, bad)
		}
	}
	r.summed[f.at.Path] = f.at.Bytes
	return nil
}

// lookAround tells what is not about single images; whole is that all of the guest was asked for, and what else is in its
// folder too.
func (r *run) lookAround(v *view, whole bool) error {
	without, all := map[string]bool{}, map[string]bool{}
	for _, t := range v.order {
		all[t.at.Path] = true
		if r.noSums[t.at.Path] {
			without[t.at.Path] = true
		}
	}
	if len(without) > 0 {
		v.other = append(v.other, fault{NoSums, "", fmt.Sprintf("%d of %d files have no check sums: whether their data was changed can't be told", len(without), len(all))})
	}
	if r.repo == nil || !whole {
		return nil
	}
	partials, err := r.repo.Partials()
	if err != nil {
		return err
	}
	for _, id := range partials {
		v.other = append(v.other, fault{Unfinished, filepath.Join(v.guest, string(id)), "a point in the making, or what a run that was killed has left"})
	}
	strays, err := r.repo.Strays()
	if err != nil {
		return err
	}
	if len(strays) > 0 {
		// A point can come between the looks that tell a stray.
		again, err := r.repo.Strays()
		if err != nil {
			return err
		}
		strays = slices.DeleteFunc(strays, func(s string) bool { return !slices.Contains(again, s) })
	}
	for _, name := range strays {
		f := fault{Unfinished, filepath.Join(v.guest, repo.ImagesFolder, name), "it belongs to no point"}
		id, _, _ := strings.Cut(name, ".")
		if _, err := chain.ParseID(id); err == nil {
			f.kind, f.text = Damage, "its point is missing" // ours go before their points do
		}
		v.other = append(v.other, f)
	}
	return nil
}
