package standard

import (
	"bufio"
	"context"
	"errors"
	"net"
	"testing"
	"time"
)

// A qemu-nbd that does not answer is left as soon as the context ends, with the context's error, also where that was before the
// time limit of a step was set.
func TestHandshakeInterrupted(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]time.Duration{"before": 0, "while it waits": 100 * time.Millisecond} {
		server, client := net.Pipe() // whose other end says nothing
		defer server.Close()
		w := &writer{conn: client, r: bufio.NewReader(client)}
		ctx, cancel := context.WithCancel(t.Context())
		defer context.AfterFunc(ctx, func() { _ = client.SetDeadline(time.Now()) })()
		if when == 0 {
			cancel()
			time.Sleep(100 * time.Millisecond) // until the connection's deadline is set
		} else {
			time.AfterFunc(when, cancel)
		}
		for what, step := range map[string]func() error{
			"handshake": func() error { return w.handshake(ctx) },
			"request":   func() error { return w.zero(ctx, 0, 512) },
		} {
			began := time.Now()
			if err := step(); !errors.Is(err, context.Canceled) || time.Since(began) > startLimit/2 {
				t.Errorf("%s, %s: %v after %s", name, what, err, time.Since(began))
			}
		}
	}
}
