package pveguest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/gofrs/flock"

	"qmchain/backup"
	"qmchain/internal/durable"
	"qmchain/proxmox"
)

const (
	// lockPoll is how often somebody else's lock is looked at.
	lockPoll = 250 * time.Millisecond
	// lockLimit bounds the taking of PVE's lock. It is not interrupted: where qm is killed nobody knows what it has done.
	lockLimit = 45 * time.Second
	maxRecord = 1 << 20
)

// record is what is written down of a lock.
type record struct {
	// Begun is when the taking of the lock began. A record without Lock is one of a process that was killed then, or that could
	// not find out what had come of it by the time GivenUp.
	Begun   time.Time           `json:"begun"`
	GivenUp time.Time           `json:"given_up,omitzero"`
	Lock    *proxmox.BackupLock `json:"lock,omitempty"`
}

// may tells whether a lock that was set at that time can be the one whose taking is on record.
func (r *record) may(set time.Time) bool {
	last := r.Begun.Add(lockLimit)
	if r.GivenUp.After(last) {
		last = r.GivenUp // a qm that hangs in a system call does not end when it is killed
	}
	return !set.Before(r.Begun.Add(-time.Second)) && set.Before(last)
}

// claim is the right to a VM's record. It ends with its process.
type claim struct {
	lock *flock.Flock
	path string
	fs   durable.FS
}

// claim takes the record. The error is proxmox.ErrBusy where a run of ours holds it for longer than the site waits.
func (vm *VM) claim(ctx context.Context, wait time.Duration) (*claim, error) {
	if err := os.MkdirAll(vm.site.Locks, 0o700); err != nil {
		return nil, err
	}
	c := &claim{flock.New(filepath.Join(vm.site.Locks, vm.ID.String()+".lock"), flock.SetPermissions(0o600)), filepath.Join(vm.site.Locks, vm.ID.String()+".json"), vm.site.FS}
	// Once in any case: on a busy host a short time can be over before the first try.
	if ok, err := c.lock.TryLock(); ok || err != nil {
		return c, err
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	_, err := c.lock.TryLockContext(ctx, lockPoll)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("VM %s is %w: another run of ours is under way", vm.ID, proxmox.ErrBusy)
	}
	return c, err
}

func (c *claim) release() { _ = c.lock.Close() }

func (c *claim) read() (*record, error) {
	f, err := os.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := &record{}
	if err := json.NewDecoder(io.LimitReader(f, maxRecord)).Decode(r); err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	return r, nil
}

func (c *claim) write(r record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return c.fs.WriteFile(c.path, text, 0o600)
}

func (c *claim) drop() error { return c.fs.Remove(c.path) }

// Take implements backup.Guard. The error wraps proxmox.ErrLocked where PVE works on the VM, or has left a lock of its own,
// and proxmox.ErrBusy where another run of ours does, for longer than the site waits.
func (vm *VM) Take(ctx context.Context) (release func(context.Context) error, err error) {
	deadline := time.Now().Add(vm.site.Wait)
	c, err := vm.claim(ctx, vm.site.Wait)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	unlock := func(context.Context) error { return nil }
	if !vm.site.InHook {
		if err := vm.giveBack(ctx, c, false); err != nil {
			return nil, err
		}
		lock, err := vm.lock(ctx, c, deadline)
		if err != nil {
			return nil, err
		}
		unlock = func(ctx context.Context) error { return vm.unlock(ctx, c, lock) }
	}
	letGo := func(context.Context) {}
	release = func(ctx context.Context) error {
		// First the lock: when nobody keeps it alive any more, a QEMU whose guest has powered off ends, and PVE changes the
		// configuration.
		vm.LockLeft = unlock(ctx)
		letGo(ctx)
		c.release()
		return vm.LockLeft
	}
	if err := vm.unchanged(); err != nil {
		return nil, errors.Join(err, release(context.WithoutCancel(ctx)))
	}
	if alive, aliveErr := vm.keepAlive(ctx); aliveErr != nil {
		vm.site.Log.Warnf("should the guest power off, the backup fails: %v", aliveErr)
	} else {
		letGo = alive
	}
	return release, nil
}

// lock takes PVE's lock, and writes it down.
func (vm *VM) lock(ctx context.Context, c *claim, deadline time.Time) (proxmox.BackupLock, error) {
	for {
		lock, err := vm.tryLock(ctx, c)
		if !errors.Is(err, proxmox.ErrLocked) && !errors.Is(err, proxmox.ErrBusy) || time.Now().After(deadline) {
			return lock, err
		}
		select {
		case <-ctx.Done():
			return lock, ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

func (vm *VM) tryLock(ctx context.Context, c *claim) (lock proxmox.BackupLock, err error) {
	now, err := vm.site.Host.Config(vm.ID)
	if err != nil {
		return lock, err
	}
	if now.Lock() != "" {
		return lock, fmt.Errorf("VM %s is %w (%s): %s", vm.ID, proxmox.ErrLocked, now.Lock(), under(now.Lock()))
	}
	if err := ctx.Err(); err != nil {
		return lock, err
	}
	begun := record{Begun: vm.site.Now()}
	if err := c.write(begun); err != nil {
		return lock, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockLimit)
	defer cancel()
	lock, err = vm.site.Host.LockBackup(ctx, vm.ID)
	switch {
	case errors.Is(err, proxmox.ErrLockUnknown): // it may be ours: the record stays
		begun.GivenUp = vm.site.Now()
		return lock, errors.Join(fmt.Errorf("%w: %w", err, backup.ErrNeedsDoctor), c.write(begun))
	case err != nil:
		return lock, errors.Join(err, c.drop())
	}
	begun.Lock = &lock
	if err := c.write(begun); err != nil {
		return lock, errors.Join(err, vm.unlock(ctx, c, lock))
	}
	return lock, nil
}

// under says what a lock is for.
func under(lock string) string {
	switch lock {
	case "backup":
		return "a backup of it is under way, or was cut off"
	case "suspended":
		return "it is hibernated"
	case "rollback", "snapshot", "snapshot-delete":
		return "a snapshot is made, removed or gone back to, or that failed"
	}
	return "a " + lock + " is under way, or was cut off"
}

func (vm *VM) unlock(ctx context.Context, c *claim, lock proxmox.BackupLock) error {
	if err := vm.site.Host.Unlock(ctx, lock); err != nil {
		return err
	}
	return c.drop()
}

// unchanged makes sure that what was looked up before the lock was taken still holds.
func (vm *VM) unchanged() error {
	now, err := vm.site.Find(vm.ID)
	if err != nil {
		return err
	}
	same := vm.Running() == now.Running() && (!vm.Running() || vm.Process.PID == now.Process.PID)
	for _, key := range []string{"smbios1", "vmgenid"} {
		same = same && vm.Config.Options[key] == now.Config.Options[key]
	}
	was, is := vm.Config.Drives(), now.Config.Drives()
	same = same && len(was) == len(is)
	for i := 0; same && i < len(was); i++ {
		same = was[i].ID == is[i].ID && was[i].Volume == is[i].Volume
	}
	if !same {
		return fmt.Errorf("VM %s was %w", vm.ID, proxmox.ErrChanged)
	}
	vm.Config = now.Config
	return nil
}

// giveBack gives back a lock that a killed run of ours has left. A run that was killed while it took the lock, or whose qm was,
// can't know whether it had got it; such a lock is only given back when the admin asks for it (asked).
func (vm *VM) giveBack(ctx context.Context, c *claim, asked bool) error {
	r, err := c.read()
	if err != nil || r == nil {
		return err
	}
	lock, ours := r.Lock, true
	if lock == nil {
		if lock, err = vm.site.Host.LockNow(vm.ID); err != nil {
			return err
		}
		ours = lock == nil || asked && r.may(lock.Changed)
	}
	switch {
	case lock == nil: // there is no backup lock
	case !ours:
		return fmt.Errorf("VM %s: a run of ours, or its qm, was killed while it took the lock: %w", vm.ID, proxmox.ErrNotOurs)
	default:
		if err := vm.site.Host.Unlock(ctx, *lock); err != nil {
			return err
		}
		vm.site.Log.Infof("VM %s: the backup lock that a killed run has left is given back", vm.ID)
	}
	return c.drop()
}

// Left tells whether a killed run of ours has left a lock, and with fix gives it back. It is "" if all is well.
func (vm *VM) Left(ctx context.Context, fix bool) (finding string, err error) {
	c, err := vm.claim(ctx, 0)
	if errors.Is(err, proxmox.ErrBusy) {
		return "", nil // it is at work
	}
	if err != nil {
		return "", err
	}
	defer c.release()
	r, err := c.read()
	if err != nil || r == nil {
		return "", err
	}
	if fix {
		err = vm.giveBack(ctx, c, true)
		if errors.Is(err, proxmox.ErrNotOurs) {
			return err.Error(), nil
		}
		return "", err
	}
	if lock, err := vm.site.Host.LockNow(vm.ID); err != nil || lock == nil {
		return "", err // the next run drops the record
	}
	return "a run that did not end has left the VM's backup lock", nil
}
