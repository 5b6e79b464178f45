package qga

import (
	"bufio"
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"qmchain/qmp"
)

// guest is a connection to a guest that says what was made up, whatever it is asked.
type guest struct {
	net.Conn
	said *bytes.Reader
	read int
}

func (g *guest) Write(p []byte) (int, error)   { return len(p), nil }
func (g *guest) SetDeadline(t time.Time) error { return nil }
func (g *guest) Read(p []byte) (int, error) {
	n, err := g.said.Read(p)
	g.read += n
	return n, err
}

// Answers come from within a guest, which may say anything: each command ends in an answer or an error that names it, and
// reads no more than a buffer ahead.
func FuzzAnswers(f *testing.F) {
	const synced = "\xff{\"return\": 8}\n"
	for _, said := range []string{
		synced + "{\"return\": 3}\n{\"return\": \"frozen\"}\n{\"return\": 3}\n",
		"{\"return\": 1}\n\xff{\"return\": 7}\n" + synced + "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}\n{\"return\": {}}\n",
		synced + "{\"return\": -1}\n{\"return\": 1e3}\n{}\nnull\n",
		"\xff\xff\xff", "\xff[]\n", synced + strings.Repeat("x", 1000), synced + "{\"error\": {}, \"return\": null}\n",
	} {
		f.Add([]byte(said))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		conn := &guest{said: bytes.NewReader(said)}
		c := &Client{conn: conn, in: bufio.NewReaderSize(conn, maxLine), id: 7}
		failed := func(command string, err error) bool {
			if err == nil {
				return false
			}
			var refused *qmp.Error
			if !strings.HasPrefix(err.Error(), "guest agent: "+command) || errors.As(err, &refused) && refused.Command != command {
				t.Errorf("%s: %v", command, err)
			}
			return true
		}
		if failed("guest-sync-delimited", c.sync(t.Context())) {
			return
		}
		if at := len(said) - conn.said.Len() - c.in.Buffered(); !bytes.Contains(said[:at], []byte{0xff}) {
			t.Errorf("in step with %q", said[:at])
		}
		n, err := c.Freeze(t.Context(), nil)
		if !failed("guest-fsfreeze-freeze", err) && n < 0 {
			t.Errorf("%d file systems are frozen", n)
		}
		_, err = c.Frozen(t.Context())
		failed("guest-fsfreeze-status", err)
		_, err = c.Freeze(t.Context(), []string{"/"})
		failed("guest-fsfreeze-freeze-list", err)
		failed("guest-fsfreeze-thaw", c.Thaw(t.Context()))
		if conn.read > len(said) {
			t.Fatal("it read what was not said")
		}
	})
}
