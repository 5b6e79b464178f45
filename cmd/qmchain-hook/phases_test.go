package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"qmchain/internal/testenv"
)

const (
	keep110   = "systemctl start qmchain-keep@110.service"
	backup110 = "systemctl start qmchain-backup@110.service"
	last110   = "systemd-run qmchain-last-110.service run --in-hook 110"
	save110   = "systemd-run qmchain-save-110.service keep --stop --limit 10s 110"
)

// TestPhases: what is set is done, at every way of starting and stopping; without it, only the keeper is started.
func TestPhases(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Guest = true // it has to power off by itself
	r.addVM(110, "memory: 384")
	r.install("110")
	r.write(r.config, "[hook]\npost-start-backup = true\n[guest.110]\ncompress = \"zstd\"\n[guest.110.hook]\npre-stop-backup = true\npost-stop-backup = true\n")
	r.contains(r.qm("start", "110"), "VM 110: qmchain-backup@110.service is started")
	r.expectCalls(keep110, backup110)
	r.VM(110).WaitBoot()
	r.contains(r.qm("reboot", "110"), "VM 110: a last increment is made before it stops, for at most 1m0s")
	r.expectCalls(last110, keep110, backup110) // none of the stopped VM: it would be locked
	r.VM(110).WaitBoot()
	r.qm("shutdown", "110")
	r.expectCalls(last110, backup110)
	r.qm("start", "110")
	r.expectCalls(keep110, backup110)
	r.VM(110).WaitBoot()
	r.VM(110).PowerOff() // PVE knows of no stop before it
	r.expectCalls(backup110)
	r.qm("start", "110")
	r.expectCalls(keep110, backup110)
	r.qm("stop", "110")
	r.expectCalls(last110, save110, backup110) // only who stops a VM that runs tells it apart from a shutdown

	r.write(r.config, "")
	r.qm("start", "110")
	r.qm("stop", "110")
	r.expectCalls(keep110, save110)
}

// TestLastIncrement: what has changed before a stop is in a point, made under the lock that PVE holds meanwhile.
func TestLastIncrement(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	repo := r.realBackup()
	r.write(r.config, "[hook]\npre-stop-backup = true\n")
	r.addVM(110, "scsi0: local:vm-110-disk-0.raw,size=8M")
	r.install("110")
	r.qm("start", "110")
	r.VM(110).IO("scsi0", "write -P 1 0 1M")
	testenv.Output(t, r.site.Backup, "run")
	r.VM(110).IO("scsi0", "write -P 2 0 64k")
	r.silent(r.qm("stop", "110"), "level=warning")
	r.points(repo, "1", "2")
}

// TestStop: a raw disk's bitmap is in memory only, and yet the increments go on over `qm stop`.
func TestStop(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	repo := r.realBackup()
	r.addVM(110, "scsi0: local:vm-110-disk-0.raw,size=8M")
	r.install("110")
	r.qm("start", "110")
	r.VM(110).IO("scsi0", "write -P 1 0 1M")
	testenv.Output(t, r.site.Backup, "run")
	r.VM(110).IO("scsi0", "write -P 2 0 64k")
	r.silent(r.qm("stop", "110"), "level=warning")
	r.wait("the end", func() bool { return r.QM("status", "110") == "status: stopped\n" })
	r.qm("start", "110")
	testenv.Output(t, r.site.Backup, "run")
	r.points(repo, "1", "2")
}

// realBackup makes qmchain-backup the real program, which takes points of VM 110 into the repository, and keeps its bitmaps.
func (r *rig) realBackup() (repo string) {
	r.t.Helper()
	binary := filepath.Join(r.t.TempDir(), "qmchain-backup")
	testenv.Output(r.t, "go", "build", "-o", binary, "qmchain/cmd/qmchain-backup")
	repo = r.t.TempDir()
	common := fmt.Sprintf("--socket '%s/110-backup.qmp' --name 110 --keep-dir '%s'", r.Run, r.t.TempDir())
	r.write(r.site.Backup, fmt.Sprintf(`#!/bin/sh
case $1 in
run) exec '%[1]s' run %[2]s --repo '%[3]s' --fleece-dir '%[4]s' ;;
keep) exec '%[1]s' keep %[2]s --stop --limit 10s ;;
esac
`, binary, common, repo, r.t.TempDir()))
	return repo
}

// points compares the first byte of the points of VM 110's disk, all but the first of which must be increments.
func (r *rig) points(repo string, want ...string) {
	r.t.Helper()
	points, err := filepath.Glob(filepath.Join(repo, "110", "images", "*.scsi0.qcow2"))
	if err != nil || len(points) != len(want) {
		journal, _ := os.ReadFile(r.calls + ".journal")
		r.t.Fatalf("%d points, %v: %s", len(points), err, journal)
	}
	for i, point := range points {
		testenv.Output(r.t, r.QEMU.IO, "-r", "-f", "qcow2", "-c", "read -P "+want[i]+" 0 64k", "-c", "read -P 1 64k 64k", point)
		if fi, err := os.Stat(point); err != nil || i > 0 && fi.Size() > 1<<20 {
			r.t.Errorf("no increment: %v, %v", fi.Size(), err)
		}
	}
}

// TestTooLong: a last increment that does not end is ended, and the VM stops.
func TestTooLong(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.write(r.site.Backup, "#!/bin/sh\n[ $1 = run ] && exec sleep 1000\n")
	r.write(r.config, "[hook]\npre-stop-backup = true\npre-stop-limit = \"1s\"\n")
	r.addVM(110)
	r.install("110")
	r.qm("start", "110")
	began := time.Now()
	r.contains(r.qm("stop", "110"), "--pre-stop-limit is from 5s to 1h0m0s", "VM 110: its last increment was not made", "journalctl -u qmchain-last-110.service",
		"its bitmaps in memory are not saved", "journalctl -u qmchain-save-110.service")
	if took := time.Since(began); took < 5*time.Second || took > time.Minute {
		t.Errorf("stopping took %s", took)
	}
}

// TestWithoutSystemd: systemctl that is not there, fails or hangs is a warning, and the VM starts.
func TestWithoutSystemd(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.addVM(110)
	r.install("110")
	for _, test := range []struct{ program, says string }{
		{"", "no such file or directory"},
		{"#!/bin/sh\necho 'Unit qmchain-keep@110.service not found.' >&2; exit 5\n", "not found."},
		{"#!/bin/sh\nexec sleep 1000\n", "not done within 8s"},
	} {
		program := filepath.Join(r.Bin, "systemctl")
		if test.program != "" {
			r.write(program, test.program)
		} else if err := os.Remove(program); err != nil {
			t.Fatal(err)
		}
		r.contains(r.qm("start", "110"), "VM 110: qmchain-keep@110.service is not started", test.says)
		r.qm("stop", "110")
	}
}

// TestArgs: a VM that starts without a backup socket of its own is told of, and has no keeper.
func TestArgs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.write(r.config, "[hook]\npost-start-backup = true\npre-stop-backup = true\n")
	r.addVM(110)
	r.install("110")
	r.QM("clone", "110", "112")
	r.contains(r.qm("start", "112"), "level=warning", "VM 112 starts with a backup socket that is wrong (it is that of VM 110): `qmchain-args add 112`")
	// The clone has the socket of the VM that it was cloned from.
	r.contains(r.qm("start", "110"), "another process listens there, such as a clone with the same args")
	r.qm("stop", "112")
	r.qm("stop", "110")
	r.wait("the end", func() bool { return r.QM("status", "110") == "status: stopped\n" })
	r.called()
	r.QM("set", "110", "--delete", "args")
	r.contains(r.qm("start", "110"), "VM 110 starts without a backup socket, and can't be backed up while it runs: `qmchain-args add 110`")
	r.contains(r.qm("stop", "110"), "nothing is saved before it stops: it runs without a backup socket")
	r.QM("set", "110", "--args", "-name 'web")
	r.contains(r.qm("start", "110"), "VM 110 starts without any of its args", "never closed")
	r.qm("stop", "110")
	if calls := r.called(); calls != "" {
		t.Errorf("called: %s", calls)
	}
}

// TestStaleSocket: what a killed QEMU leaves goes, when it ends or before the next one starts; what is no socket stays.
func TestStaleSocket(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.addVM(110)
	r.install("110")
	socket := r.site.Host.Socket(110).Path()
	r.qm("start", "110")
	if err := syscall.Kill(r.VM(110).Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.wait("the end of the socket", func() bool { return !exists(socket) })
	r.wait("the VM's end", func() bool { return r.QM("status", "110") == "status: stopped\n" })

	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	code, _, stderr := r.call("guest", "110", "pre-start")
	r.contains(stderr, "another process listens there")
	if code != 0 || !exists(socket) {
		t.Errorf("somebody's socket: exit code %d, there is it: %t", code, exists(socket))
	}
	_ = l.Close()
	_, _, stderr = r.call("guest", "110", "pre-start")
	r.contains(stderr, "VM 110: the backup socket that its last QEMU has left is removed")
	if exists(socket) {
		t.Error("the stale socket is there still")
	}
	r.write(socket, "not a socket")
	_, _, stderr = r.call("guest", "110", "post-stop")
	r.contains(stderr, "is no socket, and stays")
	if !exists(socket) {
		t.Error("a file is removed")
	}
}

// TestOthersAtWork: no backup begins where PVE has its own plans with the VM.
func TestOthersAtWork(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.write(r.config, "[hook]\nkeep = false\npost-start-backup = true\npre-stop-backup = true\npost-stop-backup = true\n")
	r.addVM(110)
	r.install("110")
	// vzdump starts a stopped VM, paused, and stops it.
	r.QM("set", "110", "--lock", "backup")
	r.contains(r.qm("start", "110", "--skiplock", "1"), "VM 110 is not backed up at its start: it is locked (backup)")
	r.contains(r.qm("stop", "110", "--skiplock", "1"), "VM 110: no last increment is made before it stops: it is locked (backup)")
	_, _, stderr := r.call("guest", "110", "post-stop")
	r.contains(stderr, "VM 110 is not backed up after its stop: it is locked (backup)")
	r.QM("unlock", "110")

	// HA may start it again at any moment.
	r.AddHA(110, "ignored")
	r.AddHA(111, "started")
	r.addVM(111)
	_, _, stderr = r.call("guest", "111", "post-stop")
	r.contains(stderr, "VM 111 is not backed up after its stop: HA manages it")
	r.call("guest", "110", "post-stop")
	r.expectCalls(backup110)

	// A VM that comes from another node.
	r.qm("start", "110")
	r.expectCalls(backup110)
	r.MoveAway(110, "pve2")
	r.MoveAway(111, "pve2")
	for _, args := range [][]string{{"guest", "111", "pre-start"}, {"guest", "110", "post-start"}} {
		cmd := exec.Command(r.site.Program, args...)
		cmd.Env = []string{"PVE_MIGRATED_FROM=pve2"}
		text, err := cmd.CombinedOutput()
		r.silent(string(text), "level=warning", "level=error")
		if err != nil {
			t.Error(err)
		}
		if args[2] == "post-start" {
			r.contains(string(text), "VM 110 is not backed up at its start: it is being migrated, from node pve2")
		}
	}
	if calls := r.called(); calls != "" {
		t.Errorf("called: %s", calls)
	}
}

// TestBrokenConfiguration: a VM starts, and what holds without the file is done.
func TestBrokenConfiguration(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.addVM(110)
	r.install("110")
	for _, test := range []struct{ text, says string }{
		{"[hook]\nkeeep = true\n", "[hook]: keeep: there is no flag --keeep"},
		{"[hook\n", "config.toml:2: expected"},
		{"[hook]\npre-stop-limit = \"soon\"\n", "--pre-stop-limit"},
		{"[guest.110.hook]\npre-stop-limit = \"soon\"\n", "VM 110: its own settings are not in effect"},
		{"[guest.111.hook]\nfrob = 1\n", "[guest.111.hook]: frob: there is no flag --frob"},
		{"log-file = \"/nowhere/log\"\n", "/nowhere/log"},
	} {
		r.write(r.config, test.text)
		code, _, stderr := r.call("guest", "110", "pre-start")
		r.contains(stderr, test.says)
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
		r.expectCalls(keep110)
	}
	r.contains(r.qm("start", "110"), "/nowhere/log")
	r.expectCalls(keep110)
	for _, args := range [][]string{{"guest", "web", "pre-start"}, {"guest"}, {"vzdump"}, {"guest", "110", "pre-start", "more"}} {
		if code, _, stderr := r.call(args...); code != 0 || stderr == "" {
			t.Errorf("%q: exit code %d, %s", args, code, stderr)
		}
	}
}

// TestVzdump: vzdump waits for a backup of ours of the same VM, for some time, and goes on in any case.
func TestVzdump(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.addVM(110)
	r.AddContainer(105)
	r.write(r.config, "[hook]\nvzdump-wait = \"3s\"\n")
	for _, args := range []string{"job-init", "job-start", "backup-start snapshot 110", "backup-start stop 105", "backup-start snapshot 999", "pre-stop snapshot 110", "backup-end snapshot 110", "frob x 110", "job-end"} {
		if code, output := r.bare(append([]string{"vzdump"}, strings.Fields(args)...)...); code != 0 || output != "" {
			t.Errorf("vzdump %s: exit code %d: %s", args, code, output)
		}
	}
	r.qm("start", "110")
	if code, output := r.bare("vzdump", "backup-start", "snapshot", "110"); code != 0 || output != "" {
		t.Errorf("an idle VM: exit code %d: %s", code, output)
	}
	// QMP serves one at a time.
	hold := func(f func()) (output string, took time.Duration) {
		conn, err := net.Dial("unix", r.site.Host.Socket(110).Path())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		began := time.Now()
		go func() {
			f()
			_ = conn.Close()
		}()
		code, output := r.bare("vzdump", "backup-start", "snapshot", "110")
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
		return output, time.Since(began)
	}
	// Upper bounds are for a machine that has much else to do.
	never := make(chan struct{})
	defer close(never)
	output, took := hold(func() { <-never })
	r.contains(output, "VM 110: another backup is under way; vzdump waits for it", "for longer than 3s; vzdump goes on beside it")
	if took < 3*time.Second || took > time.Minute {
		t.Errorf("it has waited %s", took)
	}
	r.write(r.config, "[hook]\nvzdump-wait = \"1m\"\n")
	output, took = hold(func() { time.Sleep(3 * time.Second) })
	r.contains(output, "another backup is under way; vzdump waits for it")
	r.silent(output, "level=warning")
	if took < 3*time.Second || took > time.Minute {
		t.Errorf("it has waited %s", took)
	}
	r.write(r.config, "[guest.110.hook]\nvzdump-wait = \"0s\"\n")
	if output, took := hold(func() { <-never }); output != "" || took > 20*time.Second {
		t.Errorf("it has waited %s: %s", took, output)
	}
}
