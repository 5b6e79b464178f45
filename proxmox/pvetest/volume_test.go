package pvetest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/internal/testenv"
)

// TestVolumes: new, imported, grown and removed ones.
func TestVolumes(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.AddStorage("lvmthin", "lvm")
	raw, qcow2 := filepath.Join(n.Dir, "a.raw"), filepath.Join(n.Dir, "b.qcow2")
	testenv.CreateDisk(t, n.QEMU, raw, "raw", 3<<20)
	testenv.CreateDisk(t, n.QEMU, qcow2, "qcow2", 64<<20)
	n.QM("create", "110", "--name", "web", "--memory", "64", "--scsihw", "virtio-scsi-single",
		"--scsi0", "local:0,import-from="+raw+",iothread=1", "--scsi1", "local:0.015625,format=qcow2,backup=0")
	for _, test := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"create", "110"}, 255, "unable to create VM 110 - VM 110 already exists on node 'pve1'"},
		{[]string{"set", "110", "--scsi2", "local:1,import-from=" + raw}, 2, "'import-from' requires special syntax - use <storage ID>:0,import-from=<source>"},
		{[]string{"set", "110", "--scsi2", "local:0,import-from=a.raw"}, 2, "400 Parameter verification failed."},
		{[]string{"set", "110", "--scsi2", "local:0,import-from=nbd://h/x"}, 2, "400 Parameter verification failed."},
		{[]string{"set", "110", "--scsi2", "local:0,import-from=/dev/null"}, 255, "is not a regular file"},
		{[]string{"set", "110", "--efidisk0", "local:0,import-from=" + raw}, 2, "need to specify 'efitype' when using 'import-from'"},
		{[]string{"set", "110", "--efidisk0", "local:0,efitype=4m,pre-enrolled-keys=0,import-from=" + raw}, 0, ""},
		{[]string{"set", "110", "--tpmstate0", "lvm:0,import-from=" + raw}, 2, "need to specify 'version' when using 'import-from'"},
		{[]string{"set", "110", "--virtio3", "lvm:0,import-from=" + qcow2}, 0, ""},
		{[]string{"disk", "import", "110", qcow2, "local", "--format", "qcow2"}, 0, ""},
		{[]string{"disk", "import", "110", raw, "local", "--target-disk", "scsi3"}, 0, ""},
		{[]string{"resize", "110", "scsi1", "+2M"}, 0, ""},
		{[]string{"resize", "110", "scsi1", "1M"}, 255, "shrinking disks is not supported"},
		{[]string{"set", "110", "--delete", "scsi0"}, 0, ""},
	} {
		if code, _, errs := n.TryQM(test.args...); code != test.code || !strings.Contains(errs, test.says) {
			t.Errorf("qm %q: %d %q, want %d %q", test.args, code, errs, test.code, test.says)
		}
	}
	got := parseConf(n.Config(110)).main
	for key, want := range map[string]string{
		"scsi0":    "",
		"scsi1":    "local:110/vm-110-disk-1.qcow2,backup=0,size=18M",
		"scsi3":    "local:110/vm-110-disk-4.raw,size=3M",
		"efidisk0": "local:110/vm-110-disk-2.raw,efitype=4m,pre-enrolled-keys=0,size=3M",
		"virtio3":  "lvm:vm-110-disk-0,size=64M",
		"unused0":  "local:110/vm-110-disk-3.qcow2",
		"unused1":  "local:110/vm-110-disk-0.raw",
	} {
		if got[key] != want {
			t.Errorf("%s is %q, want %q", key, got[key], want)
		}
	}
	n.QM("start", "110")
	n.VM(110).IO("scsi1", "write -P 1 0 64k")
	n.QM("resize", "110", "scsi1", "32M")
	n.VM(110).IO("scsi1", "write -P 1 31M 64k")
}

// TestSnapshots: with a persistent bitmap in the image a rollback fails, and leaves its lock.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	for _, pve := range []int{8, 9} {
		t.Run(fmt.Sprintf("PVE %d", pve), func(t *testing.T) {
			t.Parallel()
			n := Install(t)
			n.PVE = pve
			n.AddVM(110, "scsi0: local:110/vm-110-disk-0.qcow2,size=16M")
			n.QM("snapshot", "110", "first", "--description", "before")
			n.QM("start", "110")
			n.VM(110).IO("scsi0", "write -P 1 0 64k")
			n.QM("snapshot", "110", "second")
			n.VM(110).IO("scsi0", "write -P 2 0 64k")
			if got := n.QM("listsnapshot", "110"); got != "`-> first\n  `-> second\n    `-> current\n" {
				t.Errorf("listsnapshot: %s", got)
			}
			before := parseConf(n.Config(110)).main
			n.QM("rollback", "110", "second")
			after := parseConf(n.Config(110)).main
			if after["vmgenid"] == before["vmgenid"] || after["parent"] != "second" || after["lock"] != "" {
				t.Errorf("after the rollback: %v", after)
			}
			n.QM("start", "110")
			n.VM(110).IO("scsi0", "read -P 1 0 64k")
			n.QM("delsnapshot", "110", "first")
			n.QM("stop", "110")
			image := n.layout().volume("local:110/vm-110-disk-0.qcow2")
			testenv.Output(t, n.QEMU.Img, "bitmap", "--add", "-f", "qcow2", image, "b0")
			if code, _, errs := n.TryQM("rollback", "110", "second"); code == 0 || !strings.Contains(errs, "Could not apply snapshot") {
				t.Errorf("rollback with a bitmap: %d %s", code, errs)
			}
			if got := parseConf(n.Config(110)).main["lock"]; got != "rollback" {
				t.Errorf("lock is %q", got)
			}
			n.QM("unlock", "110")
			testenv.Output(t, n.QEMU.Img, "bitmap", "--remove", "-f", "qcow2", image, "b0")
			n.QM("rollback", "110", "second")
			if code, _, errs := n.TryQM("snapshot", "110", "second"); code != 255 || errs != "snapshot name 'second' already used\n" {
				t.Errorf("a name that is taken: %d %s", code, errs)
			}
			n.AddVM(111, "scsi0: local:111/vm-111-disk-0.raw,size=1M")
			if code, _, errs := n.TryQM("snapshot", "111", "x"); code != 255 || errs != "snapshot feature is not available\n" {
				t.Errorf("of a raw disk: %d %s", code, errs)
			}
		})
	}
}

// TestLinux: with a real guest, its agent and its power-off.
func TestLinux(t *testing.T) {
	t.Parallel()
	n := Install(t)
	n.Guest = true
	n.AddVM(110, "agent: 1", "scsi0: local:110/vm-110-disk-0.qcow2,size=16M,serial=scsi0", "memory: 384",
		"hookscript: "+n.AddSnippet("hook", fmt.Sprintf("#!/bin/sh\necho $2 >> %s/phases\n", n.Dir)))
	n.QM("start", "110")
	n.VM(110).WaitBoot()
	n.QM("guest", "cmd", "110", "ping")
	if got := n.QM("guest", "cmd", "110", "fsfreeze-status"); got != "thawed\n" {
		t.Errorf("fsfreeze-status: %q", got)
	}
	n.VM(110).Run(t.Context(), "echo hello > /dev/disk/scsi0 && sync")
	n.VM(110).IO("scsi0", "read -P 104 0 1")
	n.QM("set", "110", "--args", "-rtc base=utc")
	n.QM("reboot", "110")
	if got := n.QM("pending", "110"); !strings.Contains(got, "cur args: -rtc base=utc\n") {
		t.Errorf("after the reboot: %s", got)
	}
	n.VM(110).WaitBoot()
	n.QM("shutdown", "110")
	if n.running("110") {
		t.Error("it still runs")
	}
	const want = "pre-start post-start pre-stop post-stop pre-start post-start pre-stop post-stop "
	wait(t, "the hook's phases", func() bool {
		phases, _ := os.ReadFile(filepath.Join(n.Dir, "phases"))
		return strings.ReplaceAll(string(phases), "\n", " ") == want
	})
}
