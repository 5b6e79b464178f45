package qmptest

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"qmchain/qmp"
)

// qemuStart bounds how long a QEMU may take until it answers on its sockets.
const qemuStart = 30 * time.Second

// QEMU is a running qemu-system-x86_64 under TCG.
type QEMU struct {
	// Sockets are its two QMP sockets: one for the client under test, one for the test itself.
	Sockets [2]string

	process *exec.Cmd
	exited  chan struct{}
	kill    sync.Once
}

// StartQEMU starts a QEMU without default devices, with its vCPUs stopped (-S) and without a machine,
// unless the arguments have a -machine. It ends with the test.
func StartQEMU(t testing.TB, args ...string) *QEMU {
	t.Helper()
	dir := socketDir(t)
	q := &QEMU{exited: make(chan struct{})}
	all := []string{"-accel", "tcg", "-nodefaults", "-display", "none", "-S"}
	if !slices.Contains(args, "-machine") {
		all = append(all, "-machine", "none")
	}
	for i := range q.Sockets {
		q.Sockets[i] = filepath.Join(dir, fmt.Sprintf("qmp%d", i))
		all = append(all, "-qmp", "unix:"+q.Sockets[i]+",server=on,wait=off")
	}

	var output bytes.Buffer
	q.process = exec.Command("qemu-system-x86_64", append(all, args...)...)
	q.process.Stdout, q.process.Stderr = &output, &output
	// A test that is killed must not leave its QEMU behind.
	q.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := q.process.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(q.exited)
		_ = q.process.Wait() // how it ends is the test's doing
	}()
	t.Cleanup(func() {
		q.Kill()
		if t.Failed() {
			t.Logf("QEMU's output: %s", output.Bytes())
		}
	})

	ctx, cancel := context.WithTimeout(t.Context(), qemuStart)
	defer cancel()
	for _, path := range q.Sockets {
		for !answers(ctx, path) {
			select {
			case <-q.exited:
				t.Fatalf("QEMU has ended: %s", output.Bytes())
			case <-ctx.Done():
				t.Fatal("QEMU does not answer")
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	return q
}

// answers reports whether a QMP session can be had at the socket. It is there before QEMU listens on it,
// and a session that begins while QEMU still sets up its monitor can stay without an answer (seen on 7.2):
// then the next one is fine.
func answers(ctx context.Context, path string) bool {
	c, err := qmp.Dial(ctx, path, qmp.WithHandshakeTimeout(time.Second))
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// PID is the process's id.
func (q *QEMU) PID() int { return q.process.Process.Pid }

// Kill ends the process by SIGKILL and waits for that.
func (q *QEMU) Kill() {
	q.kill.Do(func() { _ = q.process.Process.Kill() }) // it fails only if the process has ended
	<-q.exited
}

// Exited is closed when the process has ended.
func (q *QEMU) Exited() <-chan struct{} { return q.exited }
