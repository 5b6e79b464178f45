// Qmchain-backup takes points of running QEMU guests, and lists them.
package main

import (
	"io/fs"
	"maps"
	"slices"
	"syscall"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/retain"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/conf"
	"qmchain/cmd/internal/listing"
	"qmchain/cmd/internal/points"
	"qmchain/cmd/internal/vms"
	"qmchain/internal/durable"
	"qmchain/internal/pveguest"
	"qmchain/internal/ui"
	"qmchain/proxmox"
	"qmchain/qmp"
)

type grammar struct {
	cli.Common
	Run       runCmd          `cmd:"" help:"Take a point of a guest."`
	Estimate  estimateCmd     `cmd:"" help:"Show what a run would copy, disk by disk."`
	List      listing.Command `cmd:"" help:"List the points in a repository."`
	Prune     pruneCmd        `cmd:"" help:"Remove the points that a policy does not keep."`
	Remove    removeCmd       `cmd:"" help:"Remove points."`
	Protect   protectCmd      `cmd:"" help:"Protect points from being removed."`
	Unprotect unprotectCmd    `cmd:"" help:"Take the protection from points."`
	Keep      keepCmd         `cmd:"" help:"Stay beside a guest: carry the bitmaps of raw disks, and of disks with snapshots, over its stops."`
	Info      infoCmd         `cmd:"" help:"Show a guest, its disks, and what tracks them."`
	Check     checkCmd        `cmd:"" help:"For monitoring: fail where a guest's newest point is too old, or damaged."`
	Doctor    doctorCmd       `cmd:"" help:"Find what crashes have left, and put it right."`
	Cleanup   cleanupCmd      `cmd:"" help:"Remove our bitmaps from a guest: a rollback to a snapshot needs that. The next run takes a full."`
}

// program is qmchain-backup; all that it writes to a repository goes through fsys.
func program(fsys durable.FS) cli.Program { return programOn(local(), fsys) }

// programOn is qmchain-backup on a node.
func programOn(n node, fsys durable.FS) cli.Program {
	var g grammar
	return cli.Program{
		Name:        "qmchain-backup",
		Description: "Live full and incremental backup of QEMU guests into chains of qcow2 images.",
		Grammar:     &g,
		Common:      &g.Common,
		Bind:        []any{fsys, n},
		Scope: conf.Scope{
			"backup": {"run", "estimate", "keep", "info", "doctor", "cleanup"},
			"prune":  {"prune"},
			"check":  {"check"},
		},
		Explain:  explain,
		Complete: offers(n),
	}
}

// offers are what shells can offer: of a guest that is a VM, the disks that it has; of another, those of its newest point.
func offers(n node) cli.Sources {
	sources := points.Sources()
	maps.Copy(sources, vms.Sources(n.Host))
	sources["d"] = func(l *cli.Line) []cli.Offer {
		if len(l.Args) > 0 {
			return vms.Disks(n.Host, l.Args[0])
		}
		return points.Disks(l.Repo(), l.Flag("name"))
	}
	return sources
}

func main() { cli.Main(program(durable.FS{})) }

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	return cli.Explain(err, slices.Concat([]cli.Cause{
		{Is: backup.ErrUndo, Code: ui.ExitNeedsDoctor, Hint: "run the backup again when the cause is mended: it first takes away what is left"},
		{Is: backup.ErrNeedsDoctor, Code: ui.ExitNeedsDoctor, Hint: "`qmchain-backup doctor` tells more; a frozen guest is thawed with --agent-socket"},
		{Is: backup.ErrBusy, Code: ui.ExitBusy, Hint: "wait for it to end, or give --lock-wait more time"},
		{Is: backup.ErrInUse, Code: ui.ExitBusy, Hint: "--offline is for stopped guests; a running one is backed up with --socket"},
		{Is: repo.ErrLocked, Code: ui.ExitBusy, Hint: "wait for it to end, or give --lock-wait more time"},
		{Is: pveguest.ErrNoSocket, Code: ui.ExitNotFound, Hint: "`qmchain-args add VMID` gives the VM one, at its next stop and start; `qmchain-args check VMID` tells more"},
		{Is: pveguest.ErrImpostor, Code: ui.ExitFailed, Hint: "a clone or a restored VM has the args of another one: `qmchain-args add VMID` for both, then stop and start them"},
		{Is: pveguest.ErrTemplate, Code: ui.ExitNotFound, Hint: "templates don't change: back up the VM before it is made one"},
		{Is: proxmox.ErrNotOurs, Code: ui.ExitBusy, Hint: "`qmchain-backup doctor VMID --fix`; or `qm unlock VMID`, if no backup is under way"},
		{Is: proxmox.ErrBusy, Code: ui.ExitBusy, Hint: "wait for it to end, or give --lock-wait more time"},
		{Is: proxmox.ErrChanged, Code: ui.ExitBusy, Hint: "try again"},
		{Is: proxmox.ErrVolume, Code: ui.ExitFailed, Hint: "start the VM, or leave the disk out with --exclude-disk"},
		{Is: proxmox.ErrHung, Code: ui.ExitFailed, Hint: "`systemctl status pve-cluster` tells more"},
		{Is: proxmox.ErrNoHost, Code: ui.ExitNotFound, Hint: "VMIDs are for Proxmox VE nodes; a guest of plain QEMU is named with --socket and --name"},
	}, vms.Causes(), []cli.Cause{
		{Is: qmp.ErrBusy, Code: ui.ExitBusy, Hint: "its QEMU hangs, or another client has the socket: a QMP socket serves one client at a time, so give the backup a socket of its own"},
		{Is: qmp.ErrNotQMP, Code: ui.ExitFailed, Hint: "--socket must name a QMP socket, made with -qmp or with -mon mode=control; QEMU's monitor for people and the guest agent's socket are not"},
		{Is: backup.ErrIOThread, Code: ui.ExitFailed, Hint: "--no-fleece backs it up without a filter; a slow or failing repository then slows or fails the guest's own writes"},
		{Is: backup.ErrOtherGuest, Code: ui.ExitFailed, Hint: "give this guest another --name, or take the folder over with --adopt, which begins new chains"},
		{Is: backup.ErrElsewhere, Code: ui.ExitFailed, Hint: "is the share mounted? --init makes a second repository for this guest"},
		{Is: repo.ErrNotRepository, Code: ui.ExitNotFound, Hint: "is the share mounted? A new repository needs an empty folder"},
		{Is: backup.ErrNotFound, Code: ui.ExitNotFound},
		{Is: retain.ErrKept, Code: ui.ExitFailed, Hint: "unprotect takes the protection from a point; remove --force removes one from which increments go on"},
		{Is: chain.ErrNoPoint, Code: ui.ExitNotFound, Hint: "`qmchain-backup list` shows what there is"},
		{Is: syscall.ECONNREFUSED, Code: ui.ExitNotFound, Hint: "nobody listens there: is the guest running?"},
		{Is: chain.ErrDamaged, Code: ui.ExitDamaged}, // also by what is missing
		{Is: fs.ErrNotExist, Code: ui.ExitNotFound},
	}))
}
