package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/qmp"
)

const (
	// A QMP socket serves one client at a time, and the guest's may be the only one: the keeper looks in for a moment, and runs
	// get their turn.
	lookInterval = 500 * time.Millisecond
	// While bitmaps wait to be merged back, it must be there before the guest's system writes: so often it looks for a sign of
	// the start, and for so long for the guest after one.
	startInterval = 20 * time.Millisecond
	startSpan     = 5 * time.Second

	keepDialLimit = 2 * time.Second
)

// Keeper stays beside a guest and carries the bitmaps of its disks in memory, of all repositories, over the end of the QEMU
// process: it saves them when the guest has powered off, and merges them back when it is started again. QEMU must run with
// -no-shutdown, so that it is still there then.
type Keeper struct {
	Guest   string // the guest's name in the repository
	Addr    string // of its QMP socket
	Kept    Kept
	QemuImg string
	// Limit bounds how long the end of QEMU may be held up: that of one in which nobody else has something under way, such as
	// the job of a backup.
	Limit time.Duration
	// Quit ends QEMU when the guest has powered off, saved or not.
	Quit bool
	// Once ends the keeping with the QEMU process.
	Once bool
	// Guard is who manages the guest, and is asked whether it is the guest who answers; nil: nobody.
	Guard Guard
	// KeepAlive is nil where nobody ends QEMU.
	KeepAlive KeepAlive
	// Saved is called by Stop when the bitmaps are saved, and QEMU can be ended; nil: nobody waits for that.
	Saved func()
	Log   logrus.FieldLogger
	Now   func() time.Time
}

// life is what the keeper knows of one QEMU process.
type life struct {
	seen   bool   // it has answered
	pid    int    // the process that did
	status string // its run state then
	// tried and saved tell of the saving since its guest has powered off.
	tried, saved bool
	done         bool      // its guest has powered off, what is to be done for it is, and nobody needs it any more
	needed       string    // who does
	idle         time.Time // since when nothing is under way in it; zero: something is
	// restored is set once merging back was tried: what is left then is not this guest's.
	restored bool
}

// Keep keeps until ctx ends, which is no error, or QEMU does, with Once. When ctx ends QEMU is let go at once, unless that
// would harm somebody: then within Limit.
func (k *Keeper) Keep(ctx context.Context) error {
	var now life
	h := &hold{Keeper: k}
	defer func() { h.leave(ctx, now.status) }()
	start := startOf(k.Addr)
	said := ""
	for {
		err := k.visit(ctx, &now)
		switch {
		case ctx.Err() != nil:
			return nil
		case gone(err):
			ended := now.seen
			now = life{}
			if ended && k.Once {
				return nil
			}
		case errors.Is(err, qmp.ErrBusy): // a run has the socket, and saves
		case err != nil:
			if said != err.Error() { // it will be the same in a moment
				said = err.Error()
				k.Log.Warn(err)
			}
		}
		h.look(ctx, now, err)
		if err == nil && now.status != "shutdown" {
			start.seen = time.Now() // it may be on its way to run, such as in "inmigrate"
		}
		if err := start.wait(ctx, !now.restored && k.Kept.has(k.Guest)); err != nil {
			return nil
		}
	}
}

// gone reports whether an error says that no QEMU is there.
func gone(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, qmp.ErrDisconnected)
}

// visit looks in on the guest once, and does what is to be done: merge back into one that has started, save that of one that
// has powered off.
func (k *Keeper) visit(ctx context.Context, now *life) error {
	client, err := k.dial(ctx, qmp.WithHandshakeTimeout(keepDialLimit), qmp.WithCommandTimeout(k.Limit/2))
	if err != nil {
		return err
	}
	defer client.Close()
	if now.seen && now.pid != client.PeerPID() {
		return fmt.Errorf("guest %s was started again between two looks: %w", k.Guest, qmp.ErrDisconnected)
	}
	status, err := client.QueryStatus(ctx)
	if err != nil {
		return err
	}
	now.seen, now.pid, now.status = true, client.PeerPID(), status.Status
	switch {
	case status.Status != "shutdown": // a guest that has powered off can be reset
		now.tried, now.saved, now.done, now.needed, now.idle = false, false, false, "", time.Time{}
	case !now.done:
		if err := k.poweredOff(ctx, client, now); err != nil {
			return err
		}
	}
	if status.Status != "shutdown" && status.Status != "inmigrate" && !now.restored && k.Kept.has(k.Guest) {
		now.restored = true
		err := k.bounded(ctx, func(ctx context.Context) error { return k.restore(ctx, client) })
		if errors.Is(err, qmp.ErrDisconnected) {
			return err // what is still there is for the next QEMU
		}
		if err != nil {
			k.Log.Warnf("guest %s: saved bitmaps are not merged back: %v", k.Guest, err)
		}
	}
	return nil
}

// poweredOff saves, and finds out whether QEMU can end.
func (k *Keeper) poweredOff(ctx context.Context, client *qmp.Client, now *life) error {
	needed, err := k.needed(ctx, client, now)
	// At once, as it is not for us when QEMU ends; what could not be saved beside others is tried again when they have gone.
	if !now.tried || !now.saved && err == nil && needed == "" {
		now.tried, now.restored = true, false
		saveErr := k.bounded(ctx, func(ctx context.Context) error { return k.save(ctx, client) })
		if now.saved = saveErr == nil; saveErr != nil {
			k.Log.Warnf("guest %s: bitmaps are not saved: %v", k.Guest, saveErr)
		}
		needed, err = k.needed(ctx, client, now)
	}
	if err != nil {
		return err
	}
	if needed != "" && needed != now.needed {
		k.Log.Infof("guest %s has powered off, and its QEMU is left alone: %s", k.Guest, needed)
	}
	now.needed, now.done = needed, needed == ""
	if now.done && k.Quit {
		_ = client.Execute(ctx, "quit", nil, nil) // the connection may end before the answer
	}
	return nil
}

// needed is who needs QEMU though its guest has powered off; "": nobody. Who neither has a job in it nor reads what it exports is
// given Limit to begin or to end: he may as well be waiting for QEMU's end.
func (k *Keeper) needed(ctx context.Context, client *qmp.Client, now *life) (why string, err error) {
	jobs, err := client.QueryJobs(ctx)
	if err != nil {
		return "", err
	}
	exports, err := exported(ctx, client)
	if err != nil {
		return "", err
	}
	job := running(jobs)
	switch {
	case job != "" || exports != "":
		now.idle = time.Time{}
	case now.idle.IsZero():
		now.idle = time.Now()
	}
	if job != "" {
		return "job " + job + " is under way", nil
	}
	if k.KeepAlive == nil || !now.idle.IsZero() && time.Since(now.idle) >= k.Limit {
		return "", nil
	}
	return k.KeepAlive.Needed(ctx)
}

// bounded calls f with a part of the limit, and returns when that is over even if f does not: a disk that hangs must not keep
// QEMU from its end.
func (k *Keeper) bounded(ctx context.Context, f func(context.Context) error) error {
	outer, cancel := context.WithTimeout(ctx, k.Limit)
	defer cancel()
	inner, cancel := context.WithTimeout(outer, k.Limit*3/4)
	defer cancel()
	result := make(chan error, 1)
	go func() { result <- f(inner) }()
	select {
	case err := <-result:
		return err
	case <-outer.Done():
	}
	select {
	case err := <-result: // it has only been waiting for its context
		return err
	case <-time.After(time.Second):
		return fmt.Errorf("QEMU is let go: %w", outer.Err())
	}
}

// dial connects to the guest, and makes sure that it is the guest.
func (k *Keeper) dial(ctx context.Context, options ...qmp.Option) (*qmp.Client, error) {
	client, err := qmp.Dial(ctx, k.Addr, options...)
	if err != nil || k.Guard == nil {
		return client, err
	}
	id, err := lookIdentity(ctx, client)
	if err == nil {
		err = k.Guard.Check(Peer{client.PeerPID(), id})
	}
	if err != nil {
		_ = client.Close()
		return nil, err
	}
	return client, nil
}

func (k *Keeper) carrier(client *qmp.Client) *carrier {
	return &carrier{qmp: client, guest: k.Guest, kept: k.Kept, qemuImg: k.QemuImg, log: k.Log, now: k.Now}
}

// locked calls f with the guest's lock, which keeps runs away.
func (k *Keeper) locked(ctx context.Context, client *qmp.Client, f func() error) (err error) {
	mutex, err := newGuestLock()
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyLimit)
		defer cancel()
		if releaseErr := mutex.release(ctx, client); !errors.Is(releaseErr, qmp.ErrDisconnected) { // it ends with QEMU
			err = errors.Join(err, releaseErr)
		}
	}()
	if err := mutex.take(ctx, client, k.Limit); err != nil {
		return err
	}
	return f()
}

func (k *Keeper) save(ctx context.Context, client *qmp.Client) error {
	return k.locked(ctx, client, func() error { return k.saveLocked(ctx, client) })
}

func (k *Keeper) saveLocked(ctx context.Context, client *qmp.Client) error {
	n, err := k.carrier(client).save(ctx)
	if err == nil && n > 0 {
		k.Log.Infof("guest %s: bitmaps of %d disks are saved", k.Guest, n)
	}
	return err
}

func (k *Keeper) restore(ctx context.Context, client *qmp.Client) error {
	return k.locked(ctx, client, func() error {
		merged, err := k.carrier(client).restore(ctx)
		for _, name := range merged {
			k.Log.Infof("guest %s: bitmap %s goes on", k.Guest, name)
		}
		return err
	})
}

// Restore merges back what was saved, once.
func (k *Keeper) Restore(ctx context.Context) error { return k.once(ctx, k.restore) }

// Save saves the bitmaps of a guest that has stopped, once.
func (k *Keeper) Save(ctx context.Context) error {
	return k.once(ctx, func(ctx context.Context, client *qmp.Client) error {
		err := k.save(ctx, client)
		if k.Quit {
			_ = client.Execute(context.WithoutCancel(ctx), "quit", nil, nil)
		}
		return err
	})
}

// Stop pauses a guest that runs, saves its bitmaps, and ends its QEMU, with Quit, or awaits that somebody else does. If QEMU is
// still there when Limit has passed, the guest is resumed, and what was saved is gone.
func (k *Keeper) Stop(ctx context.Context) error {
	return k.once(ctx, func(ctx context.Context, client *qmp.Client) error {
		// The lock is held all the time: recovery, in a run, would resume the guest.
		return k.locked(ctx, client, func() error { return k.pauseAndSave(ctx, client) })
	})
}

func (k *Keeper) once(ctx context.Context, f func(context.Context, *qmp.Client) error) error {
	client, err := k.dial(ctx)
	if err == nil {
		defer client.Close()
		err = k.bounded(ctx, func(ctx context.Context) error { return f(ctx, client) })
	}
	if err != nil {
		return fmt.Errorf("guest %s: %w", k.Guest, err)
	}
	return nil
}

func (k *Keeper) pauseAndSave(ctx context.Context, client *qmp.Client) error {
	var saveErr error
	s := &session{qmp: client, log: k.Log, result: &Result{}}
	err := s.whilePaused(ctx, func() error {
		if saveErr = k.saveLocked(ctx, client); saveErr != nil && !k.Quit {
			return saveErr
		}
		if saveErr == nil && k.Saved != nil {
			k.Saved()
		}
		if k.Quit {
			_ = client.Execute(context.WithoutCancel(ctx), "quit", nil, nil)
		}
		select {
		case <-client.Done():
			return nil
		case <-ctx.Done():
			return errors.Join(k.Kept.clear(k.Guest), fmt.Errorf("QEMU was not ended in time, and the guest goes on: %w", ctx.Err()))
		}
	})
	select {
	case <-client.Done():
		return saveErr // nobody is left to be resumed
	default:
		return err
	}
}
