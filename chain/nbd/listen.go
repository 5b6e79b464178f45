package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the longest path that a unix socket can have, in bytes.
const maxSocketPath = 107

var (
	// ErrAddress is wrapped where an address is not of a known kind.
	ErrAddress = errors.New("not an address to listen at (unix:PATH or tcp:HOST:PORT)")
	// ErrAddressInUse is wrapped where something is at an address already.
	ErrAddressInUse = errors.New("in use")
)

// Listen listens at unix:PATH or tcp:HOST:PORT. Only the own user can connect to a unix socket. One that nobody listens at
// any more is replaced; it is removed when the listener is closed.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	kind, where, _ := strings.Cut(addr, ":")
	var lc net.ListenConfig
	switch {
	case kind == "tcp":
		if _, _, err := net.SplitHostPort(where); err != nil {
			return nil, fmt.Errorf("%q: %w: %w", addr, ErrAddress, err)
		}
	case kind == "unix" && where != "":
		if len(where) > maxSocketPath {
			return nil, fmt.Errorf("%q: %w: a socket's path has at most %d bytes", addr, ErrAddress, maxSocketPath)
		}
		if err := makeWay(ctx, where); err != nil {
			return nil, err
		}
		// The mode of the socket becomes that of the file, from its first moment on.
		lc.Control = func(_, _ string, c syscall.RawConn) error {
			var modeErr error
			err := c.Control(func(fd uintptr) { modeErr = unix.Fchmod(int(fd), 0o600) })
			return errors.Join(err, modeErr)
		}
	default:
		return nil, fmt.Errorf("%q: %w", addr, ErrAddress)
	}
	l, err := lc.Listen(ctx, kind, where)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s: %w: %w", addr, ErrAddressInUse, err)
	}
	return l, err
}

// makeWay takes away a socket that has no listener.
func makeWay(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s: %w: it is no socket", path, ErrAddressInUse)
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		_ = c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%s: %w: somebody listens there", path, ErrAddressInUse)
	}
	return os.Remove(path)
}

// URI is the address of an export for clients, as in https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md.
func URI(addr net.Addr, export string) string {
	u := url.URL{Scheme: "nbd", Host: addr.String(), Path: "/" + export}
	if addr.Network() == "unix" {
		u.Scheme, u.Host = "nbd+unix", ""
		// As a part of a path, only more so: these have a meaning in a query.
		u.RawQuery = "socket=" + strings.NewReplacer("&", "%26", "+", "%2B", ";", "%3B").Replace((&url.URL{Path: addr.String()}).EscapedPath())
	}
	return u.String()
}
