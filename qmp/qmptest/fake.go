package qmptest

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"qmchain/qmp"
)

// Greeting is what a Fake greets with, unless told otherwise.
const Greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "fake"}, "capabilities": ["oob"]}}`

// Handler answers a command. What it returns is encoded as the return value, nil as an empty object. Its
// error is replied as a GenericError, or with the class and text of a *qmp.Error.
type Handler func(args json.RawMessage) (any, error)

// Event is an event that a Fake sends.
type Event struct {
	Name string
	Data any // nil: none
}

// Cut is where a fault closes the connection.
type Cut int

// The places for a cut.
const (
	NoCut             Cut = iota
	CutBeforeHandling     // the command is not executed
	CutBeforeReply        // it is executed, but the client never learns
	CutWithinReply        // the client gets half of the reply
	CutAfterReply
)

// Fault is something out of the ordinary that a Fake does at a command. What is zero does not happen; the
// rest happens in the order of the fields.
type Fault struct {
	// Command is the name of the command to act on; empty: any but qmp_capabilities.
	Command string
	// Nth is which of these commands, counted from 1 and from when the fault was added; 0: each.
	Nth int

	Delay  time.Duration // nothing is read or answered meanwhile
	Stall  bool          // QEMU hangs: nothing is read or answered any more, for any client, until Disconnect
	Before []Event       // sent before the command is handled
	Hang   bool          // the command is handled and never answered; later ones are
	Fail   *qmp.Error    // reply this instead of asking the handler; its Command is not used
	Raw    string        // send this instead of the reply
	Pieces int           // send the reply in writes of so many bytes
	Cut    Cut
	After  []Event // sent after the reply
}

// Command is a command that a Fake received.
type Command struct {
	Name string
	Args json.RawMessage
}

// Fake is a QMP server. As QEMU does, it serves one client at a time, and answers nothing but
// qmp_capabilities before that has been sent.
type Fake struct {
	addr     string
	listener net.Listener
	done     chan struct{}
	serving  sync.WaitGroup

	mu         sync.Mutex
	greeting   string
	handlers   map[string]Handler
	faults     []*faultState
	client     *fakeClient // nil: nobody is connected
	transcript []string
	commands   []Command
}

type faultState struct {
	Fault
	seen int
}

// fakeClient is the connection of one client.
type fakeClient struct {
	conn       net.Conn
	gone       chan struct{}
	closeOnce  sync.Once
	negotiated bool       // guarded by Fake.mu
	writing    sync.Mutex // held for a whole message
}

func (c *fakeClient) close() {
	c.closeOnce.Do(func() {
		close(c.gone)
		_ = c.conn.Close()
	})
}

// NewFake starts a Fake on a unix socket. It ends with the test.
func NewFake(t testing.TB) *Fake {
	t.Helper()
	path := filepath.Join(socketDir(t), "qmp")
	return newFake(t, "unix", path, "unix:"+path)
}

// NewFakeTCP starts a Fake on a TCP port.
func NewFakeTCP(t testing.TB) *Fake {
	t.Helper()
	return newFake(t, "tcp", "127.0.0.1:0", "")
}

func newFake(t testing.TB, network, address, addr string) *Fake {
	t.Helper()
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	if addr == "" {
		addr = network + ":" + listener.Addr().String()
	}
	f := &Fake{
		addr:     addr,
		listener: listener,
		done:     make(chan struct{}),
		greeting: Greeting + "\r\n",
		handlers: map[string]Handler{},
	}
	f.serving.Go(f.serve)
	t.Cleanup(func() {
		close(f.done)
		_ = listener.Close()
		f.Disconnect()
		f.serving.Wait()
	})
	return f
}

// Addr is the address for a client, in the form of qmp.ParseAddr.
func (f *Fake) Addr() string { return f.addr }

// Handle sets the handler of a command. A command without one is not known to the Fake.
func (f *Fake) Handle(command string, h Handler) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.handlers[command] = h
}

// HandleValue makes a command always return the value.
func (f *Fake) HandleValue(command string, value any) {
	f.Handle(command, func(json.RawMessage) (any, error) { return value, nil })
}

// Inject adds a fault. Where several fit a command, the one that was added first counts.
func (f *Fake) Inject(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &faultState{Fault: fault})
}

// SetGreeting sets what the next clients get first, as it is, end of line included. Empty: nothing, as when
// another client holds the socket.
func (f *Fake) SetGreeting(text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.greeting = text
}

// Emit sends an event to the client, if there is one that has negotiated.
func (f *Fake) Emit(name string, data any) {
	f.mu.Lock()
	client := f.client
	ready := client != nil && client.negotiated
	f.mu.Unlock()
	if ready {
		f.sendEvent(client, Event{name, data})
	}
}

// Disconnect closes the client's connection.
func (f *Fake) Disconnect() {
	f.mu.Lock()
	client := f.client
	f.mu.Unlock()
	if client != nil {
		client.close()
	}
}

// Transcript returns all that was received ("-> ...") and sent ("<- ...").
func (f *Fake) Transcript() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.transcript...)
}

// Commands returns the commands that were received, without qmp_capabilities.
func (f *Fake) Commands() []Command {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Command(nil), f.commands...)
}

func (f *Fake) serve() {
	for {
		conn, err := f.listener.Accept()
		if err != nil {
			return
		}
		client := &fakeClient{conn: conn, gone: make(chan struct{})}
		f.mu.Lock()
		f.client = client
		greeting := f.greeting
		f.mu.Unlock()

		select {
		case <-f.done: // the test's end found no client to disconnect
		default:
			f.write(client, greeting, 0)
			f.serveClient(client)
		}
		client.close()
		f.mu.Lock()
		f.client = nil
		f.mu.Unlock()
	}
}

func (f *Fake) serveClient(client *fakeClient) {
	dec := json.NewDecoder(client.conn)
	for {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				f.write(client, `{"error": {"class": "GenericError", "desc": "JSON parse error"}}`+"\r\n", 0)
			}
			return
		}
		f.record("-> " + string(raw))
		var cmd struct {
			Execute   string          `json:"execute"`
			Arguments json.RawMessage `json:"arguments"`
			ID        json.RawMessage `json:"id"`
		}
		if err := json.Unmarshal(raw, &cmd); err != nil {
			f.reply(client, nil, nil, &qmp.Error{Desc: err.Error()}, Fault{})
			continue
		}
		if !f.execute(client, cmd.ID, cmd.Execute, cmd.Arguments) {
			return
		}
	}
}

// execute runs one command with its fault. It returns false when the connection is to be closed.
func (f *Fake) execute(client *fakeClient, id json.RawMessage, name string, args json.RawMessage) bool {
	fault, handler, negotiated := f.receive(client, name, args)

	if fault.Delay > 0 {
		select {
		case <-time.After(fault.Delay):
		case <-client.gone:
			return false
		}
	}
	if fault.Stall {
		<-client.gone
		return false
	}
	for _, e := range fault.Before {
		f.sendEvent(client, e)
	}
	if fault.Cut == CutBeforeHandling {
		return false
	}

	var value any
	var err error
	switch {
	case fault.Fail != nil:
		err = fault.Fail
	case name == "qmp_capabilities" && negotiated:
		err = &qmp.Error{Class: qmp.ClassCommandNotFound, Desc: "Capabilities negotiation is already complete, command ignored"}
	case name == "qmp_capabilities":
	case !negotiated:
		err = &qmp.Error{Class: qmp.ClassCommandNotFound, Desc: "Expecting capabilities negotiation with 'qmp_capabilities'"}
	case handler == nil:
		err = &qmp.Error{Class: qmp.ClassCommandNotFound, Desc: "The command " + name + " has not been found"}
	default:
		value, err = handler(args)
	}

	switch {
	case fault.Cut == CutBeforeReply:
		return false
	case fault.Hang:
	case fault.Raw != "":
		f.write(client, fault.Raw, fault.Pieces)
	default:
		f.reply(client, id, value, err, fault)
	}
	if fault.Cut != NoCut {
		return false
	}
	for _, e := range fault.After {
		f.sendEvent(client, e)
	}
	return true
}

// receive notes the command and finds its fault and its handler.
func (f *Fake) receive(client *fakeClient, name string, args json.RawMessage) (Fault, Handler, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	negotiated := client.negotiated
	if name == "qmp_capabilities" {
		client.negotiated = true
	} else {
		f.commands = append(f.commands, Command{name, args})
	}
	var found *Fault
	for _, s := range f.faults {
		if s.Command == name || s.Command == "" && name != "qmp_capabilities" {
			s.seen++
			if found == nil && (s.Nth == 0 || s.Nth == s.seen) {
				found = &s.Fault
			}
		}
	}
	if found == nil {
		found = &Fault{}
	}
	return *found, f.handlers[name], negotiated
}

func (f *Fake) reply(client *fakeClient, id json.RawMessage, value any, err error, fault Fault) {
	if value == nil {
		value = struct{}{}
	}
	reply := map[string]any{"return": value}
	if err != nil {
		reply = map[string]any{"error": errorBody(err)}
	}
	if id != nil {
		reply["id"] = id
	}
	text := encode(reply)
	if fault.Cut == CutWithinReply {
		text = text[:len(text)/2]
	}
	f.write(client, text, fault.Pieces)
}

// errorBody is the body of an error reply.
func errorBody(err error) map[string]string {
	e := &qmp.Error{Desc: err.Error()}
	errors.As(err, &e)
	class := e.Class
	if class == "" {
		class = qmp.ClassGeneric
	}
	return map[string]string{"class": class, "desc": e.Desc}
}

func (f *Fake) sendEvent(client *fakeClient, e Event) {
	now := time.Now()
	event := map[string]any{
		"event":     e.Name,
		"timestamp": map[string]int64{"seconds": now.Unix(), "microseconds": int64(now.Nanosecond() / 1000)},
	}
	if e.Data != nil {
		event["data"] = e.Data
	}
	f.write(client, encode(event), 0)
}

// encode makes a line of the wire. A value that can't be encoded is the test's own mistake.
func encode(v any) string {
	line, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(line) + "\r\n"
}

// write sends text, in pieces if their size is not 0. A client that is gone is noticed by the reading side.
func (f *Fake) write(client *fakeClient, text string, pieces int) {
	if text == "" {
		return
	}
	f.record("<- " + text)
	client.writing.Lock()
	defer client.writing.Unlock()
	if pieces <= 0 {
		pieces = len(text)
	}
	for len(text) > 0 {
		n := min(pieces, len(text))
		if _, err := io.WriteString(client.conn, text[:n]); err != nil {
			return
		}
		text = text[n:]
	}
}

func (f *Fake) record(line string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.transcript = append(f.transcript, line)
}
