// Package child runs the external programs that qmchain needs, qemu-img above all, so that none of them outlives it.
//
// A child is killed when its context ends, when it takes longer than it may, and also when qmchain itself dies by
// SIGKILL: a qemu-img that goes on writing into a folder which the next run is cleaning up is a defect.
package child

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// maxOutput bounds what is kept of a child's output, in bytes.
const maxOutput = 64 << 20

// Run runs a program to its end and returns its standard output. A failure names the program and carries what it
// wrote to standard error.
func Run(caller context.Context, limit time.Duration, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(caller, limit)
	defer cancel()

	// The kernel sends the parent-death signal when the *thread* that made the child ends, so that thread is held
	// until the child is gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	var stdout, stderr limited
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	switch {
	case err == nil && stdout.cut:
		return nil, fmt.Errorf("%s: more than %d bytes of output", name, maxOutput)
	case err == nil:
		return stdout.kept.Bytes(), nil
	case caller.Err() != nil: // ctx may follow a moment later
		return nil, fmt.Errorf("%s: %w", name, caller.Err())
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s: not done within %s: %w", name, limit, context.DeadlineExceeded)
	}
	if text := strings.TrimSpace(stderr.kept.String()); text != "" {
		return nil, fmt.Errorf("%w: %s", err, text)
	}
	return nil, fmt.Errorf("%s: %w", name, err)
}

// limited keeps the first maxOutput bytes. It does not embed its buffer, whose ReadFrom would let io.Copy pass it by.
type limited struct {
	kept bytes.Buffer
	cut  bool
}

func (l *limited) Write(p []byte) (int, error) {
	keep := p[:min(len(p), maxOutput-l.kept.Len())]
	l.cut = l.cut || len(keep) < len(p)
	l.kept.Write(keep)
	return len(p), nil
}

// Process is a child that runs beside the caller.
type Process struct {
	cmd    *exec.Cmd
	stderr limited
	done   chan struct{} // closed when the child has ended
	err    error         // its end; read only after done
}

// Start starts a program that goes on until it ends by itself or Stop is called. When its parent dies it gets a SIGTERM, so
// that it can end in an orderly way.
func Start(name string, args ...string) (*Process, error) { return StartTo(nil, name, args...) }

// StartTo is Start for a program whose standard output is of interest: it is written to stdout, all of it by the time that
// the program is done.
func StartTo(stdout io.Writer, name string, args ...string) (*Process, error) {
	p := &Process{cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Stdout = stdout
	// What it has started may still hold its streams.
	p.cmd.WaitDelay = 5 * time.Second
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	p.cmd.Stderr = &p.stderr
	started := make(chan error)
	go func() {
		// The thread that makes the child must live as long as the child does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		err = p.cmd.Wait()
		if text := strings.TrimSpace(p.stderr.kept.String()); err != nil && text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		p.err = err
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how the child ended: nil for exit status 0. It must not be called before Done is closed.
func (p *Process) Err() error { return p.err }

// Stop asks the child to end by SIGTERM, and kills it when it has not ended within limit. It can be called again.
func (p *Process) Stop(limit time.Duration) error { return p.StopAgain(limit, limit) }

// StopAgain is Stop for a program that can miss the signal, as it only sets a flag that is looked at before the program goes to
// sleep: it is asked once more whenever that time has passed.
func (p *Process) StopAgain(limit, again time.Duration) error {
	end := time.After(limit)
	for {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
			return p.err
		case <-time.After(again):
		case <-end:
			_ = p.cmd.Process.Kill()
			<-p.done
			return fmt.Errorf("%s: did not end within %s and was killed: %w", p.cmd.Path, limit, context.DeadlineExceeded)
		}
	}
}
