package pveguest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

const (
	uuidA = "132c6880-893c-4b75-b195-5a5ad5b37395"
	uuidB = "f4a1b2c3-893c-4b75-b195-5a5ad5b37395"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	vm := func(config string) *VM {
		return &VM{ID: 110, Config: proxmox.ParseConfig(110, []byte(config)), Process: &proxmox.Process{PID: 42}}
	}
	both := "smbios1: uuid=" + uuidA + "\nvmgenid: " + uuidB + "\n"
	for _, test := range []struct {
		what, config string
		peer         backup.Peer
		good         bool
	}{
		{"itself", both, backup.Peer{PID: 42, Guest: chain.GuestIdentity{UUID: uuidA, VMGenID: uuidB}}, true},
		{"in capitals", "smbios1: manufacturer=x,uuid=" + strings.ToUpper(uuidA) + "\n", backup.Peer{PID: 42, Guest: chain.GuestIdentity{UUID: uuidA}}, true},
		{"a configuration without ids", "name: web\n", backup.Peer{PID: 42, Guest: chain.GuestIdentity{UUID: uuidA}}, true},
		{"a vmgenid that PVE makes", "vmgenid: 1\n", backup.Peer{PID: 42, Guest: chain.GuestIdentity{VMGenID: uuidB}}, true},
		{"another process", both, backup.Peer{PID: 43, Guest: chain.GuestIdentity{UUID: uuidA, VMGenID: uuidB}}, false},
		{"a process that is not known", both, backup.Peer{Guest: chain.GuestIdentity{UUID: uuidA, VMGenID: uuidB}}, false},
		{"another UUID", both, backup.Peer{PID: 42, Guest: chain.GuestIdentity{UUID: uuidB, VMGenID: uuidB}}, false},
		{"no UUID", both, backup.Peer{PID: 42, Guest: chain.GuestIdentity{VMGenID: uuidB}}, false},
		{"another vmgenid", both, backup.Peer{PID: 42, Guest: chain.GuestIdentity{UUID: uuidA, VMGenID: uuidA}}, false},
	} {
		if err := vm(test.config).Check(test.peer); (err == nil) != test.good || err != nil && !errors.Is(err, ErrImpostor) {
			t.Errorf("%s: %v", test.what, err)
		}
	}
	stopped := vm(both)
	stopped.Process = nil
	if err := stopped.Check(backup.Peer{Guest: stopped.Identity()}); !errors.Is(err, ErrImpostor) {
		t.Errorf("a stopped VM: %v", err)
	}
}

func TestDisks(t *testing.T) {
	t.Parallel()
	vm := &VM{ID: 110, Config: proxmox.ParseConfig(110, []byte(`scsi0: local:110/vm-110-disk-0.qcow2
scsi1: local:110/vm-110-disk-1.qcow2,backup=0
virtio2: thin:vm-110-disk-2
ide2: local:iso/debian.iso,media=cdrom
ide3: thin:vm-110-cloudinit,media=cdrom
tpmstate0: thin:vm-110-disk-3,version=v2.0
efidisk0: thin:vm-110-disk-4
unused0: thin:vm-110-disk-9
`))}
	plan := &backup.Plan{Disks: []backup.PlannedDisk{{Disk: backup.Disk{Name: "scsi0"}}}, Left: []backup.Disk{{Name: "efidisk0"}}}
	if got := vm.Missing(plan); !slices.Equal(got, []string{"virtio2"}) {
		t.Errorf("missing: %v", got)
	}
	if got := vm.Skip(); len(got) != 1 || !strings.Contains(got["scsi1"], "backup=0") {
		t.Errorf("skip: %v", got)
	}
}

// site is a node's.
func site(t *testing.T, n *pvetest.Node) Site {
	log := logrus.New()
	log.SetOutput(t.Output())
	return Site{
		Host:  proxmox.Host{Etc: n.Etc, Run: n.Run, Events: n.Events, VzdumpLock: n.VzdumpLock, Program: n.Program},
		Locks: filepath.Join(n.Dir, "locks"), Log: log, Now: time.Now,
	}
}

// TestTPM: the state is taken when it stands still, and otherwise missed.
func TestTPM(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	path := filepath.Join(n.Dir, "tpm.raw")
	n.AddVM(110, "tpmstate0: "+path+",size=4M,version=v2.0")
	vm, err := site(t, n).Find(110)
	if err != nil {
		t.Fatal(err)
	}
	write := func(data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(bytes.Repeat([]byte{1}, 4096))
	files, warnings, err := vm.Files(t.Context())
	if err != nil || len(warnings) > 0 || len(files) != 2 || files[1].Name != "tpmstate0.raw" || !bytes.Equal(files[1].Data, bytes.Repeat([]byte{1}, 4096)) {
		t.Errorf("%v, %v, %v", files, warnings, err)
	}
	write(make([]byte, maxTPM+1))
	if files, warnings, err := vm.Files(t.Context()); err != nil || len(warnings) != 1 || len(files) != 1 {
		t.Errorf("too large: %d files, %v, %v", len(files), warnings, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if files, warnings, err := vm.Files(t.Context()); err != nil || len(warnings) != 1 || len(files) != 1 {
		t.Errorf("gone: %d files, %v, %v", len(files), warnings, err)
	}
}

// TestTake: what is changed between the look and the lock is noticed, and the lock given back.
func TestTake(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	n.AddVM(110, "scsi0: local:110/vm-110-disk-0.qcow2,size=1M")
	s := site(t, n)
	find := func() *VM {
		vm, err := s.Find(110)
		if err != nil {
			t.Fatal(err)
		}
		return vm
	}
	lock := func() string { return find().Config.Lock() }
	vm := find()
	release, err := vm.Take(t.Context())
	if err != nil || lock() != "backup" {
		t.Fatalf("%v, lock %q", err, lock())
	}
	if _, err := find().Take(t.Context()); !errors.Is(err, proxmox.ErrBusy) {
		t.Errorf("twice: %v", err)
	}
	if err := release(t.Context()); err != nil || lock() != "" || vm.LockLeft != nil {
		t.Errorf("released: %v, lock %q", err, lock())
	}

	for what, change := range map[string]func(){
		"started":           func() { n.QM("start", "110") },
		"another disk":      func() { n.QM("set", "110", "--scsi0", "local:110/vm-110-disk-7.qcow2,size=1M") },
		"one disk more":     func() { n.QM("set", "110", "--scsi1", "local:110/vm-110-disk-8.qcow2,size=1M") },
		"another VM's UUID": func() { n.QM("set", "110", "--smbios1", "uuid="+uuidA) },
	} {
		vm := find()
		before := n.Config(110)
		change()
		if _, err := vm.Take(t.Context()); !errors.Is(err, proxmox.ErrChanged) || lock() != "" {
			t.Errorf("%s: %v, lock %q", what, err, lock())
		}
		n.QM("stop", "110")
		n.WriteConfig(110, before)
	}

	// Somebody takes our lock away and sets one of his own while vzdump works: that stays.
	vm = find()
	if release, err = vm.Take(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.QM("unlock", "110")
	n.QM("set", "110", "--onboot", "1", "--lock", "snapshot")
	if err := release(t.Context()); err != nil || lock() != "snapshot" {
		t.Errorf("somebody else's lock: %v, lock %q", err, lock())
	}
}
