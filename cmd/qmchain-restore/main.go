// Qmchain-restore gets disks back from points, and looks into them.
package main

import (
	"errors"
	"io/fs"
	"os"

	"qmchain/chain"
	"qmchain/chain/export"
	"qmchain/chain/image"
	"qmchain/chain/importer"
	"qmchain/chain/nbd"
	"qmchain/chain/qcow2"
	"qmchain/chain/repo"
	"qmchain/chain/standard"
	"qmchain/chain/stream"
	"qmchain/chain/virtnbd"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/conf"
	"qmchain/cmd/internal/listing"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
	"qmchain/internal/vmrestore"
	"qmchain/proxmox"
)

type grammar struct {
	cli.Common
	List   listing.Command `cmd:"" help:"List the points in a repository."`
	Verify verifyCmd       `cmd:"" help:"Find out which disks of which points are still what they were."`
	Image  imageCmd        `cmd:"" help:"Write a point's disks to files, or one disk to a device."`
	VM     vmCmd           `cmd:"" name:"vm" help:"Make a Proxmox VE VM of a point: its configuration, its firewall rules and its disks."`
	NBD    nbdCmd          `cmd:"" name:"nbd" help:"Serve a point's disks, read-only, by NBD, until a signal comes."`
	Drill  drillCmd        `cmd:"" help:"Start a point in a throw-away guest without a network, and see whether it boots."`

	Send    sendCmd    `cmd:"" help:"Write points to standard output, for receive in another repository."`
	Receive receiveCmd `cmd:"" help:"Make points of what send has written, from standard input."`
	Import  importCmd  `cmd:"" help:"Take backups of qmpbackup or virtnbdbackup into a repository."`

	Rebase    rebaseCmd    `cmd:"" help:"Make a chain of qcow2 images with backing files, which QEMU's tools know."`
	Commit    commitCmd    `cmd:"" help:"Make one image of the full with all up to a point merged into it."`
	Snapshots snapshotsCmd `cmd:"" help:"Make one qcow2 image with an internal snapshot of each point."`
}

// program is qmchain-restore on a host; fsys is told of all that it changes.
func program(fsys durable.FS, host proxmox.Host) cli.Program {
	var g grammar
	return cli.Program{
		Name:        "qmchain-restore",
		Description: "Restores disks of QEMU guests from chains of qcow2 images. POINT is GUEST/latest, GUEST/ID, or GUEST/ and the beginning of an id.",
		Grammar:     &g,
		Common:      &g.Common,
		Bind:        []any{fsys, host, pipes{os.Stdin, os.Stdout}},
		Scope:       conf.Scope{"restore": {"image", "vm", "verify", "drill"}},
		Explain:     explain,
	}
}

func main() { cli.Main(program(durable.FS{}, proxmox.Local())) }

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	for _, e := range []struct {
		is   error
		code int
		hint string
	}{
		{vmrestore.ErrLeft, ui.ExitNeedsDoctor, ""},
		{vmrestore.ErrWhole, ui.ExitPartly, ""},
		{vmrestore.ErrStorage, ui.ExitFailed, "--storage STORAGE says where all disks go, --storage DISK=STORAGE where one does"},
		{vmrestore.ErrCannot, ui.ExitFailed, ""},
		{proxmox.ErrTaken, ui.ExitFailed, "--vmid N chooses another VMID; --force replaces a VM that is stopped"},
		{proxmox.ErrLocked, ui.ExitBusy, "wait for what holds the lock; `qm unlock VMID` takes away one that was left behind"},
		{proxmox.ErrBusy, ui.ExitBusy, ""},
		{proxmox.ErrChanged, ui.ExitBusy, "nothing was changed: try again"},
		{proxmox.ErrElsewhere, ui.ExitNotFound, "run it on that node"},
		{proxmox.ErrNotFound, ui.ExitNotFound, ""},
		{proxmox.ErrNoHost, ui.ExitNotFound, "this is for Proxmox VE nodes; `qmchain-restore image` restores disks anywhere"},
		{standard.ErrUnfinished, ui.ExitNeedsDoctor, "run the same again when the cause is mended: it goes on"},
		{standard.ErrForeign, ui.ExitUsage, "--output makes a copy"},
		{standard.ErrBusy, ui.ExitBusy, ""},
		{standard.ErrExists, ui.ExitFailed, "choose another folder, or empty it"},
		{standard.ErrInside, ui.ExitFailed, "choose a folder outside"},
		{standard.ErrNoSpace, ui.ExitFailed, ""},
		{standard.ErrCannot, ui.ExitFailed, "--output leaves the backups as they are"},
		{stream.ErrUnsettled, ui.ExitNeedsDoctor, "`qmchain-backup prune --keep-all` on the repository that says so ends it"},
		{stream.ErrOtherPoint, ui.ExitFailed, "nothing that is there is replaced: receive into another repository"},
		{repo.ErrOtherGuest, ui.ExitFailed, ""},
		{importer.ErrNotForeign, ui.ExitUsage, "`qmchain-restore send` and `receive` take points from one repository to another"},
		{importer.ErrDiffers, ui.ExitDamaged, "the set is as it was: look at the storage of the repository and the memory"},
		{repo.ErrLocked, ui.ExitBusy, "wait for it to end, or give --lock-wait more time"},
		{export.ErrUnfinished, ui.ExitNeedsDoctor, "run it again when the cause is mended: it begins anew"},
		{export.ErrDiffers, ui.ExitDamaged, "the backup is as it was: look at what it was restored to, the storage and the memory"},
		{export.ErrExists, ui.ExitFailed, "--force writes over it; an existing file stays until the new one is whole"},
		{export.ErrInUse, ui.ExitBusy, ""},
		{export.ErrNoSpace, ui.ExitFailed, "where much of the data is zeroes, less will do: --no-space-check goes on regardless"},
		{export.ErrTooSmall, ui.ExitFailed, ""},
		{export.ErrInside, ui.ExitFailed, "choose a folder outside of the repository"},
		{export.ErrKind, ui.ExitFailed, ""},
		{nbd.ErrAddress, ui.ExitUsage, ""},
		{nbd.ErrAddressInUse, ui.ExitBusy, ""},
		{repo.ErrNotRepository, ui.ExitNotFound, "is the share mounted?"},
		{chain.ErrNoPoint, ui.ExitNotFound, "`qmchain-restore list` shows what there is"},
		{chain.ErrDamaged, ui.ExitDamaged, ""},
		// What is found only when an image is read.
		{image.ErrChanged, ui.ExitDamaged, ""},
		{qcow2.ErrCorrupt, ui.ExitDamaged, ""},
		{virtnbd.ErrCorrupt, ui.ExitDamaged, ""},
		{fs.ErrNotExist, ui.ExitNotFound, ""},
	} {
		if errors.Is(err, e.is) {
			if e.hint != "" && ui.HintOf(err) == "" {
				err = ui.Hint(err, e.hint)
			}
			return ui.Exit(e.code, err)
		}
	}
	return err
}
