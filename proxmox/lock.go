package proxmox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotOurs tells that the VM is locked for a backup, and that it can't be shown that the lock is ours.
var ErrNotOurs = errors.New("the backup lock may be somebody else's")

// ErrLockUnknown tells that the VM may be locked for a backup by us: qm was cut off while it set the lock, or what came of
// it could not be read.
var ErrLockUnknown = errors.New("it is not known whether the backup lock was set")

// BackupLock is a `lock: backup` that we have set. Write it down (as JSON, say) and a later process can give back what a
// killed one had taken.
//
// PVE's lock names no owner, and vzdump's looks the same. What tells them apart is the configuration itself, right after
// the lock was set: any change, and so anybody else's lock, makes it another one, or at least one of another time.
type BackupLock struct {
	VMID    VMID      `json:"vmid"`
	Digest  string    `json:"digest"`
	Changed time.Time `json:"changed"` // when the configuration was written

	held bool // by this very process
}

// lockLimit bounds the setting of a lock: qm waits up to 10 s for others.
const lockLimit = 30 * time.Second

// LockBackup takes PVE's backup lock. The error is ErrLocked where there is a lock of any kind, ErrLockUnknown, or one of
// Set's; there is no lock of ours with any but ErrLockUnknown.
func (h Host) LockBackup(ctx context.Context, vmid VMID) (BackupLock, error) {
	c, err := h.Config(vmid)
	if err != nil {
		return BackupLock{}, err
	}
	if c.Lock() != "" {
		return BackupLock{}, c.lockedError()
	}
	// qm refuses where a lock was set since; so if it is content the lock is ours. Cut short, nobody would know whether it
	// is: this step is not for ctx to end.
	_, err = h.QM(context.WithoutCancel(ctx), lockLimit, "set", vmid.String(), "--lock", "backup")
	switch {
	case cutOff(err): // a lock that is there now may be this one: it says nothing about why
		return BackupLock{}, fmt.Errorf("VM %s: %w: %w", vmid, ErrLockUnknown, err)
	case err != nil:
		return BackupLock{}, h.explain(vmid, c.Digest, err)
	}
	l, lock, err := h.readLock(vmid)
	switch {
	case err != nil:
		return BackupLock{}, fmt.Errorf("VM %s: %w: %w", vmid, ErrLockUnknown, err)
	case lock != "backup":
		return BackupLock{}, fmt.Errorf("VM %s: qm set no lock, or it was taken away at once", vmid)
	}
	l.held = true
	return l, nil
}

// cutOff tells whether a call of qm failed otherwise than by qm's own refusal, and not before it was started, so that it may
// have done what was asked of it.
func cutOff(err error) bool {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return !exit.Exited() // it was killed
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, exec.ErrWaitDelay)
}

// readLock reads what a BackupLock has to remember, and the lock that is there.
func (h Host) readLock(vmid VMID) (l BackupLock, lock string, err error) {
	// Changed between the two looks, the time is the later one's, and the lock passes for somebody else's: safe.
	c, err := h.Config(vmid)
	if err != nil {
		return l, "", err
	}
	fi, err := os.Stat(h.ConfigPath(vmid))
	if err != nil {
		return l, "", fmt.Errorf("VM %s: %w", vmid, err)
	}
	return BackupLock{VMID: vmid, Digest: c.Digest, Changed: fi.ModTime()}, c.Lock(), nil
}

// Unlock gives the backup lock back, if it is ours: the configuration is the one that the lock remembers, and, for one
// that another process has taken, no vzdump is at work. It does nothing where the lock is gone already. The error is
// ErrNotOurs where it stays, or one of Set's.
func (h Host) Unlock(ctx context.Context, l BackupLock) error {
	now, lock, err := h.readLock(l.VMID)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil // the lock went with its VM
	case err != nil:
		return err
	case lock != "backup":
		return nil
	}
	same := now.Digest == l.Digest && now.Changed.Equal(l.Changed)
	idle, err := h.vzdumpIdle()
	if err != nil {
		return err
	}
	switch {
	case same && (l.held || idle):
	// The admin has changed the VM with --skiplock. Only vzdump sets locks of this kind, and it is not there.
	case l.held && idle:
	case same:
		return fmt.Errorf("VM %s: vzdump is at work: %w", l.VMID, ErrNotOurs)
	default:
		return fmt.Errorf("VM %s: its configuration has changed since: %w; `qm unlock %s` if you are sure", l.VMID, ErrNotOurs, l.VMID)
	}
	if _, err := h.QM(ctx, setLimit, "unlock", l.VMID.String()); err != nil {
		if _, lock, readErr := h.readLock(l.VMID); readErr == nil && lock == "" {
			return nil
		}
		return h.explainUnlock(l.VMID, err)
	}
	return nil
}

// explainUnlock is explain where a lock is nothing that stands in the way.
func (h Host) explainUnlock(vmid VMID, err error) error {
	if _, readErr := h.Config(vmid); readErr != nil {
		return fmt.Errorf("%w (%w)", readErr, err)
	}
	return fmt.Errorf("VM %s: %w", vmid, err)
}

// vzdumpIdle tells whether no vzdump works on this host: it holds a lock while it does.
func (h Host) vzdumpIdle() (bool, error) {
	f, err := os.Open(h.VzdumpLock)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("vzdump's lock: %w", err)
	}
	defer func() { _ = f.Close() }()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("vzdump's lock: %w", err)
	}
	return true, nil // closing gives it back
}
