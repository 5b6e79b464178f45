package proxmox_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qmchain/proxmox"
)

func readConfig(t *testing.T, name string) *proxmox.Config {
	t.Helper()
	text, err := os.ReadFile("testdata/pve/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return proxmox.ParseConfig(120, text)
}

// TestConfigAsQM compares with what the real qm printed of the same files.
func TestConfigAsQM(t *testing.T) {
	t.Parallel()
	c := readConfig(t, "120-pending.conf")
	printed, err := os.ReadFile("testdata/pve/qm-config-current.txt")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(printed)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if key == "description" {
			continue
		}
		if c.Options[key] != value {
			t.Errorf("%s is %q, qm says %q", key, c.Options[key], value)
		}
		n++
	}
	if n != len(c.Options) {
		t.Errorf("%d options, qm has %d", len(c.Options), n)
	}
	if next, ok := c.Next("args"); !ok || next != c.Options["args"]+" -k de" {
		t.Errorf("next args: %q", next)
	}
	if c.Description != "web server: keep" {
		t.Errorf("description: %q", c.Description)
	}
	// sha1sum of the file.
	if c.Digest != "79eb98c229625736c763a39f258f2beb49559df6" {
		t.Errorf("digest: %q", c.Digest)
	}
}

func TestConfigSections(t *testing.T) {
	t.Parallel()
	c := proxmox.ParseConfig(110, []byte(`#first%3A
#
#100%25
agent: enabled=1,freeze-fs-on-backup=0,type=isa
args: "-k" "de"
cdrom: none,media=cdrom
broken line
delete: agent
lock: backup
parent: before
tags: Prod;web,x
template: 1
unused0: local:110/old.qcow2

[PENDING]
delete: !net0,args
memory: 512

[special:cloudinit]
name: x

[Before]
#its text
args: -old
snaptime: 1795172015

[special:fleecing]
fleecing-images: local:1

[.odd]
args: -odd
`))
	want := &proxmox.Config{
		VMID: 110, Digest: c.Digest, Description: "first:\n\n100%",
		Options: proxmox.Options{
			"agent": "enabled=1,freeze-fs-on-backup=0,type=isa", "args": `"-k" "de"`, "ide2": "none,media=cdrom", "lock": "backup", "parent": "before",
			"tags": "Prod;web,x", "template": "1", "unused0": "local:110/old.qcow2",
		},
		Pending: proxmox.Options{"memory": "512"}, PendingDelete: []string{"net0", "args"},
		Snapshots: []proxmox.Snapshot{{Name: "Before", Description: "its text", Options: proxmox.Options{"args": "-old", "snaptime": "1795172015"}}},
		Special:   map[string]proxmox.Options{"cloudinit": {"name": "x"}, "fleecing": {"fleecing-images": "local:1"}},
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Error(diff)
	}
	if _, ok := c.Next("args"); ok {
		t.Error("args are to be deleted")
	}
	if a := c.Agent(); !a.Enabled || a.Freeze || a.Type != "isa" {
		t.Errorf("agent: %+v", a)
	}
	if !c.Template() || c.Lock() != "backup" || !slices.Equal(c.Tags(), []string{"Prod", "web", "x"}) {
		t.Errorf("template %v, lock %s, tags %v", c.Template(), c.Lock(), c.Tags())
	}
	portable := "#first%3A\n#\n#100%25\nagent: enabled=1,freeze-fs-on-backup=0,type=isa\nargs: \"-k\" \"de\"\nide2: none,media=cdrom\ntags: Prod;web,x\ntemplate: 1\n"
	if c.Portable() != portable {
		t.Errorf("portable:\n%s", c.Portable())
	}
}

func TestAgent(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]proxmox.Agent{
		"":                         {Freeze: true, Type: "virtio"},
		"0":                        {Freeze: true, Type: "virtio"},
		"1":                        {Enabled: true, Freeze: true, Type: "virtio"},
		"1,freeze-fs=0":            {Enabled: true, Type: "virtio"},
		"1,guest-fsfreeze=off":     {Enabled: true, Type: "virtio"},
		"enabled=yes,freeze-fs=on": {Enabled: true, Freeze: true, Type: "virtio"},
	} {
		if got := proxmox.ParseConfig(110, []byte("agent: "+value+"\n")).Agent(); got != want {
			t.Errorf("%q: %+v", value, got)
		}
	}
}

func TestDrives(t *testing.T) {
	t.Parallel()
	c := proxmox.ParseConfig(120, []byte(`efidisk0: local:120/vm-120-disk-3.qcow2,efitype=4m,size=528K
ide0: none,media=cdrom
ide2: local-lvm:vm-120-cloudinit,media=cdrom,size=4M
sata2: local:120/vm-120-disk-2.qcow2,backup=0,size=48M,iothread=1
scsi10: file=local-zfs:vm-120-disk-5,size=1.5G
scsi2: /dev/disk/by-id/x,iothread=1,cache=writeback
scsihw: virtio-scsi-single
tpmstate0: local-lvm:vm-120-disk-6,size=4M,version=v2.0
virtio1: local:120/vm-120-disk-1.raw,size=oops
`))
	type row struct {
		ID, Volume                              string
		CDROM, CloudInit, TPM, Backup, IOThread bool
		Size                                    int64
	}
	var got []row
	for _, d := range c.Drives() {
		size, _ := d.Size()
		got = append(got, row{d.ID, d.Volume, d.CDROM(), d.CloudInit(), d.TPM(), d.Backup(), d.IOThread(), size})
	}
	want := []row{
		{ID: "efidisk0", Volume: "local:120/vm-120-disk-3.qcow2", Backup: true, Size: 528 << 10},
		{ID: "ide0", Volume: "none", CDROM: true, Backup: true},
		{ID: "ide2", Volume: "local-lvm:vm-120-cloudinit", CDROM: true, CloudInit: true, Backup: true, Size: 4 << 20},
		{ID: "sata2", Volume: "local:120/vm-120-disk-2.qcow2", Size: 48 << 20},
		{ID: "scsi2", Volume: "/dev/disk/by-id/x", Backup: true, IOThread: true},
		{ID: "scsi10", Volume: "local-zfs:vm-120-disk-5", Backup: true, Size: 3 << 29},
		{ID: "tpmstate0", Volume: "local-lvm:vm-120-disk-6", TPM: true, Backup: true, Size: 4 << 20},
		{ID: "virtio1", Volume: "local:120/vm-120-disk-1.raw", Backup: true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if c.Drives()[4].Options["cache"] != "writeback" {
		t.Error("scsi2 has lost its cache")
	}
}
