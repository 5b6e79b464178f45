package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// connected makes a client that has negotiated, on the connection.
func connected(t *testing.T, conn net.Conn) *Client {
	t.Helper()
	c, err := New("/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	c.conn = conn
	c.greetings, c.negotiated = 1, true
	c.goroutines.Go(func() { c.read(conn, newMessageReader(conn, maxMessage)) })
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// answer reads commands and sends what reply makes of their ids.
func answer(conn net.Conn, reply func(id string) string) {
	defer conn.Close()
	dec := json.NewDecoder(conn)
	for {
		var cmd struct{ ID string }
		if dec.Decode(&cmd) != nil {
			return
		}
		if _, err := io.WriteString(conn, reply(cmd.ID)); err != nil {
			return
		}
	}
}

// countingConn counts the calls of Write.
type countingConn struct {
	net.Conn
	writes atomic.Int32
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

func TestBatchIsOneWrite(t *testing.T) {
	t.Parallel()
	server, client := net.Pipe()
	go answer(server, func(id string) string { return `{"return": {}, "id": "` + id + `"}` })
	conn := &countingConn{Conn: client}
	c := connected(t, conn)
	_, err := c.Batch(t.Context(), Command{Name: "query-status"}, Command{Name: "stop"},
		Command{Name: "x", Args: map[string]string{"long": strings.Repeat("y", 100000)}})
	if err != nil {
		t.Fatal(err)
	}
	if n := conn.writes.Load(); n != 1 {
		t.Errorf("%d writes", n)
	}
}

// A peer that answers a command several times must not block the reader.
func TestRepeatedReply(t *testing.T) {
	t.Parallel()
	server, client := net.Pipe()
	go answer(server, func(id string) string {
		return strings.Repeat(`{"return": {}, "id": "`+id+`"}`, 3)
	})
	c := connected(t, client)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := c.Batch(ctx, Command{Name: "a"}, Command{Name: "b"}); err != nil {
		t.Error(err)
	}
	if err := c.Execute(ctx, "c", nil, nil); err != nil {
		t.Error(err)
	}
}

// stuckConn takes the first bytes of a write and then blocks until the deadline.
type stuckConn struct {
	net.Conn
	takes    int
	stuck    func() // called when it blocks
	deadline chan struct{}
	closed   atomic.Bool
}

func (c *stuckConn) Write([]byte) (int, error) {
	c.stuck()
	<-c.deadline
	return c.takes, os.ErrDeadlineExceeded
}

func (c *stuckConn) SetWriteDeadline(t time.Time) error {
	if !t.IsZero() {
		close(c.deadline)
	}
	return nil
}

func (c *stuckConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

// A write that was interrupted before its first byte has done no harm; one that was interrupted within a
// command has.
func TestInterruptedWrite(t *testing.T) {
	t.Parallel()
	for takes, ends := range map[int]bool{0: false, 1: true} {
		server, client := net.Pipe()
		defer server.Close()
		ctx, cancel := context.WithCancel(t.Context())
		conn := &stuckConn{Conn: client, takes: takes, stuck: cancel, deadline: make(chan struct{})}
		c := connected(t, conn)
		err := c.Execute(ctx, "stop", nil, nil)
		if !errors.Is(err, context.Canceled) || errors.Is(err, ErrDisconnected) != ends {
			t.Errorf("%d bytes written: %v", takes, err)
		}
		select {
		case <-c.gone:
			if !ends {
				t.Errorf("%d bytes written: the connection has ended: %v", takes, c.goneErr)
			} else if !strings.Contains(c.goneErr.Error(), "does not read") {
				t.Errorf("%d bytes written: others are told %v", takes, c.goneErr)
			}
		default:
			if ends {
				t.Errorf("%d bytes written: the connection goes on", takes)
			}
		}
		if conn.closed.Load() != ends {
			t.Errorf("%d bytes written: closed: %v", takes, conn.closed.Load())
		}
	}
}

// A deadline that a context's end is just setting must not outlast stop: it would hit the next command.
func TestInterruptibleIsTakenBack(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var deadline time.Time
	setting := make(chan struct{})
	stop := interruptible(ctx, func(d time.Time) error {
		if !d.IsZero() {
			close(setting)
			time.Sleep(50 * time.Millisecond)
		}
		mu.Lock()
		defer mu.Unlock()
		deadline = d
		return nil
	})
	cancel()
	<-setting
	stop()
	time.Sleep(100 * time.Millisecond)
	mu.Lock()
	defer mu.Unlock()
	if !deadline.IsZero() {
		t.Errorf("the deadline stayed at %v", deadline)
	}
}
