package proxmox

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

const (
	// pingLimit bounds the question whether the agent is there. PVE itself asks for 3 s, and Perl is to be loaded.
	pingLimit = 15 * time.Second
	// agentLimit bounds the short commands.
	agentLimit = 20 * time.Second
)

// FSFreeze freezes and thaws the file systems of a running VM through PVE, `qm guest cmd`: the agent's socket serves one
// client at a time, and is PVE's.
type FSFreeze struct {
	Host Host
	VMID VMID
}

func (f FSFreeze) command(ctx context.Context, limit time.Duration, name string) (string, error) {
	out, err := f.Host.QM(ctx, limit, "guest", "cmd", f.VMID.String(), name)
	return strings.TrimSpace(out), err
}

// Freeze freezes them, for as long as ctx allows. Asked is false where the agent does not answer: it was not asked to then.
func (f FSFreeze) Freeze(ctx context.Context) (asked bool, err error) {
	if _, err := f.command(ctx, pingLimit, "ping"); err != nil {
		return false, fmt.Errorf("the guest agent does not answer: %w", err)
	}
	limit := pingLimit
	if deadline, ok := ctx.Deadline(); ok {
		limit = time.Until(deadline)
	}
	out, err := f.command(ctx, limit, "fsfreeze-freeze")
	if err != nil {
		return true, err
	}
	if n, err := strconv.Atoi(out); err == nil && n == 0 {
		return true, errors.New("the guest agent froze no file system")
	}
	return true, nil
}

// Thaw thaws them, and returns no error only when they certainly are.
func (f FSFreeze) Thaw(ctx context.Context) error {
	if _, err := f.command(ctx, agentLimit, "fsfreeze-thaw"); err != nil {
		return err
	}
	out, err := f.command(ctx, agentLimit, "fsfreeze-status")
	if err == nil && strings.Trim(out, `"`) != "thawed" {
		err = fmt.Errorf("the guest's file systems are still %q", out)
	}
	return err
}
