package testenv

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// commandTimeout bounds one monitor command: far above what any takes, on a
// loaded machine.
const commandTimeout = 60 * time.Second

// Event is an event that QEMU sent.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// CommandError is QEMU's answer to a command that failed.
type CommandError struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *CommandError) Error() string { return e.Command + ": " + e.Desc }

var errGone = errors.New("QEMU has gone")

// monitor is a connection to a QMP socket.
type monitor struct {
	conn net.Conn

	mu      sync.Mutex
	next    int
	waiting map[int]chan message
	events  []Event
	seen    map[string]int // events handed out by wait, by name
	more    chan struct{}  // closed and replaced at each event
	closed  bool
}

type message struct {
	Event
	Greeting json.RawMessage `json:"QMP"`
	ID       int             `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *CommandError   `json:"error"`
}

// dialMonitor connects to a socket that QEMU has made or will soon.
// It gives up when gone is closed.
func dialMonitor(path string, gone <-chan struct{}, timeout time.Duration) (*monitor, error) {
	deadline := time.Now().Add(timeout)
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			m, err := newMonitor(conn, deadline)
			if err != nil {
				_ = conn.Close()
			}
			return m, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("QEMU made no socket within %v: %w", timeout, err)
		}
		select {
		case <-gone:
			return nil, errGone
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func newMonitor(conn net.Conn, deadline time.Time) (*monitor, error) {
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	dec := json.NewDecoder(conn)
	var greeting message
	if err := dec.Decode(&greeting); err != nil {
		return nil, fmt.Errorf("no greeting from QEMU: %w", err)
	}
	if greeting.Greeting == nil {
		return nil, errors.New("no greeting from QEMU")
	}
	m := &monitor{conn: conn, waiting: map[int]chan message{}, seen: map[string]int{}, more: make(chan struct{})}
	go m.read(dec)
	if err := m.execute("qmp_capabilities", nil, nil); err != nil {
		return nil, err
	}
	return m, conn.SetDeadline(time.Time{})
}

func (m *monitor) read(dec *json.Decoder) {
	for {
		var msg message
		err := dec.Decode(&msg)
		m.mu.Lock()
		switch {
		case err != nil:
			m.closed = true
			for id, c := range m.waiting {
				delete(m.waiting, id)
				close(c)
			}
			close(m.more)
			m.mu.Unlock()
			return
		case msg.Name != "":
			m.events = append(m.events, msg.Event)
			close(m.more)
			m.more = make(chan struct{})
		default:
			if c := m.waiting[msg.ID]; c != nil {
				delete(m.waiting, msg.ID)
				c <- msg
			}
		}
		m.mu.Unlock()
	}
}

// execute runs a command and decodes what it returns into result, unless that
// is nil.
func (m *monitor) execute(command string, args, result any) error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return fmt.Errorf("%s: %w", command, errGone)
	}
	m.next++
	id := m.next
	reply := make(chan message, 1)
	m.waiting[id] = reply
	request := map[string]any{"execute": command, "id": id}
	if args != nil {
		request["arguments"] = args
	}
	err := json.NewEncoder(m.conn).Encode(request)
	m.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	timer := time.NewTimer(commandTimeout)
	defer timer.Stop()
	select {
	case msg, ok := <-reply:
		switch {
		case !ok:
			return fmt.Errorf("%s: %w", command, errGone)
		case msg.Error != nil:
			msg.Error.Command = command
			return msg.Error
		case result != nil:
			if err := json.Unmarshal(msg.Return, result); err != nil {
				return fmt.Errorf("%s: %w", command, err)
			}
		}
		return nil
	case <-timer.C:
		return fmt.Errorf("%s: no answer within %v", command, commandTimeout)
	}
}

// wait returns the next event of that name: the first time the first since
// the connection, then each once.
func (m *monitor) wait(name string, timeout time.Duration) (Event, error) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for {
		m.mu.Lock()
		for i := m.seen[name]; i < len(m.events); i++ {
			if m.events[i].Name == name {
				e := m.events[i]
				m.seen[name] = i + 1
				m.mu.Unlock()
				return e, nil
			}
		}
		more, closed := m.more, m.closed
		m.mu.Unlock()
		if closed {
			return Event{}, fmt.Errorf("no event %s: %w", name, errGone)
		}
		select {
		case <-more:
		case <-timer.C:
			return Event{}, fmt.Errorf("no event %s within %v", name, timeout)
		}
	}
}

func (m *monitor) allEvents() []Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.events)
}

func (m *monitor) close() { _ = m.conn.Close() }
