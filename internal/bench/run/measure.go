package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"qmchain/internal/bench/figures"
)

// measuring calls benchmarks.
type measuring struct {
	form   form
	out    io.Writer
	dir    string // temporary
	binary string // the test binary, in dir
	goroot string
	head   figures.Run // what is known before anything was measured
}

// newMeasuring builds the benchmarks.
func newMeasuring(ctx context.Context, f form, out io.Writer) (*measuring, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("it needs root, for namespaces and for file systems of its own")
	}
	// Not in /tmp, which is often in memory.
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("TMPDIR"), "/var/tmp"), "qmchain-bench-")
	if err != nil {
		return nil, err
	}
	m := &measuring{form: f, out: out, dir: dir, binary: filepath.Join(dir, "bench.test")}
	goroot, err := exec.CommandContext(ctx, goScript, "env", "GOROOT").Output()
	if err != nil {
		m.close()
		return nil, fmt.Errorf("%s: %w", goScript, err)
	}
	m.goroot = strings.TrimSpace(string(goroot))
	if text, err := exec.CommandContext(ctx, goScript, "test", "-c", "-o", m.binary, "./"+benchFolder).CombinedOutput(); err != nil {
		m.close()
		return nil, fmt.Errorf("build: %w: %s", err, text)
	}
	m.head = figures.Run{
		Form: f.name, Time: time.Now().UTC().Truncate(time.Second), Machine: machine(ctx, dir),
		Version: says(ctx, `\S+`, "git", "describe", "--tags", "--always", "--dirty"),
	}
	return m, nil
}

func (m *measuring) close() { _ = os.RemoveAll(m.dir) }

// run measures cases, those that there is time for.
func (m *measuring) run(ctx context.Context, some []benchCase) figures.Run {
	r := m.head
	began := time.Now()
	for i, c := range some {
		fmt.Fprintf(m.out, "\n== %s, %d of %d; %s so far\n", c.name, i+1, len(some), time.Since(began).Round(time.Second))
		done := figures.Case{Name: c.name, Load: load(), Time: r.Time, Version: r.Version}
		start := time.Now()
		found, cpu, err := m.one(ctx, c)
		done.CPU = cpu.Round(time.Second).Seconds()
		done.Seconds = time.Since(start).Round(time.Second).Seconds()
		if err != nil {
			done.Error = err.Error()
			fmt.Fprintf(m.out, "!! %s: %v\n", c.name, err)
		}
		r.Cases = append(r.Cases, done)
		r.Figures = append(r.Figures, found...)
	}
	fmt.Fprintf(m.out, "\n== %s in all\n", time.Since(began).Round(time.Second))
	return r
}

// waitDelay is how long output may come after a case was ended.
const waitDelay = 10 * time.Second

// one measures a case. What it has found before it failed, and what it took of the processors, is returned with the error.
func (m *measuring) one(ctx context.Context, c benchCase) (all []figures.Figure, cpu time.Duration, err error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, fmt.Errorf("not begun: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, m.form.each)
	defer cancel()
	temp, err := os.MkdirTemp(m.dir, "")
	if err != nil {
		return nil, 0, err
	}
	defer m.clear(temp)
	found := filepath.Join(m.dir, c.name+".json")
	_ = os.Remove(found)

	// Killing unshare ends all in the namespace. The shell is there to be its init, which takes in orphans.
	args := append([]string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", `"$@"; exit $?`, "sh", m.binary}, c.args(m.form.name)...)
	cmd := exec.CommandContext(ctx, "unshare", append(args, "-bench-out", found)...)
	cmd.Dir = benchFolder
	cmd.Env = append(os.Environ(), "TMPDIR="+temp, "PATH="+filepath.Join(m.goroot, "bin")+":"+os.Getenv("PATH"))
	var said bytes.Buffer
	cmd.Stdout = io.MultiWriter(m.out, &said)
	cmd.Stderr = cmd.Stdout
	// In a group of its own: a Ctrl-C is ours to handle. And it ends with this process, whose thread it is bound to.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = waitDelay
	runtime.LockOSThread()
	err = cmd.Run()
	runtime.UnlockOSThread()
	if cmd.ProcessState != nil {
		cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("ended before it was done: %w", ctx.Err())
	case err != nil:
		err = reason(said.String(), err)
	}
	all, readErr := readFigures(found)
	if err == nil && readErr == nil && len(all) == 0 {
		readErr = errors.New("it has found nothing")
	}
	return all, cpu, errors.Join(err, readErr)
}

func readFigures(path string) ([]figures.Figure, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return figures.Read(f)
}

// clear removes a case's temporary folder, and what outlives its namespaces: loop devices.
func (m *measuring) clear(temp string) {
	out, err := exec.Command("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").Output()
	if err == nil {
		for line := range strings.Lines(string(out)) {
			if device, file, _ := strings.Cut(strings.TrimSpace(line), " "); strings.HasPrefix(strings.TrimSpace(file), temp+"/") {
				_ = exec.Command("losetup", "--detach", device).Run()
			}
		}
	}
	if err := os.RemoveAll(temp); err != nil {
		fmt.Fprintf(m.out, "!! %v\n", err)
	}
}

var (
	failLine  = regexp.MustCompile(`^\s*--- FAIL: Benchmark(\S+)`)
	errorLine = regexp.MustCompile(`^\s+\w+_test\.go:\d+: (.*)`)
)

// reason finds in a benchmark's output why it failed: the last that each benchmark that failed has said.
func reason(said string, err error) error {
	var reasons []string
	name, last := "", ""
	flush := func() {
		if name != "" && last != "" {
			reasons = append(reasons, name+": "+last)
		}
		name, last = "", ""
	}
	for line := range strings.Lines(said) {
		if found := failLine.FindStringSubmatch(line); found != nil {
			flush()
			name = found[1]
			continue
		}
		if found := errorLine.FindStringSubmatch(line); found != nil {
			last = strings.TrimSpace(found[1])
			continue
		}
		if !strings.HasPrefix(line, " ") {
			flush()
		}
	}
	flush()
	if len(reasons) == 0 {
		lines := strings.Split(strings.TrimSpace(said), "\n")
		return fmt.Errorf("%w: %s", err, lines[len(lines)-1])
	}
	return errors.New(strings.Join(reasons, "; "))
}
