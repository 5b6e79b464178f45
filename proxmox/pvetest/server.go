package pvetest

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"

	"qmchain/internal/testenv"
)

// client is qm: it sends its arguments, a line each, in hex, and then prints what comes: lines of o or e and bytes in
// hex, and at the end x and the exit code.
const client = `#!/usr/bin/perl
use strict; use warnings; use IO::Socket::UNIX;
my $s = IO::Socket::UNIX->new(Peer => '%s') or die "the test's Proxmox VE has gone: $!\n";
print $s join('', map { unpack('H*', $_) . "\n" } %s@ARGV), ".\n";
$s->flush;
while (<$s>) {
    if (/^o (.*)/) { syswrite STDOUT, pack('H*', $1) }
    elsif (/^e (.*)/) { syswrite STDERR, pack('H*', $1) }
    elsif (/^x (\d+)/) { exit $1 }
}
die "the test's Proxmox VE has gone\n";
`

// server takes the calls of qm.
type server struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	closer []io.Closer
}

// listen accepts connections at a path until the test ends. When the context ends the connections do.
func (n *Node) listen(path string, handle func(context.Context, net.Conn)) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	s := n.server
	s.closer = append(s.closer, l)
	s.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() {
				ctx, cancel := context.WithCancel(s.ctx)
				defer cancel()
				context.AfterFunc(ctx, func() { _ = conn.Close() })
				handle(ctx, conn)
			})
		}
	})
	return nil
}

func (n *Node) serve() error {
	ctx, cancel := context.WithCancel(context.Background())
	n.server = &server{ctx: ctx, cancel: cancel}
	n.tb.Cleanup(func() {
		cancel()
		for _, c := range n.server.closer {
			_ = c.Close()
		}
		n.server.wg.Wait()
	})
	socket := filepath.Join(n.Dir, "qm.sock")
	if err := n.listen(socket, n.answer); err != nil {
		return err
	}
	if err := testenv.WriteProgram(filepath.Join(n.Bin, "pvesm"), fmt.Sprintf(client, socket, "'pvesm', ")); err != nil {
		return err
	}
	return testenv.WriteProgram(n.Program, fmt.Sprintf(client, socket, ""))
}

// answer serves one call.
func (n *Node) answer(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in := bufio.NewReader(conn)
	var args []string
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSuffix(line, "\n")
		if line == "." {
			break
		}
		arg, err := hex.DecodeString(line)
		if err != nil {
			return
		}
		args = append(args, string(arg))
	}
	// Who kills qm ends its work.
	n.server.wg.Go(func() {
		_, _ = in.ReadByte()
		cancel()
	})
	var mu sync.Mutex
	stdout, stderr := &stream{&mu, conn, "o"}, &stream{&mu, conn, "e"}
	var code int
	if len(args) > 0 && args[0] == "pvesm" { // no command of qm
		code = n.pvesm(args[1:], stdout, stderr)
	} else {
		code = n.qm(ctx, args, stdout, stderr)
	}
	fmt.Fprintf(conn, "x %d\n", code)
}

// stream is one of the client's output streams.
type stream struct {
	mu   *sync.Mutex
	w    io.Writer
	kind string
}

func (s *stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := fmt.Fprintf(s.w, "%s %x\n", s.kind, p); err != nil {
		return 0, err
	}
	return len(p), nil
}
