package pvetest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/internal/testenv"
)

// TestProgram runs qm as a program, the way the product does.
func TestProgram(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.WriteConfig(110, "name: web\n")
	for _, test := range []struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		{[]string{"config", "110"}, 0, "name: web\n", ""},
		{[]string{"set", "110", "--args", "-a 'b\tc' \"d\\\"e\" ä"}, 0, "update VM 110: -args -a 'b\tc' \"d\\\"e\" ä\n", ""},
		{[]string{"config", "110"}, 0, "args: -a 'b\tc' \"d\\\"e\" ä\nname: web\n", ""},
		{[]string{"set", "110", "--args", "-k\nde"}, 2, "", "400 Parameter verification failed.\nargs: property contains a line feed\nqm set <vmid> [OPTIONS]\n"},
		{[]string{"config", "99"}, 2, "", "400 Parameter verification failed.\nvmid: invalid format - value does not look like a valid VM ID\nqm config <vmid> [OPTIONS]\n"},
		{[]string{"start", "999"}, 255, "", "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist\n"},
		{[]string{"frob"}, 255, "", "ERROR: unknown command 'qm frob'\n"},
	} {
		cmd := exec.Command(n.Program, test.args...)
		var stdout, stderr bytes.Buffer
		cmd.Env = []string{}
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run() // its exit code tells
		if code := cmd.ProcessState.ExitCode(); code != test.code || stdout.String() != test.stdout || stderr.String() != test.stderr {
			t.Errorf("qm %q: exit code %d, %q, %q; want %d, %q, %q", test.args, code, stdout.String(), stderr.String(), test.code, test.stdout, test.stderr)
		}
	}
}

// TestArgsOption: what PVE makes of the option args, on a stopped and on a running VM.
func TestArgsOption(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.AddVM(110)
	step := func(what string, want string, args ...string) {
		t.Helper()
		if len(args) > 0 {
			n.QM(args...)
		}
		var got []string
		for _, line := range strings.Split(n.QM("pending", "110"), "\n") {
			if strings.Contains(line, " args:") {
				got = append(got, line)
			}
		}
		if strings.Join(got, "|") != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	step("set on a stopped VM", "cur args: -k de", "set", "110", "--args", "-k de")
	step("outer quotes go", `cur args: -k" "de`, "set", "110", "--args", `"-k" "de"`)
	step("an empty value stays, blank", "cur args:  ", "set", "110", "--args", "")
	step("removed", "", "set", "110", "--delete", "args")
	step("set again", "cur args: -rtc base=utc", "set", "110", "--args", "-rtc base=utc")
	n.QM("start", "110")
	step("set on a running VM", "cur args: -rtc base=utc|new args: -k de", "set", "110", "--args", "-k de")
	if got := n.QM("config", "110"); !strings.Contains(got, "args: -k de\n") {
		t.Errorf("config shows %s", got)
	}
	if got := n.QM("config", "110", "--current"); !strings.Contains(got, "args: -rtc base=utc\n") {
		t.Errorf("config --current shows %s", got)
	}
	step("put back", "cur args: -rtc base=utc", "set", "110", "--args", "-rtc base=utc")
	step("deleted on a running VM", "del args: -rtc base=utc", "set", "110", "--delete", "args")
	n.QM("stop", "110")
	step("gone with the stop", "")
	step("unbalanced quotes are stored", `cur args: -frob "`, "set", "110", "--args", `-frob "`)
	n.QM("start", "110") // and all args dropped: QEMU would not know the option
	step("still there", `cur args: -frob "`)
	if code, _, errs := n.TryQM("start", "110"); code != 255 || errs != "VM 110 already running\n" {
		t.Errorf("a second start: %d %s", code, errs)
	}
	n.QM("stop", "110")
	n.QM("set", "110", "--args", "-frob")
	if code, _, errs := n.TryQM("start", "110"); code != 255 || !strings.Contains(errs, "-frob") {
		t.Errorf("a start with an option that QEMU does not know: %d %s", code, errs)
	}
}

func TestLocks(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.LockTimeout = time.Second
	n.AddVM(110)
	digest := parseConf(n.Config(110)).digest
	n.QM("set", "110", "--digest", digest, "--lock", "backup")
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"set", "110", "--lock", "backup"}, 255, "VM is locked (backup)\n"},
		{[]string{"start", "110"}, 255, "VM is locked (backup)\n"},
		{[]string{"clone", "110", "111"}, 255, "VM is locked (backup)\n"},
		{[]string{"set", "110", "--digest", digest, "--skiplock", "1", "--onboot", "1"}, 255, "checksum mismatch (file change by other user?)\n"},
		{[]string{"set", "110", "--skiplock", "1", "--onboot", "1"}, 0, ""},
		{[]string{"unlock", "110"}, 0, ""},
		{[]string{"set", "110", "--onboot", "0"}, 0, ""},
	} {
		if code, _, errs := n.TryQM(test.args...); code != test.code || errs != test.want {
			t.Errorf("qm %q: %d %q, want %d %q", test.args, code, errs, test.code, test.want)
		}
	}
	// A hook script runs under the VM's lock file: its own qm set can't get it.
	n.QM("set", "110", "--hookscript", n.AddSnippet("hook.sh", fmt.Sprintf(`#!/bin/sh
env >> %[1]s/env
echo "$1 $2" >> %[1]s/phases
if [ "$2" = pre-start ]; then qm set "$1" --onboot 1; echo "rc=$?"; fi
`, n.Dir)))
	code, out, errs := n.TryQM("start", "110")
	if code != 0 || !strings.Contains(errs, "can't lock file '/var/lock/qemu-server/lock-110.conf' - got timeout") || !strings.Contains(out, "rc=4\n") {
		t.Errorf("start with a hook that calls qm set: %d %q %q", code, out, errs)
	}
	n.QM("stop", "110")
	wait(t, "post-stop", func() bool {
		phases, _ := os.ReadFile(filepath.Join(n.Dir, "phases"))
		return string(phases) == "110 pre-start\n110 post-start\n110 pre-stop\n110 post-stop\n"
	})
	env, err := os.ReadFile(filepath.Join(n.Dir, "env"))
	if err != nil || !strings.Contains(string(env), "LC_ALL=C\n") || strings.Contains(string(env), "HOME=") {
		t.Errorf("the hook's environment: %s %v", env, err)
	}
	n.QM("set", "110", "--hookscript", n.AddSnippet("hook.sh", "#!/bin/sh\n[ $2 != pre-start ]\n"))
	if code, _, errs := n.TryQM("start", "110"); code != 255 || !strings.Contains(errs, "hookscript error for 110 on pre-start: command") || n.running("110") {
		t.Errorf("start with a hook that fails: %d %s", code, errs)
	}
}

func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestForms starts VMs in both of PVE's forms, and looks at QEMU's block graph.
func TestForms(t *testing.T) {
	t.Parallel()
	for _, q := range testenv.QEMUs(t) {
		for _, pve := range []int{8, 9} {
			t.Run(fmt.Sprintf("QEMU %s, PVE %d", q.Name, pve), func(t *testing.T) {
				t.Parallel()
				n := Install(t)
				n.QEMU, n.PVE = q, pve
				n.AddVM(110, "agent: 1", "net0: virtio=BC:24:11:50:6C:F3,bridge=vmbr0", "machine: q35", "bios: ovmf",
					"efidisk0: local:110/vm-110-disk-3.qcow2,efitype=4m,pre-enrolled-keys=0,size=528K",
					"scsi0: local:110/vm-110-disk-0.qcow2,iothread=1,discard=on,size=64M",
					"virtio1: other:vm-110-disk-1,size=32M", "sata2: local:110/vm-110-disk-2.qcow2,backup=0,size=48M",
					"ide0: none,media=cdrom",
					fmt.Sprintf("args: -qmp unix:%s/110-backup.qmp,server=on,wait=off", n.Run))
				n.QM("start", "110")
				var devices []struct{ Device, Qdev string }
				n.VM(110).Execute("query-block", nil, &devices)
				var got []string
				for _, d := range devices {
					got = append(got, d.Device+"|"+d.Qdev)
				}
				all := strings.Join(got, " ")
				for _, want := range map[int][]string{
					8: {"drive-scsi0|scsi0", "drive-virtio1|/machine/peripheral/virtio1/virtio-backend", "drive-sata2|sata2", "drive-efidisk0|"},
					9: {"|scsi0", "|/machine/peripheral/virtio1/virtio-backend", "|sata2", "|/machine/system.flash1"},
				}[pve] {
					if !strings.Contains(all, want) {
						t.Errorf("no %s in %s", want, all)
					}
				}
				for _, disk := range []string{"scsi0", "virtio1", "sata2"} {
					n.VM(110).IO(disk, "write -P 7 0 64k")
				}
				if conn, err := net.Dial("unix", n.VM(110).Socket); err != nil {
					t.Error(err)
				} else {
					var greeting map[string]json.RawMessage
					if err := json.NewDecoder(conn).Decode(&greeting); err != nil || greeting["QMP"] == nil {
						t.Errorf("greeting %v, %v", greeting, err)
					}
					_ = conn.Close()
				}
				if got := n.QM("status", "110"); got != "status: running\n" {
					t.Error(got)
				}
				n.QM("stop", "110")
				if _, err := os.Stat(n.VM(110).Socket); err == nil {
					t.Error("QEMU has left its socket")
				}
			})
		}
	}
}

// TestCloneAndTemplate: a clone has the args of the VM that it was cloned from.
func TestCloneAndTemplate(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.AddVM(110, "scsi0: local:110/vm-110-disk-0.qcow2,size=1M", "args: -k de", "unused0: local:110/vm-110-disk-9.qcow2")
	n.QM("clone", "110", "112", "--name", "copy")
	was, is := parseConf(n.Config(110)).main, parseConf(n.Config(112)).main
	if is["args"] != "-k de" || is["name"] != "copy" || is["smbios1"] == was["smbios1"] || is["vmgenid"] == was["vmgenid"] || is["unused0"] != "" {
		t.Errorf("clone: %v", is)
	}
	if is["scsi0"] != "local:112/vm-112-disk-0.qcow2,size=1M" {
		t.Errorf("clone's disk: %s", is["scsi0"])
	}
	n.QM("start", "112")
	n.QM("template", "110")
	if code, _, errs := n.TryQM("start", "110"); code == 0 || errs != "you can't start a vm if it's a template\n" {
		t.Errorf("start of a template: %d %s", code, errs)
	}
	n.QM("clone", "110", "113")
	n.MoveAway(113, "pve2")
	if code, _, errs := n.TryQM("config", "113"); code != 2 {
		t.Errorf("config of a VM on another node: %d %s", code, errs)
	}
	n.QM("stop", "112")
	n.QM("destroy", "112")
	if got := n.QM("list"); strings.Contains(got, "112") {
		t.Error(got)
	}
}

// TestEvents: qmeventd ends a QEMU whose guest has powered off, but not while a backup holds it.
func TestEvents(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.AddVM(110)
	n.QM("start", "110")
	n.QM("set", "110", "--args", "-rtc base=utc")
	n.VM(110).PowerOff()
	wait(t, "QEMU's end", func() bool { return !n.running("110") })
	wait(t, "the clean-up", func() bool { return strings.Contains(n.QM("pending", "110"), "cur args: -rtc") })

	n.QM("start", "110")
	// await waits until the VM is kept alive, which is said again and again if there is a connection for that, or is not.
	await := func(kept bool, conn net.Conn) {
		t.Helper()
		wait(t, fmt.Sprint("kept alive: ", kept), func() bool {
			if n.KeptAlive(110) == kept {
				return true
			}
			if conn != nil {
				say(t, conn)
			}
			return false
		})
	}
	keep := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("unix", n.Events)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		await(true, conn) // a QEMU that has just been started connects
		say(t, conn)      // it may be so for another's sake
		return conn
	}
	conn := keep()
	n.VM(110).PowerOff()
	n.VM(110).WaitEvent("SHUTDOWN", 30*time.Second)
	time.Sleep(200 * time.Millisecond)
	if got := n.QM("status", "110"); got != "status: shutdown\n" {
		t.Errorf("held: %s", got)
	}
	_ = conn.Close()
	wait(t, "QEMU's end", func() bool { return !n.running("110") })

	// Any end counts for all, and is of no harm to a guest that runs; the same said again helps.
	wait(t, "the start", func() bool {
		code, _, _ := n.TryQM("start", "110")
		return code == 0
	})
	conn = keep()
	for _, again := range []bool{true, false} {
		_ = keep().Close()
		await(false, nil)
		time.Sleep(200 * time.Millisecond)
		if got := n.QM("status", "110"); got != "status: running\n" {
			t.Errorf("it runs: %s", got)
		}
		if again {
			await(true, conn)
		}
		n.VM(110).PowerOff()
		if !again {
			break
		}
		n.VM(110).WaitEvent("SHUTDOWN", 30*time.Second)
		time.Sleep(200 * time.Millisecond)
		if got := n.QM("status", "110"); got != "status: shutdown\n" {
			t.Errorf("held: %s", got)
		}
		n.QM("reset", "110")
		n.VM(110).Execute("cont", nil, nil)
	}
	wait(t, "QEMU's end", func() bool { return !n.running("110") })

	// In other states an end is QEMU's.
	wait(t, "the start", func() bool {
		code, _, _ := n.TryQM("start", "110")
		return code == 0
	})
	conn = keep()
	n.VM(110).Execute("stop", nil, nil)
	n.VM(110).Execute("system_reset", nil, nil)
	wait(t, "the reset", func() bool { return n.QM("status", "110") == "status: prelaunch\n" })
	_ = conn.Close()
	wait(t, "QEMU's end", func() bool { return !n.running("110") })
}

// say keeps VM 110 alive.
func say(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := conn.Write([]byte(`{"vzdump":{"vmid":"110"}}`)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // to be read
}
