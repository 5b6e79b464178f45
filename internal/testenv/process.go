package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a running QEMU. Its stdout and stderr are one terminal: QEMU
// prints what `qemu-io` says on stdout, and the C library holds that back
// where it is no terminal.
type process struct {
	cmd     *exec.Cmd
	gone    chan struct{} // closed when the process has ended and was waited for
	err     error         // how it ended; to be read after gone
	drained chan struct{} // closed when all that it printed is in output

	mu     sync.Mutex
	output bytes.Buffer
	more   chan struct{} // closed and replaced when output grows
	eof    bool
}

// startProcess starts a program that dies with this process.
func startProcess(program string, args []string) (*process, error) {
	master, slave, err := openTerminal()
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	defer func() { _ = slave.Close() }()
	p := &process{
		cmd:     exec.Command(program, args...),
		gone:    make(chan struct{}),
		drained: make(chan struct{}),
		more:    make(chan struct{}),
	}
	p.cmd.Stdout, p.cmd.Stderr = slave, slave
	// A process group of its own keeps a Ctrl-C at the terminal away from
	// QEMU: the test's clean-up ends it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the *thread* that forked ends, so
		// that thread belongs to this goroutine until QEMU is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.gone)
		}
	}()
	if err := <-started; err != nil {
		_ = master.Close()
		return nil, err
	}
	go p.drain(master)
	return p, nil
}

func (p *process) drain(master *os.File) {
	defer close(p.drained)
	defer func() { _ = master.Close() }()
	buf := make([]byte, 16<<10)
	for {
		n, err := master.Read(buf)
		p.mu.Lock()
		p.output.Write(bytes.ReplaceAll(buf[:n], []byte("\r"), nil))
		p.eof = err != nil // EIO, when the last process has closed the terminal
		close(p.more)
		p.more = make(chan struct{})
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// take removes and returns the output from an offset on, up to a line that
// contains mark. That line goes too.
func (p *process) take(from int, mark string, timeout time.Duration) (string, error) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for {
		p.mu.Lock()
		all := p.output.String()
		more, eof := p.more, p.eof
		before, after, found := strings.Cut(all[from:], mark)
		if _, rest, whole := strings.Cut(after, "\n"); found && whole {
			p.output.Truncate(from)
			p.output.WriteString(rest)
			p.mu.Unlock()
			return before[:strings.LastIndexByte(before, '\n')+1], nil
		}
		p.mu.Unlock()
		if eof {
			return all[from:], errGone
		}
		select {
		case <-more:
		case <-timer.C:
			return all[from:], fmt.Errorf("no output within %v", timeout)
		}
	}
}

func (p *process) outputLen() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.output.Len()
}

func (p *process) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.output.String()
}

func (p *process) alive() bool {
	select {
	case <-p.gone:
		return false
	default:
		return true
	}
}

// signal sends a signal, by pid, to a process that was not waited for yet.
func (p *process) signal(sig syscall.Signal) error {
	err := p.cmd.Process.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// wait waits for the end of the process, and for its last words.
func (p *process) wait(timeout time.Duration) error {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for _, c := range []chan struct{}{p.gone, p.drained} {
		select {
		case <-c:
		case <-timer.C:
			return fmt.Errorf("process %d, or one that it started, is still there after %v", p.cmd.Process.Pid, timeout)
		}
	}
	return nil
}

// openTerminal returns both ends of a new pseudo terminal.
func openTerminal() (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	raw, err := master.SyscallConn()
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	var fd uintptr
	ctlErr := raw.Control(func(m uintptr) {
		if err = unix.IoctlSetPointerInt(int(m), unix.TIOCSPTLCK, 0); err != nil {
			return
		}
		// Unlike opening /dev/pts/N this works wherever devpts is mounted.
		var errno syscall.Errno
		fd, _, errno = syscall.Syscall(syscall.SYS_IOCTL, m, unix.TIOCGPTPEER, syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC)
		if errno != 0 {
			err = errno
		}
	})
	if err = errors.Join(ctlErr, err); err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, os.NewFile(fd, "pty"), nil
}
