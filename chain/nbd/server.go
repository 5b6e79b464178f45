package nbd

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"qmchain/chain/image"
)

// Export is an image that a server offers.
type Export struct {
	Name        string // at most 4096 bytes
	Description string // for people; at most 4096 bytes
	Image       image.Image
}

// Server serves exports. Its fields are not to be changed any more once it serves.
type Server struct {
	Exports []Export
	// Problem, if not nil, is told of what goes wrong: an image that can't be read, a client that breaks the protocol. It is
	// called by many goroutines.
	Problem func(error)

	// Zero is the default of each.
	negotiationLimit time.Duration // for the whole of a negotiation; 30 s
	sendLimit        time.Duration // for one write to a client; 60 s
	graceLimit       time.Duration // for what is under way at the end; 5 s
	maxClients       int           // at a time; 64
}

// Serve serves everybody who connects to l, until ctx ends; then l is closed, answers under way are given up to five
// seconds, and nil is returned. Who can connect can read: access is for the listener to control.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	for _, e := range s.Exports {
		if len(e.Name) > maxString || len(e.Description) > maxString {
			return fmt.Errorf("export %.100q: name or description of more than %d bytes", e.Name, maxString)
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	run := &serving{Server: s, clients: map[*client]struct{}{}}
	run.buffers.New = func() any { return new(buffer) }
	err := run.accept(ctx, l)
	run.end(cmp.Or(s.graceLimit, 5*time.Second))
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// serving is one call of Serve.
type serving struct {
	*Server
	buffers sync.Pool
	wait    sync.WaitGroup // for clients

	mu      sync.Mutex
	clients map[*client]struct{}
}

func (s *serving) tell(err error) {
	if s.Problem != nil {
		s.Problem(err)
	}
}

// accept takes connections until the listener is closed. Clients beyond the number that is served at a time wait.
func (s *serving) accept(ctx context.Context, l net.Listener) error {
	places := make(chan struct{}, cmp.Or(s.maxClients, 64))
	for {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			// Out of file descriptors, for one: that passes.
			<-places
			s.tell(fmt.Errorf("nbd: %w", err))
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		c := &client{Conn: conn, limit: cmp.Or(s.sendLimit, time.Minute)}
		s.mu.Lock()
		s.clients[c] = struct{}{}
		s.mu.Unlock()
		s.wait.Go(func() {
			defer func() { <-places }()
			if err := s.serve(c); err != nil {
				s.tell(fmt.Errorf("nbd: client %s: %w", c.RemoteAddr(), err))
			}
			_ = c.Close()
			s.mu.Lock()
			delete(s.clients, c)
			s.mu.Unlock()
		})
	}
}

// end has all clients served to the end of what they have asked for, and cuts off those that this takes too long for.
func (s *serving) end(grace time.Duration) {
	s.mu.Lock()
	for c := range s.clients {
		c.end(time.Now().Add(grace))
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.wait.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(grace + time.Second):
		// A read of an image that hangs can't be called back.
		s.tell(errors.New("nbd: an image is still being read"))
	}
}

// serve serves one client. That a client goes away is no error, whatever it was doing.
func (s *serving) serve(c *client) error {
	limit := cmp.Or(s.negotiationLimit, 30*time.Second)
	c.readUntil(time.Now().Add(limit))
	r := bufio.NewReaderSize(c, 16<<10)
	chosen, err := negotiate(s.Exports, r, c)
	if errors.Is(err, os.ErrDeadlineExceeded) && !c.ended() {
		return fmt.Errorf("not done with its negotiation within %s", limit)
	}
	if err == nil {
		c.readUntil(time.Time{})
		t := &transmission{session: chosen, r: r, w: c, stop: func() { c.Close() }, buffers: &s.buffers, problem: s.tell}
		err = t.run()
	}
	for _, usual := range []error{errDone, io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, usual) {
			return nil
		}
	}
	if c.ended() {
		return nil
	}
	return err
}

// client is a connection whose every write has a limit, and which can be brought to its end.
type client struct {
	net.Conn
	limit time.Duration

	mu    sync.Mutex
	until time.Time // by when all must be done; zero: not yet
}

func (c *client) Write(p []byte) (int, error) {
	c.mu.Lock()
	at := time.Now().Add(c.limit)
	if !c.until.IsZero() && c.until.Before(at) {
		at = c.until
	}
	err := c.SetWriteDeadline(at)
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// readUntil sets when reading fails; zero: never.
func (c *client) readUntil(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.until.IsZero() {
		_ = c.SetReadDeadline(at) // fails on a closed connection alone
	}
}

// end ends all reading now, and all writing by then.
func (c *client) end(by time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.until = by
	_ = c.SetReadDeadline(time.Now())
	_ = c.SetWriteDeadline(by)
}

func (c *client) ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.until.IsZero()
}
