package proxmox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
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

// LockNow is the backup lock that the VM has now, whoever has set it; nil if it has none.
func (h Host) LockNow(vmid VMID) (*BackupLock, error) {
	l, lock, err := h.readLock(vmid)
	if err != nil || lock != "backup" {
		return nil, err
	}
	return &l, nil
}

// readLock reads what a BackupLock has to remember, and the lock that is there.
func (h Host) readLock(vmid VMID) (l BackupLock, lock string, err error) {
	// Changed between the two looks, the time is the later one's, and the lock passes for somebody else's: safe.
	c, err := h.Config(vmid)
	if err != nil {
		return l, "", err
	}
	fi, err := h.stat(h.ConfigPath(vmid))
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

// vzdumpIdle tells whether no vzdump works on this host: it holds a lock, by flock(2), while it does. The kernel is asked for it:
// a lock of our own, for a moment even, would have a vzdump that begins just then wait, or fail.
func (h Host) vzdumpIdle() (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(h.VzdumpLock, &st); errors.Is(err, fs.ErrNotExist) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("vzdump's lock: %w", err)
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return false, fmt.Errorf("vzdump's lock: %w", err)
	}
	return !flocked(string(locks), st.Dev, st.Ino), nil
}

// flocked tells whether a file is locked, by the text of /proc/locks: "1: FLOCK  ADVISORY  WRITE 708 00:19:1153 0 EOF". The device is
// that of the file system, as stat tells it too for a tmpfs such as /run. Who waits for a lock has an arrow before the kind.
func flocked(locks string, dev, inode uint64) bool {
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(dev), unix.Minor(dev), inode)
	for line := range strings.Lines(locks) {
		if f := strings.Fields(line); len(f) > 5 && f[1] == "FLOCK" && f[5] == file {
			return true
		}
	}
	return false
}
