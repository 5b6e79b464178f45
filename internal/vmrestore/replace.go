package vmrestore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"qmchain/proxmox"
)

// CheckReplaceable makes sure that a VM can be replaced just now: it is on this node, stopped and not locked.
func CheckReplaceable(host proxmox.Host, vmid proxmox.VMID) (*proxmox.Config, error) {
	c, err := host.Config(vmid)
	if err != nil {
		return nil, err
	}
	if lock := c.Lock(); lock != "" {
		return nil, fmt.Errorf("VM %s is %w (%s)", vmid, proxmox.ErrLocked, lock)
	}
	process, err := host.Process(vmid)
	if err != nil {
		return nil, err
	}
	if process != nil {
		return nil, fmt.Errorf("VM %s runs, and is not replaced then: %w", vmid, proxmox.ErrBusy)
	}
	return c, nil
}

// replace makes the VM that is there another one.
func (r Runner) replace(ctx context.Context, p *Plan) (err error) {
	firewall, err := r.Host.Firewall(p.VMID)
	if err != nil {
		return err
	}
	volumes := map[string]string{} // new ones, by drive
	undo := []func(context.Context) error{func(ctx context.Context) error { return r.remove(ctx, p.VMID, slices.Collect(maps.Values(volumes))) }}
	defer func() {
		if err == nil || errors.Is(err, ErrWhole) {
			return
		}
		ctx, cancel := undoing(ctx)
		defer cancel()
		for _, f := range slices.Backward(undo) {
			if undoErr := f(ctx); undoErr != nil {
				err = errors.Join(err, fmt.Errorf("VM %s: %w: %w", p.VMID, ErrLeft, undoErr))
				return // each rests on the one after it
			}
		}
	}()
	for _, d := range p.Drives {
		if d.File == "" {
			continue
		}
		if volumes[d.ID], err = r.importUnused(ctx, p, d); err != nil {
			delete(volumes, d.ID)
			return err
		}
	}
	// From here on it takes seconds, and is not cut off.
	if err := ctx.Err(); err != nil {
		return err
	}
	short := context.WithoutCancel(ctx)
	if err := r.lock(short, p); err != nil {
		return err
	}
	undo = append(undo, func(ctx context.Context) error { return r.unlock(ctx, p.VMID) })
	undo = append(undo, func(ctx context.Context) error { return r.changeBack(ctx, p) })
	if _, err := r.Host.QM(short, callLimit, append([]string{"set", p.VMID.String(), "--skiplock", "1"},
		p.exchange(func(id string) string { return volumes[id] })...)...); err != nil {
		return err
	}
	undo = append(undo, func(context.Context) error { return r.Host.WriteFirewall(p.VMID, firewall) })
	if err := r.Host.WriteFirewall(p.VMID, p.Firewall); err != nil {
		return err
	}
	if err := r.unlock(short, p.VMID); err != nil {
		return fmt.Errorf("%w %w", ErrWhole, err)
	}
	if err := r.remove(short, p.VMID, p.oldVolumes()); err != nil {
		return fmt.Errorf("%w its old disks could not be removed, and are unused ones now: %w", ErrWhole, err)
	}
	for _, step := range p.finish(nil) {
		if err := r.take(short, p, step); err != nil {
			return fmt.Errorf("%w %w", ErrWhole, err)
		}
	}
	return nil
}

// importUnused copies a drive's data into a volume that the VM does not use, and returns its name.
func (r Runner) importUnused(ctx context.Context, p *Plan, d Drive) (string, error) {
	before, err := CheckReplaceable(r.Host, p.VMID)
	if err != nil {
		return "", err
	}
	if err := sameVM(p.old, before); err != nil {
		return "", err
	}
	step := Step{Args: p.importArgs(d), Drive: d.ID}
	takeErr := r.take(ctx, p, step)
	after, err := r.Host.Config(p.VMID)
	if err != nil {
		return "", errors.Join(takeErr, err)
	}
	var made []string
	for key, volume := range after.Options {
		if strings.HasPrefix(key, "unused") && before.Options[key] != volume && strings.HasPrefix(volume, d.Storage+":") {
			made = append(made, volume)
		}
	}
	switch {
	case takeErr != nil && len(made) == 0:
		return "", takeErr
	case takeErr != nil:
		return "", errors.Join(takeErr, fmt.Errorf("VM %s: %w: %s", p.VMID, ErrLeft, strings.Join(made, ", ")))
	case len(made) != 1:
		return "", fmt.Errorf("VM %s: %w: after the import of %s there are the new volumes %q", p.VMID, proxmox.ErrChanged, d.ID, made)
	}
	return made[0], nil
}

// sameVM makes sure that nobody has changed the VM, but for volumes that it does not use.
func sameVM(a, b *proxmox.Config) error {
	if len(changes(a.Options, b.Options, a.Description, b.Description, nil)) > 0 || len(b.Snapshots)+len(b.Pending)+len(b.PendingDelete) > 0 {
		return fmt.Errorf("VM %s was %w", a.VMID, proxmox.ErrChanged)
	}
	return nil
}

// lock locks the VM, and makes sure that it is what it was, and does not run.
func (r Runner) lock(ctx context.Context, p *Plan) error {
	c, err := CheckReplaceable(r.Host, p.VMID)
	if err != nil {
		return err
	}
	if err := sameVM(p.old, c); err != nil {
		return err
	}
	if err := r.Host.Set(ctx, c, "--lock", "create"); err != nil {
		return err
	}
	// It may have been started right before.
	process, err := r.Host.Process(p.VMID)
	if err == nil && process != nil {
		err = fmt.Errorf("VM %s runs, and is not replaced then: %w", p.VMID, proxmox.ErrBusy)
	}
	if err != nil {
		return errors.Join(err, r.unlock(ctx, p.VMID))
	}
	return nil
}

func (r Runner) unlock(ctx context.Context, vmid proxmox.VMID) error {
	_, err := r.Host.QM(ctx, callLimit, "unlock", vmid.String())
	return err
}

// changeBack gives the VM the configuration that it had.
func (r Runner) changeBack(ctx context.Context, p *Plan) error {
	now, err := r.Host.Config(p.VMID)
	if err != nil {
		return err
	}
	// What a `set` that failed has left pending is taken back by setting it to what it was.
	current := maps.Clone(now.Options)
	maps.Copy(current, now.Pending)
	for _, key := range now.PendingDelete {
		delete(current, key)
	}
	args := changes(current, p.old.Options, now.Description, p.old.Description, nil)
	if len(args) == 0 {
		return nil
	}
	_, err = r.Host.QM(ctx, callLimit, append([]string{"set", p.VMID.String(), "--skiplock", "1"}, args...)...)
	return err
}

// remove removes volumes that the VM does not use, and has as unused ones.
func (r Runner) remove(ctx context.Context, vmid proxmox.VMID, volumes []string) error {
	if len(volumes) == 0 {
		return nil
	}
	c, err := r.Host.Config(vmid)
	if err != nil {
		return err
	}
	var keys []string
	missing := slices.Clone(volumes)
	for key, value := range c.Options {
		if strings.HasPrefix(key, "unused") && slices.Contains(volumes, value) {
			keys = append(keys, key)
			missing = slices.DeleteFunc(missing, func(v string) bool { return v == value })
		}
	}
	if len(keys) > 0 {
		err = r.Host.Set(ctx, c, deletes(keys)...)
	}
	if len(missing) > 0 {
		err = errors.Join(err, fmt.Errorf("not among the unused volumes: %s", strings.Join(missing, ", ")))
	}
	return err
}
