package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/proxmox"
)

// TestWhatProxmoxDoes: what Proxmox VE does with its VMs, and what a run makes of it, on both of its forms of a command line. More of
// it is in the tests of what it concerns: hook scripts, the guest agent, restores.
func TestWhatProxmoxDoes(t *testing.T) {
	t.Parallel()
	for _, form := range []int{8, 9} {
		t.Run(fmt.Sprintf("PVE %d", form), func(t *testing.T) {
			t.Parallel()
			p := newPVE(t)
			p.PVE = form
			vmid := 110
			for _, row := range []struct {
				what  string
				lines []string // of the configuration
				does  func(v *factVM)
			}{
				{"locks a VM", nil, (*factVM).locks},
				{"keeps a change of args until the next start", nil, (*factVM).pendingArgs},
				{"drops args with an odd quote", nil, (*factVM).oddQuote},
				{"copies args with a clone", nil, (*factVM).clone},
				{"has drives that hold nothing of the VM's", []string{"ide0: none,media=cdrom", "ide2: local:iso/tools.iso,media=cdrom", "sata1: local:%d/vm-%[1]d-disk-1.raw,backup=0,size=1M"}, (*factVM).drives},
				{"has an EFI disk that is smaller than its image", []string{"bios: ovmf", "efidisk0: local:%d/vm-%[1]d-disk-1.raw,efitype=4m,size=528K"}, (*factVM).efi},
				{"takes snapshots", nil, (*factVM).snapshot},
				{"rolls back, with a new vmgenid", nil, (*factVM).rollback},
				{"grows a disk", nil, (*factVM).grow},
				{"refuses what a lock is against", nil, (*factVM).refused},
				{"talks on the monitor of its own", nil, (*factVM).ownMonitor},
				{"leaves the socket of a killed QEMU", nil, (*factVM).killed},
				{"has the older form of drives for an older machine", []string{"machine: pc-i440fx-8.1"}, (*factVM).goesOn},
				{"has an iothread for a disk", []string{"virtio1: local:%d/vm-%[1]d-disk-1.raw,iothread=1,size=1M"}, (*factVM).iothread},
				{"tracks writes itself, and exports disks", nil, (*factVM).others},
				{"has sections of its own in the configuration", nil, (*factVM).sections},
			} {
				t.Log("Proxmox VE " + row.what) // above what goes wrong with it
				v := &factVM{p, vmid, strconv.Itoa(vmid)}
				lines := []string{"memory: 16", fmt.Sprintf("scsi0: local:%d/vm-%[1]d-disk-0.qcow2,size=2M", vmid)}
				for _, line := range row.lines {
					if strings.Contains(line, "%") {
						line = fmt.Sprintf(line, vmid)
					}
					lines = append(lines, line)
				}
				v.AddVM(vmid, lines...)
				v.socket(vmid)
				row.does(v)
				vmid += 2 // one more may have been made
			}
		})
	}
}

// factVM is a VM with a backup socket, which does not run yet.
type factVM struct {
	*pve
	vmid int
	id   string
}

func (v *factVM) start() {
	v.t.Helper()
	v.QM("start", v.id)
}

func (v *factVM) write(pattern byte) {
	v.t.Helper()
	v.VM(v.vmid).IO("scsi0", fmt.Sprintf("write -P %d 0 64k", pattern))
}

// refuses makes sure that a run fails.
func (v *factVM) refuses(code int, text string, args ...string) {
	v.t.Helper()
	got, stdout, stderr := v.run(append([]string{v.id, "--lock-wait", "0s"}, args...)...)
	if got != code || stdout != "" || !strings.Contains(stderr, text) {
		v.t.Errorf("exit code %d: %s%s", got, stdout, stderr)
	}
}

// is takes a point of that level, whose disk scsi0 begins with that byte.
func (v *factVM) is(code int, level chain.Level, pattern byte, args ...string) *chain.Manifest {
	v.t.Helper()
	m, disks := v.point(code, v.vmid, args...)
	if m.Level() != level {
		v.t.Errorf("level %s: %+v", m.Level(), m.Disks)
	}
	v.holds(disks, "scsi0", pattern)
	return m
}

func (v *factVM) saysWhy(m *chain.Manifest) {
	v.t.Helper()
	if m.Disks[0].Reason == "" {
		v.t.Error("no reason is given for the full")
	}
}

// goesOn has a full and an increment.
func (v *factVM) goesOn() {
	v.t.Helper()
	v.start()
	v.write(1)
	v.is(0, chain.Full, 1)
	v.write(2)
	v.is(0, chain.Inc, 2)
}

func (v *factVM) locks() {
	v.start()
	before := v.Config(v.vmid)
	for _, lock := range []string{"backup", "clone", "create", "migrate", "rollback", "snapshot", "snapshot-delete", "suspending", "suspended"} {
		v.WriteConfig(v.vmid, "lock: "+lock+"\n"+before)
		v.refuses(3, "locked ("+lock+")")
		if got := v.lock(v.vmid); got != lock {
			v.t.Errorf("lock %s became %q", lock, got)
		}
	}
}

func (v *factVM) pendingArgs() {
	args := v.Config(v.vmid)
	v.QM("set", v.id, "--delete", "args")
	v.start()
	v.socket(v.vmid)
	if !strings.Contains(v.Config(v.vmid), "[PENDING]") {
		v.t.Errorf("nothing is pending; the configuration was %s", args)
	}
	v.refuses(2, "no backup socket")
	v.QM("stop", v.id)
	v.goesOn()
}

func (v *factVM) oddQuote() {
	v.WriteConfig(v.vmid, strings.Replace(v.Config(v.vmid), "args: ", "args: -rtc 'base=utc ", 1))
	v.start()
	v.refuses(2, "no backup socket")
}

func (v *factVM) clone() {
	v.QM("clone", v.id, strconv.Itoa(v.vmid+1))
	v.start()
	v.write(1)
	v.is(0, chain.Full, 1)
	other := &factVM{v.pve, v.vmid + 1, strconv.Itoa(v.vmid + 1)}
	other.start()
	other.refuses(2, "it is that of VM "+v.id)
	v.refuses(1, "somebody else answers")
}

func (v *factVM) drives() {
	iso := filepath.Join(v.Storage, "template/iso/tools.iso")
	if err := errors.Join(os.MkdirAll(filepath.Dir(iso), 0o700), os.WriteFile(iso, make([]byte, 64<<10), 0o600)); err != nil {
		v.t.Fatal(err)
	}
	v.goesOn()
	if m := v.is(0, chain.Inc, 2); len(m.Disks) != 1 {
		v.t.Errorf("disks %+v", m.Disks)
	}
}

func (v *factVM) efi() {
	v.goesOn()
	m := v.is(0, chain.Inc, 2)
	if d := m.Disk("efidisk0"); d == nil || d.VirtualSize != 528<<10 {
		v.t.Errorf("the EFI disk is %+v", d)
	}
}

func (v *factVM) snapshot() {
	v.goesOn()
	for i, name := range []string{"first", "second"} { // each has another parent
		v.QM("snapshot", v.id, name)
		v.write(byte(3 + i))
		v.is(0, chain.Inc, byte(3+i))
	}
	v.QM("delsnapshot", v.id, "first")
	v.is(0, chain.Inc, 4)
}

func (v *factVM) rollback() {
	v.start()
	v.write(1)
	v.QM("snapshot", v.id, "before")
	v.write(2)
	v.is(0, chain.Full, 2)
	v.QM("rollback", v.id, "before")
	v.start()
	v.saysWhy(v.is(4, chain.Full, 1))
}

func (v *factVM) grow() {
	v.goesOn()
	v.QM("resize", v.id, "scsi0", "+1M")
	v.VM(v.vmid).IO("scsi0", "write -P 5 2M 1M")
	m, disks := v.point(0, v.vmid)
	if data := disks["scsi0"]; m.Level() != chain.Inc || len(data) != 3<<20 || data[len(data)-1] != 5 {
		v.t.Errorf("level %s, %d bytes", m.Level(), len(data))
	}
}

func (v *factVM) refused() {
	v.start()
	v.write(1)
	v.VM(v.vmid).IO("scsi0", "write -P 7 64k 1984k")
	wait := v.background(v.vmid, "--speed-limit", "512KiB")
	for _, command := range []string{
		"set %s --onboot 1", "snapshot %s x", "resize %s scsi0 +1M", "shutdown %s", "reset %s", "stop %s", "reboot %s", "clone %s 999",
		"set %s --lock backup", "destroy %s",
	} {
		if code, _, errs := v.TryQM(strings.Fields(fmt.Sprintf(command, v.id))...); code == 0 || !strings.Contains(errs, "VM is locked (backup)") {
			v.t.Errorf("qm %s in mid-run: %d %s", command, code, errs)
		}
	}
	if code, _, stderr := wait(); code != 0 {
		v.t.Errorf("exit code %d: %s", code, stderr)
	}
	v.is(0, chain.Inc, 1)
}

// ownMonitor has PVE's own monitor taken, which serves one at a time.
func (v *factVM) ownMonitor() {
	v.start()
	conn, err := net.Dial("unix", filepath.Join(v.Run, v.id+".qmp"))
	if err != nil {
		v.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	v.write(1)
	v.is(0, chain.Full, 1)
}

func (v *factVM) killed() {
	v.goesOn()
	v.VM(v.vmid).IO("scsi0", "flush")
	v.VM(v.vmid).Kill()
	if _, err := os.Lstat(v.host.Host.Socket(proxmox.VMID(v.vmid)).Path()); err != nil {
		v.t.Errorf("the socket has gone: %v", err)
	}
	v.start()
	v.saysWhy(v.is(4, chain.Full, 2))
}

func (v *factVM) iothread() {
	v.start()
	v.write(1)
	if !v.QEMU.AtLeast(9, 0) {
		v.refuses(1, "--no-fleece")
	}
	v.is(0, chain.Full, 1, "--no-fleece")
}

func (v *factVM) others() {
	v.start()
	vm := v.VM(v.vmid)
	const name = "pbs-incremental-dirty-bitmap"
	vm.Execute("block-dirty-bitmap-add", map[string]any{"node": "drive-scsi0", "name": name}, nil)
	address := map[string]any{"type": "unix", "data": map[string]any{"path": filepath.Join(v.Dir, v.id+".nbd")}}
	vm.Execute("nbd-server-start", map[string]any{"addr": address}, nil)
	v.write(1)
	v.is(0, chain.Full, 1)
	v.write(2)
	v.is(0, chain.Inc, 2)
	vm.Execute("block-dirty-bitmap-remove", map[string]any{"node": "drive-scsi0", "name": name}, nil)
	vm.Execute("nbd-server-stop", nil, nil)
}

func (v *factVM) sections() {
	v.start()
	v.QM("set", v.id, "--memory", "32") // stays pending
	v.WriteConfig(v.vmid, v.Config(v.vmid)+"\n[special:cloudinit]\nname: other\n")
	v.write(1)
	m := v.is(0, chain.Full, 1)
	text, err := os.ReadFile(filepath.Join(v.repo, v.id, string(m.ID), repo.GuestFilesFolder, v.id+".conf"))
	if err != nil || strings.Contains(string(text), "[") || strings.Contains(string(text), "memory: 32") || !strings.Contains(string(text), "memory: 16") {
		v.t.Errorf("saved: %s, %v", text, err)
	}
	if !strings.Contains(v.Config(v.vmid), "[special:cloudinit]") {
		v.t.Error("PVE's own section has gone")
	}
}
