// Package pveguest is a Proxmox VE VM as package backup sees a guest: where its disks are and which of them count, who may
// answer on its socket, how it is held while it is backed up, and what it can be made from again.
//
// Words:
//
//   - A [VM] is one VM as its configuration, and its QEMU if it runs, were when it was looked up.
//   - It is held, from [VM.Take] on, by PVE's own `lock: backup`, with which PVE neither changes, starts, stops, moves nor
//     snapshots it, and by qmeventd's keep-alive, with which a guest that powers off leaves its QEMU to us.
//   - A record of each lock is kept in a folder that a restart of the host empties, as that takes PVE's backup locks away
//     too: so that what a killed run has locked can be given back, and nothing else ever is. A lock file beside it, held
//     while its process lives, tells the dead from the living.
//
// A stopped VM is backed up from its volumes. PVE's own QEMU does without locks on image files, so it is PVE's lock alone
// that keeps the VM from being started meanwhile: it is taken before an image is opened.
package pveguest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/durable"
	"qmchain/proxmox"
)

// What can be wrong with a VM.
var (
	// ErrTemplate: templates never run, and don't change.
	ErrTemplate = errors.New("a template")
	// ErrNoSocket: the VM runs without a backup socket.
	ErrNoSocket = errors.New("no backup socket")
	// ErrImpostor: somebody else answers on the VM's socket.
	ErrImpostor = errors.New("somebody else answers")
)

// Site is where VMs are.
type Site struct {
	Host  proxmox.Host
	Locks string        // the folder for records of locks; it is made
	FS    durable.FS    // writes them
	Wait  time.Duration // how long to wait for somebody else's lock
	// InHook: this runs in a hook script of the VM's, during which PVE keeps all others away from the VM, and qm as well. PVE's
	// own lock is then neither needed nor to be had.
	InHook bool
	Log    logrus.FieldLogger
	Now    func() time.Time
}

// VM is a VM of this node.
type VM struct {
	ID     proxmox.VMID
	Config *proxmox.Config
	// Process is its QEMU; nil: it is stopped.
	Process *proxmox.Process
	// LockLeft is why the lock could not be given back; nil: it was.
	LockLeft error

	site Site
}

var _ backup.Guard = (*VM)(nil)

// Find looks up a VM. The error is ErrTemplate, or one of proxmox.Host.Config's.
func (s Site) Find(vmid proxmox.VMID) (*VM, error) {
	vm := &VM{ID: vmid, site: s}
	var err error
	if vm.Config, err = s.Host.Config(vmid); err != nil {
		return nil, err
	}
	if vm.Config.Template() {
		return nil, fmt.Errorf("VM %s is %w", vmid, ErrTemplate)
	}
	vm.Process, err = s.Host.Process(vmid)
	return vm, err
}

// Running tells whether it ran when it was looked up.
func (vm *VM) Running() bool { return vm.Process != nil }

// Socket is the running VM's backup socket. The error is ErrNoSocket where its QEMU was not started with one of its own.
func (vm *VM) Socket() (string, error) {
	socket := vm.site.Host.Socket(vm.ID)
	found := socket.LookProcess(vm.Process)
	switch {
	case found.Right:
		return socket.Path(), nil
	case found.Present:
		return "", fmt.Errorf("VM %s runs with %w of its own: %s", vm.ID, ErrNoSocket, strings.Join(found.Faults, "; "))
	}
	return "", fmt.Errorf("VM %s runs with %w", vm.ID, ErrNoSocket)
}

// Check implements backup.Guard. The socket's path proves nothing: a clone's args name the socket of the VM that it was
// cloned from. What does is the process, which must be the one that PVE has started for this VM, and has its UUID.
func (vm *VM) Check(who backup.Peer) error {
	if vm.Process == nil || who.PID != vm.Process.PID {
		return fmt.Errorf("VM %s: on its backup socket %w: process %d, %q", vm.ID, ErrImpostor, who.PID, who.Guest.VMName)
	}
	for _, id := range []struct{ what, want, have string }{
		{"UUID", vm.Config.UUID(), who.Guest.UUID},
		{"vmgenid", vm.vmgenid(), who.Guest.VMGenID},
	} {
		if id.want != "" && !strings.EqualFold(id.want, id.have) {
			return fmt.Errorf("VM %s: on its backup socket %w: its %s is %q, and by its configuration %q", vm.ID, ErrImpostor, id.what, id.have, id.want)
		}
	}
	return nil
}

// vmgenid is the configured VM generation id, or "".
func (vm *VM) vmgenid() string {
	id := vm.Config.Options["vmgenid"]
	if len(id) < len("00000000-0000-0000-0000-000000000000") {
		return "" // 0 is none, 1 is for PVE to replace by a new one
	}
	return strings.ToLower(id)
}

// Identity is the VM's identity by its configuration, which is all there is of a stopped one.
func (vm *VM) Identity() chain.GuestIdentity {
	return chain.GuestIdentity{UUID: strings.ToLower(vm.Config.UUID()), VMGenID: vm.vmgenid(), VMName: vm.Config.Name()}
}

// Agent freezes the running VM's file systems through PVE; nil: its configuration says that they are not to be frozen.
func (vm *VM) Agent() backup.Agent {
	if a := vm.Config.Agent(); vm.Process == nil || !a.Enabled || !a.Freeze {
		return nil
	}
	return vm.Thawer()
}

// Thawer is Agent whether or not the configuration has it, for what an earlier run has frozen.
func (vm *VM) Thawer() backup.Agent { return proxmox.FSFreeze{Host: vm.site.Host, VMID: vm.ID} }

// Skip are the disks that the admin has excluded from backups, with the reason.
func (vm *VM) Skip() map[string]string {
	skip := map[string]string{}
	for _, d := range vm.Config.Drives() {
		if !d.Backup() {
			skip[d.ID] = "excluded by backup=0 in the VM's configuration"
		}
	}
	return skip
}

// disks are the drives of the configuration that hold the VM's own data in a block device of QEMU's.
func (vm *VM) disks() []proxmox.Drive {
	return slices.DeleteFunc(vm.Config.Drives(), func(d proxmox.Drive) bool {
		return d.CDROM() || d.CloudInit() || d.TPM() || d.Volume == "none" || d.Volume == "cdrom"
	})
}

// Images are the disks of the stopped VM for a request, which is returned with no more disks than that. A disk that can't be
// opened without PVE is an error: leaving it out is for the request to say.
func (vm *VM) Images(ctx context.Context, req backup.Request) ([]backup.OfflineImage, backup.Request, error) {
	skip := vm.Skip()
	var images []backup.OfflineImage
	for _, d := range vm.disks() {
		asked := slices.Contains(req.Disks, d.ID)
		if slices.Contains(req.Exclude, d.ID) || len(req.Disks) > 0 && !asked || skip[d.ID] != "" && !asked {
			if skip[d.ID] != "" {
				vm.site.Log.Infof("disk %s is left out: %s", d.ID, skip[d.ID])
			}
			req.Exclude = slices.DeleteFunc(slices.Clone(req.Exclude), func(name string) bool { return name == d.ID })
			continue
		}
		v, err := vm.site.Host.Volume(ctx, d)
		if err != nil {
			return nil, req, fmt.Errorf("VM %s: %w", vm.ID, err)
		}
		images = append(images, backup.OfflineImage{Disk: d.ID, Format: v.Format, Path: v.Path})
	}
	if len(images) == 0 {
		return nil, req, fmt.Errorf("VM %s has no disk that can be backed up: %w", vm.ID, backup.ErrNotFound)
	}
	return images, req, nil
}

// Missing are the configured disks that a plan does not know of, such as one that QEMU could not unplug or plug in.
func (vm *VM) Missing(plan *backup.Plan) []string {
	known := map[string]bool{}
	for _, d := range plan.Disks {
		known[d.Name] = true
	}
	for _, d := range plan.Left {
		known[d.Name] = true
	}
	maps.Copy(known, skipped(vm.Skip()))
	var missing []string
	for _, d := range vm.disks() {
		if !known[d.ID] {
			missing = append(missing, d.ID)
		}
	}
	return missing
}

func skipped(skip map[string]string) map[string]bool {
	set := map[string]bool{}
	for name := range skip {
		set[name] = true
	}
	return set
}
