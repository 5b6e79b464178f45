package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/cmd/internal/vms"
	"qmchain/internal/durable"
	"qmchain/internal/pveguest"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

// node is the Proxmox VE node that this may be.
type node struct {
	Host     proxmox.Host
	Locks    string // where records of VMs' locks are kept until the next start of the node
	Sendmail string
}

func local() node {
	return node{Host: proxmox.Local(), Locks: "/run/qmchain/locks", Sendmail: "/usr/sbin/sendmail"}
}

// name is the node's name, or the host's.
func (n node) name() string {
	if name := n.Host.Node(); name != "" {
		return name
	}
	name, err := os.Hostname()
	if err != nil {
		return "this host"
	}
	return name
}

func (n node) site(fsys durable.FS, wait time.Duration, log logrus.FieldLogger) pveguest.Site {
	return pveguest.Site{Host: n.Host, Locks: n.Locks, FS: fsys, Wait: wait, Log: log, Now: time.Now}
}

// find looks up a VM.
func (n node) find(fsys durable.FS, wait time.Duration, log logrus.FieldLogger, id proxmox.VMID) (*pveguest.VM, error) {
	vm, err := n.site(fsys, wait, log).Find(id)
	return vm, vms.Meant(err, n.Host, id)
}

// guestFlags choose guests: VMs of Proxmox VE, by number or by group, or one of plain QEMU.
type guestFlags struct {
	VMID    []proxmox.VMID `arg:"" optional:"" name:"vmid" help:"VMs of this Proxmox VE node, by number."`
	All     bool           `conf:"no" help:"All VMs of this node."`
	Pool    string         `conf:"no" placeholder:"NAME" complete:"pool" help:"The VMs of a pool, as far as they are on this node."`
	Tag     string         `conf:"no" placeholder:"TAG" help:"The VMs of this node that have a tag."`
	Exclude []proxmox.VMID `placeholder:"VMID" help:"With --all, --pool and --tag: not this VM. Can be given several times."`
	Socket  string         `conf:"no" placeholder:"ADDR" help:"In place of a VMID: a guest's QMP socket, as a path, unix:PATH or tcp:HOST:PORT."`
	Name    string         `placeholder:"GUEST" help:"The guest's name in the repository. A VM's is its VMID, if nothing else is said."`
}

// guests are those that were chosen.
type guests struct {
	names []string // VMIDs, or the name of the one plain guest
	vms   bool
	group bool // they are all of a group: one that goes away is none of it any more
}

// several tells whether each is only one of them, even where it is the only one.
func (g guests) several() bool { return g.group || len(g.names) > 1 }

// choose finds the guests. Offline says that a plain guest's images were given.
func (f *guestFlags) choose(u *ui.UI, host proxmox.Host, offline bool) (guests, error) {
	usage := func(text string) (guests, error) { return guests{}, ui.Exit(ui.ExitUsage, errors.New(text)) }
	selection := proxmox.Selection{VMIDs: f.VMID, All: f.All, Pool: f.Pool, Tag: f.Tag}
	ways := 0
	for _, given := range []bool{len(f.VMID) > 0, f.All, f.Pool != "", f.Tag != "", f.Socket != "", offline} {
		if given {
			ways++
		}
	}
	switch {
	case ways == 0:
		return usage("say which guest: VMIDs, --all, --pool or --tag; or --socket of a running one, or --offline with the images of a stopped one")
	case ways > 1:
		return usage("say which guest in one way: VMIDs, --all, --pool, --tag, --socket or --offline")
	case f.Socket != "" || offline:
		if f.Name == "" {
			return usage("missing flags: --name=GUEST")
		}
		if err := chain.CheckGuestName(f.Name); err != nil {
			return guests{}, ui.Exit(ui.ExitUsage, err)
		}
		return guests{names: []string{f.Name}}, nil
	}
	g := guests{vms: true, group: selection.Many()}
	if g.group {
		selection.Exclude = f.Exclude
	}
	ids, notes, err := vms.Select(host, selection)
	for _, note := range notes {
		u.Log.Infof("left out: %s", note)
	}
	if err != nil {
		return guests{}, err
	}
	for _, id := range ids {
		g.names = append(g.names, id.String())
	}
	if g.several() && f.Name != "" {
		return usage("--name is for a single guest")
	}
	if _, err := proxmox.ParseVMID(f.Name); err == nil && len(ids) == 1 && f.Name != g.names[0] {
		return usage("--name: a name of digits alone is a VMID, and not this one's")
	}
	if len(ids) == 0 {
		u.Log.Info("there is no such VM on this node")
	}
	return g, nil
}

// vmid is the VM that a name stands for, as choose has it.
func (g guests) vmid(name string) proxmox.VMID {
	id, _ := proxmox.ParseVMID(name) // it was made from one
	return id
}

// oneFlags choose one guest of a command that is about one.
type oneFlags struct {
	VMID   proxmox.VMID `arg:"" optional:"" name:"vmid" help:"A VM of this Proxmox VE node, by number."`
	Socket string       `conf:"no" placeholder:"ADDR" help:"In place of a VMID: the running guest's QMP socket, as a path, unix:PATH or tcp:HOST:PORT."`
}

// section is the guest whose settings in the configuration file hold.
func (f *oneFlags) section(name string) string {
	if f.VMID != 0 {
		return f.VMID.String()
	}
	return name
}

// find looks up the VM, if a VMID was given. Addr is empty for one that is stopped.
func (f *oneFlags) find(n node, fsys durable.FS, wait time.Duration, log logrus.FieldLogger) (vm *pveguest.VM, addr string, err error) {
	if f.VMID == 0 {
		return nil, f.Socket, nil
	}
	if f.Socket != "" {
		return nil, "", ui.Exit(ui.ExitUsage, errors.New("say which guest in one way: a VMID or --socket"))
	}
	if vm, err = n.find(fsys, wait, log, f.VMID); err != nil || !vm.Running() {
		return vm, "", err
	}
	addr, err = vm.Socket()
	return vm, addr, err
}

// guardOf is the VM as a guard; nil is none.
func guardOf(vm *pveguest.VM) backup.Guard {
	if vm == nil {
		return nil
	}
	return vm
}

// images are the paths of a stopped VM's qcow2 images.
func images(ctx context.Context, vm *pveguest.VM) ([]string, error) {
	found, _, err := vm.Images(ctx, backup.Request{})
	var paths []string
	for _, image := range found {
		if image.Format == "qcow2" {
			paths = append(paths, image.Path)
		}
	}
	return paths, err
}
