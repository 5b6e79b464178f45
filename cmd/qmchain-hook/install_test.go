package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstallAndRemove: what was there before is there again in the end, to the byte.
func TestInstallAndRemove(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.addVM(110)
	r.addVM(111)
	before := r.Config(110)
	snippets := filepath.Join(r.Storage, "snippets")
	ours := filepath.Join(snippets, "qmchain-hook")

	r.expect(0, "VMID NAME OURS HOOKSCRIPT CALLS REMARK\n110 vm110 no - -\n", "show", "110")
	r.expect(0, "110 vm110 would be installed: local:snippets/qmchain-hook\n", "install", "--dry-run", "110")
	if r.Config(110) != before || exists(ours) {
		t.Error("a dry run has changed something")
	}
	r.expect(0, "110 vm110 installed: local:snippets/qmchain-hook\n", "install", "110")
	if fi, err := os.Stat(ours); err != nil || fi.Mode().Perm() != 0o755 {
		t.Fatalf("%v, %v", fi, err)
	}
	r.expect(0, "110 vm110 unchanged: local:snippets/qmchain-hook\n", "install", "110")
	r.expect(0, "110 vm110 unchanged: local:snippets/qmchain-hook\n111 vm111 installed: local:snippets/qmchain-hook\n", "install", "--all")
	r.expect(0, "VMID NAME OURS HOOKSCRIPT CALLS REMARK\n110 vm110 yes local:snippets/qmchain-hook -\n", "show", "110")

	// Made by another version, or lost.
	text, err := os.ReadFile(ours)
	if err != nil {
		t.Fatal(err)
	}
	r.write(ours, strings.Replace(string(text), "Made by", "made by", 1))
	r.expect(0, "VMID NAME OURS HOOKSCRIPT CALLS REMARK\n110 vm110 yes local:snippets/qmchain-hook - it is that of another version: `qmchain-hook install 110`\n", "show", "110")
	r.expect(0, "110 vm110 updated: local:snippets/qmchain-hook\n", "install", "110")
	if err := os.Remove(ours); err != nil {
		t.Fatal(err)
	}
	_, out, _ := r.call("show", "110")
	r.contains(out, "no script that can be called")
	r.expect(0, "110 vm110 updated: local:snippets/qmchain-hook\n", "install", "110")

	r.expect(0, "110 vm110 removed\n", "remove", "110")
	if r.Config(110) != before || !exists(ours) {
		t.Errorf("after the first is removed: %s; the file is there: %t", r.Config(110), exists(ours))
	}
	r.expect(0, "110 vm110 unchanged\n111 vm111 removed\n", "remove", "--all")
	if exists(ours) {
		t.Error("the file is there though nobody needs it")
	}
	if code, out, _ := r.call("install", "--json", "110"); code != 0 {
		t.Errorf("exit code %d", code)
	} else {
		var got []outcome
		if err := json.Unmarshal([]byte(out), &got); err != nil || len(got) != 1 || got[0].Done != "installed" || got[0].Path != ours || got[0].Before != "" {
			t.Errorf("%v: %s", err, out)
		}
	}
}

// TestChaining: a script that was there is called after ours, with what PVE gives it, and its pre-start still decides.
func TestChaining(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.addVM(110)
	log := filepath.Join(r.Dir, "theirs")
	const name = "it's mine.sh"
	theirs := r.AddSnippet(name, fmt.Sprintf("#!/bin/sh\necho \"$*\" >> '%[1]s'\n[ \"$2\" != pre-start ] || [ ! -e '%[1]s.fail' ] || exit 42\n", log))
	r.QM("set", "110", "--hookscript", theirs)
	before := r.Config(110)
	r.expect(0, "110 vm110 installed: local:snippets/qmchain-hook-"+name+", which calls local:snippets/"+name+"\n", "install", "110")
	r.expect(0, "VMID NAME OURS HOOKSCRIPT CALLS REMARK\n110 vm110 yes local:snippets/qmchain-hook-"+name+" local:snippets/"+name+"\n", "show", "110")
	r.qm("start", "110")
	r.qm("stop", "110")
	r.expectCalls(keep110, save110)
	r.wait("theirs", func() bool {
		text, _ := os.ReadFile(log) // not there yet
		return string(text) == "110 pre-start\n110 post-start\n110 pre-stop\n110 post-stop\n"
	})

	r.write(log+".fail", "")
	code, _, stderr := r.TryQM("start", "110")
	r.contains(stderr, "hookscript error for 110 on pre-start", "exit code 42")
	if code == 0 {
		t.Error("a pre-start that fails does not keep the VM from starting")
	}
	r.expectCalls(keep110)
	if err := os.Remove(log + ".fail"); err != nil {
		t.Fatal(err)
	}

	// Uninstalled, or broken in whatever way: theirs is called all the same.
	for _, program := range []string{"#!/bin/sh\nexit 3\n", "#!/nowhere\n", ""} {
		if err := os.Remove(r.site.Program); err != nil {
			t.Fatal(err)
		}
		if program != "" {
			r.write(r.site.Program, program)
		}
		if err := os.Remove(log); err != nil {
			t.Fatal(err)
		}
		r.qm("start", "110")
		r.qm("stop", "110")
		r.wait("theirs", func() bool {
			text, _ := os.ReadFile(log)
			return strings.Count(string(text), "\n") == 4
		})
	}

	r.expect(0, "110 vm110 removed: local:snippets/"+name+"\n", "remove", "110")
	if r.Config(110) != before || exists(filepath.Join(r.Storage, "snippets", "qmchain-hook-"+name)) {
		t.Errorf("after remove: %s", r.Config(110))
	}
	// What is not there any more can't be put back.
	r.install("110")
	if err := os.Remove(filepath.Join(r.Storage, "snippets", name)); err != nil {
		t.Fatal(err)
	}
	_, out, _ := r.call("show", "110")
	r.contains(out, name+": no script that can be called")
	code, out, stderr = r.call("remove", "110")
	r.contains(out+stderr, "can't be put back", "what was there before is not there any more")
	if code != 4 || strings.Contains(r.Config(110), "hookscript") {
		t.Errorf("exit code %d: %s", code, r.Config(110))
	}
}

// TestSnapshotsAndCopies: snapshots and clones have the hook script of their time, and its file stays as long as one of them is
// there.
func TestSnapshotsAndCopies(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.addVM(110, "scsi0: local:110/vm-110-disk-0.qcow2,size=1M")
	ours := filepath.Join(r.Storage, "snippets", "qmchain-hook")
	r.QM("snapshot", "110", "clean")
	_, out, _ := r.call("install", "110")
	r.contains(out, "snapshot clean is without our hook script")
	r.QM("snapshot", "110", "hooked")
	r.QM("clone", "110", "112")
	r.expect(0, "112 Copy-of-VM-vm110 unchanged: local:snippets/qmchain-hook\n", "install", "112")
	r.expect(0, "112 Copy-of-VM-vm110 removed\n", "remove", "112")
	_, out, _ = r.call("remove", "110")
	r.contains(out, "snapshot hooked has our hook script")
	if !exists(ours) {
		t.Fatal("a snapshot needs the file")
	}
	r.QM("rollback", "110", "hooked")
	r.qm("start", "110")
	r.qm("stop", "110")
	r.QM("delsnapshot", "110", "hooked")
	r.QM("delsnapshot", "110", "clean")
	r.expect(0, "110 vm110 removed\n", "remove", "110")
	if exists(ours) {
		t.Error("the file is there though nobody needs it")
	}
	// Another node's VM needs it too.
	r.install("110")
	r.QM("clone", "110", "113")
	r.MoveAway(113, "pve2")
	_, out, _ = r.call("install", "110")
	r.contains(out, "storage local is this node's alone: the VM starts on pve2 only where "+ours+" is too")
	r.expect(0, "110 vm110 removed\n", "remove", "110")
	if !exists(ours) {
		t.Error("a VM of another node needs the file")
	}
}

func TestInstallRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.AddVM(110, "lock: migrate")
	r.AddVM(111, "hookscript: local:snippets/gone.sh")
	r.AddVM(112, "template: 1")
	r.AddVM(113)
	r.MoveAway(113, "pve2")
	r.AddVM(114, "hookscript: other:snippets/x.sh")
	r.AddVM(115, "hookscript: local:snippets/qmchain-hook-mine")
	mine := filepath.Join(r.Storage, "snippets", "qmchain-hook-mine")
	r.AddSnippet("qmchain-hook-mine", "#!/bin/sh\necho mine\n")
	r.AddSnippet("mine", "#!/bin/sh\n")
	r.AddVM(116, "hookscript: local:snippets/mine")
	r.AddVM(117, "hookscript: local:iso/x.iso")
	for _, test := range []struct {
		code int
		args []string
		says []string
	}{
		{3, []string{"install", "110"}, []string{"VM 110 is locked (migrate)", "hint"}},
		{1, []string{"install", "111"}, []string{"VM 111: its hook script: local:snippets/gone.sh: no script that can be called"}},
		{2, []string{"install", "113"}, []string{"VM 113 is on node pve2", "run it on that node"}},
		{1, []string{"install", "114"}, []string{"storage 'other' does not exist"}},
		{1, []string{"install", "115"}, []string{mine + " is in the way: not one of ours"}},
		{1, []string{"install", "116"}, []string{mine + " is in the way: not one of ours"}},
		{1, []string{"install", "117"}, []string{`is no snippet`}},
		{2, []string{"install", "999"}, []string{"VM 999: not found"}},
		{80, []string{"install"}, []string{"which VMs?"}},
	} {
		code, _, errs := r.call(test.args...)
		if code != test.code {
			t.Errorf("%q: exit code %d, want %d: %s", test.args, code, test.code, errs)
		}
		r.contains(errs, test.says...)
	}
	before := r.Config(115)
	r.expect(0, "112 vm112 skipped\nit is a template, and never runs\n", "install", "112")
	r.expect(0, "115 vm115 unchanged: local:snippets/qmchain-hook-mine\n"+mine+" has the name of ours and is not: it stays\n", "remove", "115")
	if text, err := os.ReadFile(mine); err != nil || string(text) != "#!/bin/sh\necho mine\n" || r.Config(115) != before {
		t.Errorf("%v: %s", err, text)
	}
	errs := r.expect(7, "112 vm112 skipped\nit is a template, and never runs\n", "install", "110", "112", "111")
	r.contains(errs, "VM 110 is locked", "gone.sh", "2 of 3 VMs failed")
	entries, err := os.ReadDir(filepath.Join(r.Storage, "snippets"))
	if err != nil || len(entries) != 2 {
		t.Errorf("refused, and files are left: %v, %v", entries, err)
	}
}
