package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"qmchain/chain/repo/repotest"
)

// terminal is a program that runs on one.
type terminal struct {
	t      *testing.T
	cmd    *exec.Cmd
	master *os.File
	ended  chan struct{}

	mu   sync.Mutex
	seen bytes.Buffer
}

// onTerminal starts the program on a terminal of that size.
func onTerminal(t *testing.T, columns, rows uint16, env []string, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatal(err)
	}
	p := &terminal{t: t, master: master, ended: make(chan struct{})}
	p.cmd = exec.Command(os.Args[0], args...)
	p.cmd.Args[0] = "qmchain-restore" // what TestMain goes by
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "QMCHAIN_CONFIG=", "LANG=C.UTF-8", "TERM=xterm"}, env...)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf) // fails when the last one has closed the terminal
			p.mu.Lock()
			p.seen.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() {
		_ = p.cmd.Wait() // its state tells
		<-read
		close(p.ended)
	}()
	t.Cleanup(func() { _ = p.cmd.Process.Kill() })
	return p
}

func (p *terminal) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.ReplaceAll(p.seen.String(), "\r\n", "\n")
}

// await waits until something is on the terminal.
func (p *terminal) await(what string) {
	p.t.Helper()
	for deadline := time.Now().Add(time.Minute); !strings.Contains(p.text(), what); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%q is not on the terminal: %q", what, p.text())
		}
	}
}

// end waits for the program's end.
func (p *terminal) end(code int) string {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		p.t.Fatalf("it does not end: %q", p.text())
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("exit code %d, want %d: %q", got, code, p.text())
	}
	return p.text()
}

// A list that is watched shows what is new, and ends with Ctrl-C as if it was meant to. The screen is as it was before.
func TestWatch(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	g := makeRepo(t, dir)
	p := onTerminal(t, 80, 24, nil, "list", "--repo", dir, "--watch", "1")
	p.await("3 points in 1 chain")
	m := g.Add(repotest.Disk{Name: "scsi0", Size: 4 << 20, Full: true}, repotest.Disk{Name: "virtio1", Size: 2 << 20, Full: true})
	p.await("4 points in 2 chains")
	p.await(string(m.ID))
	if _, err := p.master.WriteString("\x03"); err != nil {
		t.Fatal(err)
	}
	if text := p.end(0); !strings.HasPrefix(text, "\x1b[?1049h") || !strings.HasSuffix(text, "\x1b[?1049l") {
		t.Errorf("the screen is not given back: %q", text)
	}
}

// A repository that hangs does not keep a user from leaving.
func TestWatchHangs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	makeRepo(t, dir)
	p := onTerminal(t, 80, 24, nil, "list", "--repo", dir, "--watch", "1")
	p.await("3 points")
	hangs := filepath.Join(dir, "111", "20261120T101523Z-0000")
	if err := os.MkdirAll(hangs, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(hangs, "point.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond) // a look falls into it
	if _, err := p.master.WriteString("\x03"); err != nil {
		t.Fatal(err)
	}
	p.end(0)
}

// No line is wider than the terminal, but examples, which are to be copied.
func TestWidths(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	g := makeRepo(t, dir)
	id := string(g.Points[0].ID)
	for _, c := range []struct {
		columns uint16
		args    []string
	}{
		{40, []string{"list", "--repo", dir}},
		{60, []string{"list", "--repo", dir}},
		{80, []string{"list", "--repo", dir, "--long"}},
		{200, []string{"list", "--repo", dir, "--long"}},
		{80, []string{"report", "--repo", dir}},
		{80, []string{"--help"}},
		{80, []string{"image", "--help"}},
		{200, []string{"image", "--help"}},
	} {
		text := onTerminal(t, c.columns, 24, nil, c.args...).end(0)
		for line := range strings.Lines(text) {
			line = strings.TrimSuffix(line, "\n")
			if utf8.RuneCountInString(line) > int(c.columns) && !strings.HasPrefix(line, "  qmchain-restore ") {
				t.Errorf("%q on %d columns: %q", c.args, c.columns, line)
			}
		}
		if c.args[0] == "list" && !strings.Contains(text, id) {
			t.Errorf("%q on %d columns names no point: %s", c.args, c.columns, text)
		}
	}
}

// Colours are for terminals whose users want them.
func TestColours(t *testing.T) {
	t.Parallel()
	wrong := []string{"list", "--repo", t.TempDir()}
	for _, c := range []struct {
		env  []string
		want bool
	}{{nil, true}, {[]string{"NO_COLOR=1"}, false}, {[]string{"TERM=dumb"}, false}} {
		text := onTerminal(t, 80, 24, c.env, wrong...).end(2)
		if strings.Contains(text, "\x1b[") != c.want || !strings.Contains(text, "hint:") {
			t.Errorf("%q: %q", c.env, text)
		}
	}
	cmd := exec.Command(os.Args[0], wrong...)
	cmd.Args[0] = "qmchain-restore"
	if text, _ := cmd.CombinedOutput(); bytes.Contains(text, []byte("\x1b[")) || !bytes.Contains(text, []byte("hint=")) {
		t.Errorf("without a terminal: %q", text)
	}
}
