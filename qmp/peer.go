package qmp

import (
	"net"

	"golang.org/x/sys/unix"
)

// PeerPID is the process that listens at the other end of a Unix socket, as the kernel knows it; 0 where there is none to be
// told, as over TCP. It is QEMU itself only where nobody stands in between or has passed it the socket.
func (c *Client) PeerPID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn, ok := c.conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
