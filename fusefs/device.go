package fusefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The device and the mount are made here and not by go-fuse: its descriptor of the device would be inherited by every
// child that is started meanwhile, and with it the life of the mount; its errors name no reason; and it does not take the
// mount away when the first exchange with the kernel fails.

const (
	deviceFile = "/dev/fuse"
	fsSubtype  = "qmchain"
	// fsType is the type that mount(8), df(1) and /proc/self/mountinfo show.
	fsType = "fuse." + fsSubtype
)

// helperLimit bounds a run of fusermount3, which only makes a few system calls.
const helperLimit = 20 * time.Second

// device mounts at dir and returns the descriptor that the kernel's requests come from.
func device(ctx context.Context, dir, source string, allowOther bool) (int, error) {
	if os.Geteuid() == 0 {
		return deviceAsRoot(dir, source, allowOther)
	}
	return deviceByHelper(ctx, dir, source, allowOther)
}

func deviceAsRoot(dir, source string, allowOther bool) (int, error) {
	fd, err := unix.Open(deviceFile, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%w: open %s: %w", ErrNoFUSE, deviceFile, err)
	}
	data := []string{
		"fd=" + strconv.Itoa(fd),
		"rootmode=40000", // octal: a folder
		"user_id=" + strconv.Itoa(os.Geteuid()),
		"group_id=" + strconv.Itoa(os.Getegid()),
	}
	data = append(data, fuseOptions(allowOther)...)
	if err := unix.Mount(source, dir, fsType, mountFlags, strings.Join(data, ",")); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) {
			return -1, fmt.Errorf("%w: mount %s: %w", ErrNoFUSE, dir, err)
		}
		return -1, fmt.Errorf("mount %s: %w", dir, err)
	}
	return fd, nil
}

// deviceByHelper has fusermount3 do it, which is set-uid root. It sends the descriptor over a socket, fusermount3(1).
func deviceByHelper(ctx context.Context, dir, source string, allowOther bool) (int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount"), os.NewFile(uintptr(pair[1]), "fusermount")
	defer ours.Close()
	defer theirs.Close()
	options := append([]string{"ro", "nosuid", "nodev", "noexec", "subtype=" + fsSubtype, "fsname=" + source}, fuseOptions(allowOther)...)
	for i, o := range options {
		options[i] = strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(o)
	}
	if err := helper(ctx, theirs, "-o", strings.Join(options, ","), "--", dir); err != nil {
		return -1, fmt.Errorf("%w: %w", ErrNoFUSE, err)
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(ours.Fd()), make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return -1, fmt.Errorf("fusermount3: receive: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("fusermount3: sent %d messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("fusermount3: sent %d descriptors: %w", len(fds), err)
	}
	return fds[0], nil
}

// helper runs fusermount3. Its errors carry what it said.
func helper(ctx context.Context, socket *os.File, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, helperLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "fusermount3", args...)
	cmd.WaitDelay = time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if socket != nil {
		cmd.ExtraFiles = []*os.File{socket} // number 3
		cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	}
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(said.String()); text != "" {
			return fmt.Errorf("%w: %s", err, text)
		}
		return fmt.Errorf("fusermount3: %w", err)
	}
	return nil
}

// unmountAt takes away what is on top at dir. Lazy: also if it is in use; it then ends when it no longer is. Force: as
// root, requests that wait for an answer get an error, so it ends now.
func unmountAt(ctx context.Context, dir string, lazy, force bool) error {
	if os.Geteuid() != 0 {
		args := []string{"-u"}
		if lazy {
			args = append(args, "-z")
		}
		return helper(ctx, nil, append(args, "--", dir)...)
	}
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	if force {
		flags |= unix.MNT_FORCE
	}
	if err := unix.Unmount(dir, flags); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}
