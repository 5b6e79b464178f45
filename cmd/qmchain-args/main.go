// Qmchain-args gives Proxmox VE's VMs the QMP socket that backups need, and looks after it.
package main

import (
	"errors"

	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/vms"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type grammar struct {
	cli.Common
	Add    addCmd    `cmd:"" help:"Give VMs a backup socket: exactly one each, and their own. What is wrong with one that is there is mended. Takes effect when the VM is stopped and started."`
	Remove removeCmd `cmd:"" help:"Take our backup socket out of VMs' args. Other arguments stay."`
	Show   showCmd   `cmd:"" help:"Show VMs' args, now and after the next start, and what is wrong with the backup socket in them."`
	Check  checkCmd  `cmd:"" help:"Check VMs' backup sockets: configured, pending, active, and who answers. Exit code 4: all that is missing is a stop and start."`
}

// program is qmchain-args on a host.
func program(host proxmox.Host) cli.Program {
	var g grammar
	return cli.Program{
		Name: "qmchain-args",
		Description: "Looks after the QMP socket that backups of a Proxmox VE VM need. It is made by the VM's option args, of which everything else stays " +
			"as it is. Changes go through qm, and lose nothing that others change meanwhile.",
		Grammar:  &g,
		Common:   &g.Common,
		Bind:     []any{host},
		Explain:  explain,
		Complete: vms.Sources(host),
	}
}

func main() { cli.Main(program(proxmox.Local())) }

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	var quote *proxmox.QuoteError
	switch {
	case errors.As(err, &quote):
		return ui.Hint(err, "nothing in args is in effect until that is put right: `qm set VMID --args '...'`")
	case errors.Is(err, proxmox.ErrConflict):
		return ui.Hint(err, "`qmchain-args show VMID` shows the args; `qm set VMID --args '...'` changes them")
	}
	return vms.Explain(err)
}
