// Package qga speaks to the QEMU guest agent: it freezes and thaws the guest's file systems, and does nothing else.
//
// The agent listens on a virtio-serial port, which QEMU shows as a socket that serves one client at a time. Nothing tells a
// client whether an agent runs in the guest at all, so every step here has a time limit. A freeze that was not answered in
// time may still be carried out later: the agent takes its commands from a queue in the guest. So after any freeze that was
// sent, a thaw must be sent as well, and only Status says what holds.
package qga

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"qmchain/qmp"
)

// ErrSilent is wrapped where nobody answered in time: no agent runs in the guest, it hangs, or another client has the
// socket.
var ErrSilent = errors.New("the guest agent does not answer")

// maxLine bounds an answer, in bytes. Those of the commands used here are short.
const maxLine = 64 << 10

// Client is a connection to a guest agent. It is not safe for concurrent use.
type Client struct {
	conn net.Conn
	in   *bufio.Reader
	id   int64
}

// Dial connects to an agent's socket and waits until the agent answers, for as long as ctx allows.
func Dial(ctx context.Context, addr string) (*Client, error) {
	network, address, err := qmp.ParseAddr(addr)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("guest agent: %w", err)
	}
	c := &Client{conn: conn, in: bufio.NewReaderSize(conn, maxLine), id: time.Now().UnixNano()}
	if err := c.sync(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Freeze freezes the file systems that are mounted at the given places, or all of them, and returns how many.
func (c *Client) Freeze(ctx context.Context, mountpoints []string) (n int, err error) {
	command, args := "guest-fsfreeze-freeze", any(nil)
	if len(mountpoints) > 0 {
		command, args = "guest-fsfreeze-freeze-list", map[string]any{"mountpoints": mountpoints}
	}
	if err := c.execute(ctx, command, args, &n); err != nil {
		return 0, err
	}
	if n < 0 { // a guest can say what it likes
		return 0, fmt.Errorf("guest agent: %s: unexpected answer %d", command, n)
	}
	return n, nil
}

// Thaw thaws all file systems.
func (c *Client) Thaw(ctx context.Context) error {
	return c.execute(ctx, "guest-fsfreeze-thaw", nil, nil)
}

// Frozen reports whether any file system is frozen by the agent.
func (c *Client) Frozen(ctx context.Context) (bool, error) {
	var status string
	err := c.execute(ctx, "guest-fsfreeze-status", nil, &status)
	return status == "frozen", err
}

// sync skips what the agent still has to say to a client before. The byte 0xff, which is in no JSON text, makes it forget
// half a command, and comes before its answer.
func (c *Client) sync(ctx context.Context) error {
	c.id++
	request := fmt.Sprintf("\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}\n", c.id)
	return c.exchange(ctx, "guest-sync-delimited", []byte(request), func() (bool, error) {
		for {
			b, err := c.in.ReadByte()
			if err != nil {
				return false, err
			}
			if b == 0xff {
				break
			}
		}
		var answer struct{ Return int64 }
		line, err := c.line()
		return err == nil && json.Unmarshal(line, &answer) == nil && answer.Return == c.id, err
	})
}

func (c *Client) execute(ctx context.Context, command string, args, result any) error {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	return c.exchange(ctx, command, append(request, '\n'), func() (bool, error) {
		line, err := c.line()
		if err != nil {
			return false, err
		}
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Class, Desc string }
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return false, fmt.Errorf("unexpected answer: %w", err)
		}
		if answer.Error != nil {
			return false, &qmp.Error{Command: command, Class: answer.Error.Class, Desc: answer.Error.Desc}
		}
		if result == nil {
			return true, nil
		}
		return true, json.Unmarshal(answer.Return, result)
	})
}

func (c *Client) line() ([]byte, error) {
	line, err := c.in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		err = fmt.Errorf("an answer of more than %d bytes", maxLine)
	}
	return line, err
}

// exchange sends a request and calls read until it says that it has the answer, for as long as ctx allows.
func (c *Client) exchange(ctx context.Context, command string, request []byte, read func() (bool, error)) error {
	if err := c.conn.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("guest agent: %s: %w", command, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := c.conn.Write(request)
	for done := false; err == nil && !done; {
		done, err = read()
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && errors.Is(ctx.Err(), context.Canceled):
		err = ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = ErrSilent
	case errors.Is(err, io.EOF):
		err = fmt.Errorf("%w: the connection was closed", ErrSilent)
	}
	if err != nil {
		return fmt.Errorf("guest agent: %s: %w", command, err)
	}
	return nil
}
