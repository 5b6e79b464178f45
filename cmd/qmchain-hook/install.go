package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"qmchain/cmd/internal/vms"
	"qmchain/hooks"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type installCmd struct {
	vms.Flags
	Storage string `default:"local" placeholder:"NAME" complete:"snippets" help:"Where the script is put for a VM that has none yet: a storage with snippets. In a cluster best a shared one."`
	DryRun  bool   `short:"n" help:"Show what would be changed, and change nothing."`
}

// Help is what "install --help" says in addition.
func (*installCmd) Help() string {
	return `The script is a few lines of shell in the storage's snippets, qmchain-hook. A VM can have only one hook script: for a VM that has one, such as local:snippets/gpu.pl, ours is local:snippets/qmchain-hook-gpu.pl, beside it. It calls theirs after what is ours, and ends with its exit code, so that a pre-start that fails keeps the VM from starting as before; nothing of ours does.

What is done at which phase is set in the configuration file, in [hook] and [guest.VMID.hook]: "qmchain-hook guest --help". The script takes effect at once; the keeper is started with the VM's next start.`
}

type removeCmd struct {
	vms.Flags
	DryRun bool `short:"n" help:"Show what would be changed, and change nothing."`
}

// Help is what "remove --help" says in addition.
func (*removeCmd) Help() string {
	return `Hook scripts that are not ours stay. The file goes with its last user in the cluster, snapshots included. A keeper that runs stays: "systemctl stop qmchain-keep@VMID".`
}

// outcome is what was done about a VM.
type outcome struct {
	VMID   proxmox.VMID `json:"vmid"`
	Name   string       `json:"name,omitempty"`
	Done   string       `json:"done"` // installed, updated, removed, unchanged, skipped, failed; with --dry-run what would be
	Before string       `json:"before"`
	After  string       `json:"after"`
	Calls  string       `json:"calls,omitempty"`
	Path   string       `json:"path,omitempty"`
	Notes  []string     `json:"notes,omitempty"`
	Error  string       `json:"error,omitempty"`
}

func (c *installCmd) Run(ctx context.Context, u *ui.UI, s site, i *hooks.Installer) error {
	return changeAll(ctx, u, s, c.Flags, c.DryRun, func(id proxmox.VMID) (hooks.Change, string, error) {
		config, err := s.Host.Config(id)
		if err == nil && config.Template() {
			return hooks.Change{VMID: id, Name: config.Name(), Notes: []string{"it is a template, and never runs"}}, "skipped", nil
		}
		change, err := i.Install(ctx, id, c.Storage, c.DryRun)
		done := "installed"
		if change.Before == change.After {
			done = "updated"
		}
		return change, done, err
	})
}

func (c *removeCmd) Run(ctx context.Context, u *ui.UI, s site, i *hooks.Installer) error {
	return changeAll(ctx, u, s, c.Flags, c.DryRun, func(id proxmox.VMID) (hooks.Change, string, error) {
		change, err := i.Remove(ctx, id, c.DryRun)
		return change, "removed", err
	})
}

// changeAll changes VMs and prints what was done.
func changeAll(ctx context.Context, u *ui.UI, s site, flags vms.Flags, dry bool, change func(proxmox.VMID) (hooks.Change, string, error)) error {
	outcomes := []outcome{} // not null in JSON
	partly := 0
	failure := flags.Each(ctx, u, s.Host, func(id proxmox.VMID) error {
		c, done, err := change(id)
		o := outcome{VMID: id, Name: c.Name, Done: done, Before: c.Before, After: c.After, Calls: c.Calls, Path: c.Path, Notes: c.Notes}
		switch {
		case err != nil:
			o.Done, o.Error = "failed", err.Error()
		case done != "skipped" && !c.Changed():
			o.Done = "unchanged"
		}
		if c.Partly {
			partly++
		}
		outcomes = append(outcomes, o)
		return err
	})
	if len(outcomes) == 0 {
		return failure
	}
	err := u.Result(flags.JSON, outcomes, func(w io.Writer) error {
		for _, o := range outcomes {
			if err := o.print(w, dry); err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case failure != nil:
		return failure
	case partly > 0:
		return ui.Exit(ui.ExitPartly, fmt.Errorf("%d of %d VMs: what was there before is not there any more", partly, len(outcomes)))
	}
	return nil
}

func (o outcome) print(w io.Writer, dry bool) error {
	if o.Error != "" {
		return nil // the log has it
	}
	done := o.Done
	if dry && done != "unchanged" && done != "skipped" {
		done = "would be " + done
	}
	if o.After != "" {
		done += ": " + o.After
		if o.Calls != "" {
			done += ", which calls " + o.Calls
		}
	}
	if _, err := fmt.Fprintf(w, "%s\t%s\t%s\n", o.VMID, o.Name, done); err != nil {
		return err
	}
	for _, note := range o.Notes {
		if _, err := fmt.Fprintf(w, "\t\t%s\n", note); err != nil {
			return err
		}
	}
	return nil
}

type showCmd struct{ vms.Flags }

// state is what is known of a VM's hook script.
type state struct {
	VMID       proxmox.VMID `json:"vmid"`
	Name       string       `json:"name,omitempty"`
	Hookscript string       `json:"hookscript"`
	Ours       bool         `json:"ours"`
	Calls      string       `json:"calls,omitempty"`
	Faults     []string     `json:"faults,omitempty"`
	Error      string       `json:"error,omitempty"`
}

func (c *showCmd) Run(ctx context.Context, u *ui.UI, s site, i *hooks.Installer) error {
	states := []state{}
	failure := c.Each(ctx, u, s.Host, func(id proxmox.VMID) error {
		is, err := i.Look(ctx, id)
		shown := state{VMID: id, Name: is.Name, Hookscript: is.Hookscript, Ours: is.Ours, Calls: is.Calls, Faults: is.Faults}
		if err != nil {
			shown.Error = err.Error()
		}
		states = append(states, shown)
		return err
	})
	if len(states) == 0 {
		return failure
	}
	err := u.Result(c.JSON, states, func(w io.Writer) error {
		looked := slices.DeleteFunc(slices.Clone(states), func(s state) bool { return s.Error != "" })
		if len(looked) == 0 {
			return nil
		}
		if _, err := fmt.Fprintln(w, "VMID\tNAME\tOURS\tHOOKSCRIPT\tCALLS\tREMARK"); err != nil {
			return err
		}
		for _, s := range looked {
			ours := "no"
			if s.Ours {
				ours = "yes"
			}
			_, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", s.VMID, orDash(s.Name), ours, orDash(s.Hookscript), orDash(s.Calls), strings.Join(s.Faults, "; "))
			if err != nil {
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

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
