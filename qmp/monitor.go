package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"
)

// A Client can be used wherever go-qemu's Monitor is wanted.
var _ goqemu.Monitor = (*Client)(nil)

// Connect connects and negotiates within the handshake time-out; see Dial.
func (c *Client) Connect() error { return c.connect(context.Background()) }

// Disconnect is Close.
func (c *Client) Disconnect() error { return c.Close() }

// Run runs one command, a JSON object as on the wire, and returns the reply as on the wire. The command's
// id, if any, is replaced by one of the client's own and is not in the reply. An error that QEMU replied is
// returned as an *Error.
func (c *Client) Run(command []byte) ([]byte, error) {
	var cmd struct {
		Execute string          `json:"execute"`
		Args    json.RawMessage `json:"arguments"`
	}
	if err := json.Unmarshal(command, &cmd); err != nil {
		return nil, fmt.Errorf("qmp command: %w", err)
	}
	if cmd.Execute == "" {
		return nil, errors.New("qmp command: no name (execute)")
	}
	var args any
	if cmd.Args != nil {
		args = cmd.Args
	}
	var result json.RawMessage
	if err := c.Execute(context.Background(), cmd.Execute, args, &result); err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Return json.RawMessage `json:"return"`
	}{result})
}

// Events sends every event from now on to the channel, which is closed when the context or the connection
// has ended. Events that QEMU sent before it went are still delivered.
func (c *Client) Events(ctx context.Context) (<-chan goqemu.Event, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil || c.closed {
		return nil, fmt.Errorf("qmp events: %w", ErrDisconnected)
	}
	sub := c.subscribe()
	events := make(chan goqemu.Event)
	c.goroutines.Go(func() {
		defer close(events)
		defer sub.Close()
		for {
			e, err := sub.Next(ctx)
			if err != nil {
				return
			}
			select {
			case events <- monitorEvent(e):
			case <-ctx.Done():
				return
			case <-c.closing:
				return
			}
		}
	})
	return events, nil
}

func monitorEvent(e Event) goqemu.Event {
	m := goqemu.Event{Event: e.Name}
	m.Timestamp.Seconds = e.Time.Unix()
	m.Timestamp.Microseconds = int64(e.Time.Nanosecond()) / int64(time.Microsecond)
	// Data that is no object can't be shown in this form: then there is none.
	_ = json.Unmarshal(e.Data, &m.Data)
	return m
}
