// Qmchain-hook is what Proxmox VE calls when a VM starts and stops, and when vzdump backs one up.
package main

import (
	"context"
	"errors"
	"os"

	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/conf"
	"qmchain/cmd/internal/vms"
	"qmchain/hooks"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type grammar struct {
	cli.Common
	Install installCmd `cmd:"" help:"Give VMs our hook script. One that a VM has already is called by it."`
	Remove  removeCmd  `cmd:"" help:"Put back the hook script that VMs had before ours."`
	Show    showCmd    `cmd:"" help:"Show VMs' hook scripts, and what is wrong with them."`
	Guest   guestCmd   `cmd:"" help:"For Proxmox VE: what is to be done when a VM starts or stops. Never fails."`
	Vzdump  vzdumpCmd  `cmd:"" help:"For vzdump: what is to be done when it backs up a VM. Never fails."`
}

// site is where the programs are, and the node.
type site struct {
	Host    proxmox.Host
	Systemd hooks.Systemd
	Backup  string // qmchain-backup
	Program string // this program
}

func local() (site, error) {
	program, err := os.Executable()
	return site{
		Host:    proxmox.Local(),
		Systemd: hooks.Systemd{Dir: "/usr/bin"},
		Backup:  "/usr/bin/qmchain-backup",
		Program: program,
	}, err
}

// program is qmchain-hook at a site.
func program(s site, getenv func(string) string) cli.Program {
	var g grammar
	return cli.Program{
		Name: "qmchain-hook",
		Description: "Does what can't wait when Proxmox VE starts and stops VMs: looks after their backup sockets, starts keepers and backups, and makes a " +
			"last increment. Its failures never keep a VM from starting, nor a vzdump from its end.",
		Grammar: &g,
		Common:  &g.Common,
		Bind: []any{
			s, environment(getenv),
			hooks.NewInstaller(s.Host, s.Program),
		},
		Scope:    conf.Scope{"hook": {"guest", "vzdump"}},
		Explain:  explain,
		Complete: offers(s.Host),
	}
}

// offers are what shells can offer: of the node, and the phases in which Proxmox VE calls.
func offers(host proxmox.Host) cli.Sources {
	sources := vms.Sources(host)
	sources["phase"] = cli.Words("pre-start", "post-start", "pre-stop", "post-stop")
	sources["vzdump-phase"] = cli.Words("job-init", "job-start", "job-end", "job-abort", "backup-start", "backup-end", "backup-abort", "log-end", "pre-stop",
		"pre-restart", "post-restart")
	sources["mode"] = cli.Words("snapshot", "suspend", "stop")
	return sources
}

// environment looks up a variable of the environment.
type environment func(name string) string

// run runs the program. What Proxmox VE calls is done in any case, if need be with the settings that hold without a configuration
// file, and ends with success: much hangs on it that is none of ours.
func run(ctx context.Context, s site, args []string, env cli.Env) (code int) {
	code = program(s, env.Getenv).Run(ctx, args, env)
	if len(args) == 0 || args[0] != "guest" && args[0] != "vzdump" {
		return code
	}
	if code != ui.ExitOK {
		// These commands have no failure of their own: the file is what can be wrong.
		getenv := env.Getenv
		env.Config = ""
		env.Getenv = func(name string) string {
			if name == conf.Variable {
				return ""
			}
			return getenv(name)
		}
		_ = program(s, env.Getenv).Run(ctx, args, env) // an exit code would be that of an unknown command line, told already
	}
	return ui.ExitOK
}

func main() {
	cli.MainOf(func(ctx context.Context, args []string, env cli.Env) int {
		s, err := local()
		if err != nil {
			return ui.ReportError(env.Stderr, env.Getenv, err)
		}
		return run(ctx, s, args, env)
	})
}

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	switch {
	case errors.Is(err, hooks.ErrForeign):
		return ui.Hint(err, "rename that file, or remove it")
	case errors.Is(err, hooks.ErrScript):
		return ui.Hint(err, "VMs with it don't start: `qm set VMID --delete hookscript`, or mend it")
	}
	return vms.Explain(err)
}
