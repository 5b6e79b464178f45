package pvetest

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"qmchain/internal/testenv"
)

// TestImports: what becomes of the volumes of imports that fail, of drives that others replace, and of VMs.
func TestImports(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.AddStorage("lvmthin", "lvm")
	raw, luks, overlay := filepath.Join(n.Dir, "a.raw"), filepath.Join(n.Dir, "luks.raw"), filepath.Join(n.Dir, "overlay.qcow2")
	testenv.CreateDisk(t, n.QEMU, raw, "raw", 3<<20)
	testenv.Output(t, n.QEMU.Img, "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", overlay)
	if err := os.WriteFile(luks, append([]byte("LUKS\xba\xbe\x00\x02"), make([]byte, 1<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.Etc, "firewall/110.fw"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	volumes := func() []string {
		var all []string
		for _, pattern := range []string{"images/110/*", "volumes/lvm/*"} {
			found, _ := filepath.Glob(filepath.Join(n.Storage, pattern)) // valid patterns
			for _, path := range found {
				all = append(all, filepath.Base(path))
			}
		}
		return all
	}
	n.SetFault(func(at string) error {
		if at == "import "+luks || at == "option tags" {
			return errors.New("made to fail")
		}
		return nil
	})
	for _, test := range []struct {
		args    []string
		says    string
		volumes string // that are there then
	}{
		{[]string{"create", "110", "--scsi0", "local:0,import-from=" + raw, "--scsi1", "gone:1"}, "unable to create VM 110 - storage 'gone' does not exist", ""},
		{[]string{"create", "110", "--lock", "create", "--net0", "virtio,bridge=vmbr0", "--scsi0", "local:0,import-from=" + raw}, "", "vm-110-disk-0.raw"},
		{[]string{"set", "110", "--scsi1", "lvm:0,import-from=" + raw}, "VM is locked (create)", "vm-110-disk-0.raw"},
		{[]string{"set", "110", "--skiplock", "1", "--scsi1", "lvm:0,import-from=" + overlay}, "backing file", "vm-110-disk-0.raw"},
		{[]string{"set", "110", "--skiplock", "1", "--scsi1", "lvm:0,import-from=" + luks}, "made to fail", "vm-110-disk-0.raw"},
		{[]string{"unlock", "110"}, "", "vm-110-disk-0.raw"},
		{[]string{"set", "110", "--boot", "order=scsi5"}, "device 'scsi5' does not exist", "vm-110-disk-0.raw"},
		{[]string{"set", "110", "--ide2", "local:cloudinit"}, "", "vm-110-cloudinit.qcow2 vm-110-disk-0.raw"},
		{[]string{"set", "110", "--ide0", "local:cloudinit"}, "already exists", "vm-110-cloudinit.qcow2 vm-110-disk-0.raw"},
		{[]string{"set", "110", "--scsi0", "lvm:0,import-from=" + raw, "--tpmstate0", "lvm:1,version=v2.0"}, "", "vm-110-cloudinit.qcow2 vm-110-disk-0.raw vm-110-disk-0 vm-110-disk-1"},
		{[]string{"set", "110", "--scsi0", "local:110/vm-110-disk-0.raw", "--tags", "a"}, "made to fail", "vm-110-cloudinit.qcow2 vm-110-disk-0.raw vm-110-disk-0 vm-110-disk-1"},
	} {
		code, _, errs := n.TryQM(test.args...)
		if (code != 0) != (test.says != "") || !strings.Contains(errs, test.says) {
			t.Errorf("qm %q: %d %q, want %q", test.args, code, errs, test.says)
		}
		if got := strings.Join(volumes(), " "); got != test.volumes {
			t.Errorf("qm %q: volumes %q, want %q", test.args, got, test.volumes)
		}
	}
	n.SetFault(nil)
	cf := parseConf(n.Config(110))
	if cf.pending["scsi0"] != "local:110/vm-110-disk-0.raw,size=3M" || !strings.HasPrefix(cf.main["scsi0"], "lvm:vm-110-disk-0,") {
		t.Errorf("what came before the failure is pending: %v, %v", cf.main, cf.pending)
	}
	n.QM("set", "110", "--scsi0", cf.main["scsi0"]) // taken back
	cf = parseConf(n.Config(110))
	if len(cf.pending) > 0 || cf.main["unused0"] != "local:110/vm-110-disk-0.raw" || !strings.HasPrefix(cf.main["net0"], "virtio=BC:24:11:") {
		t.Errorf("taken back: %v, %v", cf.main, cf.pending)
	}
	n.QM("set", "110", "--delete", "unused0")
	if slices.Contains(volumes(), "vm-110-disk-0.raw") {
		t.Error("an unused volume that was deleted is still there")
	}
	n.QM("set", "110", "--protection", "1")
	if code, _, errs := n.TryQM("destroy", "110"); code == 0 || !strings.Contains(errs, "protection mode enabled") {
		t.Errorf("destroy: %d %s", code, errs)
	}
	n.QM("set", "110", "--protection", "0")
	n.QM("destroy", "110")
	if got := volumes(); len(got) > 0 {
		t.Errorf("volumes of a VM that was destroyed: %q", got)
	}
	if _, err := os.Stat(filepath.Join(n.Etc, "firewall/110.fw")); err == nil {
		t.Error("the firewall's rules are still there")
	}
}
