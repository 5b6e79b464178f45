package qmp

import (
	"errors"
	"testing"
)

// The last event and the connection's end come together: the event must win.
func TestNextAtTheEnd(t *testing.T) {
	t.Parallel()
	for range 2000 {
		c, err := New("/nowhere")
		if err != nil {
			t.Fatal(err)
		}
		sub := c.Subscribe()
		go func() {
			c.publish(Event{Name: "LAST"})
			c.end(ErrDisconnected)
		}()
		if e, err := sub.Next(t.Context()); err != nil || e.Name != "LAST" {
			t.Fatalf("got %+v, %v", e, err)
		}
		if _, err := sub.Next(t.Context()); !errors.Is(err, ErrDisconnected) {
			t.Fatalf("got %v", err)
		}
	}
}
