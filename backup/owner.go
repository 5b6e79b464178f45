package backup

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"qmchain/qmp"
)

// ErrBusy is wrapped where another run, or another tool's backup, is under way on the guest.
var ErrBusy = errors.New("busy")

// An owner says which process something belongs to, in a form that fits into QEMU's object ids and into file names:
// BOOT-NAMESPACE-PID-START-RANDOM. The kernel's boot id, the pid namespace and the process's start time make a pid
// unambiguous, so that a dead owner is recognised and a live one never taken for dead.
type owner string

var ownerPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9]+-[0-9]+-[0-9]+-[0-9a-f]{4}$`)

func newOwner() (owner, error) {
	boot, ns, err := here()
	if err != nil {
		return "", err
	}
	pid := os.Getpid()
	start, err := startTime(pid)
	if err != nil {
		return "", err
	}
	random := make([]byte, 2)
	_, _ = rand.Read(random) // never fails
	return owner(fmt.Sprintf("%s-%s-%d-%s-%x", boot, ns, pid, start, random)), nil
}

// here returns the kernel's boot id and the pid namespace, shortened.
func here() (boot, ns string, err error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", err
	}
	link, err := os.Readlink("/proc/self/ns/pid") // "pid:[4026531836]"
	if err != nil {
		return "", "", err
	}
	ns = strings.TrimSuffix(strings.TrimPrefix(link, "pid:["), "]")
	if len(b) < 8 || ns == "" {
		return "", "", fmt.Errorf("unexpected boot id %q or pid namespace %q", b, link)
	}
	return string(b[:8]), ns, nil
}

// startTime is the 22nd field of /proc/PID/stat. The second one, the program's name, can hold blanks and brackets, so
// counting begins behind its last bracket. A process that has ended, and that nobody has waited for yet, does not exist.
func startTime(pid int) (string, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) && errors.Is(syscall.Kill(pid, 0), syscall.EPERM) {
		return "", fmt.Errorf("process %d is hidden: %w", pid, os.ErrPermission)
	}
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("unexpected /proc/%d/stat", pid)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return "", fmt.Errorf("process %d has ended: %w", pid, os.ErrNotExist)
	}
	return fields[19], nil
}

// dead reports whether the owner has certainly ended: it ran under this very kernel and pid namespace, and its process
// is gone.
func (o owner) dead() bool {
	parts := strings.Split(string(o), "-")
	boot, ns, err := here()
	if err != nil || len(parts) != 5 || parts[0] != boot || parts[1] != ns {
		return false
	}
	pid, err := strconv.Atoi(parts[2])
	if err != nil {
		return false
	}
	start, err := startTime(pid)
	if errors.Is(err, os.ErrNotExist) {
		return true
	}
	return err == nil && start != parts[3]
}

const lockPrefix = "qmchain-run-"

// lockOwner returns the owner in the id of a lock object.
func lockOwner(object string) (owner, bool) {
	o, ok := strings.CutPrefix(object, lockPrefix)
	return owner(o), ok && ownerPattern.MatchString(o)
}

// guestLock is the right to change a QEMU process: an unused throttle group in it, named after its owner. It holds
// across repositories, sockets and hosts, and ends with the QEMU process.
type guestLock struct {
	id    string
	held  bool
	stale []string // lock objects of dead owners
}

// newGuestLock returns a lock that is not taken yet.
func newGuestLock() (*guestLock, error) {
	me, err := newOwner()
	if err != nil {
		return nil, err
	}
	return &guestLock{id: lockPrefix + string(me)}, nil
}

// take takes the lock, trying for at most wait. Two that try at the same moment see each other and both step back, so it
// tries again after a pause that differs between processes. When it fails the object may still be there: see release.
func (l *guestLock) take(ctx context.Context, c *qmp.Client, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for {
		if err := c.ObjectAddThrottleGroup(ctx, l.id); err != nil {
			return fmt.Errorf("lock the guest: %w", err)
		}
		holder, stale, err := otherOwners(ctx, c, l.id)
		if err != nil {
			return fmt.Errorf("lock the guest: %w", err)
		}
		if holder == "" {
			l.stale, l.held = stale, true
			return nil
		}
		if err := c.ObjectDel(ctx, l.id); err != nil {
			return fmt.Errorf("lock the guest: %w", err)
		}
		pause := 150*time.Millisecond + time.Duration(os.Getpid()%100)*time.Millisecond
		if time.Now().Add(pause).After(deadline) {
			return fmt.Errorf("another run is under way on this guest: %s: %w", describeOwner(holder), ErrBusy)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// release deletes the lock object, if it is there, and those of dead owners. It can be called again.
func (l *guestLock) release(ctx context.Context, c *qmp.Client) error {
	objects, err := c.Objects(ctx)
	if err != nil {
		return err
	}
	for _, id := range objects {
		if id != l.id && !slices.Contains(l.stale, id) {
			continue
		}
		if err := c.ObjectDel(ctx, id); err != nil {
			return fmt.Errorf("object %s: %w", id, err)
		}
	}
	return nil
}

// describeOwner says for people who holds a lock object.
func describeOwner(object string) string {
	o, _ := lockOwner(object)
	parts := strings.Split(string(o), "-")
	if boot, _, err := here(); err == nil && parts[0] == boot {
		return fmt.Sprintf("process %s (lock %s)", parts[2], object)
	}
	return fmt.Sprintf("process %s of another host or boot (lock %s)", parts[2], object)
}

// otherOwners returns one lock object of somebody alive, or "", and those of the dead.
func otherOwners(ctx context.Context, c *qmp.Client, mine string) (holder string, stale []string, err error) {
	objects, err := c.Objects(ctx)
	if err != nil {
		return "", nil, err
	}
	for _, id := range objects {
		o, ok := lockOwner(id)
		switch {
		case !ok || id == mine:
		case o.dead():
			stale = append(stale, id)
		default:
			holder = id
		}
	}
	return holder, stale, nil
}
