package pvetest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// monitors are the QEMUs that are connected to qmeventd, by VMID.
type monitors struct {
	mu   sync.Mutex
	qemu map[string]*monitor
}

// monitor is what qmeventd knows of one QEMU. As in the original there is one flag for all who keep it alive.
type monitor struct {
	conn   net.Conn
	pid    int
	backup bool
	ending bool
}

// listenEvents is qmeventd: it ends a QEMU whose guest has powered off, unless somebody keeps the VM for a backup, and
// cleans up when a QEMU has gone.
func (n *Node) listenEvents() error {
	m := &monitors{qemu: map[string]*monitor{}}
	n.monitors = m
	return n.listen(n.Events, func(ctx context.Context, conn net.Conn) {
		kept := "" // the VM that this client keeps
		in := json.NewDecoder(bufio.NewReader(conn))
		for {
			var message struct {
				QMP    json.RawMessage
				Vzdump *struct{ VMID string }
			}
			if in.Decode(&message) != nil {
				break
			}
			switch {
			case message.QMP != nil:
				n.watch(ctx, conn, in, m)
				return
			case message.Vzdump != nil && m.keep(message.Vzdump.VMID):
				kept = message.Vzdump.VMID
			}
		}
		if ctx.Err() == nil { // the test goes on
			m.release(kept)
		}
	})
}

// KeptAlive tells whether somebody has asked qmeventd to leave the VM's QEMU alone when its guest powers off.
func (n *Node) KeptAlive(vmid int) bool {
	n.monitors.mu.Lock()
	defer n.monitors.mu.Unlock()
	q := n.monitors.qemu[strconv.Itoa(vmid)]
	return q != nil && q.backup
}

// keep is false for a VM whose QEMU is not connected.
func (m *monitors) keep(vmid string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	q := m.qemu[vmid]
	if q != nil {
		q.backup = true
	}
	return q != nil
}

// release is the end of one who has kept the VM: it counts for all.
func (m *monitors) release(vmid string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if q := m.qemu[vmid]; q != nil {
		q.backup = false
		q.ask()
	}
}

// asked is false for a QEMU that is ending: then a SHUTDOWN tells of our own signal.
func (m *monitors) asked(q *monitor) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !q.ending {
		q.ask()
	}
	return !q.ending
}

// ask has QEMU tell its run state; answered does the rest.
func (q *monitor) ask() {
	_, _ = io.WriteString(q.conn, `{"execute":"query-status"}`) // where QEMU has gone there is nothing to be done
}

// answered ends a QEMU that is not active, unless it is kept.
func (m *monitors) answered(q *monitor, status string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if status == "running" || status == "paused" || q.backup || q.ending {
		return
	}
	q.ending = true
	// By its number: it is ours, and has not been waited for while it is connected.
	_ = syscall.Kill(q.pid, syscall.SIGTERM)
}

// watch serves a QEMU, until it has gone.
func (n *Node) watch(ctx context.Context, conn net.Conn, in *json.Decoder, m *monitors) {
	vmid, pid, err := connected(conn)
	if err != nil {
		return
	}
	if _, err := io.WriteString(conn, `{"execute":"qmp_capabilities"}`); err != nil {
		return
	}
	q := &monitor{conn: conn, pid: pid}
	m.mu.Lock()
	m.qemu[vmid] = q
	m.mu.Unlock()
	clean := false // ended by a command, so that qm cleans up
	for {
		var message struct {
			Event  string
			Data   struct{ Guest bool }
			Return struct{ Status string }
		}
		if in.Decode(&message) != nil {
			break
		}
		switch {
		case message.Return.Status != "":
			m.answered(q, message.Return.Status)
		case message.Event == "SHUTDOWN" && m.asked(q):
			clean = !message.Data.Guest
		}
	}
	m.mu.Lock()
	if m.qemu[vmid] == q {
		delete(m.qemu, vmid)
	}
	m.mu.Unlock()
	if ctx.Err() != nil {
		return // the test ends
	}
	c := &call{Node: n, ctx: ctx, stdout: io.Discard, stderr: io.Discard, name: "cleanup", vmid: vmid}
	for vm := n.vm(vmid); vm != nil && vm.Alive() && vm.Pid() == pid && ctx.Err() == nil; {
		c.ended(vm, exitLimit)
	}
	if err := c.cleanup(!clean); err != nil && ctx.Err() == nil {
		n.tb.Logf("pvetest: qm cleanup %s: %v", vmid, err)
	}
}

// connected is the VM whose QEMU is connected, and its process: /proc knows, by the name of its pid file.
func connected(conn net.Conn) (vmid string, pid int, err error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "", 0, err
	}
	var cred *unix.Ucred
	if ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); ctlErr != nil {
		return "", 0, ctlErr
	}
	if err != nil {
		return "", 0, err
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cred.Pid))
	if err != nil {
		return "", 0, err
	}
	_, rest, _ := strings.Cut(string(line), "\x00-pidfile\x00")
	path, _, _ := strings.Cut(rest, "\x00")
	return strings.TrimSuffix(filepath.Base(path), ".pid"), int(cred.Pid), nil
}
