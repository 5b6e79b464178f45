package proxmox_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

// ours is the socket that AddSocket writes for a VM of the node.
func ours(n *pvetest.Node, vmid int) string {
	return fmt.Sprintf("-chardev socket,id=qmchain,path=%s/%d-backup.qmp,server=on,wait=off -mon chardev=qmchain,mode=control", n.Run, vmid)
}

func argsOf(n *pvetest.Node, vmid int) string {
	for line := range strings.Lines(n.QM("config", fmt.Sprint(vmid))) {
		if args, found := strings.CutPrefix(line, "args: "); found {
			return strings.TrimSuffix(args, "\n")
		}
	}
	return ""
}

// TestLifeOfASocket takes a VM's socket through what happens to VMs.
func TestLifeOfASocket(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(110, "args: -rtc 'base=utc'")
	n.QM("start", "110")

	add := func(vmid proxmox.VMID, changed, restart bool) {
		t.Helper()
		change, err := h.AddSocket(t.Context(), vmid, false)
		if err != nil || !change.Done || change.Changed() != changed || change.Restart != restart {
			t.Errorf("add: %+v, %v", change, err)
		}
	}
	check := func(vmid proxmox.VMID, ready, configured, pending, active bool, answer proxmox.Answer) {
		t.Helper()
		c, err := h.CheckSocket(t.Context(), vmid)
		if err != nil || c.Ready() != ready || c.Configured != configured || c.Pending != pending || c.Active != active || c.Answer != answer {
			t.Errorf("check: ready %v, %+v, %v", c.Ready(), c, err)
		}
	}
	check(110, false, false, false, false, "no")
	before := n.Config(110)
	if change, err := h.AddSocket(t.Context(), 110, true); err != nil || change.Done || !change.Changed() || !change.Restart || n.Config(110) != before {
		t.Errorf("dry run: %+v, %v", change, err)
	}
	add(110, true, true)
	if got := argsOf(n, 110); got != "-rtc 'base=utc' "+ours(n, 110) {
		t.Errorf("args are %s", got)
	}
	check(110, false, true, true, false, "no")
	add(110, false, true) // still waiting for the restart
	n.QM("stop", "110")
	check(110, true, true, false, false, "")
	n.QM("start", "110")
	check(110, true, true, false, true, "yes")
	add(110, false, false)

	n.QM("clone", "110", "112")
	check(112, false, false, false, false, "")
	if c, err := h.CheckSocket(t.Context(), 112); err != nil || strings.Join(c.Faults, " ") != "it is that of VM 110" {
		t.Errorf("a clone: %v, %v", c.Faults, err)
	}
	add(112, true, false)
	n.QM("start", "112")
	check(112, true, true, false, true, "yes")
	check(110, true, true, false, true, "yes")

	remove, err := h.RemoveSocket(t.Context(), 110, false)
	if err != nil || !remove.Restart || argsOf(n, 110) != "-rtc 'base=utc'" {
		t.Errorf("remove: %+v, %v", remove, err)
	}
	check(110, true, false, true, true, "yes")
	add(110, true, false) // put back: nothing is pending any more
	check(110, true, true, false, true, "yes")
	n.QM("stop", "112")
	n.QM("set", "112", "--args", ours(n, 112))
	if remove, err := h.RemoveSocket(t.Context(), 112, false); err != nil || remove.After != "" || remove.Restart || strings.Contains(n.Config(112), "args") {
		t.Errorf("remove all of it: %+v, %v", remove, err)
	}
}

// TestConcurrentChange: somebody else sets args while ours are being set. Both changes are there in the end.
func TestConcurrentChange(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(110)
	// qm, but somebody else comes first, three times.
	script := fmt.Sprintf(`#!/bin/sh
n=$(cat %[1]s/count)
if [ "$n" -lt 3 ]; then echo $((n+1)) > %[1]s/count; %[2]s set 110 --args "-rtc base=utc -name n$n" >/dev/null; fi
exec %[2]s "$@"
`, n.Dir, n.Program)
	h.Program = n.Dir + "/racing-qm"
	if err := errors.Join(os.WriteFile(h.Program, []byte(script), 0o700), os.WriteFile(n.Dir+"/count", []byte("0"), 0o600)); err != nil {
		t.Fatal(err)
	}
	change, err := h.AddSocket(t.Context(), 110, false)
	if err != nil || change.Before != "-rtc base=utc -name n2" || argsOf(n, 110) != "-rtc base=utc -name n2 "+ours(n, 110) {
		t.Errorf("%+v, %v", change, err)
	}
	// One who never stops.
	h.Program = n.Dir + "/always"
	script = fmt.Sprintf("#!/bin/sh\n%[1]s set 110 --description $$ >/dev/null\nexec %[1]s \"$@\"\n", n.Program)
	if err := os.WriteFile(h.Program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := h.RemoveSocket(t.Context(), 110, false); !errors.Is(err, proxmox.ErrChanged) {
		t.Errorf("always changed: %v", err)
	}
}

func TestChangeRefuses(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	var quote *proxmox.QuoteError
	for _, test := range []struct {
		line string
		is   func(error) bool
	}{
		{"lock: backup", func(err error) bool { return errors.Is(err, proxmox.ErrLocked) }},
		{"args: -name 'web", func(err error) bool { return errors.As(err, &quote) }},
		{"args: -serial unix:" + n.Run + "/110-backup.qmp,server=on,wait=off", func(err error) bool { return errors.Is(err, proxmox.ErrConflict) }},
	} {
		n.AddVM(110, test.line)
		before := n.Config(110)
		for _, dry := range []bool{true, false} {
			if change, err := h.AddSocket(t.Context(), 110, dry); !test.is(err) || change.Done || n.Config(110) != before {
				t.Errorf("%s: %+v, %v", test.line, change, err)
			}
		}
	}
	n.AddVM(110, "args: -name 'web")
	if c, err := h.CheckSocket(t.Context(), 110); err != nil || c.Ready() || !strings.Contains(strings.Join(c.Faults, " "), "unbalanced quotes") {
		t.Errorf("check: %+v, %v", c, err)
	}
}
