package proxmox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is the QEMU of a running VM.
type Process struct {
	PID  int
	Args []string // its command line, without the program
}

// Process finds the VM's QEMU the way PVE does: by its pid file, which the process named there must name on its command
// line. It is nil if the VM does not run.
func (h Host) Process(vmid VMID) (*Process, error) {
	path := filepath.Join(h.Run, vmid.String()+".pid")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", vmid, err)
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	if pid <= 0 {
		return nil, nil // being written
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", vmid, err)
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")[1:]
	i := slices.IndexFunc(args, func(a string) bool { return optionName(a) == "pidfile" })
	if i < 0 || i+1 == len(args) || !samePath(args[i+1], path) {
		return nil, nil // somebody else has that number now
	}
	return &Process{PID: pid, Args: args}, nil
}

// LookProcess finds our backup sockets on the command line of a running VM.
func (s Socket) LookProcess(p *Process) Finding {
	words := make([]Word, len(p.Args))
	for i, arg := range p.Args {
		words[i] = Word{Text: arg, Start: i, End: i + 1}
	}
	return s.look(words)
}

// Answer is who answers on a socket.
type Answer string

// Answers.
const (
	AnswerNone  Answer = "no"    // there is no socket, or nobody listens
	AnswerBusy  Answer = "busy"  // the VM's QEMU listens, and talks with somebody else
	AnswerOther Answer = "other" // a process that is not the VM's QEMU
	AnswerYes   Answer = "yes"   // the VM's QEMU, with QMP
)

// greetingLimit bounds the wait for QMP's greeting, which comes at once unless the socket is in use.
const greetingLimit = 2 * time.Second

// Ask finds out who answers on the backup socket, and goes away again. The path alone proves nothing: a clone's args
// name the socket of the VM that it was cloned from, and the one who started last has it.
func (s Socket) Ask(ctx context.Context, p *Process) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, greetingLimit)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", s.Path())
	var late net.Error
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED):
		return AnswerNone, nil
	case err != nil && errors.Is(ctx.Err(), context.Canceled):
		return "", ctx.Err()
	case errors.As(err, &late) && late.Timeout(): // EAGAIN, where others wait already, is one too
		return AnswerBusy, nil
	case err != nil:
		return "", fmt.Errorf("backup socket of VM %s: %w", s.VMID, err)
	}
	defer func() { _ = conn.Close() }()
	pid, err := peer(conn)
	if err != nil {
		return "", fmt.Errorf("backup socket of VM %s: %w", s.VMID, err)
	}
	if p == nil || pid != p.PID {
		return AnswerOther, nil
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	greeting, err := bufio.NewReader(io.LimitReader(conn, 64<<10)).ReadString('\n')
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return "", ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return AnswerBusy, nil
	case err != nil && !errors.Is(err, io.EOF):
		return "", fmt.Errorf("backup socket of VM %s: %w", s.VMID, err)
	case !strings.HasPrefix(greeting, `{"QMP"`):
		return AnswerOther, nil
	}
	return AnswerYes, nil
}

// peer is the process that listens at the other end.
func peer(conn net.Conn) (pid int, err error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a Unix socket")
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(ctlErr, err); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}
