package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// testCalls names the variable with which this test's program is systemd-run; it is the file of calls.
const testCalls = "QMCHAIN_HOOK_TEST_CALLS"

// systemdRun does what systemd-run is asked for, as far as hooks ask: it starts a command in a session of its own, and waits for its
// end, or until it says that it is ready.
func systemdRun(calls string, args []string) (code int) {
	end := slices.Index(args, "--")
	options, command := args[:end], args[end+1:]
	value := func(name string) string {
		for _, o := range options {
			if v, found := strings.CutPrefix(o, name+"="); found {
				return v
			}
		}
		return ""
	}
	record(calls, "systemd-run "+value("--unit")+" "+strings.Join(command[1:], " "))
	limit, err := time.ParseDuration(value("--property=RuntimeMaxSec") + "s")
	if err != nil {
		return failed(err)
	}
	dir, err := os.MkdirTemp("", "unit")
	if err != nil {
		return failed(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		return failed(err)
	}
	defer func() { _ = ready.Close() }()
	journal, err := os.OpenFile(calls+".journal", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return failed(err)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "NOTIFY_SOCKET=" + filepath.Join(dir, "notify")}
	cmd.Stdout, cmd.Stderr = journal, journal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return failed(err)
	}
	ended, said := make(chan error, 1), make(chan struct{})
	go func() { ended <- cmd.Wait() }()
	if value("--service-type") == "notify" {
		go func() {
			text := make([]byte, 100)
			if n, err := ready.Read(text); err == nil && strings.HasPrefix(string(text[:n]), "READY=1") {
				close(said)
			}
		}()
	}
	select {
	case err = <-ended:
		if err == nil && value("--service-type") == "notify" {
			err = errors.New("it has ended without being ready")
		}
	case <-said:
		return 0
	case <-time.After(limit):
		_ = cmd.Process.Signal(syscall.SIGTERM)
		err = <-ended
	}
	if err != nil && cmd.ProcessState.ExitCode() != 4 {
		return failed(err)
	}
	return 0
}

func failed(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// record adds a line to the file of calls.
func record(calls, line string) {
	f, err := os.OpenFile(calls, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = fmt.Fprintln(f, line)
	}
	if err != nil {
		panic(err)
	}
	_ = f.Close()
}
