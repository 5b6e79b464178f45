package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
)

// process runs the program as a process of its own. Before that step it gets that signal, if it is not 0.
func process(t *testing.T, sig syscall.Signal, step int, stdin []byte, args ...string) (state *os.ProcessState, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qmchain-restore", args...)
	cmd.Env = os.Environ()
	if sig != 0 {
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d %d", signalAt, sig, step))
	}
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errs
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, syscall.EPIPE) {
		t.Fatal(err)
	}
	return cmd.ProcessState, out.String(), errs.String()
}

// whole makes sure that all points of a guest are whole and that nothing else is there, and returns how many there are. partials
// are what killed runs have left.
func whole(t *testing.T, dir, guest string, partials bool) int {
	t.Helper()
	r, err := repo.Open(dir, durable.FS{})
	if errors.Is(err, repo.ErrNotRepository) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Guest(guest)
	if err != nil {
		t.Fatal(err)
	}
	points, problems, err := g.Points()
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	for _, m := range points {
		for _, d := range m.Disks {
			if err := errors.Join(g.CheckSums(t.Context(), m, d.Name), g.CheckImages(points, m, d.Name)); err != nil {
				t.Error(err)
			}
		}
	}
	if strays, err := g.Strays(); len(strays) > 0 || err != nil {
		t.Errorf("strays %v, %v", strays, err)
	}
	if left, err := g.Partials(); err != nil || !partials && len(left) > 0 {
		t.Errorf("partials %v, %v", left, err)
	}
	return len(points)
}

// interrupt runs a command that fills a repository, each time with a signal at a later step, and again to its end.
func interrupt(t *testing.T, guest string, points, every, least int, stdin []byte, args func(repo string) []string) {
	t.Helper()
	for step := 1; ; step += every {
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			dir := t.TempDir()
			state, _, stderr := process(t, sig, step, stdin, args(dir)...)
			if !killed(state) && sig == syscall.SIGKILL {
				if !state.Success() || step < least {
					t.Errorf("%s after %d steps: %s", state, step-1, stderr)
				}
				return
			}
			n := whole(t, dir, guest, killed(state))
			// What is interrupted in its very last steps is done all the same.
			if !killed(state) && state.ExitCode() != 130 && (!state.Success() || n < points) {
				t.Errorf("step %d: %s, %d points: %s", step, state, n, stderr)
			}
			state, stdout, stderr := process(t, 0, 0, stdin, args(dir)...)
			if !state.Success() || whole(t, dir, guest, false) != points || strings.Count(stdout, guest+"/") != points-n {
				t.Errorf("step %d: again, after %d points: %s: %s%s", step, n, state, stdout, stderr)
			}
		}
	}
}

func TestReceiveInterrupted(t *testing.T) {
	t.Parallel()
	g := makeRepo(t, t.TempDir())
	state, stream, stderr := process(t, 0, 0, nil, "send", "--repo", g.Repo.Dir, "110/latest")
	if !state.Success() {
		t.Fatal(stderr)
	}
	interrupt(t, "110", 3, 23, 80, []byte(stream), func(dir string) []string { return []string{"receive", "--repo", dir} })
}

func TestImportInterrupted(t *testing.T) {
	t.Parallel()
	set := filepath.Join(foreigntest.Unpack(t, "virtnbdbackup/v1-compress"), "virtnbdbackup/v1-compress")
	points := 0
	if state, stdout, stderr := process(t, 0, 0, nil, "import", set, "--repo", t.TempDir(), "--name", "web"); !state.Success() {
		t.Fatal(stderr)
	} else {
		points = strings.Count(stdout, "\n")
	}
	interrupt(t, "web", points, 19, 40, nil, func(dir string) []string { return []string{"import", set, "--repo", dir, "--name", "web"} })
}

// Killed in the midst of the copying, nobody goes on writing, and another import does it all.
func TestImportKilledWhileCopying(t *testing.T) {
	t.Parallel()
	set := filepath.Join(foreigntest.Unpack(t, "virtnbdbackup/v1-chain"), "virtnbdbackup/v1-chain")
	dir := t.TempDir()
	for _, wait := range []time.Duration{50 * time.Millisecond, 150 * time.Millisecond, 300 * time.Millisecond} {
		cmd := exec.CommandContext(t.Context(), "qmchain-restore", "import", set, "--repo", dir, "--name", "web")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(wait)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		whole(t, dir, "web", true)
	}
	if state, _, stderr := process(t, 0, 0, nil, "import", set, "--repo", dir, "--name", "web"); !state.Success() {
		t.Fatal(stderr)
	}
	if n := whole(t, dir, "web", false); n != 4 {
		t.Errorf("%d points", n)
	}
}

// A receiver that waits for a sender, and a sender that waits for a receiver, end when they are told to.
func TestPipesInterrupted(t *testing.T) {
	t.Parallel()
	g := makeRepo(t, t.TempDir())
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	for _, args := range [][]string{{"receive", "--repo", t.TempDir()}, {"send", "--repo", g.Repo.Dir, "110/latest"}} {
		for wait := 700 * time.Millisecond; ; wait *= 2 {
			cmd := exec.CommandContext(t.Context(), "qmchain-restore", args...)
			cmd.Stdin, cmd.Stdout = r, w
			var errs bytes.Buffer
			cmd.Stderr = &errs
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(wait)
			_ = cmd.Process.Signal(syscall.SIGTERM)
			began := time.Now()
			_ = cmd.Wait()
			if cmd.ProcessState.ExitCode() == -1 && wait < 20*time.Second {
				continue // it was not ready for signals yet
			}
			if cmd.ProcessState.ExitCode() != 130 || time.Since(began) > 30*time.Second {
				t.Errorf("%s: %s: %s", args[0], cmd.ProcessState, errs.String())
			}
			break
		}
	}
	if n := whole(t, g.Repo.Dir, "110", false); n != 3 {
		t.Errorf("%d points", n)
	}
}
