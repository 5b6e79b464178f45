package backup

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/qmp"
)

const (
	// undoLimit bounds the undoing of a failed run, if Config.UndoLimit does not.
	undoLimit = 2 * time.Minute

	// saveLimit bounds the saving of bitmaps of a guest that has powered off.
	saveLimit = 10 * time.Second

	// reconnectLimit bounds how long undo tries to reach a guest whose connection was lost.
	reconnectLimit = 10 * time.Second
)

// Progress is told how far the copying of each disk has come, in bytes. Its methods are called concurrently.
type Progress interface {
	// Disk says how much of how much is copied, and what the disk's fleece image holds.
	Disk(name string, done, total, fleece int64)
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

	Guard    Guard               // who manages the guest; nil: nobody does
	Identity chain.GuestIdentity // of a stopped guest, as its images don't tell; empty: that of its newest point

	Kept     Kept           // bitmaps saved over the guest's stop; an empty Dir: there are none
	Offline  []OfflineImage // the disks of a stopped guest; Addr, Fleecing, Agent and Pause are then of no meaning
	Fleecing Fleecing
	Copying  Copying

	Agent       Agent         // freezes the guest's file systems for the instant; nil: they are not frozen
	FreezeLimit time.Duration // how long that may take
	Pause       bool          // pause the guest for the instant

	// UndoLimit is how long the undoing of a failed run may take; 0: 2 minutes. What hangs for longer, in a repository that does
	// not answer, is left to the next run, so that the guest is given back.
	UndoLimit time.Duration

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

// errHangs tells of calls that nothing can interrupt, such as those of a hard NFS mount whose server is gone.
var errHangs = errors.New("the repository hangs")

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
	images  []string // paths of the point's images, in the order of the plan's disks
	fleeces []fleece // likewise; nil without fleecing
	plan    *Plan
	result  *Result
	mu      sync.Mutex // of the result's warnings

	instant     time.Time
	consistency chain.Consistency
	stillFrozen bool // the guest could not be thawed
}

// ofGuest names the guest in an error, which may have been done.
func ofGuest(name string, err error) error {
	if prefix := "guest " + name + ": "; !strings.HasPrefix(err.Error(), prefix) {
		return fmt.Errorf("%s%w", prefix, err)
	}
	return err
}

// Run takes one point of a guest. When it returns an error, the guest and the repository are as they were before, or the
// error wraps ErrUndo as well.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	s := &session{cfg: cfg, log: cfg.Log, result: &Result{}}
	release := func() {}
	defer func() { release() }()
	if len(cfg.Offline) > 0 {
		var err error
		if release, err = s.take(ctx); err != nil {
			return nil, ofGuest(cfg.Guest, err)
		}
		daemon, err := startDaemon(ctx, cfg)
		if err != nil {
			return nil, ofGuest(cfg.Guest, err)
		}
		defer func() {
			if err := daemon.stop(); err != nil {
				s.warnf("the bitmaps may not be stored in the guest's images: %v", err)
			}
		}()
		s.daemon = daemon
		s.cfg.Addr, s.cfg.Fleecing.Off, s.cfg.Agent, s.cfg.Pause = daemon.socket, true, nil, false
	}
	client, err := s.connect(ctx)
	if err != nil {
		return nil, ofGuest(cfg.Guest, err)
	}
	s.qmp = client
	if s.daemon == nil {
		if release, err = s.take(ctx); err != nil {
			_ = client.Close()
			return nil, ofGuest(cfg.Guest, err)
		}
	}
	// The repository can hang for as long as it likes, and the guest must not be kept for that.
	ended, outcome := make(chan error, 1), make(chan error, 1)
	go func() { outcome <- s.work(ctx, ended) }()
	if err := s.awaitWork(ctx, ended, outcome); err != nil {
		return nil, ofGuest(cfg.Guest, err)
	}
	s.result.StillFrozen = s.stillFrozen
	return s.result, nil
}

// work does all that has to do with the repository, and closes the connection. It says in between how the run itself has
// ended; what comes after that is bounded.
func (s *session) work(ctx context.Context, ended chan<- error) error {
	defer func() { _ = s.qmp.Close() }()
	err := s.open(ctx)
	if err == nil {
		defer s.lock.Unlock()
		err = s.run(ctx)
	}
	ended <- err
	// From here on nothing may be cut short: the guest is to be left as it was found.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.undoLimit())
	defer cancel()
	if err != nil {
		if undoErr := s.twice(ctx, s.undo); undoErr != nil {
			return fmt.Errorf("%w; what it had begun %w: %w", err, ErrUndo, undoErr)
		}
		return err
	}
	// The point stands. What is left to do is worth a warning at most: the next run does it again.
	if err := s.twice(ctx, s.finish); err != nil {
		s.warnf("left for the next run to clean up: %v", err)
	}
	return nil
}

// awaitWork returns what comes of work. Once the run has ended or is interrupted it is given up when it takes longer than all that
// is bounded by time: it then hangs in a call to the repository.
func (s *session) awaitWork(ctx context.Context, ended, outcome <-chan error) (err error) {
	limit := s.cfg.undoLimit()
	limit += limit / 4
	select {
	case err := <-outcome:
		return err
	case err = <-ended:
	case <-ctx.Done():
		select {
		case err = <-ended:
		case <-time.After(limit):
			return fmt.Errorf("%w; what it had begun %w: %w", ctx.Err(), ErrUndo, errHangs)
		}
	}
	select {
	case err := <-outcome:
		return err
	case <-time.After(limit):
	}
	if err != nil {
		return fmt.Errorf("%w; what it had begun %w: %w", err, ErrUndo, errHangs)
	}
	s.warnf("%v: its lock may not be given back", errHangs)
	return nil
}

func (c Config) undoLimit() time.Duration {
	if c.UndoLimit > 0 {
		return c.UndoLimit
	}
	return undoLimit
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
	err = s.dropBitmaps(ctx, v, s.points, nil)
	if v.status == "shutdown" && s.cfg.Kept.Dir != "" {
		// The guest powered off during the run, when its keeper could not get in.
		limited, cancel := context.WithTimeout(ctx, saveLimit)
		defer cancel()
		_, saveErr := s.carrier().save(limited)
		err = errors.Join(err, saveErr)
	}
	return errors.Join(err, s.mutex.release(ctx, s.qmp))
}

func (s *session) carrier() *carrier {
	return &carrier{qmp: s.qmp, guest: s.cfg.Guest, kept: s.cfg.Kept, qemuImg: s.repo.QemuImg, log: s.log, now: s.cfg.Now}
}

// restoreKept merges back what was saved when the guest stopped, if its keeper has not. Without it disks get a full, with the
// reason; only a guest that is not there any more ends the run.
func (s *session) restoreKept(ctx context.Context) error {
	if s.daemon != nil || !s.cfg.Kept.has(s.cfg.Guest) {
		return nil
	}
	_, err := s.carrier().restore(ctx)
	if errors.Is(err, qmp.ErrDisconnected) || ctx.Err() != nil {
		return err
	}
	if err != nil {
		s.log.Warnf("saved bitmaps are not merged back: %v", err)
	}
	return nil
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
	if err := s.restoreKept(ctx); err != nil {
		return err
	}
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
	defer s.dropFleece()
	if err := s.addFiles(ctx); err != nil {
		return err
	}
	if err := s.makeImages(ctx); err != nil {
		return err
	}
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
	s.reportFleece()
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
	s.mu.Lock()
	defer s.mu.Unlock()
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
	defer func() {
		// However long the repository has hung, our own lock is nobody else's to remove.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reconnectLimit)
		defer cancel()
		err = errors.Join(err, s.mutex.release(ctx, s.qmp))
	}()
	if !s.mutex.held {
		return nil // the guest is another run's
	}
	v, err := s.clean(ctx)
	if s.partial == nil {
		return err
	}
	// Closing can hang as well, so that comes after the guest; and before the files are removed, as NFS keeps those that are open.
	s.partial.Close()
	if err != nil {
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
	client, err := s.connect(ctx)
	if err != nil {
		return err
	}
	s.qmp = client
	return nil
}

// commit brings the images to disk and makes the point.
func (s *session) commit(ctx context.Context, v *view) error {
	m := &chain.Manifest{
		Format: chain.FormatVersion, ID: s.partial.ID, UUID: s.partial.UUID, Time: s.instant.UTC(),
		Guest: v.guest, Consistency: s.consistency, Note: s.cfg.Note, QEMU: v.version.String(),
		Disks: make([]chain.Disk, len(s.plan.Disks)),
	}
	m.Guest.Name = s.cfg.Guest
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i, d := range s.plan.Disks {
		disk := &m.Disks[i]
		*disk = chain.Disk{
			Name: d.Name, Level: d.Level, Reason: d.Reason, SourceFormat: d.Driver, VirtualSize: d.Size,
			File: chain.ImageFile(s.partial.ID, d.Name),
		}
		if d.New != "" {
			disk.Tracking = &chain.Tracking{Bitmap: d.New, Kind: d.Kind}
		}
		if d.Parent != nil {
			ref := d.Parent.Point.Ref(d.Parent.Disk.Name)
			disk.Parent = &ref
		}
		group.Go(func() (err error) {
			disk.Bytes, disk.Sums, err = s.partial.Finish(ctx, d.Name)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
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
