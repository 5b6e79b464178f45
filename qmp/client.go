package qmp

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	defaultHandshakeTimeout = 10 * time.Second
	defaultCommandTimeout   = 60 * time.Second

	// lastWords is how long a connection that can't be written to is still read.
	lastWords = time.Second

	// dialRetry is the pause before a unix socket whose queue of waiting clients is full is tried again.
	dialRetry = 50 * time.Millisecond

	// maxTranscript bounds one line of the transcript, in bytes.
	maxTranscript = 16 << 10
)

// Client is one connection to one QEMU. It is safe for concurrent use; QEMU executes commands one after
// the other in any case. A Client connects once in its life: after Close, after a failed Connect or after
// QEMU has gone, make a new one.
//
// Every command is bounded by its context and by the command time-out, whichever ends first. A command
// whose context ends may still be executed by QEMU, now or later: what has been sent can't be called
// back. Its late reply is dropped.
type Client struct {
	network, address string
	handshakeTimeout time.Duration
	commandTimeout   time.Duration
	jobPoll          time.Duration
	log              *logrus.Entry // nil: no transcript
	idPrefix         string        // tells our ids from those of a client before us on the same socket

	// writing is held by whoever writes to the socket: a mutex that can be waited for with a context.
	writing chan struct{}

	closing    chan struct{} // closed by Close
	ended      sync.Once
	gone       chan struct{} // closed when the connection has ended; goneErr says why
	goneErr    error
	goroutines sync.WaitGroup

	mu         sync.Mutex
	dialed     bool     // Connect or Dial has begun
	closed     bool     // Close has begun
	conn       net.Conn // nil before the handshake
	version    Version
	greetings  int  // how many have come
	negotiated bool // qmp_capabilities is done
	lastID     uint64
	waiting    map[string]chan<- reply // by id; each with room for its one reply
	subs       map[*Subscription]struct{}
}

// Option changes a default of a Client.
type Option func(*Client)

// WithHandshakeTimeout bounds connecting, greeting and negotiation together (default: 10 s).
func WithHandshakeTimeout(d time.Duration) Option {
	return func(c *Client) { c.handshakeTimeout = d }
}

// WithCommandTimeout bounds each command and each batch (default: 60 s). A context that ends earlier
// counts, one that ends later does not.
func WithCommandTimeout(d time.Duration) Option {
	return func(c *Client) { c.commandTimeout = d }
}

// WithTranscript logs all that is sent ("-> {...}") and received ("<- {...}") at trace level. Very long
// messages are cut.
func WithTranscript(log logrus.FieldLogger) Option {
	return func(c *Client) { c.log = log.WithFields(nil) }
}

// New makes a Client that is not connected yet. For the forms of addr see ParseAddr.
func New(addr string, opts ...Option) (*Client, error) {
	network, address, err := ParseAddr(addr)
	if err != nil {
		return nil, err
	}
	c := &Client{
		network:          network,
		address:          address,
		handshakeTimeout: defaultHandshakeTimeout,
		commandTimeout:   defaultCommandTimeout,
		jobPoll:          defaultJobPoll,
		idPrefix:         rand.Text(),
		writing:          make(chan struct{}, 1),
		closing:          make(chan struct{}),
		gone:             make(chan struct{}),
		waiting:          make(map[string]chan<- reply),
		subs:             make(map[*Subscription]struct{}),
	}
	for _, opt := range opts {
		opt(c)
	}
	return c, nil
}

// Dial connects to the QMP socket at addr and negotiates, within the context's time and the handshake
// time-out. The error wraps ErrBusy or ErrNotQMP where these fit.
func Dial(ctx context.Context, addr string, opts ...Option) (*Client, error) {
	c, err := New(addr, opts...)
	if err != nil {
		return nil, err
	}
	if err := c.connect(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Client) connect(ctx context.Context) error {
	c.mu.Lock()
	again := c.dialed
	c.dialed = true
	c.mu.Unlock()
	if again {
		return fmt.Errorf("qmp %s: a client connects once only", c.address)
	}

	ctx, cancel := context.WithTimeout(ctx, c.handshakeTimeout)
	defer cancel()
	if err := c.handshake(ctx); err != nil {
		_ = c.Close()
		return fmt.Errorf("qmp %s: %w", c.address, err)
	}
	return nil
}

func (c *Client) handshake(ctx context.Context) error {
	conn, err := dial(ctx, c.network, c.address)
	if err != nil {
		return err
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		_ = conn.Close()
		return fmt.Errorf("%w: closed", ErrDisconnected)
	}
	c.conn = conn
	c.mu.Unlock()

	messages := newMessageReader(conn, maxMessage)
	greeting, err := c.greet(ctx, conn, messages)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.version = greeting.Version.version()
	c.greetings = 1
	if !c.closed {
		c.goroutines.Go(func() { c.read(conn, messages) })
	}
	c.mu.Unlock()
	return c.negotiate(ctx)
}

// negotiate leaves the negotiation mode, in which QEMU executes no other command.
//
// A QEMU that has just been started may greet twice (seen on 7.2), when a client comes while the monitor is
// being set up, and each greeting begins the negotiation anew. So it is negotiated again after a second
// greeting, and a QEMU that has got over the first negotiation says that there is no such command any more.
func (c *Client) negotiate(ctx context.Context) error {
	for {
		c.mu.Lock()
		greetings := c.greetings
		c.mu.Unlock()

		err := c.Execute(ctx, "qmp_capabilities", nil, nil)
		if e := new(Error); errors.As(err, &e) && e.Class == ClassCommandNotFound && greetings > 1 {
			err = nil
		}
		if err != nil {
			return err
		}

		c.mu.Lock()
		c.negotiated = c.greetings == greetings
		done := c.negotiated
		c.mu.Unlock()
		if done {
			return nil
		}
	}
}

// greetedAgain notes a greeting after the first one, and reports whether that can be.
func (c *Client) greetedAgain() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.greetings++
	return c.greetings == 2 && !c.negotiated
}

// dial connects. A unix socket refuses at once when its queue of waiting clients is full, which for a QMP
// socket means that several others wait: it is tried again until the context ends.
func dial(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	full := false
	for {
		conn, err := d.DialContext(ctx, network, address)
		switch {
		case err == nil:
			return conn, nil
		case errors.Is(err, syscall.EAGAIN):
			full = true
		case full && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)):
			// The dialer saw the context's end, maybe a moment before the context itself does.
		default:
			return nil, err
		}
		select {
		case <-time.After(dialRetry):
		case <-ctx.Done():
			return nil, noGreeting(ctx)
		}
	}
}

// greet awaits the greeting.
func (c *Client) greet(ctx context.Context, conn net.Conn, messages *messageReader) (*greeting, error) {
	defer interruptible(ctx, conn.SetReadDeadline)()

	msg, raw, err := messages.next()
	switch {
	case err == nil && msg.greeting == nil:
		return nil, fmt.Errorf("%w: no greeting but %s", ErrNotQMP, excerpt(raw, 200))
	case err == nil:
		c.trace("<-", raw)
		return msg.greeting, nil
	case errors.Is(err, ErrNotQMP):
		return nil, err
	case ctx.Err() == nil:
		return nil, disconnected(err)
	case messages.limit.total > 0 && !errors.Is(ctx.Err(), context.Canceled):
		return nil, fmt.Errorf("%w: a greeting without end: %w", ErrNotQMP, ctx.Err())
	default:
		return nil, noGreeting(ctx)
	}
}

// noGreeting is the error for a context that ended before the greeting: a caller who gave up tells nothing
// about the socket, time that ran out does.
func noGreeting(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return contextError(ctx)
	}
	return fmt.Errorf("%w: %w", ErrBusy, ctx.Err())
}

// Version is the version that QEMU greeted with.
func (c *Client) Version() Version {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.version
}

// Done is closed when the connection has ended, by either side.
func (c *Client) Done() <-chan struct{} { return c.gone }

// Close ends the connection and waits for the client's goroutines. Waiting commands and subscriptions
// get an error that wraps ErrDisconnected. It never fails, and closing again does nothing.
func (c *Client) Close() error {
	c.end(fmt.Errorf("%w: closed", ErrDisconnected))
	c.mu.Lock()
	if !c.closed {
		c.closed = true
		close(c.closing)
		if c.conn != nil {
			_ = c.conn.Close()
		}
	}
	c.mu.Unlock()
	c.goroutines.Wait()
	return nil
}

// end tells every waiter, once, that the connection is over.
func (c *Client) end(err error) {
	c.ended.Do(func() {
		c.goneErr = err
		close(c.gone)
	})
}

func (c *Client) hasEnded() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

// read hands on what QEMU sends until the connection ends. Nothing in here waits for anybody else.
func (c *Client) read(conn net.Conn, messages *messageReader) {
	defer conn.Close()
	for {
		msg, raw, err := messages.next()
		if err != nil {
			c.end(disconnected(err))
			return
		}
		c.trace("<-", raw)
		switch {
		case msg.event != nil:
			c.publish(*msg.event)
		case msg.reply != nil:
			c.deliver(*msg.reply)
		case !c.greetedAgain():
			c.end(disconnected(fmt.Errorf("%w: a greeting out of place", ErrNotQMP)))
			return
		}
	}
}

// deliver gives a reply to whoever waits for it. Without a waiter it answers a command that timed out, or
// one of the client before us, and is dropped.
func (c *Client) deliver(r reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if waiter, ok := c.waiting[r.id]; ok {
		delete(c.waiting, r.id)
		waiter <- r
	}
}

// Command is one command of a batch.
type Command struct {
	Name string
	Args any // encoded as a JSON object; nil for none
}

// Reply is QEMU's answer to one command of a batch.
type Reply struct {
	Return json.RawMessage
	Err    error // an *Error that QEMU replied, or what kept the reply from coming
}

// Decode decodes the returned value into result, or returns the reply's error.
func (r Reply) Decode(result any) error {
	if r.Err != nil {
		return r.Err
	}
	return json.Unmarshal(r.Return, result)
}

// Execute runs one command and decodes what it returns into result, unless that is nil. An error reply of
// QEMU's comes back as an *Error.
func (c *Client) Execute(ctx context.Context, name string, args, result any) error {
	replies, err := c.Batch(ctx, Command{Name: name, Args: args})
	if err != nil {
		return err
	}
	if result == nil || replies[0].Err != nil {
		return replies[0].Err
	}
	if err := replies[0].Decode(result); err != nil {
		return fmt.Errorf("%s: QEMU's answer: %w", name, err)
	}
	return nil
}

// Batch sends all commands in one write and awaits their replies, which come back in the commands' order.
// QEMU reads them together and executes them one after the other, without a round trip in between; a
// command that fails does not keep the next ones from being executed.
//
// A batch is as close together as QMP allows, and still not atomic: QEMU takes turns between its monitors,
// so that a command which another client has sent already can be executed between two of these (seen on
// 7.2).
//
// The error is for the transport and the context only; then each command that got no reply has that error
// in its Reply, too. Errors that QEMU replied are in the replies alone.
func (c *Client) Batch(ctx context.Context, cmds ...Command) ([]Reply, error) {
	if len(cmds) == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.commandTimeout,
		fmt.Errorf("no answer within %v: %w", c.commandTimeout, context.DeadlineExceeded))
	defer cancel()

	var buf bytes.Buffer
	ids := make([]string, len(cmds))
	for i, cmd := range cmds {
		ids[i] = c.newID()
		line, err := json.Marshal(struct {
			Execute string `json:"execute"`
			Args    any    `json:"arguments,omitempty"`
			ID      string `json:"id"`
		}{cmd.Name, cmd.Args, ids[i]})
		if err != nil {
			return nil, fmt.Errorf("%s: arguments: %w", cmd.Name, err)
		}
		buf.Write(line)
		buf.WriteByte('\n')
	}

	arrived := make([]chan reply, len(cmds))
	c.mu.Lock()
	for i, id := range ids {
		arrived[i] = make(chan reply, 1)
		c.waiting[id] = arrived[i]
	}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, id := range ids {
			delete(c.waiting, id)
		}
	}()

	failure := c.send(ctx, buf.Bytes())
	replies := make([]Reply, len(cmds))
	var firstErr error
	for i, cmd := range cmds {
		r, err := c.await(ctx, arrived[i], failure)
		switch {
		case err != nil:
			failure = err
			replies[i].Err = fmt.Errorf("%s: %w", cmd.Name, err)
			if firstErr == nil {
				firstErr = replies[i].Err
			}
		case r.err != nil:
			r.err.Command = cmd.Name
			replies[i].Err = r.err
		default:
			replies[i].Return = r.result
		}
	}
	return replies, firstErr
}

func (c *Client) newID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastID++
	return c.idPrefix + "-" + strconv.FormatUint(c.lastID, 10)
}

// send writes the commands with a single call. When a part only could be written, the stream is out of
// step and the connection ends.
func (c *Client) send(ctx context.Context, commands []byte) error {
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn == nil {
		return fmt.Errorf("%w: not connected yet", ErrDisconnected)
	}

	select {
	case c.writing <- struct{}{}:
	case <-c.gone:
		return c.goneErr
	case <-ctx.Done():
		return contextError(ctx)
	}
	defer func() { <-c.writing }()
	if c.hasEnded() {
		return c.goneErr
	}
	if ctx.Err() != nil {
		return contextError(ctx)
	}

	for line := range bytes.Lines(commands) {
		c.trace("->", line)
	}
	stop := interruptible(ctx, conn.SetWriteDeadline)
	n, err := conn.Write(commands)
	stop()

	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil && n == 0:
		return contextError(ctx)
	case ctx.Err() != nil:
		err = fmt.Errorf("%w: QEMU does not read: %w", ErrDisconnected, contextError(ctx))
		c.end(err)
		_ = conn.Close()
		return err
	}

	// The connection is broken, and the reader is to say why, once it has read what QEMU sent before. It
	// needs a deadline for a peer that has closed one direction only.
	_ = conn.SetReadDeadline(time.Now().Add(lastWords))
	select {
	case <-c.gone:
		return c.goneErr
	case <-ctx.Done():
		return disconnected(err)
	}
}

// await returns the reply, or why there will be none. After a failure it takes only what is already there.
func (c *Client) await(ctx context.Context, arrived <-chan reply, failure error) (reply, error) {
	if failure == nil {
		select {
		case r := <-arrived:
			return r, nil
		case <-c.gone:
			failure = c.goneErr
		case <-ctx.Done():
			failure = contextError(ctx)
		}
	}
	select {
	case r := <-arrived:
		return r, nil
	default:
		return reply{}, failure
	}
}

func (c *Client) trace(direction string, raw []byte) {
	if c.log != nil && c.log.Logger.IsLevelEnabled(logrus.TraceLevel) {
		c.log.Trace(direction + " " + excerpt(raw, maxTranscript))
	}
}

// interruptible makes the end of the context interrupt a read or a write: it sets the deadline that is
// given. The function that it returns takes this back.
func interruptible(ctx context.Context, setDeadline func(time.Time) error) (stop func()) {
	fired := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(fired)
		_ = setDeadline(time.Unix(1, 0))
	})
	return func() {
		if !cancel() {
			<-fired
		}
		_ = setDeadline(time.Time{})
	}
}

// contextError says why the context has ended, with context.Canceled or DeadlineExceeded always in it.
func contextError(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ctx.Err()) {
		return cause
	}
	return fmt.Errorf("%w: %w", ctx.Err(), cause)
}

// disconnected makes the error for a connection that ended with err.
func disconnected(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: QEMU closed the connection", ErrDisconnected)
	}
	return fmt.Errorf("%w: %w", ErrDisconnected, err)
}
