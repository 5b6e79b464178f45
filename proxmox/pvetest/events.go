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
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// keepers are those who keep qmeventd from ending VMs.
type keepers struct {
	mu    sync.Mutex
	count map[string]int    // by VMID
	owed  map[string]func() // what is to be done when the last has gone
}

// listenEvents is qmeventd: it ends a QEMU whose guest has powered off, unless somebody holds the VM for a backup, and
// cleans up when a QEMU has gone.
func (n *Node) listenEvents() error {
	k := &keepers{count: map[string]int{}, owed: map[string]func(){}}
	return n.listen(n.Events, func(ctx context.Context, conn net.Conn) {
		var first map[string]json.RawMessage
		in := json.NewDecoder(bufio.NewReader(conn))
		if in.Decode(&first) != nil {
			return
		}
		var keeper struct{ VMID string }
		switch {
		case first["QMP"] != nil:
			n.watch(ctx, conn, in, k)
		case first["vzdump"] != nil && json.Unmarshal(first["vzdump"], &keeper) == nil:
			k.hold(keeper.VMID)
			defer k.release(keeper.VMID)
			_, _ = io.Copy(io.Discard, conn)
		}
	})
}

func (k *keepers) hold(vmid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.count[vmid]++
}

func (k *keepers) release(vmid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.count[vmid]--
	if end := k.owed[vmid]; end != nil && k.count[vmid] == 0 {
		delete(k.owed, vmid)
		end()
	}
}

// unlessHeld does end, now or when nobody holds the VM any more.
func (k *keepers) unlessHeld(vmid string, end func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.count[vmid] > 0 {
		k.owed[vmid] = end
		return
	}
	end()
}

// watch serves a QEMU, until it has gone.
func (n *Node) watch(ctx context.Context, conn net.Conn, in *json.Decoder, k *keepers) {
	vmid, pid, err := connected(conn)
	if err != nil {
		return
	}
	if _, err := io.WriteString(conn, `{"execute":"qmp_capabilities"}`); err != nil {
		return
	}
	clean, asked := false, false // clean: ended by a command, so that qm cleans up
	for {
		var event struct {
			Event string
			Data  struct{ Guest bool }
		}
		if in.Decode(&event) != nil {
			break
		}
		if event.Event != "SHUTDOWN" || asked {
			continue // the second tells of our own signal
		}
		asked = true
		clean = !event.Data.Guest
		if event.Data.Guest {
			// By its number: it is ours, and has not been waited for while it is connected.
			k.unlessHeld(vmid, func() { _ = syscall.Kill(pid, syscall.SIGTERM) })
		}
	}
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
