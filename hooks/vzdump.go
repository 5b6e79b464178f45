package hooks

import (
	"context"
	"fmt"
	"time"

	"qmchain/proxmox"
)

// askAgain is how often the end of somebody else's backup is looked for.
const askAgain = time.Second

// Vzdump does what is to be done at a phase of vzdump for a VM: before it begins with one, it waits until the VM's backup socket is
// free, for as long as wait. What goes wrong is a warning in the log.
func (h Hooks) Vzdump(ctx context.Context, phase string, vmid proxmox.VMID, wait time.Duration) {
	if phase != "backup-start" || wait <= 0 {
		h.Log.Debugf("vzdump of %s: nothing is to be done at %s", vmid, phase)
		return
	}
	h.bounded(ctx, wait+phaseLimit, fmt.Sprintf("vzdump of VM %s", vmid), func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		h.awaitOther(ctx, vmid, wait)
	})
}

// awaitOther waits until nobody talks with the VM on its backup socket, other than a keeper, who is never there for long.
func (h Hooks) awaitOther(ctx context.Context, vmid proxmox.VMID, wait time.Duration) {
	for told := false; ; {
		process, err := h.Host.Process(vmid)
		if err != nil {
			h.Log.Warn(err)
			return
		}
		if process == nil {
			return // no VM, a container for one, or a stopped one
		}
		answer, err := h.Host.Socket(vmid).Ask(ctx, process)
		switch {
		case ctx.Err() != nil:
			h.Log.Warnf("VM %s: another backup is under way for longer than %s; vzdump goes on beside it", vmid, wait)
			return
		case err != nil:
			h.Log.Warn(err)
			return
		case answer != proxmox.AnswerBusy:
			return
		case !told:
			h.Log.Infof("VM %s: another backup is under way; vzdump waits for it, for at most %s", vmid, wait)
			told = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(askAgain):
		}
	}
}
