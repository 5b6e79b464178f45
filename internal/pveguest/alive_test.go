package pveguest

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/proxmox/pvetest"
)

// TestTakeKeepsAlive: a guest that powers off leaves its QEMU to the run, also when somebody else has kept it alive and ended
// before. A QEMU that the run's end would end is left alone.
func TestTakeKeepsAlive(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	n.AddVM(110)
	n.QM("start", "110")
	s := site(t, n)
	log := &bytes.Buffer{}
	s.Log.(*logrus.Logger).SetOutput(log)
	find := func() *VM {
		t.Helper()
		vm, err := s.Find(110)
		if err != nil {
			t.Fatal(err)
		}
		return vm
	}
	await := func(want string) {
		t.Helper()
		got := ""
		for range 1200 {
			var err error
			if got, err = s.Host.Status(t.Context(), 110); err == nil && got == want {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Fatalf("the VM is %s, not %s", got, want)
	}
	kept := func() {
		t.Helper()
		for range 600 {
			if n.KeptAlive(110) {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Fatal("QEMU is not kept alive")
	}
	release := func() (free func() error) {
		t.Helper()
		give, err := find().Take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return func() error { return give(t.Context()) }
	}
	reset := func() {
		t.Helper()
		n.VM(110).Execute("stop", nil, nil)
		n.VM(110).Execute("system_reset", nil, nil)
		await("prelaunch")
	}

	// It is not kept in a state in which the end of that would end it.
	reset()
	if err := release()(); err != nil {
		t.Error(err)
	}
	time.Sleep(300 * time.Millisecond)
	await("prelaunch")
	if !strings.Contains(log.String(), "should the guest power off") {
		t.Errorf("it does not say that QEMU is not kept: %s", log)
	}

	// Nor is it let go in such a state: not before it runs again.
	n.VM(110).Execute("cont", nil, nil)
	free := release()
	kept()
	reset()
	freed := make(chan error, 1)
	go func() { freed <- free() }()
	select {
	case err := <-freed:
		t.Fatalf("QEMU was let go: %v", err)
	case <-time.After(2 * time.Second):
	}
	await("prelaunch")
	n.VM(110).Execute("cont", nil, nil)
	if err := <-freed; err != nil {
		t.Error(err)
	}
	await("running")

	free = release()
	other, err := s.Host.KeepAlive(t.Context(), 110)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	_ = other.Close()
	time.Sleep(aliveInterval + 300*time.Millisecond)
	kept()
	n.VM(110).PowerOff()
	await("shutdown")
	time.Sleep(300 * time.Millisecond)
	await("shutdown")
	if err := free(); err != nil {
		t.Error(err)
	}
	await("stopped")
}
