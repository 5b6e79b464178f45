package qmptest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"qmchain/qmp"
)

// CommandSeen is a command on its way through a Proxy.
type CommandSeen struct {
	Name string
	Args json.RawMessage // nil: none
	ID   json.RawMessage // nil: none
	Line []byte          // the command as it came, with its line end
}

// Verdict says what a Proxy does with commands; the zero Verdict forwards them.
type Verdict struct {
	Drop bool       // close both sides; QEMU never sees the commands
	Fail *qmp.Error // answer each of them with this error; QEMU never sees them
}

// Hooks are called by a Proxy, one at a time and in the commands' order. They may take their time and may
// call Drop.
type Hooks struct {
	// Before is called with the commands that came in one write, before QEMU sees them; n is the number of
	// the first one. A hook that kills the client must return Drop. It may change the commands' Lines, which is what
	// QEMU gets.
	Before func(n int, cmds []CommandSeen) Verdict

	// After is called when QEMU has answered command n, before the client sees the reply. In a group of
	// several, QEMU may have executed the next ones by then.
	After func(n int, cmd CommandSeen, reply json.RawMessage)

	// Split forwards commands that came in one write one at a time, each with its Before and After.
	Split bool
}

// Proxy stands between QMP clients and the unix socket of a QEMU. It goes by lines, as QEMU writes them
// and as package qmp does.
//
// Each client's connection has its own connection to QEMU, one at a time; when either side goes away the
// other is closed at once. Commands that came in one write go to QEMU in one write. Events go to the
// client at once, also while a hook runs, and so can overtake the reply that an After hook holds back.
type Proxy struct {
	path     string
	target   string
	hooks    Hooks
	listener net.Listener
	serving  sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	current *proxySession // nil: no client
	count   int
}

// NewProxy starts a Proxy for the QMP socket at the path target. Commands are counted from 1, over all
// connections, qmp_capabilities included. The Proxy ends with the test, once a hook that runs has returned.
func NewProxy(t testing.TB, target string, hooks Hooks) *Proxy {
	t.Helper()
	path := filepath.Join(socketDir(t), "proxy")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{path: path, target: target, hooks: hooks, listener: listener}
	p.serving.Go(p.serve)
	t.Cleanup(func() {
		p.mu.Lock()
		p.closed = true
		p.mu.Unlock()
		_ = listener.Close()
		p.Drop()
		p.serving.Wait()
	})
	return p
}

// Addr is the path of the socket for clients.
func (p *Proxy) Addr() string { return p.path }

// Commands is how many commands have come so far.
func (p *Proxy) Commands() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

// Drop closes the current client's connection and the one to QEMU.
func (p *Proxy) Drop() {
	p.mu.Lock()
	s := p.current
	p.mu.Unlock()
	if s != nil {
		s.close()
	}
}

func (p *Proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		qemu, err := net.Dial("unix", p.target)
		if err != nil {
			_ = client.Close() // QEMU is gone: the client sees just that
			continue
		}
		s := &proxySession{
			proxy:   p,
			client:  client,
			qemu:    qemu,
			gone:    make(chan struct{}),
			groups:  make(chan []byte, queueLength),
			replies: make(chan []byte, queueLength),
		}
		p.mu.Lock()
		p.current = s
		if p.closed {
			s.close()
		}
		p.mu.Unlock()
		s.run()
		p.mu.Lock()
		p.current = nil
		p.mu.Unlock()
	}
}

// queueLength is how many writes of a client, and replies of QEMU, can wait for a hook before reading
// stops. A client that waits for its replies has very few under way.
const queueLength = 1024

// proxySession is one client's connection and its connection to QEMU.
type proxySession struct {
	proxy        *Proxy
	client, qemu net.Conn
	gone         chan struct{}
	closeOnce    sync.Once
	groups       chan []byte // complete lines, as they came in one write
	replies      chan []byte
	writing      sync.Mutex // to the client
}

func (s *proxySession) close() {
	s.closeOnce.Do(func() {
		close(s.gone)
		_ = s.client.Close()
		_ = s.qemu.Close()
	})
}

func (s *proxySession) run() {
	var readers sync.WaitGroup
	readers.Go(s.readClient)
	readers.Go(s.readQEMU)
	for s.next() {
	}
	s.close()
	readers.Wait()
}

// next handles one group of commands. It returns false when the session has ended.
func (s *proxySession) next() bool {
	select {
	case group := <-s.groups:
		cmds := parseCommands(group)
		if !s.proxy.hooks.Split {
			return s.forward(cmds)
		}
		for i := range cmds {
			if !s.forward(cmds[i : i+1]) {
				return false
			}
		}
		return true
	case <-s.gone:
		return false
	}
}

// forward takes commands to QEMU and the replies back, with the hooks around.
func (s *proxySession) forward(cmds []CommandSeen) bool {
	p := s.proxy
	p.mu.Lock()
	first := p.count + 1
	p.count += len(cmds)
	p.mu.Unlock()

	var verdict Verdict
	if p.hooks.Before != nil {
		verdict = p.hooks.Before(first, cmds)
	}
	switch {
	case verdict.Drop:
		return false
	case verdict.Fail != nil:
		for _, cmd := range cmds {
			reply := map[string]any{"error": errorBody(verdict.Fail)}
			if cmd.ID != nil {
				reply["id"] = cmd.ID
			}
			s.toClient([]byte(encode(reply)))
		}
		return true
	}

	var lines []byte
	for _, cmd := range cmds {
		lines = append(lines, cmd.Line...)
	}
	if _, err := s.qemu.Write(lines); err != nil {
		return false // as it does when the client has left meanwhile
	}
	for i, cmd := range cmds {
		select {
		case reply := <-s.replies:
			if p.hooks.After != nil {
				p.hooks.After(first+i, cmd, bytes.TrimSpace(reply))
			}
			s.toClient(reply)
		case <-s.gone:
			return false
		}
	}
	return true
}

// readClient queues what the client writes. It reads all the time, to notice when the client goes.
func (s *proxySession) readClient() {
	defer s.close()
	var group []byte
	buf := make([]byte, 1<<20)
	for {
		n, err := s.client.Read(buf)
		group = append(group, buf[:n]...)
		// A write that is longer than the socket's buffer comes in parts, which end within a line.
		if bytes.HasSuffix(group, []byte("\n")) {
			select {
			case s.groups <- group:
			case <-s.gone:
				return
			}
			group = nil
		}
		if err != nil {
			return
		}
	}
}

// readQEMU queues replies and hands on everything else at once.
func (s *proxySession) readQEMU() {
	defer s.close()
	r := bufio.NewReader(s.qemu)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		if !isReply(line) {
			s.toClient(line)
			continue
		}
		select {
		case s.replies <- line:
		case <-s.gone:
			return
		}
	}
}

func (s *proxySession) toClient(line []byte) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if _, err := s.client.Write(line); err != nil {
		s.close()
	}
}

func isReply(line []byte) bool {
	var m struct {
		Return, Error json.RawMessage
	}
	return json.Unmarshal(line, &m) == nil && (m.Return != nil || m.Error != nil)
}

func parseCommands(group []byte) []CommandSeen {
	var cmds []CommandSeen
	for line := range bytes.Lines(group) {
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var cmd struct {
			Execute   string          `json:"execute"`
			Arguments json.RawMessage `json:"arguments"`
			ID        json.RawMessage `json:"id"`
		}
		// What is no command goes to QEMU as it is, without a name: QEMU says what is wrong with it.
		_ = json.Unmarshal(line, &cmd)
		cmds = append(cmds, CommandSeen{cmd.Execute, cmd.Arguments, cmd.ID, line})
	}
	return cmds
}
