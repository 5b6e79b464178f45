package hooks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/proxmox"
)

const (
	// phaseLimit bounds a phase, without what it is asked to wait for. Starting and stopping hang on it.
	phaseLimit = 20 * time.Second
	// undoLimit is how long a last increment that takes too long has to undo what it has begun.
	undoLimit = 15 * time.Second
	// saveLimit bounds the saving of bitmaps, and how long QEMU may take to end then.
	saveLimit = 10 * time.Second
)

// Settings say what the phases of a VM's hook script do beyond looking.
type Settings struct {
	Keep            bool          // pre-start: start the keeper; pre-stop: save bitmaps before QEMU is ended while the guest runs
	PostStartBackup bool          // post-start: start a backup
	PreStopBackup   bool          // pre-stop: make a last increment
	PreStopLimit    time.Duration // how long that may take
	PostStopBackup  bool          // post-stop: start a backup of the stopped VM
}

// Hooks does what PVE's phases are for.
type Hooks struct {
	Host    proxmox.Host
	Systemd Systemd
	Log     logrus.FieldLogger
	Backup  string // qmchain-backup, for the units that are made here
	// MigratedFrom is the node that a starting VM comes from, as PVE says (PVE_MIGRATED_FROM); "": it does not.
	MigratedFrom string
}

// Guest does what is to be done at a phase of a VM. What goes wrong is a warning in the log. It returns when its time is over, even
// if something hangs. Phases that it does not know are for others.
func (h Hooks) Guest(ctx context.Context, vmid proxmox.VMID, phase string, s Settings) {
	limit := phaseLimit
	var do func(context.Context, proxmox.VMID, Settings)
	switch phase {
	case "pre-start":
		do = h.preStart
	case "post-start":
		do = h.postStart
	case "pre-stop":
		do = h.preStop
		limit += s.PreStopLimit + undoLimit + saveLimit
	case "post-stop":
		do = h.postStop
	default:
		h.Log.Debugf("VM %s: nothing is to be done at %s", vmid, phase)
		return
	}
	h.bounded(ctx, limit, fmt.Sprintf("VM %s: %s", vmid, phase), func(ctx context.Context) { do(ctx, vmid, s) })
}

// bounded calls f and returns when that is done, or limit over: a file system or a program that hangs can't be interrupted.
func (h Hooks) bounded(ctx context.Context, limit time.Duration, what string, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	select {
	case <-done:
		return
	case <-ctx.Done():
	}
	select {
	case <-done: // it has only been waiting for its context
	case <-time.After(time.Second):
		h.Log.Warnf("%s: not all is done within %s", what, limit)
	}
}

func (h Hooks) preStart(ctx context.Context, vmid proxmox.VMID, s Settings) {
	socket := h.Host.Socket(vmid)
	h.removeStale(ctx, vmid, func(err error) { h.Log.Warn(err) })
	if h.MigratedFrom != "" {
		return // its configuration is the other node's still
	}
	c, err := h.Host.Config(vmid)
	if err != nil {
		h.Log.Warn(err)
		return
	}
	args, _ := c.Next("args")
	found, err := socket.Look(args)
	switch {
	case err != nil:
		h.Log.Warnf("VM %s starts without any of its args, and so without a backup socket: %v", vmid, err)
		return
	case !found.Present:
		h.Log.Warnf("VM %s starts without a backup socket, and can't be backed up while it runs: `qmchain-args add %s`, then stop and start it", vmid, vmid)
		return
	case !found.Right:
		h.Log.Warnf("VM %s starts with a backup socket that is wrong (%s): `qmchain-args add %s`, then stop and start it",
			vmid, strings.Join(found.Faults, "; "), vmid)
		return
	}
	if s.Keep {
		h.start(ctx, vmid, keepUnit(vmid))
	}
}

func (h Hooks) postStart(ctx context.Context, vmid proxmox.VMID, s Settings) {
	process, err := h.Host.Process(vmid)
	if err != nil {
		h.Log.Warn(err)
		return
	}
	socket := h.Host.Socket(vmid)
	if process == nil || !socket.LookProcess(process).Right {
		return // the first is no start, and the second was told before it
	}
	answer, err := socket.Ask(ctx, process)
	switch {
	case err != nil:
		h.Log.Warn(err)
	case answer == proxmox.AnswerNone:
		h.Log.Warnf("VM %s: nobody answers on its backup socket %s", vmid, socket.Path())
	case answer == proxmox.AnswerOther:
		h.Log.Warnf("VM %s: another process answers on its backup socket %s, such as a clone with the same args", vmid, socket.Path())
	case s.PostStartBackup:
		if reason := h.inTheWay(vmid); reason != "" {
			h.Log.Infof("VM %s is not backed up at its start: %s", vmid, reason)
			return
		}
		h.start(ctx, vmid, backupUnit(vmid))
	}
}

func (h Hooks) preStop(ctx context.Context, vmid proxmox.VMID, s Settings) {
	// A guest that is shut down is seen by its keeper when it has powered off. One that is stopped has no such moment, nor has one
	// that vzdump has started, paused, for its backup, and stops again.
	task := proxmox.TaskAbove(os.Getpid(), vmid)
	save := s.Keep && (task == "qmstop" || task == "vzdump")
	if !s.PreStopBackup && !save {
		return
	}
	process, err := h.Host.Process(vmid)
	if err != nil {
		h.Log.Warn(err)
		return
	}
	if process == nil {
		return
	}
	if !h.Host.Socket(vmid).LookProcess(process).Right {
		h.Log.Infof("VM %s: nothing is saved before it stops: it runs without a backup socket", vmid)
		return
	}
	if reason := h.inTheWay(vmid); s.PreStopBackup && reason != "" {
		h.Log.Infof("VM %s: no last increment is made before it stops: %s", vmid, reason)
	} else if s.PreStopBackup {
		h.Log.Infof("VM %s: a last increment is made before it stops, for at most %s", vmid, s.PreStopLimit)
		// The lock file that PVE holds while it waits for us keeps all others away; its lock in the configuration can't be taken.
		err := h.Systemd.RunUnit(ctx, lastUnit(vmid), s.PreStopLimit, h.Backup, "run", "--in-hook", vmid.String())
		if err != nil {
			h.Log.Warnf("VM %s: its last increment was not made, and what has changed since its newest point is in none: %v; `journalctl -u %s` tells more",
				vmid, err, lastUnit(vmid))
		}
	}
	if save {
		err := h.Systemd.StartReady(ctx, saveUnit(vmid), saveLimit, h.Backup, "keep", "--stop", "--limit", saveLimit.String(), vmid.String())
		if err != nil {
			h.Log.Warnf("VM %s: its bitmaps in memory are not saved, and the next backup of such disks is a full: %v; `journalctl -u %s` tells more",
				vmid, err, saveUnit(vmid))
		}
	}
}

func (h Hooks) postStop(ctx context.Context, vmid proxmox.VMID, s Settings) {
	h.removeStale(ctx, vmid, func(err error) { h.Log.Debug(err) }) // the next start tells, if it is so still
	if !s.PostStopBackup {
		return
	}
	reason := h.inTheWay(vmid)
	if reason == "" && h.Host.Rebooting(vmid) {
		reason = "it is about to be started again"
	}
	if reason == "" {
		switch managed, err := h.Host.HAManaged(vmid); {
		case err != nil:
			reason = err.Error()
		case managed:
			reason = "HA manages it, and could not start it meanwhile"
		}
	}
	if reason != "" {
		h.Log.Infof("VM %s is not backed up after its stop: %s", vmid, reason)
		return
	}
	h.start(ctx, vmid, backupUnit(vmid))
}

// removeStale removes the socket that a killed QEMU has left; somebody else's is told of by busy.
func (h Hooks) removeStale(ctx context.Context, vmid proxmox.VMID, busy func(error)) {
	removed, err := h.Host.Socket(vmid).RemoveStale(ctx)
	switch {
	case errors.Is(err, proxmox.ErrBusy):
		busy(err)
	case err != nil:
		h.Log.Warn(err)
	case removed:
		h.Log.Infof("VM %s: the backup socket that its last QEMU has left is removed", vmid)
	}
}

// inTheWay is why the VM is not to be backed up at this moment, or "".
func (h Hooks) inTheWay(vmid proxmox.VMID) string {
	if h.MigratedFrom != "" {
		return "it is being migrated, from node " + h.MigratedFrom
	}
	c, err := h.Host.Config(vmid)
	if err != nil {
		return err.Error()
	}
	if c.Lock() != "" {
		return "it is locked (" + c.Lock() + ")"
	}
	return ""
}

// start hands over to a unit.
func (h Hooks) start(ctx context.Context, vmid proxmox.VMID, unit string) {
	if err := h.Systemd.Start(ctx, unit); err != nil {
		h.Log.Warnf("VM %s: %s is not started: %v", vmid, unit, err)
		return
	}
	h.Log.Infof("VM %s: %s is started", vmid, unit)
}
