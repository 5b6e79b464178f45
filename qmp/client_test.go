package qmp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"
	"github.com/sirupsen/logrus"

	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

// patience bounds what must not hang, on a slow machine, too.
const patience = time.Minute

func dial(t *testing.T, addr string, opts ...qmp.Option) *qmp.Client {
	t.Helper()
	c, err := qmp.Dial(t.Context(), addr, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// within fails the test when f takes longer than patience.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s hangs", what)
	}
}

func wantErrorIs(t *testing.T, what string, err error, targets ...error) {
	t.Helper()
	for _, target := range targets {
		if !errors.Is(err, target) {
			t.Errorf("%s: got %v, want it to wrap %q", what, err, target)
		}
	}
}

func TestHandshake(t *testing.T) {
	t.Parallel()
	for name, newFake := range map[string]func(testing.TB) *qmptest.Fake{"unix": qmptest.NewFake, "tcp": qmptest.NewFakeTCP} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.HandleValue("query-name", map[string]string{"name": "web"})
			c := dial(t, f.Addr())
			if got, want := c.Version(), (qmp.Version{Major: 7, Minor: 2, Micro: 22, Package: "fake"}); got != want {
				t.Errorf("version %+v, want %+v", got, want)
			}
			if name, err := c.QueryName(t.Context()); err != nil || name != "web" {
				t.Errorf("name %q, %v", name, err)
			}
			if err := c.Connect(); err == nil {
				t.Error("a second Connect succeeded")
			}
			if _, err := c.QueryName(t.Context()); err != nil {
				t.Errorf("after a second Connect: %v", err)
			}
		})
	}
}

// A QEMU that has just been started may greet twice, and begins the negotiation anew with the second one.
func TestTwoGreetings(t *testing.T) {
	t.Parallel()
	t.Run("before the negotiation", func(t *testing.T) {
		t.Parallel()
		f := qmptest.NewFake(t)
		f.SetGreeting(qmptest.Greeting + "\r\n" + qmptest.Greeting + "\r\n")
		f.HandleValue("x", nil)
		c := dial(t, f.Addr())
		if err := c.Execute(t.Context(), "x", nil, nil); err != nil {
			t.Error(err)
		}
	})

	t.Run("within the negotiation", func(t *testing.T) {
		t.Parallel()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		served := make(chan []string, 1)
		go func() {
			var commands []string
			defer func() { served <- commands }()
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			fmt.Fprintln(conn, qmptest.Greeting)
			dec := json.NewDecoder(conn)
			for {
				var cmd struct{ Execute, ID string }
				if dec.Decode(&cmd) != nil {
					return
				}
				commands = append(commands, cmd.Execute)
				if len(commands) == 1 {
					fmt.Fprintln(conn, qmptest.Greeting)
				}
				fmt.Fprintf(conn, "{\"return\": {}, \"id\": %q}\r\n", cmd.ID)
			}
		}()
		c := dial(t, "tcp:"+listener.Addr().String())
		if err := c.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		_ = c.Close()
		if got := <-served; fmt.Sprint(got) != "[qmp_capabilities qmp_capabilities stop]" {
			t.Errorf("commands %v", got)
		}
	})
}

func TestHandshakeFails(t *testing.T) {
	t.Parallel()
	const short = 2 * time.Second // long enough for what does come to be read, on a busy machine
	tests := []struct {
		name, greeting string
		fault          qmptest.Fault
		want           error
		timeout        bool // nothing else ends it
	}{
		{name: "silence", want: qmp.ErrBusy, timeout: true},
		{name: "ssh", greeting: "SSH-2.0-OpenSSH_9.2p1\r\n", want: qmp.ErrNotQMP},
		{name: "vnc", greeting: "RFB 003.008\n", want: qmp.ErrNotQMP},
		{name: "smtp", greeting: "220 mail ESMTP\r\n", want: qmp.ErrNotQMP},
		{name: "human monitor", greeting: "QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ", want: qmp.ErrNotQMP},
		{name: "zeroes", greeting: "\x00\x00\x00\x00", want: qmp.ErrNotQMP},
		{name: "other JSON", greeting: `{"hello": 1}`, want: qmp.ErrNotQMP},
		{name: "a reply", greeting: `{"return": {}}`, want: qmp.ErrNotQMP},
		{name: "an event", greeting: `{"event": "STOP"}`, want: qmp.ErrNotQMP},
		{name: "no object", greeting: `[]`, want: qmp.ErrNotQMP},
		{name: "another QMP", greeting: `{"QMP": "yes"}`, want: qmp.ErrNotQMP},
		{name: "half a greeting", greeting: `{"QMP": {"version"`, want: qmp.ErrNotQMP, timeout: true},
		{name: "a number without end", greeting: "1234", want: qmp.ErrNotQMP, timeout: true},
		{name: "three greetings", greeting: strings.Repeat(qmptest.Greeting, 3), want: qmp.ErrNotQMP},
		{name: "refusal", greeting: qmptest.Greeting, fault: qmptest.Fault{Fail: &qmp.Error{Class: "GenericError", Desc: "no"}}, want: new(qmp.Error)},
		{name: "hang", greeting: qmptest.Greeting, fault: qmptest.Fault{Hang: true}, want: context.DeadlineExceeded, timeout: true},
		{name: "stall", greeting: qmptest.Greeting, fault: qmptest.Fault{Stall: true}, want: context.DeadlineExceeded, timeout: true},
		{name: "cut", greeting: qmptest.Greeting, fault: qmptest.Fault{Cut: qmptest.CutBeforeReply}, want: qmp.ErrDisconnected},
		{name: "half a reply", greeting: qmptest.Greeting, fault: qmptest.Fault{Cut: qmptest.CutWithinReply}, want: qmp.ErrDisconnected},
		{name: "garbage for a reply", greeting: qmptest.Greeting, fault: qmptest.Fault{Raw: "}"}, want: qmp.ErrNotQMP},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := qmptest.NewFake(t)
			f.SetGreeting(tt.greeting)
			tt.fault.Command = "qmp_capabilities"
			f.Inject(tt.fault)
			limit := patience
			if tt.timeout {
				limit = short
			}
			within(t, "Dial", func() {
				_, err := qmp.Dial(t.Context(), f.Addr(), qmp.WithHandshakeTimeout(limit))
				if refusal := new(qmp.Error); tt.name == "refusal" {
					if !errors.As(err, &refusal) || refusal.Desc != "no" {
						t.Errorf("got %v", err)
					}
					return
				}
				wantErrorIs(t, "Dial", err, tt.want)
			})
		})
	}

	t.Run("closed before the greeting", func(t *testing.T) {
		t.Parallel()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		accepted := make(chan struct{})
		go func() {
			defer close(accepted)
			if conn, err := listener.Accept(); err == nil {
				_ = conn.Close()
			}
		}()
		_, err = qmp.Dial(t.Context(), "tcp:"+listener.Addr().String())
		wantErrorIs(t, "Dial", err, qmp.ErrDisconnected)
		<-accepted
	})

	t.Run("nobody there", func(t *testing.T) {
		t.Parallel()
		_, err := qmp.Dial(t.Context(), filepath.Join(t.TempDir(), "none"))
		wantErrorIs(t, "Dial", err, os.ErrNotExist)
	})

	t.Run("the caller gives up", func(t *testing.T) {
		t.Parallel()
		f := qmptest.NewFake(t)
		f.SetGreeting("")
		ctx, cancel := context.WithTimeout(t.Context(), short)
		defer cancel()
		_, err := qmp.Dial(ctx, f.Addr())
		wantErrorIs(t, "at the caller's deadline", err, qmp.ErrBusy, context.DeadlineExceeded)

		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(short, cancel)
		_, err = qmp.Dial(ctx, f.Addr())
		wantErrorIs(t, "cancelled", err, context.Canceled)
		if errors.Is(err, qmp.ErrBusy) {
			t.Errorf("cancelled: %v", err)
		}
	})

	t.Run("closed from elsewhere", func(t *testing.T) {
		t.Parallel()
		f := qmptest.NewFake(t)
		f.SetGreeting("")
		c, err := qmp.New(f.Addr())
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(short, func() { c.Close() })
		within(t, "Connect", func() { wantErrorIs(t, "Connect", c.Connect(), qmp.ErrDisconnected) })
	})
}

// A unix socket whose queue of waiting clients is full refuses with EAGAIN: that is "busy", not a failure
// of its own, and passes when the queue moves.
func TestFullQueueIsBusy(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	waiting, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	if _, err := net.Dial("unix", path); !errors.Is(err, syscall.EAGAIN) {
		t.Fatalf("the queue is not full: %v", err)
	}

	_, err = qmp.Dial(t.Context(), path, qmp.WithHandshakeTimeout(500*time.Millisecond))
	wantErrorIs(t, "Dial", err, qmp.ErrBusy)

	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		time.Sleep(100 * time.Millisecond)
		for range 2 {
			conn, _, err := syscall.Accept(fd)
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = syscall.Write(conn, []byte(qmptest.Greeting)) // the first one does not read it
			syscall.Close(conn)
		}
	}()
	_, err = qmp.Dial(t.Context(), path)
	wantErrorIs(t, "after the queue moved", err, qmp.ErrDisconnected)
	if err != nil && !strings.Contains(err.Error(), "qmp_capabilities") {
		t.Errorf("no greeting after the queue moved: %v", err)
	}
	<-accepted
}

func TestNotConnected(t *testing.T) {
	t.Parallel()
	c, err := qmp.New("/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	wantErrorIs(t, "before Connect", c.Stop(t.Context()), qmp.ErrDisconnected)
	_, err = c.Events(t.Context())
	wantErrorIs(t, "Events before Connect", err, qmp.ErrDisconnected)
	sub := c.Subscribe()
	_ = c.Close()
	_ = c.Close()
	wantErrorIs(t, "after Close", c.Stop(t.Context()), qmp.ErrDisconnected)
	_, err = sub.Next(t.Context())
	wantErrorIs(t, "Next after Close", err, qmp.ErrDisconnected)
}

func TestExecute(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.Handle("echo", func(args json.RawMessage) (any, error) { return args, nil })
	f.Handle("fail", func(json.RawMessage) (any, error) {
		return nil, &qmp.Error{Class: "DeviceNotFound", Desc: "Device 'd' not found"}
	})
	c := dial(t, f.Addr())
	ctx := t.Context()

	args := map[string]string{"a": "<\u00e4>&\n"}
	var got map[string]string
	if err := c.Execute(ctx, "echo", args, &got); err != nil || got["a"] != args["a"] {
		t.Errorf("got %v, %v", got, err)
	}

	err := c.Execute(ctx, "fail", nil, nil)
	e := new(qmp.Error)
	if !errors.As(err, &e) || *e != (qmp.Error{Command: "fail", Class: "DeviceNotFound", Desc: "Device 'd' not found"}) {
		t.Errorf("got %#v", err)
	}
	if got, want := err.Error(), "fail: Device 'd' not found (DeviceNotFound)"; got != want {
		t.Errorf("text %q, want %q", got, want)
	}

	var number int
	if err := c.Execute(ctx, "echo", args, &number); err == nil || errors.Is(err, qmp.ErrDisconnected) {
		t.Errorf("an answer of another type: %v", err)
	}
	if err := c.Execute(ctx, "echo", func() {}, nil); err == nil {
		t.Error("arguments that can't be encoded were accepted")
	}

	cancelled, cancel := context.WithCancelCause(ctx)
	reason := errors.New("changed my mind")
	cancel(reason)
	before := len(f.Commands())
	wantErrorIs(t, "cancelled before", c.Execute(cancelled, "echo", nil, nil), context.Canceled, reason)
	if len(f.Commands()) != before {
		t.Error("a command was sent although its context had ended")
	}
	if err := c.Execute(ctx, "echo", nil, nil); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func TestReplySizes(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	big := strings.Repeat("0123456789abcdef", 1<<17) // 2 MiB
	f.HandleValue("big", big)
	f.HandleValue("small", "x")
	f.Inject(qmptest.Fault{Command: "small", Pieces: 1})
	c := dial(t, f.Addr())

	var got string
	if err := c.Execute(t.Context(), "big", nil, &got); err != nil || got != big {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := c.Execute(t.Context(), "small", nil, &got); err != nil || got != "x" {
		t.Errorf("got %.10q, %v", got, err)
	}
}

func TestConcurrentCommands(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.Handle("echo", func(args json.RawMessage) (any, error) { return args, nil })
	c := dial(t, f.Addr())
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			for j := range 20 {
				want := [2]int{i, j}
				var got [2]int
				if err := c.Execute(t.Context(), "echo", want, &got); err != nil || got != want {
					t.Errorf("got %v, want %v, %v", got, want, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestTimeout(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.Handle("number", func(args json.RawMessage) (any, error) { return args, nil })
	f.Inject(qmptest.Fault{Command: "number", Nth: 1, Delay: 800 * time.Millisecond})
	f.Inject(qmptest.Fault{Command: "number", Nth: 3, Hang: true})
	c := dial(t, f.Addr(), qmp.WithCommandTimeout(patience/2))

	short, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	wantErrorIs(t, "late", c.Execute(short, "number", 1, nil), context.DeadlineExceeded)
	// The late reply to 1 comes first, and must not be taken for this one's.
	var got int
	if err := c.Execute(t.Context(), "number", 2, &got); err != nil || got != 2 {
		t.Errorf("got %d, %v", got, err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(400*time.Millisecond, cancel)
	wantErrorIs(t, "cancelled", c.Execute(ctx, "number", 3, nil), context.Canceled)
	if err := c.Execute(t.Context(), "number", 4, &got); err != nil || got != 4 {
		t.Errorf("got %d, %v", got, err)
	}
}

func TestDefaultTimeout(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.HandleValue("x", nil)
	f.Inject(qmptest.Fault{Command: "x", Nth: 1, Hang: true})
	c := dial(t, f.Addr(), qmp.WithCommandTimeout(50*time.Millisecond))
	within(t, "a command without a deadline", func() {
		err := c.Execute(context.Background(), "x", nil, nil)
		wantErrorIs(t, "hang", err, context.DeadlineExceeded)
		if err != nil && !strings.Contains(err.Error(), "x: no answer within 50ms") {
			t.Errorf("text: %v", err)
		}
	})
}

// Cancelling a command, at whatever moment, must leave the connection in order: the undo needs it.
func TestCancelKeepsConnection(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.Handle("echo", func(args json.RawMessage) (any, error) { return args, nil })
	c := dial(t, f.Addr())
	for i := range 500 {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.Sleep(time.Duration(i%50) * 4 * time.Microsecond)
			cancel()
		}()
		if err := c.Execute(ctx, "echo", i, nil); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatalf("command %d: %v", i, err)
		}
		cancel()
	}
	var got int
	if err := c.Execute(t.Context(), "echo", 42, &got); err != nil || got != 42 {
		t.Errorf("got %d, %v", got, err)
	}
}

func TestForeignReplies(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.HandleValue("x", "right")
	for i, raw := range []string{
		`{"return": "wrong", "id": "libvirt-1"}`, `{"return": "wrong"}`, `{"return": "wrong", "id": 1}`,
		`{"return": "wrong", "id": null}`, `{"error": {"class": "GenericError", "desc": "JSON parse error"}}`,
	} {
		f.Inject(qmptest.Fault{Command: "foreign", Nth: i + 1, Raw: raw + "\r\n"})
	}
	c := dial(t, f.Addr())
	for range 5 {
		short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		wantErrorIs(t, "foreign", c.Execute(short, "foreign", nil, nil), context.DeadlineExceeded)
		cancel()
		var got string
		if err := c.Execute(t.Context(), "x", nil, &got); err != nil || got != "right" {
			t.Errorf("got %q, %v", got, err)
		}
	}
}

func TestDisconnect(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		fault qmptest.Fault
		also  error // wrapped besides ErrDisconnected
	}{
		"before handling": {fault: qmptest.Fault{Cut: qmptest.CutBeforeHandling}},
		"before reply":    {fault: qmptest.Fault{Cut: qmptest.CutBeforeReply}},
		"within reply":    {fault: qmptest.Fault{Cut: qmptest.CutWithinReply}},
		"garbage":         {fault: qmptest.Fault{Raw: "<html>\r\n"}, also: qmp.ErrNotQMP},
		"half, garbage":   {fault: qmptest.Fault{Raw: "{\"return\": {\r\n{\"event\""}, also: qmp.ErrNotQMP},
		"no object":       {fault: qmptest.Fault{Raw: "[1]\r\n"}, also: qmp.ErrNotQMP},
		"no message":      {fault: qmptest.Fault{Raw: "{}\r\n"}, also: qmp.ErrNotQMP},
		"greeting":        {fault: qmptest.Fault{Raw: qmptest.Greeting}, also: qmp.ErrNotQMP},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := qmptest.NewFake(t)
			f.HandleValue("bad", nil)
			f.Inject(qmptest.Fault{Command: "hang", Hang: true})
			tt.fault.Command = "bad"
			tt.fault.Before = []qmptest.Event{{Name: "LAST"}}
			f.Inject(tt.fault)
			c := dial(t, f.Addr())
			sub := c.Subscribe()
			if tt.also == nil {
				tt.also = qmp.ErrDisconnected
			}

			within(t, "a waiter", func() {
				var wg sync.WaitGroup
				for range 5 {
					wg.Go(func() {
						wantErrorIs(t, "another waiter", c.Execute(t.Context(), "hang", nil, nil), qmp.ErrDisconnected, tt.also)
					})
				}
				for len(f.Commands()) < 5 {
					time.Sleep(time.Millisecond)
				}
				wantErrorIs(t, "the command", c.Execute(t.Context(), "bad", nil, nil), qmp.ErrDisconnected, tt.also)
				wg.Wait()
				<-c.Done()
				// What came before the end is not lost by it.
				if e, err := sub.Next(t.Context()); err != nil || e.Name != "LAST" {
					t.Errorf("last event: %+v, %v", e, err)
				}
				_, err := sub.Next(t.Context())
				wantErrorIs(t, "Next", err, qmp.ErrDisconnected, tt.also)
				wantErrorIs(t, "a later command", c.Execute(t.Context(), "bad", nil, nil), qmp.ErrDisconnected, tt.also)
			})
		})
	}

	t.Run("after reply", func(t *testing.T) {
		t.Parallel()
		f := qmptest.NewFake(t)
		f.HandleValue("x", "y")
		f.Inject(qmptest.Fault{Command: "x", Cut: qmptest.CutAfterReply})
		c := dial(t, f.Addr())
		var got string
		if err := c.Execute(t.Context(), "x", nil, &got); err != nil || got != "y" {
			t.Errorf("got %q, %v", got, err)
		}
		within(t, "the end", func() { <-c.Done() })
		wantErrorIs(t, "a later command", c.Execute(t.Context(), "x", nil, nil), qmp.ErrDisconnected)
	})
}

func TestClose(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.Inject(qmptest.Fault{Command: "hang", Hang: true})
	c := dial(t, f.Addr())
	events, err := c.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.Emit("UNREAD", nil)
	sub := c.Subscribe()
	within(t, "Close", func() {
		var wg sync.WaitGroup
		wg.Go(func() {
			wantErrorIs(t, "waiter", c.Execute(t.Context(), "hang", nil, nil), qmp.ErrDisconnected)
		})
		wg.Go(func() {
			_, err := sub.Next(t.Context())
			for err == nil { // UNREAD, if it came late
				_, err = sub.Next(t.Context())
			}
			wantErrorIs(t, "Next", err, qmp.ErrDisconnected)
		})
		for len(f.Commands()) < 1 {
			time.Sleep(time.Millisecond)
		}
		for range 3 {
			wg.Go(func() {
				if err := c.Disconnect(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for range events {
		}
	})
}

// When QEMU does not read, a command must not wait for ever to be written, nor those behind it.
func TestPeerDoesNotRead(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.Inject(qmptest.Fault{Command: "stall", Stall: true})
	c := dial(t, f.Addr())
	stalled, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	wantErrorIs(t, "stall", c.Execute(stalled, "stall", nil, nil), context.DeadlineExceeded)

	long := strings.Repeat("x", 1<<20) // more than a socket buffers
	within(t, "a write", func() {
		var wg sync.WaitGroup
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		wg.Go(func() {
			err := c.Execute(ctx, "long", long, nil)
			wantErrorIs(t, "long command", err, qmp.ErrDisconnected, context.DeadlineExceeded)
		})
		wg.Go(func() {
			time.Sleep(200 * time.Millisecond)
			short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			defer cancel()
			err := c.Execute(short, "behind it", nil, nil)
			wantErrorIs(t, "impatient command behind it", err, context.DeadlineExceeded)
			if errors.Is(err, qmp.ErrDisconnected) {
				t.Errorf("impatient command behind it ended the connection: %v", err)
			}
		})
		wg.Go(func() {
			time.Sleep(200 * time.Millisecond)
			err := c.Execute(t.Context(), "behind it", nil, nil)
			wantErrorIs(t, "patient command behind it", err, qmp.ErrDisconnected)
		})
		wg.Wait()
	})
}

func TestBatch(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.HandleValue("query-status", map[string]any{"status": "running", "running": true})
	f.HandleValue("stop", nil)
	f.Inject(qmptest.Fault{Command: "hang", Hang: true})
	f.Inject(qmptest.Fault{Command: "cut", Cut: qmptest.CutBeforeReply})
	c := dial(t, f.Addr())

	if replies, err := c.Batch(t.Context()); err != nil || len(replies) != 0 {
		t.Errorf("an empty batch: %v, %v", replies, err)
	}

	replies, err := c.Batch(t.Context(), qmp.Command{Name: "query-status"}, qmp.Command{Name: "unknown"}, qmp.Command{Name: "stop"})
	if err != nil || len(replies) != 3 {
		t.Fatalf("%v, %v", replies, err)
	}
	var status qmp.StatusInfo
	if err := replies[0].Decode(&status); err != nil || !status.Running {
		t.Errorf("first reply: %+v, %v", status, err)
	}
	if e := new(qmp.Error); !errors.As(replies[1].Err, &e) || e.Command != "unknown" || e.Class != qmp.ClassCommandNotFound {
		t.Errorf("second reply: %v", replies[1].Err)
	}
	if err := replies[1].Decode(&status); !errors.Is(err, replies[1].Err) {
		t.Errorf("Decode of an error: %v", err)
	}
	if replies[2].Err != nil {
		t.Errorf("third reply: %v", replies[2].Err)
	}

	short, cancel := context.WithTimeout(t.Context(), 2*time.Second) // for the answered ones
	defer cancel()
	replies, err = c.Batch(short, qmp.Command{Name: "query-status"}, qmp.Command{Name: "hang"}, qmp.Command{Name: "stop"})
	wantErrorIs(t, "hang", err, context.DeadlineExceeded)
	if replies[0].Err != nil || replies[2].Err != nil {
		t.Errorf("answered ones: %v, %v", replies[0].Err, replies[2].Err)
	}
	wantErrorIs(t, "hang's reply", replies[1].Err, context.DeadlineExceeded)

	replies, err = c.Batch(t.Context(), qmp.Command{Name: "query-status"}, qmp.Command{Name: "cut"}, qmp.Command{Name: "stop"})
	wantErrorIs(t, "cut", err, qmp.ErrDisconnected)
	if replies[0].Err != nil {
		t.Errorf("answered one: %v", replies[0].Err)
	}
	wantErrorIs(t, "cut's reply", replies[1].Err, qmp.ErrDisconnected)
	wantErrorIs(t, "the reply after it", replies[2].Err, qmp.ErrDisconnected)
}

func TestEvents(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	const many = 5000
	burst := make([]qmptest.Event, many)
	for i := range burst {
		burst[i] = qmptest.Event{Name: "E", Data: i}
	}
	f.HandleValue("x", nil)
	f.Inject(qmptest.Fault{Command: "x", Nth: 1, Before: burst})
	c := dial(t, f.Addr())
	begin := time.Now().Add(-time.Second)
	unread, early, late := c.Subscribe(), c.Subscribe(), c.Subscribe()
	defer unread.Close()

	// Nobody reads them, and yet the command returns; and then they are all there already.
	if err := c.Execute(t.Context(), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
	check := func(i int, e qmp.Event) {
		if e.Name != "E" || string(e.Data) != fmt.Sprint(i) || e.Time.Before(begin) || e.Time.After(time.Now()) {
			t.Fatalf("event %d: %+v", i, e)
		}
	}
	events := early.Pending()
	if len(events) != many {
		t.Fatalf("%d events", len(events))
	}
	for i, e := range events {
		check(i, e)
	}
	if len(early.Pending()) != 0 {
		t.Error("Pending does not take the events out")
	}
	for i := range many {
		e, err := late.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		check(i, e)
	}

	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := late.Next(short)
	wantErrorIs(t, "nothing comes", err, context.DeadlineExceeded)

	time.AfterFunc(20*time.Millisecond, func() { f.Emit("LATER", nil) })
	if e, err := late.Next(t.Context()); err != nil || e.Name != "LATER" || e.Data != nil {
		t.Errorf("got %+v, %v", e, err)
	}

	time.AfterFunc(20*time.Millisecond, late.Close)
	within(t, "Next of a closed subscription", func() {
		if _, err := late.Next(t.Context()); err == nil || errors.Is(err, qmp.ErrDisconnected) {
			t.Errorf("got %v", err)
		}
	})
	late.Close()
	f.Emit("AFTER", nil)
	if err := c.Execute(t.Context(), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
	if events := late.Pending(); len(events) != 0 {
		t.Errorf("a closed subscription got %v", events)
	}
}

func TestMonitor(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.Handle("echo", func(args json.RawMessage) (any, error) { return args, nil })
	c, err := qmp.New(f.Addr())
	if err != nil {
		t.Fatal(err)
	}
	var m goqemu.Monitor = c
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}

	command, err := json.Marshal(goqemu.Command{Execute: "echo", Args: map[string]int{"a": 1}})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := m.Run(command); err != nil || string(out) != `{"return":{"a":1}}` {
		t.Errorf("Run: %s, %v", out, err)
	}
	if e := new(qmp.Error); true {
		if _, err := m.Run([]byte(`{"execute":"unknown","id":"mine"}`)); !errors.As(err, &e) {
			t.Errorf("Run of an unknown command: %v", err)
		}
	}
	for _, bad := range []string{``, `{}`, `{"execute":5}`, `{"execute":"echo"} {}`} {
		if _, err := m.Run([]byte(bad)); err == nil {
			t.Errorf("Run(%q) succeeded", bad)
		}
	}

	f.Emit("JOB_STATUS_CHANGE", map[string]string{"id": "j", "status": "running"})
	f.Emit("ODD", 7)
	e := <-events
	if e.Event != "JOB_STATUS_CHANGE" || e.Data["status"] != "running" || e.Timestamp.Seconds < 1e9 {
		t.Errorf("got %+v", e)
	}
	if e := <-events; e.Event != "ODD" || e.Data != nil {
		t.Errorf("got %+v", e)
	}
	cancel()
	within(t, "the end of Events", func() {
		for range events {
		}
	})

	// What QEMU sent before it went is delivered, then the channel closes.
	events, err = m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.Emit("SHUTDOWN", nil)
	f.Disconnect()
	<-c.Done()
	within(t, "the end of Events", func() {
		if e := <-events; e.Event != "SHUTDOWN" {
			t.Errorf("got %+v", e)
		}
		if e, ok := <-events; ok {
			t.Errorf("got %+v", e)
		}
	})
	if err := m.Disconnect(); err != nil {
		t.Error(err)
	}
}

func TestTranscript(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.HandleValue("big", strings.Repeat("x", 100000))
	for _, level := range []logrus.Level{logrus.TraceLevel, logrus.DebugLevel} {
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		log.SetLevel(level)
		log.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableQuote: true})
		c := dial(t, f.Addr(), qmp.WithTranscript(log.WithField("guest", "110")))
		if err := c.Execute(t.Context(), "big", nil, nil); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()

		text := out.String()
		if level != logrus.TraceLevel {
			if text != "" {
				t.Errorf("at level %v: %s", level, text)
			}
			continue
		}
		for _, want := range []string{`<- {"QMP"`, `-> {"execute":"qmp_capabilities"`, `-> {"execute":"big"`, `<- {"`, "guest=110"} {
			if !strings.Contains(text, want) {
				t.Errorf("the transcript lacks %q", want)
			}
		}
		if len(text) > 50000 {
			t.Errorf("the transcript has %d bytes", len(text))
		}
	}
}
