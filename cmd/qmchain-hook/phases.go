package main

import (
	"context"
	"time"

	"qmchain/cmd/internal/cli"
	"qmchain/hooks"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type guestCmd struct {
	VMID  proxmox.VMID `arg:"" name:"vmid" help:"The VM."`
	Phase string       `arg:"" help:"pre-start, post-start, pre-stop or post-stop. Others are ignored."`

	Keep            bool          `default:"true" negatable:"" help:"At pre-start: start the keeper, qmchain-keep@VMID.service, if the VM has a backup socket. At pre-stop of a stop: pause the guest, and save its bitmaps."`
	PostStartBackup bool          `help:"At post-start: start a backup, qmchain-backup@VMID.service."`
	PreStopBackup   bool          `help:"At pre-stop: make a last increment. The stop waits for it."`
	PreStopLimit    time.Duration `default:"60s" placeholder:"TIME" help:"How long the last increment may take: 5s to 1h."`
	PostStopBackup  bool          `help:"At post-stop: start a backup of the stopped VM, qmchain-backup@VMID.service. It can't be started meanwhile; so there is none of a VM that HA manages."`
}

// Help is what "guest --help" says in addition.
func (*guestCmd) Help() string {
	return `Proxmox VE calls this through the script that "install" puts in place. What is wrong with the VM's backup socket is told in the log of the task that starts it. The flags are for the configuration file, where they stand in [hook] for all VMs, and in [guest.VMID.hook] for one.`
}

const minPreStop, maxPreStop = 5 * time.Second, time.Hour

func (c *guestCmd) Run(ctx context.Context, u *ui.UI, s site, getenv environment, again cli.Again) error {
	if own := ownSettings(u, c.VMID, again); own != nil {
		c = &own.Guest
	}
	limit := min(max(c.PreStopLimit, minPreStop), maxPreStop)
	if limit != c.PreStopLimit {
		u.Log.Warnf("--pre-stop-limit is from %s to %s: it is taken for %s", minPreStop, maxPreStop, limit)
	}
	h := s.hooks(u)
	h.MigratedFrom = getenv("PVE_MIGRATED_FROM")
	h.Guest(ctx, c.VMID, c.Phase, hooks.Settings{
		Keep:            c.Keep,
		PostStartBackup: c.PostStartBackup,
		PreStopBackup:   c.PreStopBackup,
		PreStopLimit:    limit,
		PostStopBackup:  c.PostStopBackup,
	})
	return nil
}

// ownSettings is the command line with a VM's own settings; nil where they are not right: then those of all hold.
func ownSettings(u *ui.UI, vmid proxmox.VMID, again cli.Again) *grammar {
	var own grammar
	if err := again(vmid.String(), &own); err != nil {
		u.Log.Warnf("VM %s: its own settings are not in effect: %v", vmid, err)
		return nil
	}
	return &own
}

type vzdumpCmd struct {
	Phase string       `arg:"" complete:"vzdump-phase" help:"vzdump's phase. All but backup-start are ignored."`
	Mode  string       `arg:"" optional:"" help:"vzdump's mode: snapshot, suspend or stop."`
	VMID  proxmox.VMID `arg:"" optional:"" name:"vmid" help:"The VM or container."`

	VzdumpWait time.Duration `default:"10m" placeholder:"TIME" help:"How long vzdump may wait for the end of a backup of ours of the same VM; 0: not at all."`
}

// Help is what "vzdump --help" says in addition.
func (*vzdumpCmd) Help() string {
	return `To be called by a script of vzdump's (script: in /etc/vzdump.conf), with its arguments. Without that, all is as safe: it makes backups of one VM come one after the other that would be made side by side.`
}

func (c *vzdumpCmd) Run(ctx context.Context, u *ui.UI, s site, again cli.Again) error {
	if c.VMID == 0 {
		return nil // a phase of the whole job
	}
	if own := ownSettings(u, c.VMID, again); own != nil {
		c = &own.Vzdump
	}
	h := s.hooks(u)
	h.Vzdump(ctx, c.Phase, c.VMID, c.VzdumpWait)
	return nil
}

func (s site) hooks(u *ui.UI) hooks.Hooks {
	return hooks.Hooks{Host: s.Host, Systemd: s.Systemd, Log: u.Log, Backup: s.Backup}
}
