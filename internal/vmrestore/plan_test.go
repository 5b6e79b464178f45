package vmrestore_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"qmchain/internal/vmrestore"
	"qmchain/proxmox"
)

var storages = map[string]proxmox.Storage{
	"local": {Type: "dir", Path: "/var/lib/vz", Content: []string{"images", "iso", "snippets"}},
	"lvm":   {Type: "lvmthin", Content: []string{"images", "rootdir"}},
	"nas":   {Type: "nfs", Path: "/mnt/pve/nas", Content: []string{"iso", "backup"}},
}

// plan makes a plan for VM 110, all of whose disks are in the point unless files says which. What is on the host is what
// exists names.
func plan(config string, o vmrestore.Options, files, exists []string, change func(*vmrestore.Site)) (*vmrestore.Plan, error) {
	c := proxmox.ParseConfig(110, []byte(config))
	point := vmrestore.Point{Name: "110/x", Config: c, Files: map[string]string{}}
	for _, id := range files {
		point.Disks = append(point.Disks, id)
		point.Files[id] = "/mnt/" + id + ".raw"
	}
	if o.VMID == 0 {
		o.VMID = 110
	}
	uuids := 0
	site := vmrestore.Site{
		Socket: proxmox.Socket{VMID: o.VMID, Dir: "/var/run/qemu-server"}, Storages: storages, Dir: "/tmp/private",
		Exists:  func(path string) bool { return path != "" && slices.Contains(exists, path) },
		NewUUID: func() string { uuids++; return fmt.Sprintf("00000000-0000-4000-8000-%012d", uuids) },
	}
	if change != nil {
		change(&site)
	}
	return vmrestore.NewPlan(point, o, site)
}

// commands are all of a plan's, a line each.
func commands(p *vmrestore.Plan) string {
	var b strings.Builder
	for _, s := range p.Steps(func(id string) string { return "new:" + id }) {
		b.WriteString(s.String() + "\n")
	}
	return b.String()
}

func notes(p *vmrestore.Plan) string {
	var all []string
	for _, n := range p.Notes {
		all = append(all, n.Text)
	}
	return strings.Join(all, "|")
}

func TestPlanDrives(t *testing.T) {
	t.Parallel()
	none := vmrestore.Options{}
	for _, test := range []struct {
		what   string
		line   string
		o      vmrestore.Options
		files  string
		exists string
		want   string // of qm's commands
		note   string
		loss   bool
	}{
		{"qcow2 stays qcow2", "scsi0: local:110/vm-110-disk-0.qcow2,discard=on,size=32G", none, "scsi0", "", "--scsi0 local:0,import-from=/mnt/scsi0.raw,format=qcow2,discard=on\n", "", false},
		{"raw stays raw", "scsi0: local:110/vm-110-disk-0.raw,size=32G", none, "scsi0", "", "--scsi0 local:0,import-from=/mnt/scsi0.raw,format=raw\n", "", false},
		{"of a block device's storage", "virtio1: lvm:vm-110-disk-0,iothread=1,size=1G", none, "virtio1", "", "--virtio1 lvm:0,import-from=/mnt/virtio1.raw,iothread=1\n", "", false},
		{"from files to LVM", "scsi0: local:110/vm-110-disk-0.qcow2", vmrestore.Options{Storage: "lvm"}, "scsi0", "", "--scsi0 lvm:0,import-from=/mnt/scsi0.raw\n", "", false},
		{"from LVM to files", "scsi0: gone:vm-110-disk-0", vmrestore.Options{Storage: "local"}, "scsi0", "", "--scsi0 local:0,import-from=/mnt/scsi0.raw\n", "", false},
		{"one elsewhere", "scsi0: local:110/vm-110-disk-0.raw", vmrestore.Options{Storage: "local", Storages: map[string]string{"scsi0": "lvm"}}, "scsi0", "", "--scsi0 lvm:0,import-from=/mnt/scsi0.raw\n", "", false},
		{"a device of the old host", "scsi0: /dev/disk/by-id/x,size=1T", vmrestore.Options{Storage: "lvm"}, "scsi0", "", "--scsi0 lvm:0,import-from=/mnt/scsi0.raw\n", "", false},
		{"older EFI", "efidisk0: lvm:vm-110-disk-0,size=128K", none, "efidisk0", "", "--efidisk0 lvm:0,import-from=/mnt/efidisk0.raw,efitype=2m,pre-enrolled-keys=0\n", "", false},
		{"EFI", "efidisk0: lvm:vm-110-disk-0,efitype=4m,pre-enrolled-keys=1", none, "efidisk0", "", ",efitype=4m,pre-enrolled-keys=1\n", "", false},
		{"TPM", "tpmstate0: local:110/vm-110-disk-0.raw,size=4M,version=v2.0", none, "tpmstate0", "", "--tpmstate0 local:0,import-from=/mnt/tpmstate0.raw,format=raw,version=v2.0\n", "", false},
		{"TPM that was not saved", "tpmstate0: lvm:vm-110-disk-0,size=4M,version=v2.0", none, "", "", "--tpmstate0 lvm:1,version=v2.0\n", "an empty one", true},
		{"cloud-init", "ide2: lvm:vm-110-cloudinit,media=cdrom,size=4M", none, "", "", "--ide2 lvm:cloudinit,media=cdrom\n", "", false},
		{"CD that is here", "ide2: local:iso/a.iso,media=cdrom,size=1G", none, "", "/var/lib/vz/template/iso/a.iso", "--ide2 local:iso/a.iso,media=cdrom\n", "", false},
		{"CD that is not", "ide2: local:iso/a.iso,media=cdrom,size=1G", none, "", "", "--ide2 none,media=cdrom\n", "the drive is empty", false},
		{"CD outside of the storage", "ide2: local:iso/../../a.iso,media=cdrom", none, "", "", "--ide2 none,media=cdrom\n", "the drive is empty", false},
		{"empty CD", "ide2: none,media=cdrom", none, "", "", "--ide2 none,media=cdrom\n", "", false},
		{"backup=0", "scsi1: lvm:vm-110-disk-0,backup=0", none, "", "", "", "backup=0", false},
		{"not in the point", "scsi1: lvm:vm-110-disk-0", none, "", "", "", "the point does not hold it", true},
		{"in no drive", "memory: 64", none, "scsi1", "", "", "in no drive", true},
	} {
		p, err := plan(test.line+"\n", test.o, strings.Fields(test.files), strings.Fields(test.exists), nil)
		if err != nil {
			t.Errorf("%s: %v", test.what, err)
			continue
		}
		if got := commands(p); !strings.Contains(got, test.want) || test.want == "" && strings.Contains(got, "--scsi") {
			t.Errorf("%s: no %q in %s", test.what, test.want, got)
		}
		if !strings.Contains(notes(p), test.note) || test.note == "" && len(p.Notes) > 0 || (p.Loss() != "") != test.loss {
			t.Errorf("%s: notes %q, loss %q", test.what, notes(p), p.Loss())
		}
	}
	for _, test := range []struct {
		line string
		o    vmrestore.Options
	}{
		{"scsi0: gone:vm-110-disk-0", none},
		{"scsi0: /dev/sdb", none},
		{"scsi0: nas:110/vm-110-disk-0.raw", none},
		{"scsi0: lvm:vm-110-disk-0", vmrestore.Options{Storage: "gone"}},
		{"scsi0: lvm:vm-110-disk-0", vmrestore.Options{Storages: map[string]string{"scsi7": "lvm"}}},
		{"ide2: gone:vm-110-cloudinit,media=cdrom", none},
	} {
		if _, err := plan(test.line+"\n", test.o, []string{"scsi0"}, nil, nil); !errors.Is(err, vmrestore.ErrStorage) {
			t.Errorf("%s, %+v: %v", test.line, test.o, err)
		}
	}
}

func TestPlanOptions(t *testing.T) {
	t.Parallel()
	unique := vmrestore.Options{VMID: 120, Unique: true}
	other := vmrestore.Options{VMID: 120}
	const ours = "-chardev socket,id=qmchain,path=/var/run/qemu-server/110-backup.qmp,server=on,wait=off -mon chardev=qmchain,mode=control"
	for _, test := range []struct {
		what, lines string
		o           vmrestore.Options
		want, not   string // in qm's commands
		note        string
	}{
		{"what is of a moment", "lock: backup\nparent: x\nmeta: creation-qemu=9\nunused0: lvm:x\nrunningmachine: pc\nmemory: 64", vmrestore.Options{}, "create 110 --lock create --memory 64 --vmgenid 00000000-0000-4000-8000-000000000001 --description 'qmchain-restore makes this VM.'\n", "unused", ""},
		{"vmgenid is new", "vmgenid: 9a037514-e9bd-449f-9bdf-80befe73f126", vmrestore.Options{}, "--vmgenid 00000000-0000-4000-8000-000000000001 ", "9a037514", ""},
		{"vmgenid that was off stays so", "vmgenid: 0", vmrestore.Options{}, "qm set 110 --skiplock 1 --vmgenid 0\n", "", ""},
		{"args of a copy", "args: -k de " + ours, other, "120-backup.qmp", "110-backup", "args: taken over from the backup, and what is in there reaches into this host"},
		{"the socket alone", "args: " + ours, other, "120-backup.qmp", "110-backup", ""},
		{"args without a socket", "args: -k de", other, "--args '-k de' ", "chardev", "reaches into this host"},
		{"devices of the host", "hostpci0: 0000:01:00.0\nusb0: host=1234:5678\nusb1: spice\nusb2: host=spice,usb3=1\nserial0: socket\nserial1: /dev/ttyS0", other, "--hostpci0 0000:01:00.0 ", "", "hostpci0, serial1, usb0: taken over"},
		{"args that PVE can't split", "args: -k 'de", other, `--args '-k '\''de' `, "", "unbalanced quotes"},
		{"MAC stays", "net0: virtio=BC:24:11:50:6C:F3,bridge=vmbr0", other, "--net0 virtio=BC:24:11:50:6C:F3,bridge=vmbr0 ", "", ""},
		{"MAC is new", "net0: virtio=BC:24:11:50:6C:F3,bridge=vmbr0\nnet1: e1000=BC:24:11:50:6C:F4", unique, "--net0 virtio,bridge=vmbr0 --net1 e1000 ", "BC:24", ""},
		{"UUID is new", "smbios1: family=x,uuid=3afdd324-5022-4756-b3ce-7614878a4a02", unique, "--smbios1 family=x,uuid=00000000-0000-4000-8000-000000000002 ", "3afdd324", ""},
		{"UUID stays", "smbios1: uuid=3afdd324-5022-4756-b3ce-7614878a4a02", other, "--smbios1 uuid=3afdd324-5022-4756-b3ce-7614878a4a02 ", "", ""},
		{"boot order without what is left out", "boot: order=scsi1;net0;ide2\nide2: none,media=cdrom\nscsi1: lvm:x,backup=0\nnet0: virtio=BC:24:11:50:6C:F3", vmrestore.Options{}, "--boot 'order=net0;ide2' --delete description\n", "scsi1", "backup=0"},
		{"no boot order", "memory: 64", vmrestore.Options{}, "qm set 110 --skiplock 1 --delete boot,description\n", "", ""},
		{"protection last", "protection: 1", vmrestore.Options{}, "qm set 110 --skiplock 1 --protection 1 --delete boot,description\n", "create --protection", ""},
		{"a template", "template: 1", vmrestore.Options{}, "qm unlock 110\nqm template 110\n", "--template", ""},
		{"a hook script that is here", "hookscript: local:snippets/a.sh", vmrestore.Options{}, "--hookscript local:snippets/a.sh ", "", "hookscript: taken over"},
		{"one that is not", "hookscript: local:snippets/b.sh", vmrestore.Options{}, "", "hookscript", "b.sh is not on this host"},
		{"vmstatestorage", "vmstatestorage: gone", vmrestore.Options{}, "", "vmstatestorage", "no storage gone"},
		{"SSH keys", "sshkeys: ssh-rsa%20A", vmrestore.Options{}, "--sshkeys /tmp/private/sshkeys ", "ssh-rsa", ""},
		{"quotes for the shell", "name: it's", vmrestore.Options{}, `--name 'it'\''s' `, "", ""},
		{"started", "memory: 64", vmrestore.Options{Start: true}, "qm unlock 110\nqm start 110\n", "", ""},
	} {
		p, err := plan(test.lines+"\n", test.o, nil, []string{"/var/lib/vz/snippets/a.sh"}, nil)
		if err != nil {
			t.Errorf("%s: %v", test.what, err)
			continue
		}
		if got := commands(p); !strings.Contains(got, test.want) || test.not != "" && strings.Contains(got, test.not) {
			t.Errorf("%s: no %q, or %q, in %s", test.what, test.want, test.not, got)
		}
		if !strings.Contains(notes(p), test.note) || test.note == "" && len(p.Notes) > 0 {
			t.Errorf("%s: notes %q", test.what, notes(p))
		}
	}
	p, err := plan("memory: 64\n", other, nil, nil, func(s *vmrestore.Site) { s.Twin = true })
	if err != nil || !strings.Contains(notes(p), "same MAC addresses") || p.Loss() != "" {
		t.Errorf("beside the VM: %q, %v", notes(p), err)
	}
	p, err = plan("memory: 64\n", unique, nil, nil, func(s *vmrestore.Site) { s.Twin = true })
	if err != nil || notes(p) != "" {
		t.Errorf("beside the VM, unique: %q, %v", notes(p), err)
	}
	// What a repository knows under this VMID is the VM that it was.
	p, err = plan("memory: 64\n", vmrestore.Options{Unique: true}, nil, nil, nil)
	if err != nil || !strings.Contains(notes(p), "--adopt") || p.Loss() != "" {
		t.Errorf("in place of the VM, unique: %q, %v", notes(p), err)
	}
	for _, test := range []struct {
		lines string
		o     vmrestore.Options
	}{
		{"template: 1", vmrestore.Options{Start: true}},
		{"template: 1", vmrestore.Options{Live: true}},
		{"tpmstate0: lvm:x,version=v2.0", vmrestore.Options{Live: true}},
	} {
		if _, err := plan(test.lines+"\n", test.o, []string{"tpmstate0"}, nil, nil); !errors.Is(err, vmrestore.ErrCannot) {
			t.Errorf("%s, %+v: %v", test.lines, test.o, err)
		}
	}
}

func TestPlanReplaces(t *testing.T) {
	t.Parallel()
	old := func(text string) func(*vmrestore.Site) {
		return func(s *vmrestore.Site) { s.Old = proxmox.ParseConfig(110, []byte(text)) }
	}
	p, err := plan("memory: 64\nscsi0: local:110/vm-110-disk-0.qcow2,ssd=1\nide2: lvm:vm-110-cloudinit,media=cdrom\n", vmrestore.Options{}, []string{"scsi0"}, nil,
		old("memory: 32\ncores: 2\nunused3: lvm:kept\nscsi0: local:110/vm-110-disk-0.qcow2\nsata1: lvm:vm-110-disk-1\nide2: lvm:vm-110-cloudinit,media=cdrom,size=4M\nsata5: /dev/sdb\nsata4: lvm:vm-200-disk-0\n"))
	if err != nil {
		t.Fatal(err)
	}
	const want = `qm disk import 110 /mnt/scsi0.raw local --format qcow2
qm set 110 --lock create
qm set 110 --skiplock 1 --memory 64 --scsi0 new:scsi0,ssd=1 --vmgenid 0 --delete cores,sata1,sata4,sata5
qm unlock 110
qm set 110 --delete '<unused of local:110/vm-110-disk-0.qcow2>'
`
	if !strings.Contains(notes(p), "lvm:vm-110-disk-1, which was sata1, stays as an unused volume") || strings.Contains(notes(p), "sdb") || strings.Contains(notes(p), "200") {
		t.Errorf("notes: %q", notes(p))
	}
	if got := commands(p); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	for _, text := range []string{"ide2: local:110/vm-110-cloudinit.qcow2,media=cdrom", "ide0: lvm:vm-110-cloudinit,media=cdrom"} {
		_, err := plan("memory: 64\nide2: lvm:vm-110-cloudinit,media=cdrom\n", vmrestore.Options{}, nil, nil, old(text+"\n"))
		if !errors.Is(err, vmrestore.ErrCannot) || !strings.Contains(err.Error(), "cloud-init drive is in the way") {
			t.Errorf("%s: %v", text, err)
		}
	}
}
