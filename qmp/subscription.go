package qmp

import (
	"context"
	"errors"
	"sync"
)

// errSubscriptionClosed is what Next returns after the subscription's own Close.
var errSubscriptionClosed = errors.New("subscription closed")

// Subscription receives every event from the moment of its Subscribe on. Its queue has no bound, so that no
// event is lost and none blocks a command; take events out, or close it.
//
// Order is kept: when a command has returned, all events that QEMU sent before its reply are in the queue.
type Subscription struct {
	client *Client
	wake   chan struct{} // holds a token when the queue may have become non-empty
	closed chan struct{}

	mu        sync.Mutex
	queue     []Event
	closeOnce sync.Once
}

// Subscribe starts to collect events. It may be called before Connect, so that not one is missed.
func (c *Client) Subscribe() *Subscription {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.subscribe()
}

// subscribe is Subscribe with the lock held.
func (c *Client) subscribe() *Subscription {
	s := &Subscription{client: c, wake: make(chan struct{}, 1), closed: make(chan struct{})}
	c.subs[s] = struct{}{}
	return s
}

// publish queues the event with every subscriber.
func (c *Client) publish(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		s.mu.Lock()
		s.queue = append(s.queue, e)
		s.mu.Unlock()
		select {
		case s.wake <- struct{}{}:
		default: // woken already
		}
	}
}

// Next awaits the next event. Once the connection has ended and the queue is empty, its error wraps
// ErrDisconnected. One goroutine at a time may wait.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	for {
		ended := s.client.hasEnded() // asked before the queue is: nothing is queued after the end
		if e, ok := s.pop(); ok {
			return e, nil
		}
		if ended {
			return Event{}, s.client.goneErr
		}
		select {
		case <-s.wake:
		case <-s.client.gone:
		case <-s.closed:
			return Event{}, errSubscriptionClosed
		case <-ctx.Done():
			return Event{}, contextError(ctx)
		}
	}
}

func (s *Subscription) pop() (Event, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return Event{}, false
	}
	e := s.queue[0]
	s.queue = s.queue[1:]
	return e, true
}

// Pending takes all events out of the queue without waiting.
func (s *Subscription) Pending() []Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	events := s.queue
	s.queue = nil
	return events
}

// Close ends the subscription; whoever waits in Next gets an error.
func (s *Subscription) Close() {
	s.client.mu.Lock()
	delete(s.client.subs, s)
	s.client.mu.Unlock()
	s.closeOnce.Do(func() { close(s.closed) })
}
