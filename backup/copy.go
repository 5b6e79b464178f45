package backup

import (
	"context"
	"fmt"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"qmchain/chain"
	"qmchain/qmp"
)

// maxWorkers is how many copies of all disks together may be under way in QEMU at the same time.
const maxWorkers = 16

// atOnce is how many images are made, and how many are brought to disk, at once.
const atOnce = 4

// node names of a disk's parts, by its place in the plan: disks' own names could be too long for QEMU.
func nodeName(prefix string, i int) string { return fmt.Sprintf("%s%d", prefix, i) }

// makeImages makes the images of the point, and the fleece images.
func (s *session) makeImages(ctx context.Context) error {
	n := len(s.plan.Disks)
	s.images = make([]string, n)
	if !s.cfg.Fleecing.Off {
		s.fleeces = make([]fleece, n)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i, d := range s.plan.Disks {
		group.Go(func() error { return s.makeImage(ctx, i, d) })
		if !s.cfg.Fleecing.Off {
			group.Go(func() error { return s.makeFleece(ctx, i, d) })
		}
	}
	return group.Wait()
}

func (s *session) makeImage(ctx context.Context, i int, d PlannedDisk) error {
	var parent *chain.ImageRef
	if d.Parent != nil {
		ref := d.Parent.Point.Ref(d.Parent.Disk.Name)
		parent = &ref
	}
	path, err := s.partial.CreateImage(ctx, d.Name, d.Size, parent, s.cfg.Copying.image())
	if err != nil {
		return err
	}
	s.images[i], err = filepath.Abs(path) // QEMU's working folder is another one
	return err
}

// addImages has QEMU open the images of the point.
func (s *session) addImages(ctx context.Context) error {
	for i, d := range s.plan.Disks {
		abs := s.images[i]
		file := s.cfg.Copying.file(nodeName(targetPrefix, i)+fileSuffix, abs)
		if err := s.addImage(ctx, nodeName(targetPrefix, i), file, d.Name); err != nil {
			return fmt.Errorf("%w: can QEMU's user open %s?", err, abs)
		}
	}
	return nil
}

// addImage has QEMU open a qcow2 image of ours, without its backing file: what is written to it is all of it that is read.
func (s *session) addImage(ctx context.Context, name string, file map[string]any, disk string) error {
	if err := s.qmp.BlockdevAdd(ctx, imageOptions(name, file, false)); err != nil {
		return fmt.Errorf("disk %s: %w", disk, err)
	}
	return nil
}

// imageOptions are those of a qcow2 image of ours. QEMU never syncs it (no-flush): it would do so in its main loop when it
// closes the image, and the guest would stand still until a slow target has swallowed all that the host has cached for it.
// The sync that counts is ours, at the commit.
func imageOptions(name string, file any, readOnly bool) map[string]any {
	return map[string]any{
		"driver": "qcow2", "node-name": name, "backing": nil, "discard": "unmap", "read-only": readOnly,
		"cache": map[string]any{"no-flush": true}, "file": file,
	}
}

// settle has QEMU write what it still keeps of the images' tables, and say whether it could. When it closes an image it does so
// as well, but tells nobody of an error: a damaged image would be taken for a good one.
func (s *session) settle(ctx context.Context) error {
	var options []any
	for i := range s.plan.Disks {
		name := nodeName(targetPrefix, i)
		options = append(options, imageOptions(name, name+fileSuffix, true))
	}
	if err := s.qmp.BlockdevReopen(ctx, options...); err != nil {
		return fmt.Errorf("bring the images to their files: %w", err)
	}
	return nil
}

// newBitmaps are the actions that start the NEW bitmaps.
func (s *session) newBitmaps() []qmp.Action {
	var actions []qmp.Action
	for _, d := range s.plan.Disks {
		if d.New != "" {
			actions = append(actions, qmp.BitmapAdd(d.format, d.New, d.Kind == chain.KindPersistent, false))
		}
	}
	return actions
}

// job are the options of the job that copies a disk from a node of its content at the instant.
func (s *session) job(i int, d PlannedDisk, from string, version qmp.Version) qmp.BackupOptions {
	job := qmp.BackupOptions{
		JobID: s.jobID(i), Device: from, Target: nodeName(targetPrefix, i), Sync: "full",
		Compress: s.cfg.Copying.Compress != "", Speed: s.cfg.Copying.Speed, AutoFinalize: true,
	}
	// QEMU has 64 threads for the I/O of all its images. Were they all to wait for a slow target, the guest's writes would wait
	// for one as well (seen: three times the latency, and more the slower the target).
	job.XPerf = &qmp.XPerf{MaxWorkers: max(1, maxWorkers/len(s.plan.Disks))}
	if !version.AtLeast(10, 0) {
		// QEMU 7.2 reads zeroes for what the guest zeroes between the switch and the copying of it, unless it copies
		// cluster by cluster. 10.0 does not.
		job.XPerf.MaxChunk = 64 << 10
	}
	if d.Level.Overlay() {
		job.Sync, job.Bitmap, job.BitmapMode = "bitmap", d.Old, "never"
	}
	return job
}

// copyDirectly copies the disks without fleecing: what the guest is about to overwrite is copied to the image first, and a
// slow or failing target is felt by the guest. One transaction is the instant of all disks.
func (s *session) copyDirectly(ctx context.Context, version qmp.Version) error {
	actions := s.newBitmaps()
	for i, d := range s.plan.Disks {
		job := s.job(i, d, d.format, version)
		if version.AtLeast(11, 1) {
			job.OnCBWError = "break-snapshot" // a failing target at least does not fail the guest's writes
		}
		actions = append(actions, qmp.BlockdevBackup(job))
	}
	err := s.atInstant(ctx, func() error {
		s.instant = s.cfg.Now()
		return s.qmp.Transaction(ctx, actions...)
	})
	if err != nil {
		return fmt.Errorf("start the copying: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	for i, d := range s.plan.Disks {
		group.Go(func() error { return s.await(ctx, i, d) })
	}
	return group.Wait()
}

// copyFromFleece switches all disks at once and copies what they were at that instant.
func (s *session) copyFromFleece(ctx context.Context, version qmp.Version) error {
	if actions := s.newBitmaps(); len(actions) > 0 {
		if err := s.qmp.Transaction(ctx, actions...); err != nil {
			return fmt.Errorf("start the bitmaps of the new point: %w", err)
		}
	}
	for i, d := range s.plan.Disks {
		if err := s.addFleece(ctx, i, d); err != nil {
			return err
		}
	}
	if err := s.takeInstant(ctx); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	if s.cfg.Copying.Jobs > 0 {
		group.SetLimit(s.cfg.Copying.Jobs)
	}
	for i, d := range s.plan.Disks {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := s.startCopy(ctx, i, d, version); err != nil {
				return fmt.Errorf("disk %s: start the copying: %w", d.Name, err)
			}
			return s.await(ctx, i, d)
		})
	}
	return group.Wait()
}

// startCopy starts the job of one disk. Which clusters an increment has to copy is read from OLD only now, after the
// switch: what it has marked since is copied as well, and does no harm.
func (s *session) startCopy(ctx context.Context, i int, d PlannedDisk, version qmp.Version) error {
	const todo = "todo" // on the snapshot-access node, and gone with it
	snapshot := nodeName(snapshotPrefix, i)
	job := s.job(i, d, snapshot, version)
	job.DiscardSource = version.AtLeast(9, 1) // the fleece image gives back what has been copied
	var actions []qmp.Action
	if d.Level.Overlay() {
		job.Bitmap = todo
		actions = append(actions,
			qmp.BitmapAdd(snapshot, todo, false, true),
			qmp.BitmapMerge(snapshot, todo, qmp.BitmapRef{Node: d.format, Name: d.Old}))
	}
	return s.qmp.Transaction(ctx, append(actions, qmp.BlockdevBackup(job))...)
}

// await waits for the end of a disk's job.
func (s *session) await(ctx context.Context, i int, d PlannedDisk) error {
	err := s.qmp.WaitJob(ctx, s.jobID(i), func(j qmp.Job) {
		var fleece int64
		if !s.cfg.Fleecing.Off {
			fleece = s.fleeces[i].used()
		}
		s.cfg.Progress.Disk(d.Name, j.Current, j.Total, fleece)
	})
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	return nil
}

// jobID is different for each run, so that a late event of an earlier job is not taken for this one's.
func (s *session) jobID(i int) string { return fmt.Sprintf("%s%s-%d", ourPrefix, s.plan.ID, i) }
