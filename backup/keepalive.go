package backup

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"qmchain/qmp"
)

// KeepAlive keeps something outside from ending QEMU as soon as its guest has powered off: Proxmox VE's qmeventd does that.
// It is not this keeper's alone: whoever ends his own may end it for all, and have a QEMU ended whose guest neither runs nor is
// paused. The Keeper calls the methods one at a time.
type KeepAlive interface {
	// Hold begins to, and is called again every now and then, so that the end of somebody else's is made good.
	Hold(ctx context.Context) error
	// Release ends it, and can be called at any time; Hold begins anew.
	Release()
	// Needed is who else would lose by the end of QEMU, or of his own keep-alive; "": nobody.
	Needed(ctx context.Context) (who string, err error)
	// Status is QEMU's run state as the manager knows it, or "stopped", where QEMU does not tell the keeper.
	Status(ctx context.Context) (string, error)
}

// unharmed are the run states in which the end of a keep-alive leaves QEMU there.
var unharmed = map[string]bool{"running": true, "paused": true}

// hold is a keeper's use of its keep-alive.
type hold struct {
	*Keeper
	held    bool
	failed  string    // what was last said about Hold
	failing time.Time // when the guest last did not answer for Limit, or began not to; zero: it answers
}

// look holds and lets go as what the keeper has just seen wants it, or did not see: err.
func (h *hold) look(ctx context.Context, now life, err error) {
	switch {
	case h.KeepAlive == nil:
	case err == nil:
		h.failing = time.Time{}
		if now.done {
			h.release()
		} else if h.held || unharmed[now.status] {
			h.hold(ctx)
		}
	case h.held:
		// A run has the socket, or QEMU hangs, or has gone: what the guest does is not known, so that nothing ends here by itself.
		// Where QEMU has gone it harms nobody that the connection stays, and a new one may be starting.
		if now.seen {
			h.hold(ctx)
		}
		switch {
		case h.failing.IsZero():
			h.failing = time.Now()
		case time.Since(h.failing) >= h.Limit:
			h.failing = time.Now()
			if h.over(ctx, now.status) {
				h.release()
			}
		}
	}
}

func (h *hold) hold(ctx context.Context) {
	err := h.KeepAlive.Hold(ctx)
	if err == nil {
		h.held, h.failed = true, ""
		return
	}
	if text := err.Error(); ctx.Err() == nil && text != h.failed {
		h.failed = text
		h.Log.Warnf("QEMU may end before its bitmaps are saved: %v", err)
	}
}

func (h *hold) release() {
	if h.held {
		h.KeepAlive.Release()
	}
	h.held = false
}

// over tells of a QEMU that does not answer whether it is to end, or has.
func (h *hold) over(ctx context.Context, status string) bool {
	if who, err := h.KeepAlive.Needed(ctx); err == nil && who != "" {
		return false
	}
	if status != "shutdown" {
		var err error
		if status, err = h.KeepAlive.Status(ctx); err != nil {
			// The manager is away too, and with it the proof that who answers on the socket is the guest. To be asked does no harm,
			// and a keep-alive that never ended would.
			if status = h.unproven(ctx); status != "" {
				h.Log.WithError(err).Warnf("guest %s: only QEMU itself tells that it is %s", h.Guest, status)
			}
		}
	}
	return status == "shutdown" || status == "stopped"
}

// leave lets go at the end of the keeper, as soon as that harms nobody, but within Limit.
func (h *hold) leave(ctx context.Context, status string) {
	if !h.held {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), h.Limit)
	defer cancel()
	defer h.release()
	for waited := false; ; waited = true {
		err := h.harm(ctx, status)
		if err == nil {
			return
		}
		if !waited {
			h.Log.Infof("guest %s: QEMU is held for up to %s more: %v", h.Guest, h.Limit, err)
		}
		h.hold(ctx)
		select {
		case <-ctx.Done():
			h.Log.Warnf("guest %s: QEMU is let go, and may be ended: %v", h.Guest, err)
			return
		case <-time.After(lookInterval):
		}
		status = h.status(ctx)
	}
}

// harm is whom letting go would harm. The status may be "" for one that is not known.
func (h *hold) harm(ctx context.Context, status string) error {
	who, err := h.KeepAlive.Needed(ctx)
	if err != nil {
		return err
	}
	if who != "" {
		return fmt.Errorf("it is needed: %s", who)
	}
	if status == "" {
		if status, err = h.KeepAlive.Status(ctx); err != nil {
			return err
		}
	}
	if unharmed[status] || status == "shutdown" || status == "stopped" {
		return nil
	}
	return fmt.Errorf("the guest is %s, and QEMU would be ended", status)
}

// status asks QEMU; "": it does not tell.
func (h *hold) status(ctx context.Context) string { return ask(ctx, h.dial) }

// unproven asks whoever answers on the socket.
func (h *hold) unproven(ctx context.Context) string {
	return ask(ctx, func(ctx context.Context, options ...qmp.Option) (*qmp.Client, error) {
		return qmp.Dial(ctx, h.Addr, options...)
	})
}

func ask(ctx context.Context, dial func(context.Context, ...qmp.Option) (*qmp.Client, error)) string {
	client, err := dial(ctx, qmp.WithHandshakeTimeout(keepDialLimit), qmp.WithCommandTimeout(keepDialLimit))
	if err != nil {
		return ""
	}
	defer client.Close()
	status, err := client.QueryStatus(ctx)
	if err != nil {
		return ""
	}
	return status.Status
}

// starting sees the socket of a new QEMU appear, without a call of connect, which costs more.
type starting struct {
	path string // "": there is none, and nothing to be seen
	file fileID
	seen time.Time // when it last appeared, or the keeper began
}

// fileID tells a socket from that of an earlier QEMU; the zero value is none.
type fileID struct {
	inode   uint64
	changed syscall.Timespec
}

func startOf(addr string) *starting {
	s := &starting{seen: time.Now()}
	if network, path, err := qmp.ParseAddr(addr); err == nil && network == "unix" {
		s.path = path
		s.file = s.stat()
	}
	return s
}

func (s *starting) stat() fileID {
	info, err := os.Stat(s.path)
	if err != nil {
		return fileID{}
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fileID{}
	}
	return fileID{st.Ino, st.Ctim}
}

// wait waits until the guest is to be looked at again: soon, with keen, when it has just been started. The error is ctx's.
func (s *starting) wait(ctx context.Context, keen bool) error {
	for until := time.Now().Add(lookInterval); ; {
		interval := lookInterval
		if keen {
			interval = startInterval
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(interval):
		}
		if file := s.stat(); file != s.file {
			s.file = file
			if file != (fileID{}) {
				s.seen = time.Now()
			}
		}
		if !keen || s.path == "" || time.Since(s.seen) < startSpan || !time.Now().Before(until) {
			return nil
		}
	}
}
