package main

import (
	"context"
	"fmt"
	"io"

	"qmchain/cmd/internal/vms"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type addCmd struct {
	vms.Flags
	DryRun bool `short:"n" help:"Show what would be changed, and change nothing."`
}

type removeCmd struct {
	vms.Flags
	DryRun bool `short:"n" help:"Show what would be changed, and change nothing."`
}

// Help is what "add --help" says in addition.
func (*addCmd) Help() string {
	return `The socket is /var/run/qemu-server/VMID-backup.qmp, made by "-chardev socket,id=qmchain,... -mon chardev=qmchain,mode=control" at the end of args. One that is there already and right stays, in whichever form. Mended is what cannot work: the socket of another VM, as after a clone or a restore; an old path; half of the two options; options that would keep the VM from starting; more than one.

A VM that runs has its new args pending until it is stopped and started, or rebooted with "qm reboot". Templates are left out, and so are VMs on other nodes. Nothing is written where PVE would drop args for unbalanced quotes: the error shows the place.`
}

// Help is what "remove --help" says in addition.
func (*removeCmd) Help() string {
	return `All backup sockets of ours go, also those that are not right and those that a clone has of another VM. A VM that runs keeps its socket until it is stopped and started.`
}

// outcome is what was done about a VM.
type outcome struct {
	VMID    proxmox.VMID `json:"vmid"`
	Name    string       `json:"name,omitempty"`
	Running bool         `json:"running"`
	Done    string       `json:"done"` // added, mended, removed, unchanged, skipped, failed; with --dry-run what would be
	Faults  []string     `json:"faults,omitempty"`
	Before  string       `json:"before"`
	After   string       `json:"after"`
	Restart bool         `json:"restart"` // it takes effect when the VM is stopped and started
	Error   string       `json:"error,omitempty"`
}

func (c *addCmd) Run(ctx context.Context, u *ui.UI, host proxmox.Host) error {
	return run(ctx, u, host, c.Flags, c.DryRun, func(id proxmox.VMID) (outcome, error) {
		config, err := host.Config(id)
		if err == nil && config.Template() {
			skipped := fmt.Errorf("VM %s is a template: it never runs, and its clones need sockets of their own", id)
			o := outcome{VMID: id, Name: config.Name(), Done: "skipped"}
			if c.Many() {
				u.Log.Infof("left out: %v", skipped)
				return o, nil
			}
			o.Error = skipped.Error()
			return o, ui.Exit(ui.ExitPartly, skipped)
		}
		change, err := host.AddSocket(ctx, id, c.DryRun)
		done := "added"
		if len(change.Faults) > 0 {
			done = "mended"
		}
		return outcomeOf(change, done, err), err
	})
}

func (c *removeCmd) Run(ctx context.Context, u *ui.UI, host proxmox.Host) error {
	return run(ctx, u, host, c.Flags, c.DryRun, func(id proxmox.VMID) (outcome, error) {
		change, err := host.RemoveSocket(ctx, id, c.DryRun)
		return outcomeOf(change, "removed", err), err
	})
}

func outcomeOf(c proxmox.Change, done string, err error) outcome {
	switch {
	case err != nil:
		done = "failed"
	case !c.Changed():
		done = "unchanged"
	}
	o := outcome{
		VMID: c.VMID, Name: c.Name, Running: c.Running, Done: done, Faults: c.Faults, Before: c.Before, After: c.After,
		Restart: c.Restart && err == nil,
	}
	if err != nil {
		o.Error = err.Error()
	}
	return o
}

// run changes VMs and prints what was done.
func run(ctx context.Context, u *ui.UI, host proxmox.Host, v vms.Flags, dry bool, change func(proxmox.VMID) (outcome, error)) error {
	outcomes := []outcome{} // not null in JSON
	failure := v.Each(ctx, u, host, func(id proxmox.VMID) error {
		o, err := change(id)
		outcomes = append(outcomes, o)
		return err
	})
	if len(outcomes) == 0 {
		return failure
	}
	err := u.Result(v.JSON, outcomes, func(w io.Writer) error {
		for _, o := range outcomes {
			if err := o.print(w, dry); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return failure
}

func (o outcome) print(w io.Writer, dry bool) error {
	if o.Error != "" {
		return nil // the log has it
	}
	done := o.Done
	if dry && o.Before != o.After {
		done = "would be " + done
	}
	for _, fault := range o.Faults {
		done += "; " + fault
	}
	if _, err := fmt.Fprintf(w, "%s\t%s\t%s\n", o.VMID, o.Name, done); err != nil {
		return err
	}
	if dry && o.Before != o.After {
		for _, line := range [][2]string{{"-", o.Before}, {"+", o.After}} {
			if line[1] == "" {
				continue
			}
			if _, err := fmt.Fprintf(w, "%s args: %s\n", line[0], line[1]); err != nil {
				return err
			}
		}
	}
	if !o.Restart {
		return nil
	}
	_, err := fmt.Fprintf(w, "\t\ttakes effect with a stop and start of VM %s, or `qm reboot %s`; a reboot from inside does not do\n", o.VMID, o.VMID)
	return err
}
