package vmrestore_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"qmchain/internal/vmrestore"
	"qmchain/proxmox"
)

// The configurations are of another host, and of a VM that is to be replaced: what comes of them is a plan whose commands copy nothing but
// the point's own files, and mean the same when a shell reads them; or an error that says which of the reasons it is.
func FuzzPlan(f *testing.F) {
	for _, name := range []string{"120.conf", "120-pending.conf"} {
		text, err := os.ReadFile("../../proxmox/testdata/pve/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text), "", byte(0))
		f.Add(string(text), string(text), byte(7))
	}
	f.Add("scsi0: local:110/vm-110-disk-0.qcow2,import-from=/etc/shadow\nscsi1: lvm:a\nide2: local:iso/../x.iso,media=cdrom\ncloudinit0: a", "scsi0: lvm:vm-110-disk-0", byte(1))
	f.Add("efidisk0: local:x.raw\ntpmstate0: lvm:t\nnet0: virtio=AA:BB:CC:DD:EE:FF,bridge=a'b\nsmbios1: uuid=1\nsshkeys: %zz\nboot: order=scsi0;ide2\nvmgenid: 0", "", byte(2))
	f.Add("args: -chardev socket,id=qmchain,path=/var/run/qemu-server/120-backup.qmp,server=on,wait=off -mon chardev=qmchain,mode=control\ntemplate: 1\nhookscript: local:snippets/x\nide0: lvm:vm-110-cloudinit,media=cdrom",
		"ide0: local:110/vm-110-cloudinit.qcow2,media=cdrom\nunused0: lvm:u", byte(4))
	f.Fuzz(func(t *testing.T, config, old string, flags byte) {
		if strings.Contains(config+old, "\x00") {
			return // it can be in no argument
		}
		o := vmrestore.Options{Unique: flags&1 != 0, Live: flags&2 != 0, Start: flags&8 != 0}
		if flags&16 != 0 {
			o.Storage = "local"
		}
		p, err := plan(config, o, []string{"scsi0", "efidisk0", "tpmstate0"}, []string{"/var/lib/vz/template/iso/x.iso"}, func(s *vmrestore.Site) {
			if flags&4 != 0 {
				s.Old = proxmox.ParseConfig(110, []byte(old))
			}
		})
		if err != nil {
			var quote *proxmox.QuoteError
			if !errors.Is(err, vmrestore.ErrStorage) && !errors.Is(err, vmrestore.ErrCannot) && !errors.As(err, &quote) || !strings.HasPrefix(err.Error(), "110/x: ") {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		for _, d := range p.Drives {
			if s, ok := storages[d.Storage]; d.File != "" && (!ok || !s.Images()) {
				t.Errorf("drive %s goes to %q", d.ID, d.Storage)
			}
		}
		var lines bytes.Buffer
		var want []byte
		for _, s := range p.Steps(func(id string) string { return "new:" + id }) {
			lines.WriteString(s.String() + "\n")
			for _, arg := range s.Args {
				want = append(append(want, arg...), 0)
				for part := range strings.SplitSeq(arg, ",") {
					file, found := strings.CutPrefix(strings.TrimSpace(part), "import-from=")
					if found && !slices.Contains([]string{"/mnt/scsi0.raw", "/mnt/efidisk0.raw", "/mnt/tpmstate0.raw"}, file) && isDrive(s.Args, arg) {
						t.Errorf("%s would be copied: %q", file, s.Args)
					}
				}
			}
		}
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", "qm() { printf '%s\\0' \"$@\"; }\n"+lines.String())
		got, err := cmd.CombinedOutput()
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("the shell reads %q, %v\nnot %q", got, err, want)
		}
	})
}

// isDrive tells whether an argument is the value of a drive.
func isDrive(args []string, arg string) bool {
	i := slices.Index(args, arg)
	return i > 0 && proxmox.IsDrive(strings.TrimPrefix(args[i-1], "--"))
}
