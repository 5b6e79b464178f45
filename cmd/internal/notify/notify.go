// Package notify tells systemd how a service is doing: sd_notify(3), a datagram of lines VARIABLE=VALUE to the socket that
// systemd names in the service's environment.
package notify

import (
	"fmt"
	"net"
	"strings"
)

// Systemd is where systemd listens for news of this process. The zero value is where nobody does, and tells nobody.
type Systemd struct{ socket string }

// Of finds it in the environment.
func Of(getenv func(string) string) Systemd { return Systemd{getenv("NOTIFY_SOCKET")} }

// Tell sends what has changed. An error is no reason to give up what is told of.
func (s Systemd) Tell(lines ...string) error {
	if s.socket == "" {
		return nil
	}
	// A name that begins with @ is one of Linux' abstract sockets, which package net writes in the same way.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(strings.Join(lines, "\n"))); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// Status makes one line of a text that is for `systemctl status`.
func Status(format string, args ...any) string {
	return "STATUS=" + strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " ")
}
