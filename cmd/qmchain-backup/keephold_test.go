package main

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
)

// keeping has a keeper for VM 110, and returns when it holds it. With wait it is told to end, and awaited.
func (p *pve) keeping() (wait func() string) {
	p.t.Helper()
	cmd, stderr := p.command(append([]string{"keep", "110"}, p.common[len(p.common)-2:]...)...)
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	wait = func() string {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Signal(os.Interrupt)
			if err := cmd.Wait(); err != nil {
				p.t.Errorf("keep: %v", err)
			}
			p.t.Logf("keep: %s", stderr)
		}
		return stderr.String()
	}
	p.t.Cleanup(func() { _ = wait() })
	p.await("the keeper", func() bool { return p.KeptAlive(110) })
	return wait
}

func (p *pve) status() string {
	return strings.TrimSpace(strings.TrimPrefix(p.QM("status", "110"), "status: "))
}

// stays makes sure that the VM is in that state all the time.
func (p *pve) stays(want string, d time.Duration) {
	p.t.Helper()
	for until := time.Now().Add(d); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if got := p.status(); got != want {
			p.t.Fatalf("the VM is %s, not %s", got, want)
		}
	}
}

// TestKeepBesideVzdump: qmeventd knows of one keep-alive only, whoever ends his. vzdump's QEMU is left to it, and the bitmaps
// are saved in time all the same.
func TestKeepBesideVzdump(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.AddStorage("lvmthin", "thin")
	p.add(110, "virtio1: thin:vm-110-disk-1,size=2M")
	p.point(0, 110)
	p.VM(110).IO("virtio1", "write -P 31 0 64k")
	p.keeping()
	p.QM("set", "110", "--lock", "backup")
	vzdump, err := net.Dial("unix", p.Events)
	if err != nil {
		t.Fatal(err)
	}
	defer vzdump.Close()
	if _, err := vzdump.Write([]byte(`{"vzdump":{"vmid":"110"}}`)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	p.VM(110).PowerOff()
	p.await("the power-off", func() bool { return p.status() == "shutdown" })
	p.stays("shutdown", 4*time.Second)
	_ = vzdump.Close()
	p.await("QEMU's end", func() bool { return p.status() == "stopped" })
	p.QM("unlock", "110")
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

// TestKeepBesideRun: a keeper, and whatever else holds the VM for a moment, leaves a run its QEMU.
func TestKeepBesideRun(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110, "virtio1: local:110/vm-110-disk-1.qcow2,size=8M")
	p.VM(110).IO("virtio1", "write -P 31 0 8M")
	p.keeping()
	wait := p.background(110, "--level", "full")
	other, err := net.Dial("unix", p.Events)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Write([]byte(`{"vzdump":{"vmid":"110"}}`)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	_ = other.Close()
	time.Sleep(3 * time.Second) // the keeper has found the socket busy
	p.VM(110).PowerOff()
	code, stdout, stderr := wait()
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	_, disks := p.read(strings.TrimSpace(stdout))
	p.holds(disks, "virtio1", 31)
	p.await("QEMU's end", func() bool { return p.status() == "stopped" })
}

// TestKeepLeaves: a keeper that is ended while its end would be QEMU's holds on until it is not.
func TestKeepLeaves(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)
	end := p.keeping()
	p.VM(110).Execute("stop", nil, nil)
	p.VM(110).Execute("system_reset", nil, nil)
	p.await("the reset", func() bool { return p.status() == "prelaunch" })
	time.Sleep(3 * time.Second) // it looks in twice a second
	said := make(chan string, 1)
	go func() { said <- end() }()
	p.stays("prelaunch", 2*time.Second)
	p.VM(110).Execute("cont", nil, nil)
	if text := <-said; !strings.Contains(text, "QEMU is held for up to") {
		t.Errorf("the keeper says: %s", text)
	}
	p.stays("running", time.Second)
}

// TestKeepBesideVzdumpThatStops: vzdump can have the VM shut down first. It waits for QEMU's end then, and holds the VM's lock, but
// has nothing under way in QEMU.
func TestKeepBesideVzdumpThatStops(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.AddStorage("lvmthin", "thin")
	p.add(110, "virtio1: thin:vm-110-disk-1,size=2M")
	p.point(0, 110)
	p.VM(110).IO("virtio1", "write -P 31 0 64k")
	p.keeping()
	p.QM("set", "110", "--lock", "backup")
	shutdown := make(chan string, 1)
	began := time.Now()
	go func() {
		_, _, stderr := p.TryQM("shutdown", "110", "--skiplock", "--timeout", "120")
		shutdown <- stderr
	}()
	vm := p.VM(110)
	vm.WaitEvent("POWERDOWN", time.Minute)
	vm.PowerOff()
	if stderr := <-shutdown; stderr != "" {
		t.Errorf("after %s: %s", time.Since(began), stderr)
	}
	p.QM("start", "110", "--skiplock")
	p.QM("unlock", "110")
	m, disks := p.point(0, 110)
	if m.Level() != chain.Inc {
		t.Errorf("level %s: %+v", m.Level(), m.Disks)
	}
	p.holds(disks, "virtio1", 31)
}
