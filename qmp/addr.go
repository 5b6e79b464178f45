package qmp

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// maxSocketPath is how long a unix socket's path can be on Linux: sun_path holds 108 bytes, the last one zero.
const maxSocketPath = 107

// ParseAddr splits the address of a QMP socket into the network and the address that package net wants.
// It takes a path, unix:PATH or tcp:HOST:PORT.
func ParseAddr(s string) (network, address string, err error) {
	if hostport, ok := strings.CutPrefix(s, "tcp:"); ok {
		host, port, err := net.SplitHostPort(hostport)
		if err != nil {
			return "", "", fmt.Errorf("qmp address %q: %w", s, err)
		}
		if host == "" {
			return "", "", fmt.Errorf("qmp address %q: the host is missing", s)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return "", "", fmt.Errorf("qmp address %q: the port must be a number from 1 to 65535", s)
		}
		return "tcp", hostport, nil
	}

	path := strings.TrimPrefix(s, "unix:")
	switch {
	case path == "":
		return "", "", errors.New("qmp address: the path is empty")
	case len(path) > maxSocketPath:
		return "", "", fmt.Errorf("qmp address %q: a socket's path can't be longer than %d bytes", s, maxSocketPath)
	case strings.ContainsRune(path, 0):
		return "", "", fmt.Errorf("qmp address %q: a path can't hold a zero byte", s)
	case path[0] == '@':
		// Package net would take it for an abstract socket.
		path = "./" + path
	}
	return "unix", path, nil
}
