package ui

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

func getenv(vars ...string) func(string) string {
	return func(name string) string {
		for _, v := range vars {
			if value, ok := strings.CutPrefix(v, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

// terminal returns a terminal and a function that closes it and gives what was written to it.
func terminal(t *testing.T) (*os.File, func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
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
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 120}); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			seen.Write(b[:n])
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = slave.Close()
		<-done
		_ = master.Close()
	})
	return slave, func() string {
		_ = slave.Close()
		<-done
		return strings.ReplaceAll(seen.String(), "\r\n", "\n")
	}
}

func newUI(t *testing.T, stdout, stderr io.Writer, env func(string) string, opts Options) *UI {
	t.Helper()
	u, err := New(stdout, stderr, env, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u
}

func TestExitCode(t *testing.T) {
	t.Parallel()
	child := exec.Command("sh", "-c", "exit 5").Run()
	if child == nil {
		t.Fatal("exit 5 is no error")
	}
	base := errors.New("base")
	for _, test := range []struct {
		name string
		err  error
		code int
		hint string
	}{
		{"none", nil, 0, ""},
		{"none, with a code", Exit(ExitBusy, nil), 0, ""},
		{"none, with a hint", Hint(nil, "do"), 0, ""},
		{"any", base, ExitFailed, ""},
		{"coded", Exit(ExitBusy, base), ExitBusy, ""},
		{"wrapped", fmt.Errorf("guest 110: %w", Exit(ExitDamaged, base)), ExitDamaged, ""},
		{"the outermost counts", Exit(ExitPartly, Exit(ExitDamaged, base)), ExitPartly, ""},
		{"hint", Hint(Exit(ExitNotFound, base), "look"), ExitNotFound, "look"},
		{"hint within", Exit(ExitNotFound, Hint(base, "look")), ExitNotFound, "look"},
		{"the outermost hint counts", Hint(Hint(base, "in"), "out"), ExitFailed, "out"},
		{"cancelled", fmt.Errorf("copy: %w", context.Canceled), ExitInterrupted, ""},
		{"a time limit is a failure", context.DeadlineExceeded, ExitFailed, ""},
		{"a child's code is its own", fmt.Errorf("qemu-img: %w", child), ExitFailed, ""},
		{"joined", errors.Join(base, Exit(ExitBusy, base)), ExitBusy, ""},
		{"reported", Reported(ExitNotFound), ExitNotFound, ""},
	} {
		if got := ExitCode(test.err); got != test.code {
			t.Errorf("%s: code %d, want %d", test.name, got, test.code)
		}
		if got := HintOf(test.err); got != test.hint {
			t.Errorf("%s: hint %q, want %q", test.name, got, test.hint)
		}
	}
	if err := Hint(Exit(ExitBusy, base), "x"); !errors.Is(err, base) || err.Error() != "base" {
		t.Errorf("wrapping changed the error: %v", err)
	}
	for _, code := range []int{0, 1, 2, 3, 4, 5, 6, 7, 80, 130} {
		if !strings.Contains(ExitCodes(), fmt.Sprintf("%5d  ", code)) {
			t.Errorf("%d is not in the table", code)
		}
	}
}

func TestLogFormats(t *testing.T) {
	t.Parallel()
	say := func(u *UI) int {
		u.Log.Debug("detail")
		u.Log.WithField("guest", "110").Info("begin")
		u.Log.WithField("name", "a b\x1b[31m").Warn("odd\x07 name")
		return u.Finish(Exit(ExitBusy, Hint(errors.New("locked"), "wait")))
	}
	for _, test := range []struct {
		name string
		env  []string
		opts Options
		want string
	}{
		{"plain", []string{"NO_COLOR=1"}, Options{}, "begin  guest=110\n" +
			"warning: odd\uFFFD name  name=\"a b\\x1b[31m\"\nerror: locked\nhint: wait\n"},
		{"verbose", []string{"TERM=dumb"}, Options{Verbose: true}, "debug: detail\nbegin  guest=110\n" +
			"warning: odd\uFFFD name  name=\"a b\\x1b[31m\"\nerror: locked\nhint: wait\n"},
		{"colours", []string{"TERM=xterm"}, Options{}, "begin  guest=110\n" +
			"\x1b[33mwarning:\x1b[0m odd\uFFFD name  name=\"a b\\x1b[31m\"\n\x1b[31merror:\x1b[0m locked\n\x1b[32mhint:\x1b[0m wait\n"},
		{"quiet", []string{"NO_COLOR=1"}, Options{Quiet: true}, "error: locked\nhint: wait\n"},
	} {
		t.Run("terminal, "+test.name, func(t *testing.T) {
			tty, seen := terminal(t)
			if code := say(newUI(t, io.Discard, tty, getenv(test.env...), test.opts)); code != ExitBusy {
				t.Errorf("code %d", code)
			}
			if diff := cmp.Diff(test.want, seen()); diff != "" {
				t.Error(diff)
			}
		})
	}

	t.Run("pipe", func(t *testing.T) {
		var b bytes.Buffer
		say(newUI(t, io.Discard, &b, getenv("TERM=xterm", "JOURNAL_STREAM=1:2"), Options{}))
		lines := strings.Split(strings.TrimSpace(b.String()), "\n")
		if len(lines) != 3 {
			t.Fatalf("%q", lines)
		}
		for i, want := range []string{`level=info msg=begin guest=110`, `level=warning msg="odd\a name" name="a b\x1b[31m"`, `level=error msg=locked hint=wait`} {
			if !strings.HasPrefix(lines[i], `time="20`) || !strings.HasSuffix(lines[i], want) {
				t.Errorf("line %q, want a time and %q", lines[i], want)
			}
		}
	})

	// The journal has the time itself; the variable counts only where it is about this stream.
	t.Run("journal", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "stream")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		say(newUI(t, io.Discard, f, getenv(fmt.Sprintf("JOURNAL_STREAM=%d:%d", st.Dev, st.Ino)), Options{}))
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want := "<6>level=info msg=begin guest=110\n<4>level=warning msg=\"odd\\a name\" name=\"a b\\x1b[31m\"\n<3>level=error msg=locked hint=wait\n"
		if string(text) != want {
			t.Errorf("%q, want %q", text, want)
		}
		// Before there is a UI an error has more than one line.
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if code := ReportError(f, getenv(fmt.Sprintf("JOURNAL_STREAM=%d:%d", st.Dev, st.Ino)), Hint(errors.New("wrong\nin two lines"), "help")); code != ExitFailed {
			t.Errorf("code %d", code)
		}
		if text, err = os.ReadFile(path); err != nil || strings.TrimLeft(string(text), "\x00") != "<3>error: wrong\n<3>in two lines\n<3>hint: help\n" {
			t.Errorf("%q, %v", text, err)
		}
	})

	t.Run("debug in the journal", func(t *testing.T) {
		text, err := journalFormat{plainFormat(false)}.Format(&logrus.Entry{Level: logrus.DebugLevel, Message: "a\nb"})
		if err != nil || string(text) != "<7>level=debug msg=\"a\\nb\"\n" {
			t.Errorf("%q, %v", text, err)
		}
	})

	// What is done is done; but the reason for the exit code is always told.
	t.Run("partly", func(t *testing.T) {
		for quiet, want := range map[bool]string{false: "level=warning msg=odd\n", true: "level=error msg=odd\n"} {
			var b bytes.Buffer
			if code := newUI(t, io.Discard, &b, getenv(), Options{Quiet: quiet}).Finish(Exit(ExitPartly, errors.New("odd"))); code != ExitPartly || !strings.HasSuffix(b.String(), want) {
				t.Errorf("quiet %t: code %d, %q", quiet, code, b.String())
			}
		}
	})
}

func TestLogFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	for range 2 { // appended to
		var b bytes.Buffer
		u := newUI(t, io.Discard, &b, getenv(), Options{Quiet: true, LogFile: path})
		u.Log.Info("begin")
		u.Log.Debug("detail")
		if code := u.Finish(errors.New("failed")); code != ExitFailed {
			t.Errorf("code %d", code)
		}
		if s := b.String(); strings.Contains(s, "begin") || !strings.Contains(s, "failed") {
			t.Errorf("standard error: %q", s)
		}
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(text); strings.Count(s, "msg=begin") != 2 || strings.Count(s, "msg=failed") != 2 || strings.Contains(s, "detail") {
		t.Errorf("log file: %q", s)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := New(io.Discard, io.Discard, getenv(), Options{LogFile: filepath.Join(path, "x")}); err == nil {
		t.Error("a log file that can't be opened is no error")
	}
}

func TestSyslog(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	hook, err := newSyslog("unixgram", path, "qmchain-test")
	if err != nil {
		t.Fatal(err)
	}
	u := newUI(t, io.Discard, io.Discard, getenv(), Options{})
	u.Log.AddHook(hook)
	u.Log.Debug("left out")
	u.Log.WithField("guest", "110").Warn("odd")
	u.Finish(Hint(errors.New("failed"), "wait"))
	for _, want := range [][2]string{ // facility daemon is 3; warning is 4, error 3: RFC 3164
		{"<28>", "level=warning msg=odd guest=110"},
		{"<27>", "level=error msg=failed hint=wait"},
	} {
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1024)
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(b[:n])); !strings.HasPrefix(got, want[0]) || !strings.HasSuffix(got, want[1]) || !strings.Contains(got, "qmchain-test[") {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestReportedIsNotSaidAgain(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	u := newUI(t, io.Discard, &b, getenv(), Options{})
	if code := u.Finish(Reported(ExitNotFound)); code != ExitNotFound || b.Len() > 0 {
		t.Errorf("code %d, %q", code, &b)
	}
	if code := u.Finish(nil); code != ExitOK || b.Len() > 0 {
		t.Errorf("code %d, %q", code, &b)
	}
	if code := ReportError(&b, getenv(), Exit(ExitUsage, Hint(errors.New("no\x1bsuch flag"), "--help"))); code != ExitUsage {
		t.Errorf("code %d", code)
	}
	if got, want := b.String(), "error: no\uFFFDsuch flag\nhint: --help\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestResult(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	u := newUI(t, &b, io.Discard, getenv(), Options{})
	v := []map[string]string{{"note": "a<b & c"}}
	text := func(w io.Writer) error {
		_, err := fmt.Fprint(w, "GUEST\tPOINT\n110\t20261120T101523Z-3f9c\nm\x1b[2J\u00e9\tx\n")
		return err
	}
	if err := errors.Join(u.Result(true, v, text), u.Result(false, v, text), u.Event(v[0])); err != nil {
		t.Fatal(err)
	}
	want := "[\n  {\n    \"note\": \"a<b & c\"\n  }\n]\nGUEST   POINT\n110     20261120T101523Z-3f9c\nm\uFFFD[2J\u00e9  x\n{\"note\":\"a<b & c\"}\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	full := newUI(t, failing{}, io.Discard, getenv(), Options{})
	for _, err := range []error{full.Result(true, v, text), full.Result(false, v, text), full.Event(v)} {
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("full disk: %v", err)
		}
	}
	if err := full.Done(true, v, text); !errors.Is(err, unix.ENOSPC) || ExitCode(err) != ExitPartly {
		t.Errorf("full disk: %v, exit code %d", err, ExitCode(err))
	}
	// Who reads has seen enough.
	left := newUI(t, noReader{}, io.Discard, getenv(), Options{})
	if err := errors.Join(left.Result(true, v, text), left.Result(false, v, text), left.Event(v), left.Done(false, v, text)); err != nil {
		t.Errorf("a pipe that is closed: %v", err)
	}
}

type noReader struct{}

func (noReader) Write([]byte) (int, error) {
	return 0, &os.PathError{Op: "write", Path: "/dev/stdout", Err: unix.EPIPE}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, unix.ENOSPC }

func TestMeter(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	at := time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)
	m := newMeter(100*mib, at)
	if got := m.text(); got != "0 B of 100 MiB" {
		t.Error(got)
	}
	for i := range int64(6) {
		at = at.Add(time.Second)
		m.set(i*10*mib, 100*mib, at)
	}
	if got := m.text(); got != "50 MiB of 100 MiB, 10 MiB/s, 5s left" {
		t.Error(got)
	}
	m.set(60*mib, 0, at)
	if got := m.text(); got != "60 MiB, 10 MiB/s" {
		t.Error(got)
	}
	m.set(100*mib, 100*mib, at.Add(time.Second))
	if got := m.text(); got != "100 MiB of 100 MiB" {
		t.Error(got)
	}
	m.set(50*mib, 100*mib, at.Add(2*time.Second)) // backwards, as no job does
	if got := m.text(); !strings.HasPrefix(got, "50 MiB of 100 MiB") {
		t.Error(got)
	}
}

func TestProgressLines(t *testing.T) {
	t.Parallel()
	b := &syncBuffer{}
	log := logrus.New()
	log.SetOutput(b)
	log.SetFormatter(plainFormat(false))
	p := newLines(log, "copied", 20*time.Millisecond)
	scsi0, scsi1 := p.Bar("scsi0", 1<<30), p.Bar("scsi1", 0)
	scsi0.Set(1<<29, 1<<30)
	scsi1.Set(1<<20, 1<<20)
	for deadline := time.Now().Add(time.Minute); strings.Count(b.String(), "disk=scsi0") < 2 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	p.Done()
	said := b.String()
	if n := strings.Count(said, `msg="copied 512 MiB of 1.0 GiB`); n < 2 {
		t.Errorf("scsi0 %d times:\n%s", n, said)
	}
	if n := strings.Count(said, "disk=scsi1"); n != 1 {
		t.Errorf("scsi1, complete, %d times:\n%s", n, said)
	}
	time.Sleep(50 * time.Millisecond)
	if b.String() != said {
		t.Error("goes on after Done")
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// Bars and log lines share the terminal, and no line is lost; also where a disk did not come to its end.
func TestProgressBars(t *testing.T) {
	t.Parallel()
	tty, seen := terminal(t)
	u := newUI(t, io.Discard, tty, getenv("NO_COLOR=1"), Options{})
	p := u.NewProgress("copied")
	scsi0, scsi1 := p.Bar("scsi0", 1<<30), p.Bar("efidisk0", 0)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range int64(21) {
			scsi0.Set(i<<30/20, 1<<30)
			time.Sleep(20 * time.Millisecond)
		}
	})
	for i := range 10 {
		u.Log.Infof("line %d", i)
		scsi1.Set(int64(i)<<10, 1<<20)
		time.Sleep(30 * time.Millisecond)
	}
	wg.Wait()
	scsi1.Note("fleece 2.0 MiB")
	scsi1.Set(9<<10, 1<<20)
	p.Done()
	u.Log.Info("after")
	got := seen()
	for i := range 10 {
		if strings.Count(got, fmt.Sprintf("line %d\n", i)) != 1 {
			t.Errorf("line %d is lost or doubled:\n%q", i, got)
		}
	}
	if !strings.HasSuffix(got, "after\n") {
		t.Errorf("the log does not go on after the bars: %q", got)
	}
	for _, want := range []string{"scsi0", "efidisk0", "100 %", "1.0 GiB of 1.0 GiB", "9.0 KiB of 1.0 MiB", "fleece 2.0 MiB"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
}

func TestNoProgress(t *testing.T) {
	t.Parallel()
	tty, seen := terminal(t)
	u := newUI(t, io.Discard, tty, getenv(), Options{Quiet: true})
	p := u.NewProgress("copied")
	p.Bar("scsi0", 10).Set(10, 10)
	p.Done()
	if got := seen(); got != "" {
		t.Errorf("%q", got)
	}
}
