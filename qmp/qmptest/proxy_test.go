package qmptest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

const (
	patience  = time.Minute
	clientEnv = "QMPTEST_CLIENT"
)

// TestMain also is the client process that a test kills.
func TestMain(m *testing.M) {
	if addr := os.Getenv(clientEnv); addr != "" {
		if err := client(addr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// client adds two objects.
func client(addr string) error {
	ctx := context.Background()
	c, err := qmp.Dial(ctx, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	return errors.Join(c.ObjectAddThrottleGroup(ctx, "first"), c.ObjectAddThrottleGroup(ctx, "second"))
}

func dial(t *testing.T, addr string) *qmp.Client {
	t.Helper()
	c, err := qmp.Dial(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func wantObjects(t *testing.T, c *qmp.Client, want ...string) {
	t.Helper()
	got, err := c.Objects(t.Context())
	if err != nil || strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("objects %v, want %v, %v", got, want, err)
	}
}

func wantDisconnected(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, qmp.ErrDisconnected) {
		t.Errorf("%s: got %v, want a lost connection", what, err)
	}
}

// within waits for the channel to be closed.
func within(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s hangs", what)
	}
}

// calls records what a Proxy's hooks are called with.
type calls struct {
	mu   sync.Mutex
	list []string
}

func (c *calls) add(format string, a ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = append(c.list, fmt.Sprintf(format, a...))
}

func (c *calls) want(t *testing.T, want ...string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if strings.Join(c.list, "\n") != strings.Join(want, "\n") {
		t.Errorf("calls:\n%s\nwant:\n%s", strings.Join(c.list, "\n"), strings.Join(want, "\n"))
	}
}

// recording makes hooks that record, and then do what is given.
func recording(c *calls, before func(n int, cmds []qmptest.CommandSeen) qmptest.Verdict) qmptest.Hooks {
	return qmptest.Hooks{
		Before: func(n int, cmds []qmptest.CommandSeen) qmptest.Verdict {
			var names []string
			for _, cmd := range cmds {
				names = append(names, cmd.Name)
			}
			c.add("before %d %s", n, strings.Join(names, " "))
			if before == nil {
				return qmptest.Verdict{}
			}
			return before(n, cmds)
		},
		After: func(n int, cmd qmptest.CommandSeen, reply json.RawMessage) {
			kind := "ok"
			var r struct{ Error json.RawMessage }
			if err := json.Unmarshal(reply, &r); err != nil || r.Error != nil {
				kind = "error"
			}
			c.add("after %d %s %s", n, cmd.Name, kind)
		},
	}
}

func pair() []qmp.Command {
	return []qmp.Command{{Name: "query-status"}, {Name: "object-del", Args: map[string]string{"id": "none"}}}
}

func TestProxyForwards(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	for _, split := range []bool{false, true} {
		var seen calls
		hooks := recording(&seen, nil)
		hooks.Split = split
		p := qmptest.NewProxy(t, q.Sockets[0], hooks)
		for range 2 { // one connection after the other; the count goes on
			c := dial(t, p.Addr())
			replies, err := c.Batch(t.Context(), pair()...)
			if e := new(qmp.Error); err != nil || replies[0].Err != nil || !errors.As(replies[1].Err, &e) {
				t.Errorf("%+v, %v", replies, err)
			}
			_ = c.Close()
		}
		if split {
			seen.want(t,
				"before 1 qmp_capabilities", "after 1 qmp_capabilities ok",
				"before 2 query-status", "after 2 query-status ok",
				"before 3 object-del", "after 3 object-del error",
				"before 4 qmp_capabilities", "after 4 qmp_capabilities ok",
				"before 5 query-status", "after 5 query-status ok",
				"before 6 object-del", "after 6 object-del error")
		} else {
			seen.want(t,
				"before 1 qmp_capabilities", "after 1 qmp_capabilities ok",
				"before 2 query-status object-del", "after 2 query-status ok", "after 3 object-del error",
				"before 4 qmp_capabilities", "after 4 qmp_capabilities ok",
				"before 5 query-status object-del", "after 5 query-status ok", "after 6 object-del error")
		}
		if p.Commands() != 6 {
			t.Errorf("%d commands", p.Commands())
		}
	}
}

// What one write held must reach QEMU in one write.
func TestProxyKeepsPairs(t *testing.T) {
	t.Parallel()
	var seen calls
	dir := t.TempDir()
	listener, err := net.Listen("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	p := qmptest.NewProxy(t, dir+"/s", recording(&seen, nil))
	client, err := net.Dial("unix", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	qemu, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()

	buf := make([]byte, 4<<20)
	long := `{"execute":"` + strings.Repeat("x", 1<<20) + "\"}\n" // more than a socket buffers
	for _, write := range []string{
		"{\"execute\":\"a\"}\n{\"execute\":\"b\"}\r\n",
		"{\"execute\":\"c\"}\n",
		"not JSON\n",
		long + long,
	} {
		if _, err := client.Write([]byte(write)); err != nil {
			t.Fatal(err)
		}
		n, err := qemu.Read(buf)
		if len(write) > len(long) { // the one that can't be read at once
			var rest int
			rest, err = io.ReadFull(qemu, buf[n:len(write)])
			n += rest
		}
		if err != nil || string(buf[:n]) != write {
			t.Errorf("read %.100q, %v", buf[:n], err)
		}
		answers := strings.Repeat("{\"return\": {}}\r\n", strings.Count(write, "\n"))
		if _, err := qemu.Write([]byte(answers)); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < len(answers); {
			n, err := client.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			got += n
		}
	}

	var groups []int
	for _, call := range seen.list {
		if fields := strings.Fields(call); fields[0] == "before" {
			groups = append(groups, len(fields)-2)
		}
	}
	if fmt.Sprint(groups) != "[2 1 0 2]" { // what is not JSON has no name
		t.Errorf("groups of %v commands", groups)
	}
}

func TestProxyLongReply(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	var seen calls
	p := qmptest.NewProxy(t, q.Sockets[0], recording(&seen, nil))
	c := dial(t, p.Addr())
	var schema []json.RawMessage
	if err := c.Execute(t.Context(), "query-qmp-schema", nil, &schema); err != nil || len(schema) < 500 {
		t.Errorf("%d entries, %v", len(schema), err)
	}
	seen.want(t,
		"before 1 qmp_capabilities", "after 1 qmp_capabilities ok",
		"before 2 query-qmp-schema", "after 2 query-qmp-schema ok")
}

func TestProxyVerdicts(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	direct := dial(t, q.Sockets[1])
	var p *qmptest.Proxy
	act := func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
		switch string(cmds[0].Args) {
		case `{"qom-type":"throttle-group","id":"fail"}`:
			return qmptest.Verdict{Fail: &qmp.Error{Class: "DeviceNotFound", Desc: "injected"}}
		case `{"qom-type":"throttle-group","id":"drop"}`:
			return qmptest.Verdict{Drop: true}
		case `{"qom-type":"throttle-group","id":"Drop()"}`:
			p.Drop()
		}
		return qmptest.Verdict{}
	}
	var seen calls
	p = qmptest.NewProxy(t, q.Sockets[0], recording(&seen, act))

	c := dial(t, p.Addr())
	err := c.ObjectAddThrottleGroup(t.Context(), "fail")
	if e := new(qmp.Error); !errors.As(err, &e) || *e != (qmp.Error{Command: "object-add", Class: "DeviceNotFound", Desc: "injected"}) {
		t.Errorf("got %v", err)
	}
	if err := c.ObjectAddThrottleGroup(t.Context(), "good"); err != nil {
		t.Errorf("after a failure: %v", err)
	}
	wantDisconnected(t, "drop", c.ObjectAddThrottleGroup(t.Context(), "drop"))
	c = dial(t, p.Addr())
	wantDisconnected(t, "Drop()", c.ObjectAddThrottleGroup(t.Context(), "Drop()"))
	dial(t, p.Addr())
	wantObjects(t, direct, "good")
	seen.want(t,
		"before 1 qmp_capabilities", "after 1 qmp_capabilities ok", "before 2 object-add",
		"before 3 object-add", "after 3 object-add ok", "before 4 object-add",
		"before 5 qmp_capabilities", "after 5 qmp_capabilities ok", "before 6 object-add",
		"before 7 qmp_capabilities", "after 7 qmp_capabilities ok")
}

// Dropped in After: QEMU has executed the command, and the client does not know.
func TestProxyDropAfter(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	direct := dial(t, q.Sockets[1])
	var p *qmptest.Proxy
	p = qmptest.NewProxy(t, q.Sockets[0], qmptest.Hooks{
		After: func(_ int, cmd qmptest.CommandSeen, _ json.RawMessage) {
			if cmd.Name != "object-add" {
				return
			}
			wantObjects(t, direct, "x")
			p.Drop()
		},
	})
	c := dial(t, p.Addr())
	wantDisconnected(t, "object-add", c.ObjectAddThrottleGroup(t.Context(), "x"))
	wantObjects(t, direct, "x")
}

// A client that is killed at a command: QEMU must not see this command, and is free for the next client.
func TestProxyKillsClient(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	direct := dial(t, q.Sockets[1])
	var process *exec.Cmd
	started := make(chan struct{})
	p := qmptest.NewProxy(t, q.Sockets[0], qmptest.Hooks{
		Before: func(n int, _ []qmptest.CommandSeen) qmptest.Verdict {
			if n != 3 { // 1 is qmp_capabilities
				return qmptest.Verdict{}
			}
			<-started
			if err := process.Process.Signal(syscall.SIGKILL); err != nil {
				t.Error(err)
			}
			return qmptest.Verdict{Drop: true}
		},
	})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	process = exec.Command(exe)
	process.Env = append(os.Environ(), clientEnv+"="+p.Addr())
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	close(started)
	err = process.Wait()
	if status, ok := process.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		t.Errorf("the client ended with %v", err)
	}
	wantObjects(t, direct, "first")

	// The whole of it once more, through the same proxy.
	process = exec.Command(exe)
	process.Env = append(os.Environ(), clientEnv+"="+p.Addr())
	out, err := process.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "attempt to add duplicate property") {
		t.Errorf("the second client: %v: %s", err, out)
	}
	wantObjects(t, direct, "first", "second")
}

// Events must come through while a hook blocks.
func TestProxyEventsDuringHook(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	direct := dial(t, q.Sockets[1])
	entered, leave := make(chan struct{}), make(chan struct{})
	p := qmptest.NewProxy(t, q.Sockets[0], qmptest.Hooks{
		Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
			if cmds[0].Name == "query-status" {
				close(entered)
				<-leave
			}
			return qmptest.Verdict{}
		},
	})
	c := dial(t, p.Addr())
	sub := c.Subscribe()
	result := make(chan error, 1)
	go func() {
		_, err := c.QueryStatus(t.Context())
		result <- err
	}()
	within(t, "the hook", entered)

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, node := range []string{"s", "t"} {
		if err := direct.BlockdevAdd(ctx, map[string]any{"driver": "null-co", "node-name": node, "size": 1 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	if err := direct.Transaction(ctx, qmp.BlockdevBackup(qmp.BackupOptions{JobID: "j", Device: "s", Target: "t", Sync: "full", AutoFinalize: true})); err != nil {
		t.Fatal(err)
	}
	if e, err := sub.Next(ctx); err != nil || e.Name != "JOB_STATUS_CHANGE" {
		t.Errorf("event %+v, %v", e, err)
	}
	select {
	case err := <-result:
		t.Errorf("the command did not wait for the hook: %v", err)
	default:
	}
	close(leave)
	if err := <-result; err != nil {
		t.Error(err)
	}
	if err := direct.WaitJob(ctx, "j", nil); err != nil {
		t.Error(err)
	}
}

// When the client goes away, QEMU's side is closed at once, a hook that runs or not; and vice versa.
func TestProxyEnds(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	entered, leave := make(chan struct{}), make(chan struct{})
	first := true
	p := qmptest.NewProxy(t, q.Sockets[0], qmptest.Hooks{
		Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
			if first && cmds[0].Name == "object-add" {
				first = false
				close(entered)
				<-leave
			}
			return qmptest.Verdict{}
		},
	})
	c := dial(t, p.Addr())
	result := make(chan error, 1)
	go func() { result <- c.ObjectAddThrottleGroup(t.Context(), "x") }()
	within(t, "the hook", entered)
	_ = c.Close()
	wantDisconnected(t, "the closed client", <-result)

	// QEMU's socket is free although the hook has not returned.
	other, err := qmp.Dial(t.Context(), q.Sockets[0])
	if err != nil {
		t.Fatal(err)
	}
	close(leave)
	wantObjects(t, other) // the command of the client that left was not forwarded
	_ = other.Close()

	c = dial(t, p.Addr())
	q.Kill()
	within(t, "the client of a QEMU that is gone", c.Done())
	if _, err := qmp.Dial(t.Context(), p.Addr()); !errors.Is(err, qmp.ErrDisconnected) {
		t.Errorf("Dial through the proxy of a QEMU that is gone: %v", err)
	}
}
