package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"qmchain/chain"
	"qmchain/qmp"
	"qmchain/qmp/qga"
)

// Marks on a guest that a run has frozen or paused: unused throttle groups, which live exactly as long as the QEMU process.
// They are added before the deed and deleted after its undoing, so that recovery undoes it only where a run of ours did it.
const (
	frozenMark = "qmchain-frozen"
	pausedMark = "qmchain-paused"
)

// thawLimit bounds how long a run tries to thaw a guest before it goes on and reports it.
const thawLimit = 30 * time.Second

// Agent freezes and thaws a guest's file systems.
type Agent interface {
	// Freeze freezes them. Asked is false where the agent was not even asked to, so that no thaw is needed.
	Freeze(ctx context.Context) (asked bool, err error)
	// Thaw thaws them, and returns no error only when they certainly are.
	Thaw(ctx context.Context) error
}

// SocketAgent is a guest agent that is reached by its socket.
type SocketAgent struct {
	Addr        string
	Mountpoints []string // freeze only these; empty: all
}

var _ Agent = SocketAgent{}

// Freeze implements Agent.
func (a SocketAgent) Freeze(ctx context.Context) (asked bool, err error) {
	c, err := qga.Dial(ctx, a.Addr)
	if err != nil {
		return false, err
	}
	defer c.Close()
	n, err := c.Freeze(ctx, a.Mountpoints)
	if err == nil && n == 0 {
		err = errors.New("the guest agent froze no file system")
	}
	return true, err
}

// Thaw implements Agent.
func (a SocketAgent) Thaw(ctx context.Context) error {
	c, err := qga.Dial(ctx, a.Addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Thaw(ctx); err != nil {
		return err
	}
	frozen, err := c.Frozen(ctx)
	if err == nil && frozen {
		err = errors.New("the guest's file systems are still frozen")
	}
	return err
}

// atInstant calls f, which makes the instant of the point, with the guest frozen and paused as asked for. What can't be had
// is a warning, and the next best thing is taken: f is called in any case, unless the guest could be hurt.
func (s *session) atInstant(ctx context.Context, f func() error) (err error) {
	s.consistency = chain.Instant
	if s.cfg.Pause {
		inner := f
		f = func() error { return s.whilePaused(ctx, inner) }
	}
	if s.cfg.Agent == nil {
		return f()
	}
	status, err := s.qmp.QueryStatus(ctx)
	if err != nil {
		return err
	}
	if !status.Running {
		s.warnf("the guest is %s, so its agent can't freeze its file systems", status.Status)
		return f()
	}
	if err := s.qmp.ObjectAddThrottleGroup(ctx, frozenMark); err != nil {
		return fmt.Errorf("mark the guest as frozen: %w", err)
	}
	freezeCtx, cancel := context.WithTimeout(ctx, s.cfg.FreezeLimit)
	asked, freezeErr := s.cfg.Agent.Freeze(freezeCtx)
	cancel()
	// Whatever happens from here on, the thaw is tried.
	defer func() {
		if thawErr := s.thaw(ctx, asked); thawErr != nil {
			s.stillFrozen = true
			s.warnf("the guest may still be frozen: %v", thawErr)
		}
	}()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case freezeErr != nil:
		s.warnf("the guest's file systems are not frozen: %v", freezeErr)
		return f()
	}
	if err := f(); err != nil {
		return err
	}
	s.consistency = chain.Frozen
	return nil
}

// thaw thaws the guest, if it may be frozen, and takes the mark away when it certainly is not.
func (s *session) thaw(ctx context.Context, needed bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawLimit)
	defer cancel()
	for needed {
		// An agent that has just died may come back, and one that hangs may go on.
		try, cancel := context.WithTimeout(ctx, thawLimit/3)
		err := s.cfg.Agent.Thaw(try)
		cancel()
		if err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
	if err := s.qmp.ObjectDel(ctx, frozenMark); err != nil {
		return fmt.Errorf("take its mark away: %w", err)
	}
	return nil
}

// whilePaused calls f with the vCPUs stopped. The run state is anybody's to change, so each change goes together with a look
// at it, in one write: a guest that did not run is neither stopped nor resumed, and if somebody resumes it meanwhile the
// instant is spoilt, which is an error.
func (s *session) whilePaused(ctx context.Context, f func() error) error {
	now, err := s.qmp.QueryStatus(ctx)
	if err != nil {
		return err
	}
	if !now.Running {
		s.log.Infof("the guest is %s: it needs no pause", now.Status)
		return f()
	}
	events := s.qmp.Subscribe()
	defer events.Close()
	replies, err := s.qmp.Batch(ctx,
		qmp.Command{Name: "object-add", Args: map[string]any{"qom-type": "throttle-group", "id": pausedMark}},
		qmp.Command{Name: "query-status"}, qmp.Command{Name: "stop"})
	if err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	before, statusErr := decodeStatus(replies[1])
	if err := errors.Join(replies[0].Err, statusErr, replies[2].Err); err != nil {
		if replies[0].Err != nil && before.Running && replies[2].Err == nil {
			err = errors.Join(err, s.qmp.Cont(context.WithoutCancel(ctx))) // without the mark nobody else would
		}
		return fmt.Errorf("pause the guest: %w", err)
	}
	if !before.Running {
		s.log.Infof("the guest is %s: it needs no pause", before.Status)
		if err := s.qmp.ObjectDel(ctx, pausedMark); err != nil {
			return err
		}
		return f()
	}
	err = f()
	if err == nil {
		s.consistency = chain.Paused
	}
	return errors.Join(err, s.resume(context.WithoutCancel(ctx), events))
}

// resume undoes the pause of whilePaused, unless somebody else has.
func (s *session) resume(ctx context.Context, events *qmp.Subscription) error {
	spoilt := fmt.Errorf("somebody has resumed the guest in the middle of the switch: %w", ErrBusy)
	if resumed(events.Pending()) {
		return errors.Join(spoilt, s.qmp.ObjectDel(ctx, pausedMark))
	}
	replies, err := s.qmp.Batch(ctx, qmp.Command{Name: "query-status"}, qmp.Command{Name: "cont"})
	if err != nil {
		return fmt.Errorf("resume the guest: %w", err)
	}
	status, err := decodeStatus(replies[0])
	if err := errors.Join(err, replies[1].Err); err != nil {
		return fmt.Errorf("resume the guest: %w", err)
	}
	if err := s.qmp.ObjectDel(ctx, pausedMark); err != nil {
		return err
	}
	if status.Status != "paused" {
		return spoilt
	}
	return nil
}

func resumed(events []qmp.Event) bool {
	return slices.ContainsFunc(events, func(e qmp.Event) bool { return e.Name == "RESUME" })
}

func decodeStatus(r qmp.Reply) (status qmp.StatusInfo, err error) {
	if r.Err != nil {
		return status, r.Err
	}
	return status, json.Unmarshal(r.Return, &status)
}

// release resumes and thaws a guest that a killed or failed run of ours has left paused or frozen.
func (s *session) release(ctx context.Context) error {
	objects, err := s.qmp.Objects(ctx)
	if err != nil {
		return err
	}
	if slices.Contains(objects, pausedMark) {
		status, err := s.qmp.QueryStatus(ctx)
		if err != nil {
			return err
		}
		if status.Status == "paused" {
			s.log.Warn("resuming the guest, which a run of ours has left paused")
			if err := s.qmp.Cont(ctx); err != nil {
				return fmt.Errorf("resume the guest: %w", err)
			}
		}
		if err := s.qmp.ObjectDel(ctx, pausedMark); err != nil {
			return err
		}
	}
	if !slices.Contains(objects, frozenMark) {
		return nil
	}
	if s.cfg.Agent == nil {
		return fmt.Errorf("a run of ours has left the guest's file systems frozen, and no guest agent is given to thaw them: %w", ErrNeedsDoctor)
	}
	s.log.Warn("thawing the guest, which a run of ours has left frozen")
	if err := s.thaw(ctx, true); err != nil {
		return fmt.Errorf("thaw the guest: %w", errors.Join(err, ErrNeedsDoctor))
	}
	return nil
}
