package backup

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/qmp"
)

const (
	// undoLimit bounds the undoing of a failed run.
	undoLimit = 2 * time.Minute

	// reconnectLimit bounds how long undo tries to reach a guest whose connection was lost.
	reconnectLimit = 10 * time.Second
)

// Progress is told how far the copying of each disk has come, in bytes. Its methods are called concurrently.
type Progress interface {
	Disk(name string, done, total int64)
}

// Config is all that a run needs.
type Config struct {
	Request
	Guest string                     // the guest's name in the repository
	Addr  string                     // of its QMP socket
	Repo  func() (*repo.Repo, error) // opens the repository; called when the guest has answered
	// Create makes the repository where Repo says repo.ErrNotRepository; nil: it is not made. It is not called for a guest that
	// another repository tracks, unless Init is set: then most likely a share is not mounted.
	Create   func() (*repo.Repo, error)
	Init     bool
	LockWait time.Duration // how long to wait for locks

	Offline  []OfflineImage // the disks of a stopped guest; Addr, Fleecing, Agent and Pause are then of no meaning
	Fleecing Fleecing
	Copying  Copying

	Agent       Agent         // freezes the guest's file systems for the instant; nil: they are not frozen
	FreezeLimit time.Duration // how long that may take
	Pause       bool          // pause the guest for the instant

	Log      logrus.FieldLogger
	Progress Progress
	Now      func() time.Time
}

// Result is what a run has made.
type Result struct {
	// StillFrozen says that the guest's file systems could not be thawed. The point is good, but somebody must look after the
	// guest; the next run with an agent tries again.
	StillFrozen bool
	Point       *chain.Manifest // nil: less has changed than Request.Threshold
	Plan        *Plan
	// Warnings are what went not quite as asked: the point is good all the same.
	Warnings []string
}

// ErrIOThread is wrapped where a disk has an iothread and QEMU is too old for fleecing on such a disk.
var ErrIOThread = errors.New("an iothread serves the disk, and a filter on it would crash a QEMU before 9.0")

// ErrUndo is wrapped beside the error of a failed run where undoing it failed too. The next run, or the doctor, undoes
// what is left.
var ErrUndo = errors.New("could not be undone")

// session is one run on one guest.
type session struct {
	cfg     Config
	log     logrus.FieldLogger
	qmp     *qmp.Client
	repo    *repo.Repo
	guest   *repo.Guest
	daemon  *daemon // of a stopped guest
	lock    *repo.Lock
	mutex   *guestLock
	points  chain.Points
	tip     chain.ID
	partial *repo.Partial
	plan    *Plan
	result  *Result

	instant     time.Time
	consistency chain.Consistency
	stillFrozen bool // the guest could not be thawed
}

// Run takes one point of a guest. When it returns an error, the guest and the repository are as they were before, or the
// error wraps ErrUndo as well.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	s := &session{cfg: cfg, log: cfg.Log, result: &Result{}}
	if len(cfg.Offline) > 0 {
		daemon, err := startDaemon(ctx, cfg)
		if err != nil {
			return nil, fmt.Errorf("guest %s: %w", cfg.Guest, err)
		}
		defer func() {
			if err := daemon.stop(); err != nil {
				s.warnf("the bitmaps may not be stored in the guest's images: %v", err)
			}
		}()
		s.daemon = daemon
		s.cfg.Addr, s.cfg.Fleecing.Off, s.cfg.Agent, s.cfg.Pause = daemon.socket, true, nil, false
	}
	client, err := qmp.Dial(ctx, s.cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", cfg.Guest, err)
	}
	s.qmp = client
	defer func() { _ = s.qmp.Close() }()

	if err = s.open(ctx); err == nil {
		defer s.lock.Unlock()
		err = s.run(ctx)
	}
	// From here on nothing may be cut short: the guest is to be left as it was found.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if err != nil {
		if undoErr := s.twice(ctx, s.undo); undoErr != nil {
			return nil, fmt.Errorf("guest %s: %w; what it had begun %w: %w", cfg.Guest, err, ErrUndo, undoErr)
		}
		return nil, fmt.Errorf("guest %s: %w", cfg.Guest, err)
	}
	// The point stands. What is left to do is worth a warning at most: the next run does it again.
	if err := s.twice(ctx, s.finish); err != nil {
		s.warnf("left for the next run to clean up: %v", err)
	}
	s.result.StillFrozen = s.stillFrozen
	return s.result, nil
}

// twice calls f and, if it fails, once more, over a new connection where that is lost. If the guest has ended there is
// nothing to do in it.
func (s *session) twice(ctx context.Context, f func(context.Context) error) error {
	firstErr := f(ctx)
	if firstErr == nil {
		return nil
	}
	switch err := s.reconnect(ctx); {
	case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT):
		s.log.Warn("the guest has ended; the next run removes what this one has begun")
		return nil
	case err != nil:
		return errors.Join(firstErr, err)
	}
	return f(ctx)
}

// finish takes away what is of no more use once the point stands.
func (s *session) finish(ctx context.Context) error {
	v, err := s.look(ctx)
	if err != nil {
		return err
	}
	return errors.Join(s.dropBitmaps(ctx, v, s.points, nil), s.mutex.release(ctx, s.qmp))
}

// ErrElsewhere is wrapped where a repository would be made though the guest is tracked for another one.
var ErrElsewhere = errors.New("the guest is tracked for another repository")

// create makes the repository, unless the guest's bitmaps say that it has one elsewhere.
func (s *session) create(ctx context.Context, notThere error) (*repo.Repo, error) {
	v, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range v.nodes {
		for _, b := range n.info.DirtyBitmaps {
			if name, ok := chain.ParseBitmapName(b.Name); ok && !s.cfg.Init {
				return nil, fmt.Errorf("%w; and none is made here: %w (%s…)", notThere, ErrElsewhere, name.Repo)
			}
		}
	}
	return s.cfg.Create()
}

// open reads the repository and takes the locks. It gives back the repository's when it fails.
func (s *session) open(ctx context.Context) (err error) {
	if s.repo, err = s.cfg.Repo(); errors.Is(err, repo.ErrNotRepository) && s.cfg.Create != nil {
		s.repo, err = s.create(ctx, err)
	}
	if err != nil {
		return err
	}
	if s.guest, err = s.repo.Guest(s.cfg.Guest); err != nil {
		return err
	}
	if s.lock, err = s.guest.Lock(ctx, s.cfg.LockWait); err != nil {
		return err
	}
	if s.mutex, err = newGuestLock(); err == nil {
		err = s.mutex.take(ctx, s.qmp, s.cfg.LockWait)
	}
	if err != nil {
		s.lock.Unlock()
	}
	return err
}

func (s *session) run(ctx context.Context) error {
	v, err := s.recover(ctx)
	if err != nil {
		return err
	}
	if s.plan, err = s.makePlan(v); err != nil {
		return err
	}
	s.result.Plan = s.plan
	if s.plan.below(s.cfg.Threshold) {
		s.log.Infof("no point: %d bytes have changed, which is less than %d", s.plan.Estimate(), s.cfg.Threshold)
		return nil
	}
	s.report()
	if err := s.checkUnmoved(ctx); err != nil {
		return err
	}
	if err := s.checkSupport(ctx, v); err != nil {
		return err
	}
	if s.daemon == nil {
		s.cfg.Fleecing.describe(s.log, s.plan.Disks)
	}
	if s.partial, err = s.guest.Begin(s.plan.ID); err != nil {
		return err
	}
	defer s.partial.Close()
	if err := s.addImages(ctx); err != nil {
		return err
	}
	if s.cfg.Fleecing.Off {
		err = s.copyDirectly(ctx, v.version)
	} else {
		err = s.copyFromFleece(ctx, v.version)
	}
	if err != nil {
		return err
	}
	s.reportFleece(ctx)
	if err := s.settle(ctx); err != nil {
		return err
	}
	if err := s.checkUnmoved(ctx); err != nil {
		return err
	}
	if v, err = s.cleanNodes(ctx); err != nil {
		return err
	}
	return s.commit(ctx, v)
}

func (s *session) warnf(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.log.Warn(text)
	s.result.Warnings = append(s.result.Warnings, text)
}

// recover undoes what killed runs have left in the guest and in the repository, and reads the points. The order matters:
// bitmaps are known to be useless by the unfinished points that lie in the repository, so those go last; and a rename
// that a killed run had just done must be on disk before a bitmap goes for it.
func (s *session) recover(ctx context.Context) (*view, error) {
	v, err := s.clean(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Fleecing.sweep(); err != nil {
		return nil, err
	}
	partials, err := s.guest.Partials()
	if err != nil {
		return nil, err
	}
	if err := s.guest.Sync(); err != nil {
		return nil, err
	}
	if err := s.readPoints(); err != nil {
		return nil, err
	}
	// What lies there must be this guest's before anything of it is removed.
	if err := (planner{points: s.points, guest: v.guest}).checkGuest(s.cfg.Request); err != nil {
		return nil, err
	}
	if err := s.dropBitmaps(ctx, v, s.points, partials); err != nil {
		return nil, err
	}
	for _, id := range partials {
		s.log.Infof("removing unfinished point %s of a run that did not end", id)
		if err := s.guest.RemovePartial(id); err != nil {
			return nil, err
		}
	}
	return s.look(ctx)
}

func (s *session) readPoints() error {
	points, problems, err := s.guest.Points()
	if err != nil {
		return err
	}
	for _, p := range problems {
		if !errors.Is(p.Err, chain.ErrDamaged) {
			return p.Err // it may be sound, and needed: a share that hiccups is no reason for a new chain
		}
		s.log.Warnf("point left out: %v", p.Err)
	}
	s.points = points
	s.tip, err = s.guest.Tip()
	return err
}

// undo takes away all that a failed run has made. If it can't reach the guest, the unfinished point stays for the next
// run: it explains the bitmaps that QEMU may have stored in the guest's images meanwhile.
func (s *session) undo(ctx context.Context) (err error) {
	if s.mutex == nil {
		return nil // nothing was begun
	}
	defer func() { err = errors.Join(err, s.mutex.release(ctx, s.qmp)) }()
	if !s.mutex.held {
		return nil // the guest is another run's
	}
	v, err := s.clean(ctx)
	if err != nil || s.partial == nil {
		return err
	}
	if err := s.guest.Sync(); err != nil {
		return err
	}
	if err := s.readPoints(); err != nil {
		return err
	}
	partials := []chain.ID{s.partial.ID}
	if err := s.dropBitmaps(ctx, v, s.points, partials); err != nil {
		return err
	}
	return s.guest.RemovePartial(s.partial.ID)
}

func (s *session) reconnect(ctx context.Context) error {
	if _, err := s.qmp.QueryJobs(ctx); !errors.Is(err, qmp.ErrDisconnected) {
		return err
	}
	_ = s.qmp.Close()
	ctx, cancel := context.WithTimeout(ctx, reconnectLimit)
	defer cancel()
	client, err := qmp.Dial(ctx, s.cfg.Addr)
	if err != nil {
		return err
	}
	s.qmp = client
	return nil
}

// look looks at the guest, running or not.
func (s *session) look(ctx context.Context) (*view, error) {
	if s.daemon == nil {
		return look(ctx, s.qmp)
	}
	v, err := lookBlock(ctx, s.qmp)
	if err != nil {
		return nil, err
	}
	v.status, v.images = "stopped", s.cfg.Offline
	if latest := s.points.Latest(); latest != nil {
		v.guest = latest.Guest // images don't tell whose they are
	}
	return v, nil
}

// Preview returns the plan of a run without changing anything. It refuses while the guest still has something of a run that
// was killed, as only recovering from that would show what the next run does.
func Preview(ctx context.Context, cfg Config) (*Plan, error) {
	s := &session{cfg: cfg, log: cfg.Log}
	client, err := qmp.Dial(ctx, cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", cfg.Guest, err)
	}
	defer client.Close()
	v, err := look(ctx, client)
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", cfg.Guest, err)
	}
	if s.repo, err = cfg.Repo(); err != nil {
		return nil, err
	}
	if s.guest, err = s.repo.Guest(cfg.Guest); err != nil {
		return nil, err
	}
	if err := s.readPoints(); err != nil {
		return nil, err
	}
	plan, err := s.makePlan(v)
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", cfg.Guest, err)
	}
	return plan, nil
}

func (s *session) makePlan(v *view) (*Plan, error) {
	disks, err := v.disks()
	if err != nil {
		return nil, err
	}
	random := make([]byte, 2)
	_, _ = rand.Read(random) // never fails
	p := planner{
		repo:   s.repo.ShortID(),
		points: s.points,
		guest:  v.guest,
		memory: v.images == nil,
		now:    s.cfg.Now(),
		sound: func(l chain.Layer) error {
			return s.guest.CheckImages(s.points, l.Point, l.Disk.Name)
		},
	}
	return p.plan(chain.NewID(s.cfg.Now(), s.tip, binary.BigEndian.Uint16(random)), disks, s.cfg.Request)
}

func (s *session) report() {
	for _, d := range s.plan.Left {
		if d.unsupported {
			s.warnf("disk %s is left out: %s", d.Name, d.Left)
			continue
		}
		s.log.Infof("disk %s is left out: %s", d.Name, d.Left)
	}
	for _, d := range s.plan.Disks {
		switch {
		case d.Unplanned:
			s.warnf("disk %s: a full instead of an increment: %s", d.Name, d.Reason)
		case d.Level.Overlay():
			s.log.Infof("disk %s: %s since %s", d.Name, d.Level, d.Parent.Point.ID)
		default:
			s.log.Infof("disk %s: %s: %s", d.Name, d.Level, d.Reason)
		}
		for _, b := range d.Stray {
			s.log.Warnf("disk %s: bitmap %s belongs to no point of the repository; it is left alone", d.Name, b)
		}
	}
}

// checkUnmoved makes sure that no other QEMU process writes to the guest's disks: one that the guest was or is being migrated to.
func (s *session) checkUnmoved(ctx context.Context) error {
	if s.daemon != nil {
		return nil
	}
	status, err := s.qmp.QueryStatus(ctx)
	if err != nil {
		return err
	}
	switch status.Status {
	case "inmigrate", "finish-migrate", "postmigrate", "colo":
		return fmt.Errorf("the guest is being migrated (it is in the state %s): %w", status.Status, ErrBusy)
	}
	var migration struct {
		Status string `json:"status"`
	}
	if err := s.qmp.Execute(ctx, "query-migrate", nil, &migration); err != nil {
		return err
	}
	switch migration.Status {
	case "", "none", "completed", "failed", "cancelled":
		return nil
	}
	return fmt.Errorf("the guest is being migrated (%s): %w", migration.Status, ErrBusy)
}

// checkSupport refuses what this QEMU can't do without danger to the guest.
func (s *session) checkSupport(ctx context.Context, v *view) error {
	if s.cfg.Fleecing.Off || v.version.AtLeast(9, 0) {
		return nil
	}
	// QEMU 7.2 aborts, and the guest with it, when a filter goes onto a disk that an iothread serves; 9.0 is the first
	// without the lock that is behind it.
	for _, d := range s.plan.Disks {
		served, err := servedByIOThread(ctx, s.qmp, d.device)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		if served {
			return fmt.Errorf("disk %s: QEMU %s: %w", d.Name, v.version, ErrIOThread)
		}
	}
	return nil
}

// node names of a disk's parts, by its place in the plan: disks' own names could be too long for QEMU.
func nodeName(prefix string, i int) string { return fmt.Sprintf("%s%d", prefix, i) }

// addImages makes the images of the point and has QEMU open them.
func (s *session) addImages(ctx context.Context) error {
	for i, d := range s.plan.Disks {
		var parent *chain.ImageRef
		if d.Parent != nil {
			ref := d.Parent.Point.Ref(d.Parent.Disk.Name)
			parent = &ref
		}
		path, err := s.partial.CreateImage(ctx, d.Name, d.Size, parent, s.cfg.Copying.image())
		if err != nil {
			return err
		}
		abs, err := filepath.Abs(path) // QEMU's working folder is another one
		if err != nil {
			return err
		}
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
	if !version.AtLeast(10, 0) {
		// QEMU 7.2 reads zeroes for what the guest zeroes between the switch and the copying of it, unless it copies
		// cluster by cluster. 10.0 does not.
		job.XPerf = &qmp.XPerf{MaxChunk: 64 << 10}
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
	err := s.qmp.WaitJob(ctx, s.jobID(i), func(j qmp.Job) { s.cfg.Progress.Disk(d.Name, j.Current, j.Total) })
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	return nil
}

// takeInstant puts the filters in and switches all disks at once.
func (s *session) takeInstant(ctx context.Context) error {
	// The plan is older than the making of the images: somebody may have begun something on a disk.
	v, err := s.look(ctx)
	if err != nil {
		return err
	}
	for _, d := range s.plan.Disks {
		now := v.nodes[d.top]
		if now == nil || v.deviceOn(d.top) == nil {
			return fmt.Errorf("disk %s: its node %s is not on top of it any more: %w", d.Name, d.top, ErrBusy)
		}
		if err := now.checkUsers(); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	for i, d := range s.plan.Disks {
		if !d.switchable {
			if err := s.addTop(ctx, i, d); err != nil {
				return err
			}
		}
		err := s.qmp.BlockdevAdd(ctx, map[string]any{
			"driver": "copy-before-write", "node-name": nodeName(cbwPrefix, i), "file": d.below,
			"target": nodeName(fleecePrefix, i), "on-cbw-error": "break-snapshot",
			"cbw-timeout": int64(s.cfg.Fleecing.timeout() / time.Second), "discard": "unmap",
		})
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}

	// The options of the guest's own filters are asked for again, as they are now.
	if v, err = s.look(ctx); err != nil {
		return err
	}
	var options []any
	for i, d := range s.plan.Disks {
		top := d.top
		if !d.switchable {
			top = nodeName(topPrefix, i)
		}
		n := v.nodes[top]
		if n == nil {
			return fmt.Errorf("disk %s: node %s is gone", d.Name, top)
		}
		o, err := reopenOnto(n, nodeName(cbwPrefix, i))
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		options = append(options, o)
		// The sizes must be those of the plan, whatever was resized since: a copy-before-write filter takes a smaller
		// fleece image without a word.
		for _, name := range []string{top, nodeName(cbwPrefix, i), nodeName(fleecePrefix, i), nodeName(targetPrefix, i)} {
			if n := v.nodes[name]; n == nil || n.size != d.Size {
				return fmt.Errorf("disk %s: node %s does not have the disk's size of %d bytes; was the disk resized?", d.Name, name, d.Size)
			}
		}
	}
	err = s.atInstant(ctx, func() error {
		s.instant = s.cfg.Now()
		if err := s.qmp.BlockdevReopen(ctx, options...); err != nil {
			return fmt.Errorf("switch the disks: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, d := range s.plan.Disks {
		err := s.qmp.BlockdevAdd(ctx, map[string]any{
			"driver": "snapshot-access", "node-name": nodeName(snapshotPrefix, i), "file": nodeName(cbwPrefix, i),
		})
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	return nil
}

// addTop puts a filter that passes everything through on top of a disk. blockdev-reopen can change what it sits on, which
// it can't do for a device.
func (s *session) addTop(ctx context.Context, i int, d PlannedDisk) error {
	name := nodeName(topPrefix, i)
	if err := s.qmp.BlockdevAdd(ctx, topFilter(name, d.top)); err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	st := setDrive(d.device, name)
	if err := s.qmp.Execute(ctx, st.command, st.args, nil); err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	return nil
}

// jobID is different for each run, so that a late event of an earlier job is not taken for this one's.
func (s *session) jobID(i int) string { return fmt.Sprintf("%s%s-%d", ourPrefix, s.plan.ID, i) }

// commit brings the images to disk and makes the point.
func (s *session) commit(ctx context.Context, v *view) error {
	m := &chain.Manifest{
		Format: chain.FormatVersion, ID: s.partial.ID, UUID: s.partial.UUID, Time: s.instant.UTC(),
		Guest: v.guest, Consistency: s.consistency, Note: s.cfg.Note, QEMU: v.version.String(),
		Disks: make([]chain.Disk, len(s.plan.Disks)),
	}
	m.Guest.Name = s.cfg.Guest
	for i, d := range s.plan.Disks {
		disk := chain.Disk{
			Name: d.Name, Level: d.Level, Reason: d.Reason, SourceFormat: d.Driver, VirtualSize: d.Size,
			File: chain.ImageFile(d.Name),
		}
		if d.New != "" {
			disk.Tracking = &chain.Tracking{Bitmap: d.New, Kind: d.Kind}
		}
		if d.Parent != nil {
			ref := d.Parent.Point.Ref(d.Parent.Disk.Name)
			disk.Parent = &ref
		}
		var err error
		if disk.Bytes, disk.Sums, err = s.partial.Finish(ctx, d.Name); err != nil {
			return err
		}
		m.Disks[i] = disk
	}
	if err := s.partial.Commit(s.lock, s.tip, m); err != nil {
		// Only the sync after the rename can have failed if the point is in place; without it a power loss could undo it.
		if !s.partial.Committed() || s.guest.Sync() != nil {
			return err
		}
		s.warnf("the commit succeeded at the second try: %v", err)
	}
	s.points = append(s.points, m)
	s.result.Point = m
	return nil
}
