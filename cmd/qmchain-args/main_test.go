package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/jsondoc"
	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

// rig is a node and the program on it.
type rig struct {
	*pvetest.Node
	t *testing.T
}

func newRig(t *testing.T) rig { return rig{pvetest.Install(t), t} }

func (r rig) call(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	host := proxmox.Host{Etc: r.Etc, Run: r.Run, Events: r.Events, VzdumpLock: r.VzdumpLock, Program: r.Program}
	code = program(host).Run(ctx, args, cli.Env{Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }})
	if slices.Contains(args, "--json") {
		jsondoc.Load(r.t).Output(r.t, "qmchain-args "+args[0], out.Bytes())
	}
	return code, out.String(), errs.String()
}

// expect runs the program and compares its exit code and its standard output, without regard to runs of spaces.
func (r rig) expect(code int, stdout string, args ...string) (stderr string) {
	r.t.Helper()
	gotCode, gotOut, gotErr := r.call(r.t.Context(), args...)
	if gotCode != code || words(gotOut) != words(stdout) {
		r.t.Errorf("qmchain-args %s: exit code %d, want %d\n got %s\nwant %s\n%s", strings.Join(args, " "), gotCode, code, words(gotOut), words(stdout), gotErr)
	}
	return gotErr
}

// contains compares standard error in part.
func (r rig) contains(stderr string, parts ...string) {
	r.t.Helper()
	for _, part := range parts {
		if !strings.Contains(stderr, part) {
			r.t.Errorf("%q is not said: %s", part, stderr)
		}
	}
}

func words(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(lines, "\n")
}

// socket are the args of a VM's backup socket.
func (r rig) socket(vmid int) string {
	return fmt.Sprintf("-chardev socket,id=qmchain,path=%s/%d-backup.qmp,server=on,wait=off -mon chardev=qmchain,mode=control", r.Run, vmid)
}

const heading = "VMID NAME STATUS CONFIGURED PENDING ACTIVE ANSWERS REMARK\n"

const restart = "takes effect with a stop and start of VM 110, or `qm reboot 110`; a reboot from inside does not do\n"

func TestOneVM(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.AddVM(110, "args: -rtc 'base=utc'")
	added := "-rtc 'base=utc' " + r.socket(110)
	before := r.Config(110)

	r.expect(1, heading+"110 vm110 stopped no no - - qmchain-args add 110\n", "check", "110")
	r.expect(0, "110 vm110 would be added\n- args: -rtc 'base=utc'\n+ args: "+added+"\n", "add", "--dry-run", "110")
	if r.Config(110) != before {
		t.Error("a dry run has changed the configuration")
	}
	r.expect(0, "110 vm110 added\n", "add", "110")
	if want := strings.Replace(before, "-rtc 'base=utc'", added, 1); r.Config(110) != want {
		t.Errorf("configuration:\n%s\nwant:\n%s", r.Config(110), want)
	}
	r.expect(0, "110 vm110 unchanged\n", "add", "110")
	r.expect(0, heading+"110 vm110 stopped yes no - -\n", "check", "110")

	r.QM("start", "110")
	r.expect(0, heading+"110 vm110 running yes no yes yes\n", "check", "110")
	r.expect(0, "110 vm110 removed\n"+restart, "remove", "110")
	r.expect(0, "110 vm110\nbackup socket: -\nargs: "+added+"\nafter the next start: -rtc 'base=utc'\n", "show", "110")
	r.expect(1, heading+"110 vm110 running no yes yes yes gone after the next start\n", "check", "110")
	r.QM("stop", "110")
	if r.Config(110) != before {
		t.Errorf("after add and remove:\n%s\nwant:\n%s", r.Config(110), before)
	}
	r.QM("start", "110")
	r.expect(0, "110 vm110 added\n"+restart, "add", "110")
	r.expect(4, heading+"110 vm110 running yes yes no no stop and start the VM\n", "check", "110")
	r.expect(0, "110 vm110 unchanged\n"+restart, "add", "110")

	_, out, _ := r.call(t.Context(), "check", "--json", "110")
	var states []state
	if err := json.Unmarshal([]byte(out), &states); err != nil || len(states) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	if s := states[0]; s.VMID != 110 || !s.Running || !s.Configured || !s.Pending || s.Active || s.Ready || s.Next != added || s.Answers != "no" {
		t.Errorf("check --json: %+v", s)
	}
	r.QM("stop", "110")
	r.QM("start", "110")

	// A clone has the socket of the VM that it was cloned from.
	r.QM("clone", "110", "112", "--name", "copy")
	r.expect(1, heading+"112 copy stopped no no - - qmchain-args add 112; it is that of VM 110\n", "check", "112")
	r.expect(0, "112 copy would be mended; it is that of VM 110\n- args: "+added+"\n+ args: -rtc 'base=utc' "+r.socket(112)+"\n", "add", "--dry-run", "112")
	r.QM("start", "112")
	r.expect(1, heading+"110 vm110 running yes no yes other another process has the socket, a clone for one: check that, then stop and start the VM\n", "check", "110")
	r.QM("stop", "112")
	r.expect(0, "112 copy mended; it is that of VM 110\n", "add", "112")
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.AddVM(110, "lock: snapshot")
	r.AddVM(111, "args: -name 'web")
	r.AddVM(112, "template: 1")
	r.AddVM(113)
	r.MoveAway(113, "pve2")
	r.AddContainer(105)
	r.AddVM(114, "args: -monitor unix:"+r.Run+"/114-backup.qmp,server=on,wait=off")
	for _, test := range []struct {
		code int
		args []string
		says []string
	}{
		{3, []string{"add", "110"}, []string{"VM 110 is locked (snapshot)"}},
		{1, []string{"add", "111"}, []string{"the quote at position 7 is never closed; PVE drops all args: -name  >>>'web", "hint"}},
		{1, []string{"remove", "111"}, []string{"unbalanced quotes"}},
		{1, []string{"check", "111"}, []string{"no backup socket that can be used"}},
		{4, []string{"add", "112"}, []string{"VM 112 is a template"}},
		{2, []string{"add", "113"}, []string{"VM 113 is on node pve2", "run it on that node"}},
		{2, []string{"check", "105"}, []string{"105 is a container on node pve1, not a VM"}},
		{2, []string{"show", "999"}, []string{"VM 999: not found"}},
		{1, []string{"add", "114"}, []string{"for something else"}},
		{2, []string{"add", "--pool", "none"}, []string{"pool none: not found"}},
		{2, []string{"add", "--tag", "none"}, []string{"tag none: no VM of this node has it"}},
		{80, []string{"add"}, []string{"which VMs?"}},
		{80, []string{"add", "--all", "110"}, []string{"either"}},
		{80, []string{"add", "--exclude", "110", "111"}, []string{"--exclude is for"}},
		{80, []string{"add", "web"}, []string{`"web" is not a VMID`}},
		{80, []string{"add", "99"}, []string{`"99" is not a VMID`}},
	} {
		code, _, errs := r.call(t.Context(), test.args...)
		if code != test.code {
			t.Errorf("%q: exit code %d, want %d: %s", test.args, code, test.code, errs)
		}
		r.contains(errs, test.says...)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if code, _, errs := r.call(cancelled, "add", "--all"); code != 130 {
		t.Errorf("interrupted: %d %s", code, errs)
	}
}

func TestManyVMs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.AddVM(110, "tags: prod")
	r.AddVM(111, "lock: migrate", "tags: x;prod")
	r.AddVM(112, "template: 1")
	r.AddVM(113)
	r.AddVM(114)
	r.MoveAway(114, "pve2")
	r.AddPool("some", 113, 114, 112)

	errs := r.expect(0, "112 vm112 skipped\n113 vm113 added\n", "add", "--pool", "some")
	r.contains(errs, "VM 114 is on node pve2", "VM 112 is a template")
	errs = r.expect(7, "110 vm110 added\n112 vm112 skipped\n113 vm113 unchanged\n", "add", "--all")
	r.contains(errs, "VM 111 is locked (migrate)", "1 of 4 VMs failed")
	r.expect(0, "110 vm110 unchanged\n112 vm112 skipped\n113 vm113 unchanged\n", "add", "--all", "--exclude", "111")
	r.expect(7, heading+"110 vm110 stopped yes no - -\n111 vm111 stopped no no - - qmchain-args add 111; locked (migrate)\n", "check", "--tag", "prod")
	r.expect(0, heading+"112 vm112 template no no - - a template never runs\n113 vm113 stopped yes no - -\n", "check", "--pool", "some")

	// A template's clones would get what is in its args.
	r.QM("set", "112", "--args", r.socket(112))
	r.expect(0, "112 vm112 removed\n", "remove", "112")

	// One of several that are named fails; the others are done.
	errs = r.expect(7, "110 vm110 removed\n", "remove", "110", "999")
	r.contains(errs, "VM 999: not found")
	_, out, _ := r.call(t.Context(), "remove", "--json", "113", "111", "999")
	var outcomes []outcome
	if err := json.Unmarshal([]byte(out), &outcomes); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got []string
	for _, o := range outcomes {
		got = append(got, fmt.Sprintf("%s %s %q", o.VMID, o.Done, o.Error))
	}
	if want := `113 removed "" 111 unchanged "" 999 failed "VM 999: not found"`; strings.Join(got, " ") != want {
		t.Errorf("remove --json: %s", strings.Join(got, " "))
	}

	// A node without VMs.
	empty := newRig(t)
	empty.contains(empty.expect(0, "", "add", "--all"), "there is no such VM on this node")
}
