package proxmox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"time"
)

const (
	// eventsLimit bounds the conversation with qmeventd, which is a short one.
	eventsLimit = 5 * time.Second

	// statusLimit bounds `qm status`, which asks QEMU.
	statusLimit = 20 * time.Second
)

// Alive asks qmeventd to leave a VM's QEMU alone when its guest powers off: QEMU then stays in the state "shutdown".
// Otherwise qmeventd ends it at once, in mid-backup. It is what vzdump does, in the same words.
//
// What follows is from qmeventd's source. It keeps one flag for each QEMU that is connected to it. The message sets the flag,
// also when it is repeated on its connection; it does nothing for a VM whose QEMU is not connected, and says nothing of either.
// The end of any connection that has set it clears it for all, vzdump's included, and has qmeventd look at QEMU: unless
// Spares says otherwise, it ends that QEMU. So the message is to be repeated every now and then, and the end of a
// connection is to be well considered.
type Alive struct {
	host Host
	vmid VMID
	conn net.Conn
}

// KeepAlive begins to keep the VM's QEMU alive.
func (h Host) KeepAlive(ctx context.Context, vmid VMID) (*Alive, error) {
	a := &Alive{host: h, vmid: vmid}
	if err := a.Repeat(ctx); err != nil {
		_ = a.Close()
		return nil, err
	}
	return a, nil
}

// Repeat says it again, on a new connection only where qmeventd itself was started anew: to close one that still is there
// would end what others have asked for.
func (a *Alive) Repeat(ctx context.Context) error {
	err := a.say(ctx)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		_ = a.Close()
		err = a.say(ctx)
	}
	if err != nil {
		return fmt.Errorf("qmeventd: %w", err)
	}
	return nil
}

func (a *Alive) say(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, eventsLimit)
	defer cancel()
	if a.conn == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", a.host.Events)
		if err != nil {
			return err
		}
		a.conn = conn
	}
	request, err := json.Marshal(map[string]any{"vzdump": map[string]string{"vmid": a.vmid.String()}})
	if err != nil {
		return err
	}
	deadline, _ := ctx.Deadline()
	if err := a.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err = a.conn.Write(request)
	return err
}

// Close ends it, for all who have asked for the same.
func (a *Alive) Close() error {
	if a.conn == nil {
		return nil
	}
	conn := a.conn
	a.conn = nil
	return conn.Close()
}

// Spares tells whether qmeventd, of any version, leaves a QEMU in that run state alone that nobody keeps alive.
func Spares(status string) bool { return status == "running" || status == "paused" }

// Stopped is the status of a VM without a QEMU.
const Stopped = "stopped"

// Status is QEMU's run state, as PVE finds it, or Stopped. Where QEMU does not answer, PVE says "running".
func (h Host) Status(ctx context.Context, vmid VMID) (string, error) {
	if p, err := h.Process(vmid); err != nil || p == nil {
		return Stopped, err
	}
	out, err := h.QM(ctx, statusLimit, "status", vmid.String())
	if err != nil {
		return "", err
	}
	status, found := strings.CutPrefix(strings.TrimSpace(out), "status: ")
	if !found {
		return "", fmt.Errorf("qm status %s says %q", vmid, out)
	}
	return status, nil
}
