package inside

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a guestmount that runs.
type process struct {
	cmd    *exec.Cmd
	said   tail
	hidden bool      // its mount is in a namespace of its own
	ready  chan bool // gets one value: whether the mount is there
	done   chan struct{}
	err    error // set before done is closed

	mu     sync.Mutex
	reaped bool // its number may be another process's by now
}

// run starts guestmount.
func (a Appliance) run(program string, args []string) (*process, error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(program, args...), ready: make(chan bool, 1), done: make(chan struct{})}
	p.cmd.Env = append(append([]string{}, a.Env...), "LIBGUESTFS_TMPDIR="+a.Temp, "XDG_RUNTIME_DIR="+a.Temp)
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	p.cmd.WaitDelay = time.Second // its children have these too
	p.cmd.ExtraFiles = []*os.File{theirs}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		// A session of its own: it can be killed with its children, and finds no terminal to ask for passphrases.
		Setsid: true,
		// An orderly end takes the mount away, which is only needed where others see it.
		Pdeathsig: syscall.SIGTERM,
	}
	if a.Dir == "" {
		p.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		if p.hidden = os.Geteuid() == 0; p.hidden {
			p.cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
		}
	}
	started := make(chan error)
	go func() {
		// The parent-death signal comes at the end of the thread that made the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		_ = theirs.Close()
		started <- err
		if err != nil {
			return
		}
		// It stays a zombie, and its number its own, until what it has left is killed.
		for unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
		p.kill()
		p.mu.Lock()
		p.reaped = true
		p.mu.Unlock()
		p.err = p.cmd.Wait()
		removeSockets(a.Temp)
		close(p.done)
	}()
	if err := <-started; err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("%s: %w", guestmount, err)
	}
	go func() {
		defer ours.Close()
		n, _ := ours.Read(make([]byte, 1))
		p.ready <- n == 1
	}()
	return p, nil
}

// awaitReady waits until the mount is there, and meanwhile keeps an eye on what a kill would leave.
func (p *process) awaitReady(ctx context.Context, temp string) error {
	look := time.NewTicker(500 * time.Millisecond)
	defer look.Stop()
	defer p.noteSockets(temp)
	for noted := false; ; {
		select {
		case ready := <-p.ready:
			if ready {
				return nil
			}
			<-p.done
			return p.failure()
		case <-ctx.Done():
			return fmt.Errorf("the appliance is not ready: %w", context.Cause(ctx))
		case <-look.C:
			noted = noted || p.noteSockets(temp)
		}
	}
}

// kill ends guestmount, its helpers and the appliance: they are one process group.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	}
}

// libguestfs makes a folder for its sockets that can't be chosen: for root it is in /tmp. It removes it, unless it is killed.
const (
	socketsNote = "sockets" // a symbolic link in Appliance.Temp that leads there
	socketsGlob = "/tmp/libguestfs??????"
)

var socketsPath = regexp.MustCompile(`path=(/tmp/libguestfs\w{6})/guestfsd\.sock`)

// noteSockets finds the folder in the arguments of the appliance's QEMU.
func (p *process) noteSockets(temp string) bool {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		stat, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		// Behind the name, which is in parentheses: state, parent, process group.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) < 3 || fields[2] != strconv.Itoa(p.cmd.Process.Pid) {
			continue
		}
		args, err := os.ReadFile(filepath.Join(filepath.Dir(f), "cmdline"))
		if m := socketsPath.FindSubmatch(args); err == nil && m != nil {
			err := os.Symlink(string(m[1]), filepath.Join(temp, socketsNote))
			return err == nil || errors.Is(err, os.ErrExist)
		}
	}
	return false
}

// removeSockets removes the folder that was noted, and only what libguestfs has in it.
func removeSockets(temp string) {
	dir, err := os.Readlink(filepath.Join(temp, socketsNote))
	if ok, _ := filepath.Match(socketsGlob, dir); err != nil || !ok {
		return
	}
	_ = os.Remove(filepath.Join(dir, "guestfsd.sock"))
	_ = os.Remove(filepath.Join(dir, "console.sock"))
	_ = os.Remove(dir)
}

// failure is the error of a guestmount that has ended before there was a mount.
func (p *process) failure() error {
	if text := p.said.String(); text != "" {
		return fmt.Errorf("%s: %s", guestmount, text)
	}
	if p.err == nil {
		return fmt.Errorf("%s: ended without a mount", guestmount)
	}
	return fmt.Errorf("%s: %w", guestmount, p.err)
}

// open opens the root of a mount that is for this process alone.
func (p *process) open(ctx context.Context, dir string) (*os.File, error) {
	if p.hidden {
		dir = filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), "root", dir)
	}
	type opened struct {
		fd  int
		err error
	}
	ch := make(chan opened, 1)
	go func() {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		ch <- opened{fd, err}
	}()
	select {
	case o := <-ch:
		if o.err != nil {
			return nil, fmt.Errorf("%s: its mount: %w", guestmount, o.err)
		}
		return os.NewFile(uintptr(o.fd), dir), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// tail keeps the end of what a program says.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const maxTail = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if over := len(t.b) - maxTail; over > 0 {
		t.b = append([]byte{}, t.b[over:]...)
	}
	return len(p), nil
}

// String is what was said, without libguestfs' standing advice.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var lines []string
	for line := range bytes.Lines(t.b) {
		s := strings.TrimSpace(string(line))
		if strings.HasPrefix(s, "To see full error messages") || strings.HasPrefix(s, "If reporting bugs") {
			break
		}
		if s != "" {
			lines = append(lines, printable(s))
		}
	}
	return strings.Join(lines, "; ")
}
