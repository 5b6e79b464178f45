package main

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"qmchain/chain"
)

// TestStopByVMID: before `qm stop` a hook script has the bitmaps saved, and goes on when it is told that they are.
func TestStopByVMID(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.AddStorage("lvmthin", "thin")
	p.add(110, "virtio1: thin:vm-110-disk-1,size=2M")
	p.point(0, 110)
	p.VM(110).IO("virtio1", "write -P 31 0 64k")

	socket := filepath.Join(p.Dir, "notify") // a test's own temp folder has a path that is too long
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = systemd.Close() }()
	cmd, stderr := p.command(append([]string{"keep", "110", "--stop", "--limit", "1m"}, p.common[len(p.common)-2:]...)...)
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait() // the test has failed
		}
	}()
	text := make([]byte, 100)
	if err := systemd.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	n, err := systemd.Read(text)
	if err != nil || string(text[:n]) != "READY=1" {
		t.Fatalf("%q, %v", text[:n], err)
	}
	if got := p.QM("status", "110"); got != "status: paused\n" {
		t.Errorf("the guest may write: %s", got)
	}
	p.QM("stop", "110")
	if err := cmd.Wait(); err != nil {
		t.Errorf("keep --stop: %v: %s", err, stderr)
	}
	p.await("the VM's end", func() bool {
		code, _, _ := p.TryQM("start", "110")
		return code == 0
	})
	m, disks := p.point(0, 110)
	if m.Level() != chain.Inc {
		t.Errorf("level %s: %+v", m.Level(), m.Disks)
	}
	p.holds(disks, "virtio1", 31)
}
