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
		s.signal()
	}
}

func (s *Subscription) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Next awaits the next event. Once the connection has ended and the queue is empty, its error wraps
// ErrDisconnected.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	for {
		if e, ok := s.pop(); ok {
			return e, nil
		}
		select {
		case <-s.wake:
		case <-s.closed:
			return Event{}, errSubscriptionClosed
		case <-ctx.Done():
			return Event{}, contextError(ctx)
		case <-s.client.gone:
			// The last events may have come between the look at the queue and here.
			if e, ok := s.pop(); ok {
				return e, nil
			}
			return Event{}, s.client.goneErr
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
	if len(s.queue) > 0 {
		s.signal() // for another caller of Next, whose token this call may have taken
	}
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
