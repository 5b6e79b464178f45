package vmrestore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/proxmox"
)

var (
	// ErrLeft is wrapped where what was made could not be taken away again; the text says what it is.
	ErrLeft = errors.New("something is left behind")
	// ErrWhole is wrapped where the VM is restored, and something failed after that.
	ErrWhole = errors.New("the VM is restored, but")
)

const (
	// callLimit bounds commands that copy no data. A start can wait for its storages.
	callLimit = 5 * time.Minute
	// undoLimit bounds all that is done to undo a restore. Large volumes are not removed at once everywhere.
	undoLimit = 15 * time.Minute
)

// Runner carries out plans.
type Runner struct {
	Host proxmox.Host
	Log  logrus.FieldLogger
	// Progress is told how much of a drive has been copied, 0 to 1.
	Progress func(drive string, part float64)
}

// Run takes a plan's steps. If one fails, or ctx ends, all is undone, and what was there is as it was; but a VM that is whole
// stays. Besides ErrLeft and ErrWhole its errors are those of package proxmox.
func (r Runner) Run(ctx context.Context, p *Plan) error {
	if p.sshFile != "" {
		if err := os.WriteFile(p.sshFile, []byte(p.sshKeys), 0o600); err != nil {
			return err
		}
	}
	if p.old != nil {
		return r.replace(ctx, p)
	}
	if err := r.Host.CheckFree(p.VMID); err != nil {
		return err
	}
	firewall, err := r.Host.Firewall(p.VMID) // of an earlier VM, perhaps
	if err != nil {
		return err
	}
	for _, step := range p.Steps(nil) {
		if err := r.take(ctx, p, step); err != nil {
			if step.Whole {
				return fmt.Errorf("%w %w", ErrWhole, err)
			}
			return errors.Join(err, r.destroy(ctx, p, firewall))
		}
	}
	return nil
}

// take takes one step.
func (r Runner) take(ctx context.Context, p *Plan, step Step) error {
	r.Log.Debug(step)
	switch {
	case step.Args == nil:
		return r.Host.WriteFirewall(p.VMID, p.Firewall)
	case step.Drive != "":
		return r.Host.Task(ctx, func(part float64) { r.Progress(step.Drive, part) }, step.Args...)
	}
	if err := ctx.Err(); err != nil && !step.Whole {
		return err
	}
	// It is short, and half of it would be hard to undo: it is not cut off.
	_, err := r.Host.QM(context.WithoutCancel(ctx), callLimit, step.Args...)
	return err
}

// undoing is a context that the cancellation does not reach.
func undoing(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
}

// destroy removes the VM if it is ours, and puts the firewall's rules back that were there.
func (r Runner) destroy(ctx context.Context, p *Plan, firewall []byte) error {
	ctx, cancel := undoing(ctx)
	defer cancel()
	left := func(err error) error {
		return fmt.Errorf("VM %s: %w: %w; `qm destroy %[1]s --skiplock 1` removes it", p.VMID, ErrLeft, err)
	}
	c, err := r.Host.Config(p.VMID)
	switch {
	case errors.Is(err, proxmox.ErrNotFound):
		if p.Firewall == nil {
			return nil
		}
		return r.Host.WriteFirewall(p.VMID, firewall)
	case err != nil:
		return left(err)
	case c.Options["vmgenid"] != p.VMGenID && c.Lock() == "create" && len(c.Options) == 1:
		// The beginning of a VM. Most likely ours, but nothing says so.
		return left(errors.New("a VM that was begun, and whose it is nobody knows"))
	case c.Options["vmgenid"] != p.VMGenID:
		return nil // somebody else's, who came first
	}
	r.Log.Infof("removing VM %s", p.VMID)
	id := p.VMID.String()
	if process, err := r.Host.Process(p.VMID); err == nil && process != nil {
		if _, err := r.Host.QM(ctx, undoLimit, "stop", id, "--skiplock", "1"); err != nil {
			return left(err)
		}
	}
	// Not with --purge: backup jobs and the like may know the VMID from before.
	if _, err := r.Host.QM(ctx, undoLimit, "destroy", id, "--skiplock", "1"); err != nil {
		return left(err)
	}
	if p.Firewall == nil && firewall == nil {
		return nil
	}
	return r.Host.WriteFirewall(p.VMID, firewall)
}
