package fusefs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/internal/mountinfo"
)

// A server must end when its mount does, and there is more than one way in which it might not:
//
//   - Somebody else's mount namespace (a service's, a container's) has a copy of the mount. umount(8) here does not touch
//     that one, so the kernel never tells the server. The watch looks whether the mount is still in our own namespace.
//   - The mount is detached (umount -l) while files are open. That is meant to serve them on, and ends with the last.
//   - A read of the repository hangs, on a dead NFS server for one. go-fuse then waits for it for ever, though the kernel
//     has given up the mount long ago. The watch asks the device itself.
//   - The connection is aborted (umount -f, or through fusectl) while the mount stays. go-fuse ends; the mount would be
//     left as one that answers ENOTCONN to all. It is taken away.
//   - The server is told to end and can't unmount, because a file is open. Unmount detaches and aborts.

// Done is closed when the mount has ended, by whomever.
func (m *Mounted) Done() <-chan struct{} { return m.gone }

// Wait waits until the mount has ended. It returns ErrHangs if a request still has not returned then, and ErrBusy if the
// mount is gone here but not in another mount namespace: the process should exit, which is the only way to end either.
func (m *Mounted) Wait() error {
	<-m.gone
	return m.err
}

// watch follows the mount until it has ended.
func (m *Mounted) watch() {
	changed := make(chan struct{}, 1)
	go m.watchMounts(changed)

	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	detached := false
	for {
		select {
		case <-m.served:
			m.stop(nil)
			return
		case <-m.gone:
			return
		case <-changed:
		case <-tick.C:
		}
		if !m.alive() {
			m.awaitServed(ErrHangs)
			return
		}
		if !detached && !m.attached() {
			detached = true
			if n := m.fsys.disks.inUse(); n > 0 && !m.ending.Load() {
				m.log.Warnf("unmounted, but %d open disk images are served until they are closed", n)
			}
			continue // for a moment: in the usual case the kernel is just ending it
		}
		if detached && m.fsys.disks.inUse() == 0 {
			m.log.Info("unmounted; a copy of the mount in another mount namespace ends with it")
			m.abort()
			m.awaitServed(ErrBusy)
			return
		}
	}
}

// watchMounts says when the mounts of our namespace have changed, until the mount has ended. Without it the watch is only
// slower to notice.
func (m *Mounted) watchMounts(changed chan<- struct{}) {
	fd, err := unix.Open(mountinfo.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		m.log.WithError(err).Debug("changes of the mounts are not reported")
		return
	}
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
	for {
		n, err := unix.Poll(fds, int(watchEvery.Milliseconds()))
		select {
		case <-m.gone:
			return
		default:
		}
		if n > 0 {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
		if err != nil && err != unix.EINTR {
			return
		}
	}
}

// alive reports whether the kernel still has the connection. The device says POLLERR when it has not.
func (m *Mounted) alive() bool {
	m.fdMu.Lock()
	defer m.fdMu.Unlock()
	if m.fd < 0 {
		return false
	}
	fds := []unix.PollFd{{Fd: int32(m.fd)}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return err != nil || n == 0 || fds[0].Revents&unix.POLLERR == 0
		}
	}
}

func (m *Mounted) closeFD() {
	m.fdMu.Lock()
	defer m.fdMu.Unlock()
	_ = unix.Close(m.fd)
	m.fd = -1
}

// attached reports whether the mount is in our mount namespace. A doubt counts as yes.
func (m *Mounted) attached() bool {
	mounts, err := mountinfo.Read()
	if err != nil {
		return true
	}
	_, ok := m.find(mounts)
	return ok
}

// find returns our mount. Numbers of mounts and devices are given to others as soon as they are free, and other people's
// mounts are not ours to end: so the number of the device counts only while the kernel has the connection, for it is not
// free then, and after that only at our own place, which nobody else takes as long as we have it locked.
func (m *Mounted) find(mounts []mountinfo.Entry) (mountinfo.Entry, bool) {
	for _, e := range mounts {
		if e.ID == m.entry.ID && e.Device == m.entry.Device && e.Type == fsType && e.Source == m.entry.Source {
			return e, e.Point == m.dir || m.alive()
		}
	}
	return mountinfo.Entry{}, false
}

// awaitServed gives requests that are being served a last moment. What then keeps go-fuse from ending is other's.
func (m *Mounted) awaitServed(other error) {
	select {
	case <-m.served:
		m.stop(nil)
	case <-time.After(endLimit):
		m.stop(other)
	}
}

// stop ends what is left of the mount.
func (m *Mounted) stop(err error) {
	m.once.Do(func() {
		if mounts, err := mountinfo.Read(); err == nil {
			if entry, ok := m.find(mounts); ok {
				if err := m.unmountEntry(context.Background(), mounts, entry, true); err != nil {
					m.log.WithError(err).Warn("a dead mount is left")
				}
			}
		}
		select {
		case <-m.served:
			if !m.fsys.end() && err == nil {
				err = ErrHangs
			}
		default: // a request may still be using them
		}
		m.closeFD()
		_ = m.place.Close()
		m.err = err
		close(m.gone)
	})
}

// abort makes the kernel give up the connection, where fusectl is mounted. The end of the process does it everywhere.
func (m *Mounted) abort() bool {
	_, minor, _ := strings.Cut(m.entry.Device, ":")
	err := os.WriteFile(filepath.Join("/sys/fs/fuse/connections", minor, "abort"), []byte("1"), 0)
	if err != nil {
		m.log.WithError(err).Debug("the connection can't be aborted")
	}
	return err == nil
}

// Unmount ends the mount. If files are in use it waits a few seconds for them, and then takes the mount away all the same:
// who has a file open gets errors from then on. It returns ErrHangs or ErrBusy if only the end of this process will end
// the mount for all who use it; it always returns within some ten seconds.
func (m *Mounted) Unmount(ctx context.Context) error {
	select {
	case <-m.gone:
		return m.err
	default:
	}
	m.ending.Store(true)
	if m.tryUnmount(ctx) {
		return m.awaitGone()
	}
	aborted := false
	if mounts, err := mountinfo.Read(); err == nil {
		if entry, ok := m.find(mounts); ok {
			m.log.Warn("the mount is in use: it is detached, and what is open gets errors from now on")
			if err := m.unmountEntry(ctx, mounts, entry, true); err != nil {
				return fmt.Errorf("%w: %w", ErrBusy, err) // covered by another mount; breaking it would leave a dead one there
			}
			aborted = os.Geteuid() == 0
		}
	}
	if !aborted && !m.abort() {
		return ErrBusy
	}
	return m.awaitGone()
}

// tryUnmount unmounts as soon as nothing is in use. It gives up after busyLimit.
func (m *Mounted) tryUnmount(ctx context.Context) bool {
	deadline := time.Now().Add(busyLimit)
	for {
		mounts, err := mountinfo.Read()
		if err != nil {
			m.log.WithError(err).Warn("unmount")
			return false
		}
		entry, ok := m.find(mounts)
		if !ok {
			// Somebody was faster, or detached it: then it ends when nothing is open.
			return m.fsys.disks.inUse() == 0
		}
		err = m.unmountEntry(ctx, mounts, entry, false)
		if err == nil {
			return true
		}
		select {
		case <-m.gone:
			return true
		case <-ctx.Done():
			return false
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			m.log.WithError(err).Debug("no orderly unmount")
			return false
		}
	}
}

// unmountEntry unmounts our mount where it is now. It leaves what somebody else has mounted on top of it.
func (m *Mounted) unmountEntry(ctx context.Context, mounts []mountinfo.Entry, entry mountinfo.Entry, force bool) error {
	if top, _ := mountinfo.Top(mounts, entry.Point); top.ID != entry.ID {
		return fmt.Errorf("%s is covered by another mount (%s)", entry.Point, top.Type)
	}
	return unmountAt(ctx, entry.Point, force, force)
}

// awaitGone waits for the watch to see the end.
func (m *Mounted) awaitGone() error {
	select {
	case <-m.gone:
		return m.err
	case <-time.After(endLimit + 5*watchEvery):
		return ErrBusy
	}
}

// ErrNotMounted means that no repository is mounted there.
var ErrNotMounted = errors.New("no repository is mounted there")

// autofsType is the type of what systemd has at an automount point: x-systemd.automount in fstab.
const autofsType = "autofs"

// serverLimit is how long Unmount waits for the server to be gone.
const serverLimit = 15 * time.Second

// Unmount unmounts the repository at dir, whoever serves it, and waits until its server is gone, but not at an automount
// point. Lazy detaches a mount that is in use; its server then ends with the last use, which is not waited for. It wraps
// ErrNotMounted, ErrBusy, or what the system says. A mount whose server is dead is unmounted like any other.
func Unmount(ctx context.Context, dir string, lazy bool) error {
	mounts, err := mountinfo.Read()
	if err != nil {
		return err
	}
	path, err := mountPath(mounts, dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotMounted, err)
	}
	if top, ok := mountinfo.Top(mounts, path); !ok || top.Type != fsType {
		return fmt.Errorf("%s: %w", path, ErrNotMounted)
	}
	if err := unmountAt(ctx, path, lazy, false); err != nil {
		if errors.Is(err, unix.EBUSY) || strings.Contains(err.Error(), "busy") { // fusermount3 has only words
			return fmt.Errorf("%s: %w", path, ErrBusy)
		}
		return err
	}
	if lazy {
		return nil
	}
	if mounts, err = mountinfo.Read(); err != nil {
		return err
	}
	if top, ok := mountinfo.Top(mounts, path); ok && top.Type == autofsType {
		return nil // to open the place would have it mounted again
	}
	place, err := lockPlace(ctx, path, serverLimit)
	if err != nil {
		return fmt.Errorf("unmounted, but its server has not ended: %w", err)
	}
	return place.Close()
}
