package proxmox_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

// hostOf is the product's view of a test's node.
func hostOf(n *pvetest.Node) proxmox.Host {
	return proxmox.Host{Etc: n.Etc, Run: n.Run, Events: n.Events, VzdumpLock: n.VzdumpLock, Program: n.Program}
}

func TestWhereAVMIs(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(110)
	n.AddVM(111)
	n.MoveAway(111, "pve2")
	n.AddContainer(105)
	for _, test := range []struct {
		vmid proxmox.VMID
		is   error
		text string
	}{
		{110, nil, ""},
		{111, proxmox.ErrElsewhere, "VM 111 is on node pve2: on another node"},
		{105, proxmox.ErrNotFound, "105 is a container on node pve1, not a VM: not found"},
		{999, proxmox.ErrNotFound, "VM 999: not found"},
	} {
		c, err := h.Config(test.vmid)
		if !errors.Is(err, test.is) || err != nil && err.Error() != test.text {
			t.Errorf("%s: %v", test.vmid, err)
		}
		if (c != nil) != (test.is == nil) {
			t.Errorf("%s: configuration %v", test.vmid, c)
		}
	}
	if h.Node() != "pve1" {
		t.Errorf("node is %q", h.Node())
	}
	h.Etc = t.TempDir()
	if _, err := h.Config(110); !errors.Is(err, proxmox.ErrNoHost) {
		t.Errorf("without PVE: %v", err)
	}
	if _, err := h.VMIDs(); !errors.Is(err, proxmox.ErrNoHost) {
		t.Errorf("without PVE: %v", err)
	}
	for _, bad := range []string{"", "99", "0110", "+110", "1e3", "1000000000", "web"} {
		if _, err := proxmox.ParseVMID(bad); err == nil {
			t.Errorf("%q is taken for a VMID", bad)
		}
	}
}

func TestSelect(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(1100, "tags: prod;web")
	n.AddVM(110, "tags: Prod")
	n.AddVM(120)
	n.AddVM(130)
	n.MoveAway(130, "pve2")
	n.AddContainer(105)
	n.AddPool("some", 120, 130, 1100, 105, 999)
	n.AddPool("none")
	for _, test := range []struct {
		s     proxmox.Selection
		want  []proxmox.VMID
		notes int
		is    error
	}{
		{proxmox.Selection{VMIDs: []proxmox.VMID{999, 110, 999}}, []proxmox.VMID{999, 110}, 0, nil},
		{proxmox.Selection{All: true}, []proxmox.VMID{110, 120, 1100}, 0, nil},
		{proxmox.Selection{All: true, Exclude: []proxmox.VMID{110, 5000}}, []proxmox.VMID{120, 1100}, 0, nil},
		{proxmox.Selection{Tag: "prod"}, []proxmox.VMID{110, 1100}, 0, nil},
		{proxmox.Selection{Tag: "pro"}, nil, 0, proxmox.ErrNotFound},
		{proxmox.Selection{Pool: "some"}, []proxmox.VMID{120, 1100}, 3, nil},
		{proxmox.Selection{Pool: "none"}, nil, 0, nil},
		{proxmox.Selection{Pool: "som"}, nil, 0, proxmox.ErrNotFound},
	} {
		got, notes, err := h.Select(test.s)
		if !errors.Is(err, test.is) || !slices.Equal(got, test.want) || len(notes) != test.notes {
			t.Errorf("%+v: %v, %q, %v", test.s, got, notes, err)
		}
	}
}

func TestSetExplains(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	n.LockTimeout = time.Second
	h := hostOf(n)
	n.AddVM(110)
	read := func() *proxmox.Config {
		t.Helper()
		c, err := h.Config(110)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	old := read()
	if err := h.Set(t.Context(), old, "--onboot", "1"); err != nil {
		t.Fatal(err)
	}
	if err := h.Set(t.Context(), old, "--onboot", "0"); !errors.Is(err, proxmox.ErrChanged) {
		t.Errorf("changed: %v", err)
	}
	if err := h.Set(t.Context(), read(), "--args", "a\nb"); err == nil || !strings.Contains(err.Error(), "property contains a line feed") {
		t.Errorf("refused: %v", err)
	}
	// Somebody works on the VM.
	file, err := os.OpenFile(n.Dir+"/run/lock/lock-110.conf", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := h.Set(t.Context(), read(), "--onboot", "0"); !errors.Is(err, proxmox.ErrBusy) {
		t.Errorf("busy: %v", err)
	}
	_ = file.Close()
	n.QM("set", "110", "--lock", "snapshot")
	if err := h.Set(t.Context(), read(), "--onboot", "0"); !errors.Is(err, proxmox.ErrLocked) || !strings.Contains(err.Error(), "(snapshot)") {
		t.Errorf("locked: %v", err)
	}
	was := read()
	n.MoveAway(110, "pve2")
	if err := h.Set(t.Context(), was, "--onboot", "0"); !errors.Is(err, proxmox.ErrElsewhere) {
		t.Errorf("moved away: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Set(cancelled, was, "--onboot", "0"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestQMThatHangs: every wait ends.
func TestQMThatHangs(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(110)
	h.Program = n.Dir + "/hanging"
	if err := os.WriteFile(h.Program, []byte("#!/bin/sh\nexec sleep 600\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := h.QM(t.Context(), 50*time.Millisecond, "status", "110"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the limit: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if _, err := h.AddSocket(ctx, 110, false); err == nil || time.Since(begun) > 30*time.Second {
		t.Errorf("interrupted: %v after %v", err, time.Since(begun))
	}
	h.Program = n.Dir + "/missing"
	if _, err := h.QM(t.Context(), time.Second, "status", "110"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without qm: %v", err)
	}
}

// TestBackupLock: only our own lock is given back.
func TestBackupLock(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	lockOf := func() string {
		t.Helper()
		c, err := h.Config(110)
		if err != nil {
			t.Fatal(err)
		}
		return c.Lock()
	}
	vzdump := func() (end func()) {
		t.Helper()
		f, err := os.OpenFile(n.VzdumpLock, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		return func() { _ = f.Close() }
	}
	for _, test := range []struct {
		what    string
		crashed bool // another process gives it back
		during  func()
		vzdump  bool // works meanwhile
		kept    bool
	}{
		{what: "as it was"},
		{what: "after a crash", crashed: true},
		{what: "while vzdump works", vzdump: true},
		{what: "after a crash, while vzdump works", crashed: true, vzdump: true, kept: true},
		{what: "taken away", during: func() { n.QM("unlock", "110") }},
		{what: "changed with skiplock", during: func() { n.QM("set", "110", "--skiplock", "1", "--onboot", "1") }},
		{what: "changed, after a crash", crashed: true, during: func() { n.QM("set", "110", "--skiplock", "1", "--onboot", "0") }, kept: true},
		{what: "changed, while vzdump works", during: func() { n.QM("set", "110", "--skiplock", "1", "--onboot", "1") }, vzdump: true, kept: true},
		{what: "another one of the same look", crashed: true, during: func() {
			n.QM("unlock", "110")
			n.QM("set", "110", "--lock", "backup")
		}, kept: true},
	} {
		n.AddVM(110)
		lock, err := h.LockBackup(t.Context(), 110)
		if err != nil || lockOf() != "backup" {
			t.Fatalf("%s: %v", test.what, err)
		}
		if _, err := h.LockBackup(t.Context(), 110); !errors.Is(err, proxmox.ErrLocked) {
			t.Errorf("%s: a second lock: %v", test.what, err)
		}
		if test.crashed {
			text, err := json.Marshal(lock)
			if err != nil {
				t.Fatal(err)
			}
			lock = proxmox.BackupLock{}
			if err := json.Unmarshal(text, &lock); err != nil {
				t.Fatal(err)
			}
		}
		if test.during != nil {
			test.during()
		}
		end := func() {}
		if test.vzdump {
			end = vzdump()
		}
		err = h.Unlock(t.Context(), lock)
		end()
		if want := map[bool]string{true: "backup"}[test.kept]; lockOf() != want || errors.Is(err, proxmox.ErrNotOurs) != test.kept || !test.kept && err != nil {
			t.Errorf("%s: lock %q, %v", test.what, lockOf(), err)
		}
	}
	n.AddVM(110, "lock: migrate")
	if _, err := h.LockBackup(t.Context(), 110); !errors.Is(err, proxmox.ErrLocked) {
		t.Errorf("locked for something else: %v", err)
	}
	if err := h.Unlock(t.Context(), proxmox.BackupLock{VMID: 110}); err != nil || lockOf() != "migrate" {
		t.Errorf("somebody else's lock: %v, %q", err, lockOf())
	}
}

// TestKeepAlive: while it is held, a guest's power-off leaves QEMU there, if it is said again after the end of another's.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(110)
	status := func(want string) {
		t.Helper()
		if got, err := h.Status(t.Context(), 110); err != nil || got != want {
			t.Errorf("status is %q, %v, not %q", got, err, want)
		}
	}
	status(proxmox.Stopped)
	n.QM("start", "110")
	status("running")
	var held []*proxmox.Alive
	for range 2 {
		alive, err := h.KeepAlive(t.Context(), 110)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, alive)
	}
	say := func(i int) {
		t.Helper()
		if err := held[i].Repeat(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	await := func(kept bool, say func()) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); n.KeptAlive(110) != kept; time.Sleep(200 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("kept alive is still %v", !kept)
			}
			say()
		}
	}
	await(true, func() { say(0) }) // QEMU may connect only now
	say(1)
	_ = held[1].Close()
	await(false, func() {})
	await(true, func() { say(0) })
	n.VM(110).PowerOff()
	n.VM(110).WaitEvent("SHUTDOWN", 30*time.Second)
	time.Sleep(200 * time.Millisecond)
	status("shutdown")
	_ = held[0].Close()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		p, err := h.Process(110)
		if err == nil && p == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("QEMU is still there: %v, %v", p, err)
		}
	}
	h.Events += ".gone"
	if _, err := h.KeepAlive(t.Context(), 110); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without qmeventd: %v", err)
	}
}

// TestKeepAliveAgain: qmeventd was started anew, which took what it knew and its connections away.
func TestKeepAliveAgain(t *testing.T) {
	t.Parallel()
	h := proxmox.Host{Events: filepath.Join(t.TempDir(), "events")}
	var alive *proxmox.Alive
	for i := range 3 {
		l, err := net.Listen("unix", h.Events)
		if err != nil {
			t.Fatal(err)
		}
		if alive == nil {
			alive, err = h.KeepAlive(t.Context(), 110)
		} else {
			err = alive.Repeat(t.Context())
		}
		if err != nil {
			t.Fatalf("start %d: %v", i, err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := alive.Repeat(t.Context()); err != nil {
			t.Errorf("start %d: %v", i, err)
		}
		in := json.NewDecoder(conn)
		for range 2 {
			var said struct{ Vzdump struct{ VMID string } }
			if err := in.Decode(&said); err != nil || said.Vzdump.VMID != "110" {
				t.Errorf("start %d: it says %+v, %v", i, said, err)
			}
		}
		_, _ = conn.Close(), l.Close()
	}
	_ = alive.Close()
}

// TestWhoAnswers: the path proves nothing.
func TestWhoAnswers(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(110)
	s := h.Socket(110)
	ask := func(want proxmox.Answer) {
		t.Helper()
		p, err := h.Process(110)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.Ask(t.Context(), p); err != nil || got != want {
			t.Errorf("answer %q, %v; want %q", got, err, want)
		}
	}
	ask(proxmox.AnswerNone)
	if _, err := h.AddSocket(t.Context(), 110, false); err != nil {
		t.Fatal(err)
	}
	n.QM("start", "110")
	ask(proxmox.AnswerYes)
	conn, err := net.Dial("unix", s.Path())
	if err != nil {
		t.Fatal(err)
	}
	ask(proxmox.AnswerBusy)
	_ = conn.Close()
	ask(proxmox.AnswerYes)
	// A clone that was started with this VM's socket takes it over.
	n.QM("clone", "110", "112")
	n.QM("start", "112")
	ask(proxmox.AnswerOther)
	// The number in a stale pid file is another VM's now.
	n.AddVM(113)
	if err := os.WriteFile(n.Run+"/113.pid", fmt.Appendln(nil, n.VM(112).Pid()), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := h.Process(113); p != nil || err != nil {
		t.Errorf("a pid file that names another VM's QEMU: %v, %v", p, err)
	}
	n.QM("stop", "112")
	ask(proxmox.AnswerNone)
	n.VM(110).Kill()
	ask(proxmox.AnswerNone)
	if err := os.WriteFile(n.Run+"/110.pid", fmt.Appendln(nil, os.Getpid()), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := h.Process(110); p != nil || err != nil {
		t.Errorf("a pid file that names somebody else: %v, %v", p, err)
	}
}
