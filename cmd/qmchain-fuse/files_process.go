package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/internal/ui"
)

// self is this program, started again.
type self struct {
	*os.Process
	ready chan bool
	ended chan error
}

// readyFD is where it says that it is ready.
const readyFD = 3

// startSelf starts this program again: in a session of its own, as a server; or as a child that gets a SIGTERM when this
// process ends.
func startSelf(args []string, session bool) (*self, error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if err := keepInherited(); err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: session}
	if !session {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	}
	s := &self{ready: make(chan bool, 1), ended: make(chan error, 1)}
	started := make(chan error)
	go func() {
		// The parent-death signal comes at the end of the thread that made the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		_ = theirs.Close()
		s.Process = cmd.Process
		started <- err
		if err == nil {
			s.ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("start the server: %w", err)
	}
	go func() {
		defer ours.Close()
		b := make([]byte, 1)
		n, _ := ours.Read(b)
		s.ready <- n == 1 && b[0] == readyByte
	}()
	return s, nil
}

// keepInherited keeps from children what this process has inherited: a script's lock, for one, is not for a server to keep.
func keepInherited() error {
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close what was inherited: %w", err)
	}
	return nil
}

// errEnded means that a server has ended before it was ready; it has said why.
var errEnded = errors.New("the server ended at once")

func (s *self) awaitReady(ctx context.Context, limit time.Duration) error {
	select {
	case ok := <-s.ready:
		if !ok {
			return errEnded
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(limit):
		return fmt.Errorf("the files are not there within %s", limit)
	}
}

// killLimit is how long a killed process may take to end.
const killLimit = 10 * time.Second

// failed ends a server, if it has not ended by itself, and returns why it did: its own exit code, where why is nil or
// errEnded; a nil error for its success.
func (s *self) failed(why error) error {
	if !errors.Is(why, errEnded) {
		_ = s.Signal(syscall.SIGTERM)
	}
	var err error
	select {
	case err = <-s.ended:
	case <-time.After(endLimit):
		_ = s.Kill()
		select {
		case err = <-s.ended:
		case <-time.After(killLimit):
			err = errors.New("it does not end, though it was killed: it waits for what it reads")
		}
	}
	if why != nil && !errors.Is(why, errEnded) {
		return why
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		return ui.Reported(exit.ExitCode())
	case err != nil:
		return fmt.Errorf("the server failed: %w", err)
	}
	return why
}

// sayReady tells the waiting process that the files are there. A server in the background lets go of the terminal first.
func sayReady(u *ui.UI, fd int, background bool) error {
	f := os.NewFile(uintptr(fd), "ready")
	if f == nil {
		return fmt.Errorf("no descriptor %d to say that the files are there", fd)
	}
	defer f.Close()
	if background {
		if err := u.Background("qmchain-fuse"); err != nil {
			return err
		}
	}
	if _, err := f.Write([]byte{readyByte}); err != nil {
		return fmt.Errorf("who started the mount has gone: %w", err)
	}
	return nil
}

// endChildren ends what the worker has left: the appliance is told by its parent's death, and has a moment for its own files.
func endChildren() {
	for deadline := time.Now().Add(busyPatience); ; time.Sleep(50 * time.Millisecond) {
		pids := children()
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			if time.Now().After(deadline) {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		if time.Now().After(deadline.Add(endLimit)) {
			return // not even a kill ends it: it waits for the disk of this host
		}
	}
}

// children are those of this process.
func children() (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		stat, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		// Behind the name, which is in parentheses: state, parent.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) < 2 || fields[1] != strconv.Itoa(os.Getpid()) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
