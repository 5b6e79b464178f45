package main

import (
	"context"
	"errors"
	"fmt"

	"qmchain/internal/ui"
	"qmchain/proxmox"
)

// vms are the arguments that choose VMs.
type vms struct {
	VMID    []proxmox.VMID `arg:"" optional:"" name:"vmid" help:"The VMs, by number."`
	All     bool           `help:"All VMs of this node."`
	Pool    string         `placeholder:"NAME" help:"The VMs of a pool, as far as they are on this node."`
	Tag     string         `placeholder:"TAG" help:"The VMs of this node that have a tag."`
	Exclude []proxmox.VMID `placeholder:"VMID" help:"Not this one. With --all, --pool and --tag; can be given several times."`
	JSON    bool           `name:"json" help:"Print one JSON document."`
}

func (v vms) selection() proxmox.Selection {
	return proxmox.Selection{VMIDs: v.VMID, All: v.All, Pool: v.Pool, Tag: v.Tag, Exclude: v.Exclude}
}

// choose finds the VMs. What is left out of a group is told in the log.
func (v vms) choose(u *ui.UI, host proxmox.Host) ([]proxmox.VMID, error) {
	ways := 0
	for _, given := range []bool{len(v.VMID) > 0, v.All, v.Pool != "", v.Tag != ""} {
		if given {
			ways++
		}
	}
	switch {
	case ways == 0:
		return nil, ui.Exit(ui.ExitUsage, errors.New("which VMs? Say VMIDs, --all, --pool or --tag"))
	case ways > 1:
		return nil, ui.Exit(ui.ExitUsage, errors.New("say either VMIDs, --all, --pool or --tag"))
	case len(v.VMID) > 0 && len(v.Exclude) > 0:
		return nil, ui.Exit(ui.ExitUsage, errors.New("--exclude is for --all, --pool and --tag"))
	}
	ids, notes, err := host.Select(v.selection())
	for _, note := range notes {
		u.Log.Infof("left out: %s", note)
	}
	if err == nil && len(ids) == 0 {
		u.Log.Info("there is no such VM on this node")
	}
	return ids, err
}

// each does something with every VM, and goes on after a failure. That of a single VM is returned as it is; those of
// several are logged, and the error says how many there were.
func (v vms) each(ctx context.Context, u *ui.UI, host proxmox.Host, do func(proxmox.VMID) error) error {
	ids, err := v.choose(u, host)
	if err != nil {
		return err
	}
	failed := 0
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := do(id)
		switch {
		case err == nil:
			continue
		case len(ids) == 1 || ctx.Err() != nil:
			return err
		case v.selection().Many() && (errors.Is(err, proxmox.ErrNotFound) || errors.Is(err, proxmox.ErrElsewhere)):
			u.Log.Infof("left out: %v", err) // it went away meanwhile
			continue
		}
		failed++
		u.Log.Error(err)
	}
	if failed > 0 {
		return ui.Exit(ui.ExitSomeFailed, fmt.Errorf("%d of %d VMs failed", failed, len(ids)))
	}
	return nil
}
