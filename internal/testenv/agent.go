package testenv

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// Agent is a connection to a guest agent. The agent serves one at a time.
type Agent struct {
	conn net.Conn
	in   *bufio.Reader

	mu   sync.Mutex
	sync int
}

// DialAgent connects to a guest agent's socket and waits until the agent
// answers.
func DialAgent(ctx context.Context, path string) (*Agent, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	a := &Agent{conn: conn, in: bufio.NewReader(conn)}
	if err := a.resync(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return a, nil
}

// Close ends the connection.
func (a *Agent) Close() error { return a.conn.Close() }

// resync skips what the agent still has to say to those before us. A byte that
// no JSON text holds makes it forget half a command, and marks its answer.
func (a *Agent) resync(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sync++
	command := fmt.Sprintf("\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}\n", a.sync)
	return a.exchange(ctx, "guest-sync-delimited", []byte(command), func() (bool, error) {
		if _, err := a.in.ReadBytes(0xff); err != nil {
			return false, err
		}
		line, err := a.in.ReadBytes('\n')
		if err != nil {
			return false, err
		}
		var answer struct{ Return int }
		return json.Unmarshal(line, &answer) == nil && answer.Return == a.sync, nil
	})
}

// exchange sends a command and reads until read says that it has the answer,
// for as long as ctx allows, and no longer than commandTimeout.
func (a *Agent) exchange(ctx context.Context, name string, command []byte, read func() (done bool, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if err := a.conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = a.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := a.conn.Write(command)
	for done := false; err == nil && !done; {
		done, err = read()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("no answer from the guest agent: %w", context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// Execute runs an agent command and decodes what it returns into result,
// unless that is nil. A refusal is a *CommandError.
func (a *Agent) Execute(ctx context.Context, command string, args, result any) error {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	text, err := json.Marshal(request)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.exchange(ctx, command, append(text, '\n'), func() (bool, error) {
		line, err := a.in.ReadBytes('\n')
		if err != nil {
			return false, err
		}
		var answer message
		if err := json.Unmarshal(line, &answer); err != nil {
			return false, fmt.Errorf("%q: %w", line, err)
		}
		if answer.Error != nil {
			answer.Error.Command = command
			return false, answer.Error
		}
		if result == nil {
			return true, nil
		}
		return true, json.Unmarshal(answer.Return, result)
	})
}

// Exec runs a program in the guest and returns its output when it has ended.
// An exit code other than 0 is an error, with the program's stderr in it.
func (a *Agent) Exec(ctx context.Context, program string, args ...string) (stdout string, err error) {
	var started struct{ PID int }
	err = a.Execute(ctx, "guest-exec", map[string]any{"path": program, "arg": args, "capture-output": true}, &started)
	if err != nil {
		return "", err
	}
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		var status struct {
			Exited   bool
			ExitCode int
			Signal   int
			OutData  string `json:"out-data"`
			ErrData  string `json:"err-data"`
		}
		if err := a.Execute(ctx, "guest-exec-status", map[string]any{"pid": started.PID}, &status); err != nil {
			return "", err
		}
		if !status.Exited {
			select {
			case <-ctx.Done():
				return "", context.Cause(ctx)
			case <-time.After(wait):
			}
			continue
		}
		out, err := base64.StdEncoding.DecodeString(status.OutData)
		if err != nil {
			return "", err
		}
		stderr, err := base64.StdEncoding.DecodeString(status.ErrData)
		if err != nil {
			return "", err
		}
		if status.ExitCode != 0 || status.Signal != 0 {
			return string(out), fmt.Errorf("exit code %d, signal %d: %s", status.ExitCode, status.Signal, bytes.TrimSpace(stderr))
		}
		return string(out), nil
	}
}

// Freeze freezes the guest's file systems and returns how many.
func (a *Agent) Freeze(ctx context.Context) (n int, err error) {
	return n, a.Execute(ctx, "guest-fsfreeze-freeze", nil, &n)
}

// Thaw thaws them and returns how many.
func (a *Agent) Thaw(ctx context.Context) (n int, err error) {
	return n, a.Execute(ctx, "guest-fsfreeze-thaw", nil, &n)
}

// Frozen tells whether the guest's file systems are frozen.
func (a *Agent) Frozen(ctx context.Context) (bool, error) {
	var status string
	err := a.Execute(ctx, "guest-fsfreeze-status", nil, &status)
	return strings.EqualFold(status, "frozen"), err
}
