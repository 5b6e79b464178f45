// Qmchain-backup takes points of running QEMU guests, and lists them.
package main

import (
	"errors"
	"io/fs"
	"syscall"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/retain"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/conf"
	"qmchain/cmd/internal/listing"
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
	Check     checkCmd        `cmd:"" help:"For monitoring: fail where a guest's newest point is too old."`
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
		Explain: explain,
	}
}

func main() { cli.Main(program(durable.FS{})) }

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	for _, e := range []struct {
		is   error
		code int
		hint string
	}{
		{backup.ErrUndo, ui.ExitNeedsDoctor, "run the backup again when the cause is mended: it first takes away what is left"},
		{backup.ErrNeedsDoctor, ui.ExitNeedsDoctor, "`qmchain-backup doctor` tells more; a frozen guest is thawed with --agent-socket"},
		{backup.ErrBusy, ui.ExitBusy, "wait for it to end, or give --lock-wait more time"},
		{backup.ErrInUse, ui.ExitBusy, "--offline is for stopped guests; a running one is backed up with --socket"},
		{repo.ErrLocked, ui.ExitBusy, "wait for it to end, or give --lock-wait more time"},
		{pveguest.ErrNoSocket, ui.ExitNotFound, "`qmchain-args add VMID` gives the VM one, at its next stop and start; `qmchain-args check VMID` tells more"},
		{pveguest.ErrImpostor, ui.ExitFailed, "a clone or a restored VM has the args of another one: `qmchain-args add VMID` for both, then stop and start them"},
		{pveguest.ErrTemplate, ui.ExitNotFound, "templates don't change: back up the VM before it is made one"},
		{proxmox.ErrNotOurs, ui.ExitBusy, "`qmchain-backup doctor VMID --fix`; or `qm unlock VMID`, if no backup is under way"},
		{proxmox.ErrLocked, ui.ExitBusy, "wait for what holds the lock; `qm unlock VMID` takes away one that was left behind"},
		{proxmox.ErrBusy, ui.ExitBusy, "wait for it to end, or give --lock-wait more time"},
		{proxmox.ErrChanged, ui.ExitBusy, "try again"},
		{proxmox.ErrVolume, ui.ExitFailed, "start the VM, or leave the disk out with --exclude-disk"},
		{proxmox.ErrElsewhere, ui.ExitNotFound, "run it on that node"},
		{proxmox.ErrNotFound, ui.ExitNotFound, ""},
		{proxmox.ErrNoHost, ui.ExitNotFound, "VMIDs are for Proxmox VE nodes; a guest of plain QEMU is named with --socket and --name"},
		{qmp.ErrBusy, ui.ExitBusy, "its QEMU hangs, or another client has the socket: a QMP socket serves one client at a time, so give the backup a socket of its own"},
		{qmp.ErrNotQMP, ui.ExitFailed, "--socket must name a QMP socket, made with -qmp or with -mon mode=control; QEMU's monitor for people and the guest agent's socket are not"},
		{backup.ErrIOThread, ui.ExitFailed, "--no-fleece backs it up without a filter; a slow or failing repository then slows or fails the guest's own writes"},
		{backup.ErrOtherGuest, ui.ExitFailed, "give this guest another --name, or take the folder over with --adopt, which begins new chains"},
		{backup.ErrElsewhere, ui.ExitFailed, "is the share mounted? --init makes a second repository for this guest"},
		{repo.ErrNotRepository, ui.ExitNotFound, "is the share mounted? A new repository needs an empty folder"},
		{backup.ErrNotFound, ui.ExitNotFound, ""},
		{retain.ErrKept, ui.ExitFailed, "unprotect takes the protection from a point; remove --force removes one from which increments go on"},
		{chain.ErrNoPoint, ui.ExitNotFound, ""},
		{syscall.ECONNREFUSED, ui.ExitNotFound, "nobody listens there: is the guest running?"},
		{fs.ErrNotExist, ui.ExitNotFound, ""},
		{chain.ErrDamaged, ui.ExitDamaged, ""},
	} {
		if errors.Is(err, e.is) {
			if e.hint != "" {
				err = ui.Hint(err, e.hint)
			}
			return ui.Exit(e.code, err)
		}
	}
	return err
}
