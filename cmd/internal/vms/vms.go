// Package vms is what the command lines have in common that change Proxmox VE's VMs one after the other: the flags that choose
// VMs, the going on after a failure, and the exit codes of what can be wrong with a VM.
package vms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/similar"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

// Flags choose VMs.
type Flags struct {
	VMID    []proxmox.VMID `arg:"" optional:"" name:"vmid" help:"The VMs, by number."`
	All     bool           `help:"All VMs of this node."`
	Pool    string         `placeholder:"NAME" complete:"pool" help:"The VMs of a pool, as far as they are on this node."`
	Tag     string         `placeholder:"TAG" help:"The VMs of this node that have a tag."`
	Exclude []proxmox.VMID `placeholder:"VMID" help:"Not this one. With --all, --pool and --tag; can be given several times."`
	JSON    bool           `conf:"no" name:"json" help:"Print one JSON document."`
}

// Many tells whether they name a group and not single VMs.
func (f Flags) Many() bool { return f.selection().Many() }

func (f Flags) selection() proxmox.Selection {
	return proxmox.Selection{VMIDs: f.VMID, All: f.All, Pool: f.Pool, Tag: f.Tag, Exclude: f.Exclude}
}

// choose finds the VMs. What is left out of a group is told in the log.
func (f Flags) choose(u *ui.UI, host proxmox.Host) ([]proxmox.VMID, error) {
	ways := 0
	for _, given := range []bool{len(f.VMID) > 0, f.All, f.Pool != "", f.Tag != ""} {
		if given {
			ways++
		}
	}
	switch {
	case ways == 0:
		return nil, ui.Exit(ui.ExitUsage, errors.New("which VMs? Say VMIDs, --all, --pool or --tag"))
	case ways > 1:
		return nil, ui.Exit(ui.ExitUsage, errors.New("say either VMIDs, --all, --pool or --tag"))
	case len(f.VMID) > 0 && len(f.Exclude) > 0:
		return nil, ui.Exit(ui.ExitUsage, errors.New("--exclude is for --all, --pool and --tag"))
	}
	ids, notes, err := Select(host, f.selection())
	for _, note := range notes {
		u.Log.Infof("left out: %s", note)
	}
	if err == nil && len(ids) == 0 {
		u.Log.Info("there is no such VM on this node")
	}
	return ids, err
}

// Each does something with every VM, and goes on after a failure. That of a single VM is returned as it is; those of
// several are logged, and the error says how many there were.
func (f Flags) Each(ctx context.Context, u *ui.UI, host proxmox.Host, do func(proxmox.VMID) error) error {
	ids, err := f.choose(u, host)
	if err != nil {
		return err
	}
	failed := 0
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := Meant(do(id), host, id)
		switch {
		case err == nil:
			continue
		case len(ids) == 1 || ctx.Err() != nil:
			return err
		case f.Many() && (errors.Is(err, proxmox.ErrNotFound) || errors.Is(err, proxmox.ErrElsewhere)):
			u.Log.Infof("left out: %v", err) // it went away meanwhile
			continue
		}
		failed++
		u.Error(Explain(err))
	}
	if failed > 0 {
		return ui.Exit(ui.ExitSomeFailed, fmt.Errorf("%d of %d VMs failed", failed, len(ids)))
	}
	return nil
}

// Select finds the VMs of a selection. An error that there is no such pool or tag asks for the one that may have been meant.
func Select(host proxmox.Host, s proxmox.Selection) ([]proxmox.VMID, []string, error) {
	ids, notes, err := host.Select(s)
	if !errors.Is(err, proxmox.ErrNotFound) {
		return ids, notes, err
	}
	name, list, kind := s.Pool, host.Pools, "pools"
	if s.Pool == "" {
		name, list, kind = s.Tag, host.Tags, "tags"
	}
	known, listErr := list()
	if listErr != nil {
		return ids, notes, err
	}
	names := slices.Sorted(maps.Keys(known))
	hint := similar.Question(name, names)
	switch {
	case hint == "" && len(names) == 0:
		hint = "there are no " + kind
	case hint == "" && len(names) <= 10:
		hint = kind + " are " + strings.Join(names, ", ")
	case hint == "":
		hint = fmt.Sprintf("there are %d %s", len(names), kind)
	}
	return ids, notes, ui.Hint(err, hint)
}

// Causes are what can be wrong with a VM, or with the node.
func Causes() []cli.Cause {
	return []cli.Cause{
		{Is: proxmox.ErrElsewhere, Code: ui.ExitNotFound, Hint: "run it on that node"},
		{Is: proxmox.ErrNotFound, Code: ui.ExitNotFound, Hint: "`qm list` shows the VMs of this node"},
		{Is: proxmox.ErrHung, Code: ui.ExitFailed, Hint: "`systemctl status pve-cluster` tells more"},
		{Is: proxmox.ErrNoHost, Code: ui.ExitNotFound, Hint: "this is for Proxmox VE nodes; is pve-cluster.service running?"},
		{Is: proxmox.ErrLocked, Code: ui.ExitBusy, Hint: "wait for what holds the lock; `qm unlock VMID` takes away one that was left behind"},
		{Is: proxmox.ErrBusy, Code: ui.ExitBusy, Hint: "something else works on this VM: try again later"},
		{Is: proxmox.ErrChanged, Code: ui.ExitBusy, Hint: "somebody keeps changing this VM: try again later"},
	}
}

// Explain gives an error of package proxmox its exit code and, where there is one, the next step.
func Explain(err error) error { return cli.Explain(err, Causes()) }

// Meant gives an error, that there is no such VM, the numbers that may have been meant.
func Meant(err error, host proxmox.Host, id proxmox.VMID) error {
	if !errors.Is(err, proxmox.ErrNotFound) {
		return err
	}
	all, listErr := host.VMIDs()
	if listErr != nil {
		return err
	}
	var names []string
	for _, vmid := range all {
		names = append(names, vmid.String())
	}
	if question := similar.Question(id.String(), names); question != "" && !slices.Contains(all, id) {
		return ui.Hint(err, question)
	}
	return err
}
