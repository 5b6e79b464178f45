package inside

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotRoot means that only root can use the kernel's file systems.
var ErrNotRoot = errors.New("only root can mount with the kernel's file systems")

// Kernel says what the host's own kernel is to show. It needs root.
type Kernel struct {
	Volume      Volume
	SkipJournal bool // no replay
	// Dir is the mount point. Where it is empty the mount is for View.Root alone.
	Dir string
	// Source is what losetup(8) shows, at most 200 bytes of it.
	Source string
	// Server starts a process that calls File.Serve, for the same volume and source. It must not be reused.
	Server *exec.Cmd
}

// Mount mounts the volume. When ctx ends meanwhile, what the kernel is reading fails, and Mount returns ctx's cause.
//
// The order is such that nothing needs to be undone after a kill: the FUSE file system has no place in the tree, the loop
// device goes with its last user, and a mount without a place goes with the descriptor. Only what has a mount point stays,
// without a disk under it.
func (k Kernel) Mount(ctx context.Context) (*View, error) {
	if os.Geteuid() != 0 {
		return nil, ErrNotRoot
	}
	if k.Volume.Why != "" {
		return nil, fmt.Errorf("%s: %w: %s", k.Volume, ErrNoFiles, k.Volume.Why)
	}
	file, err := startFile(ctx, k.Server, k.Source)
	if err != nil {
		return nil, err
	}
	v := &View{done: make(chan struct{})}
	go func() {
		<-file.ended
		v.err = file.err
		close(v.done)
	}()
	inTime := context.AfterFunc(ctx, file.abort)
	mount, err := k.mount(file)
	file.detach()
	if !inTime() {
		if err == nil {
			_ = unix.Close(mount)
		}
		v.await()
		return nil, fmt.Errorf("%s: %w", k.Volume, context.Cause(ctx))
	}
	if err != nil {
		file.end(func() {})
		v.await()
		return nil, fmt.Errorf("%s: %w", k.Volume, err)
	}
	if k.Dir == "" {
		v.root = os.NewFile(uintptr(mount), "/")
		// The mount goes with its descriptor, and with it the loop device and the file.
		v.stop = func() { file.end(func() { _ = v.root.Close() }) }
		return v, nil
	}
	v.stop = func() { file.end(func() { _ = Detach(context.WithoutCancel(ctx), k.Dir) }) }
	err = unix.MoveMount(mount, "", unix.AT_FDCWD, k.Dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
	letGo := func() { _ = unix.Close(mount) }
	if err != nil {
		file.end(letGo)
		v.await()
		return nil, fmt.Errorf("mount at %s: %w", k.Dir, err)
	}
	letGo()
	return v, nil
}

// Secluded tells whether nobody but this process's user (and root) can get to a mount point, whatever the modes in the mount
// allow: one of the folders above it is closed to all others. The kernel lets into a mount of its own whoever gets there, and
// the users of a guest have numbers that are other people's here. The path must have no symbolic links.
func Secluded(dir string) (bool, error) {
	for dir != "/" {
		dir = filepath.Dir(dir)
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return false, fmt.Errorf("%s: %w", dir, err)
		}
		// With an ACL the group's bits bound what it grants.
		if int(st.Uid) == os.Geteuid() && st.Mode&0o011 == 0 {
			return true, nil
		}
	}
	return false, nil
}

// mount puts a loop device on the file, and mounts it.
func (k Kernel) mount(file *oneFile) (int, error) {
	flags, access := 0, unix.O_RDWR
	if k.SkipJournal {
		flags, access = unix.LO_FLAGS_READ_ONLY, unix.O_RDONLY
	}
	backing, err := file.open(access)
	if err != nil {
		return -1, err
	}
	defer unix.Close(backing) // the loop device has its own hold on it
	loop, name, err := attachLoop(backing, flags)
	if err != nil {
		return -1, err
	}
	defer unix.Close(loop) // the mount has its own
	values, on := map[string]string{"source": name}, []string{}
	for _, o := range k.Volume.options("ro", k.SkipJournal) {
		if key, value, ok := strings.Cut(o, "="); ok {
			values[key] = value
		} else {
			on = append(on, o)
		}
	}
	return detached(fileSystems[k.Volume.Type].driver, values, on)
}

// attachLoop puts a free loop device on a file. The device goes with its last user: at the latest when loop, which holds it,
// is closed.
func attachLoop(file, flags int) (loop int, path string, err error) {
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, "", fmt.Errorf("loop devices: open /dev/loop-control: %w", err)
	}
	defer unix.Close(control)
	config := unix.LoopConfig{Fd: uint32(file)}
	config.Info.Flags = uint32(flags) | unix.LO_FLAGS_AUTOCLEAR
	for range 100 {
		n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return -1, "", fmt.Errorf("loop devices: %w", err)
		}
		path := filepath.Join("/dev", "loop"+strconv.Itoa(n))
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, "", fmt.Errorf("loop device: open %s: %w", path, err)
		}
		err = unix.IoctlLoopConfigure(fd, &config)
		if err == nil {
			return fd, path, nil
		}
		_ = unix.Close(fd)
		if !errors.Is(err, unix.EBUSY) { // else somebody was faster
			return -1, "", fmt.Errorf("loop device %s: %w", path, err)
		}
	}
	return -1, "", errors.New("loop devices: none is free")
}

// isOurLoop tells whether a block device is a loop device on a oneFile. The device is not asked: it would ask the file, and
// that may be gone.
func isOurLoop(path string) bool {
	name, ok := strings.CutPrefix(path, "/dev/loop")
	if !ok || strings.Contains(name, "/") {
		return false
	}
	file, err := os.ReadFile("/sys/block/loop" + name + "/loop/backing_file")
	return err == nil && strings.HasPrefix(string(file), "/"+fileMark)
}
