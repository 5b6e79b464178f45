package child

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const asParent = "QMCHAIN_TEST_PARENT"

// As a parent, the test binary runs a child that says its pid and then sleeps.
func TestMain(m *testing.M) {
	if os.Getenv(asParent) == "" {
		os.Exit(m.Run())
	}
	_, err := Run(context.Background(), time.Minute, "sh", "-c", "echo $$ >&3; exec sleep 60")
	fmt.Println(err)
}

func TestRun(t *testing.T) {
	out, err := Run(t.Context(), time.Minute, "sh", "-c", "echo yes; echo no >&2")
	if err != nil || string(out) != "yes\n" {
		t.Errorf("%q, %v", out, err)
	}
	_, err = Run(t.Context(), time.Minute, "sh", "-c", "echo the reason >&2; exit 3")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(err.Error(), "the reason") {
		t.Errorf("failure: %v", err)
	}
	if _, err = Run(t.Context(), time.Minute, "no-such-program-here"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("missing program: %v", err)
	}
}

func TestRunIsBounded(t *testing.T) {
	began := time.Now()
	if _, err := Run(t.Context(), 50*time.Millisecond, "sleep", "60"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "sleep") {
		t.Errorf("time limit: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := Run(ctx, time.Minute, "sleep", "60"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Run(t.Context(), time.Minute, "sh", "-c", "head -c 70000000 /dev/zero"); err == nil || !strings.Contains(err.Error(), "output") {
		t.Errorf("too much output: %v", err)
	}
	if took := time.Since(began); took > 50*time.Second {
		t.Errorf("it took %s", took)
	}
}

// The child dies with a parent that is killed.
func TestChildDiesWithItsParent(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	parent := exec.Command(self)
	parent.Env = append(os.Environ(), asParent+"=1")
	parent.ExtraFiles = []*os.File{w}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	defer parent.Wait() //nolint:errcheck // it was killed
	if err := r.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 2400 {
		if gone(pid) {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	t.Error("the child lives on")
}

// gone reports whether a process has ended; whoever inherited it may not have waited for it yet.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "Z")
}

// A program that misses the first signal is asked again, one that does not care is killed.
func TestStop(t *testing.T) {
	start := func(script string) *Process {
		t.Helper()
		r, w := io.Pipe()
		p, err := StartTo(w, "sh", "-c", script+"; echo ready; while :; do sleep 0.01; done")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Stop(time.Millisecond) })
		if line, err := bufio.NewReader(r).ReadString('\n'); err != nil {
			t.Fatalf("%q, %v", line, err)
		}
		return p
	}
	if err := start(`trap "exit 0" TERM`).Stop(time.Minute); err != nil {
		t.Errorf("at once: %v", err)
	}
	missing := `n=0; trap 'n=$((n + 1)); [ $n -lt 3 ] || exit 0' TERM`
	if err := start(missing).StopAgain(time.Minute, 50*time.Millisecond); err != nil {
		t.Errorf("at the third: %v", err)
	}
	if err := start(missing).Stop(200 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("never asked again: %v", err)
	}
	p := start(`trap "" TERM`)
	if err := p.StopAgain(200*time.Millisecond, 20*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("never: %v", err)
	}
	select {
	case <-p.Done():
	default:
		t.Error("it was not killed")
	}
}
