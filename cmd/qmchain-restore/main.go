// Qmchain-restore gets disks back from points, and looks into them.
package main

import (
	"io/fs"
	"maps"
	"os"
	"slices"

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
	"qmchain/cmd/internal/points"
	"qmchain/cmd/internal/vms"
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
	Report reportCmd       `cmd:"" help:"Say how all backups are: the last of each guest, its size, when it was verified and drilled; as a table or a page."`

	NoteDrill noteDrillCmd `cmd:"" help:"Keep the result of a drill that could not write to the repository, for report."`

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
		Scope:       conf.Scope{"restore": {"image", "vm", "verify", "drill", "note-drill", "report"}},
		Explain:     explain,
		Complete:    offers(host),
	}
}

// offers are what shells can offer: of the set, and of a Proxmox VE node.
func offers(host proxmox.Host) cli.Sources {
	sources := vms.Sources(host)
	maps.Copy(sources, points.Sources())
	return sources
}

func main() { cli.Main(program(durable.FS{}, proxmox.Local())) }

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	return cli.Explain(err, slices.Concat([]cli.Cause{
		{Is: vmrestore.ErrLeft, Code: ui.ExitNeedsDoctor},
		{Is: vmrestore.ErrWhole, Code: ui.ExitPartly},
		{Is: vmrestore.ErrStorage, Code: ui.ExitFailed, Hint: "--storage STORAGE says where all disks go, --storage DISK=STORAGE where one does"},
		{Is: vmrestore.ErrCannot, Code: ui.ExitFailed},
		{Is: proxmox.ErrTaken, Code: ui.ExitFailed, Hint: "--vmid N chooses another VMID; --force replaces a VM that is stopped"},
		{Is: proxmox.ErrChanged, Code: ui.ExitBusy, Hint: "nothing was changed: try again"},
		{Is: proxmox.ErrHung, Code: ui.ExitFailed, Hint: "`systemctl status pve-cluster` tells more"},
		{Is: proxmox.ErrNoHost, Code: ui.ExitNotFound, Hint: "this is for Proxmox VE nodes; `qmchain-restore image` restores disks anywhere"},
	}, vms.Causes(), []cli.Cause{
		{Is: standard.ErrUnfinished, Code: ui.ExitNeedsDoctor, Hint: "run the same again when the cause is mended: it goes on"},
		{Is: standard.ErrForeign, Code: ui.ExitUsage, Hint: "--output makes a copy"},
		{Is: standard.ErrBusy, Code: ui.ExitBusy},
		{Is: standard.ErrExists, Code: ui.ExitFailed, Hint: "choose another folder, or empty it"},
		{Is: standard.ErrInside, Code: ui.ExitFailed, Hint: "choose a folder outside"},
		{Is: standard.ErrNoSpace, Code: ui.ExitFailed},
		{Is: standard.ErrCannot, Code: ui.ExitFailed, Hint: "--output leaves the backups as they are"},
		{Is: stream.ErrUnsettled, Code: ui.ExitNeedsDoctor, Hint: "`qmchain-backup prune --keep-all` on the repository that says so ends it, or tells what it waits for; then send again"},
		{Is: stream.ErrOtherPoint, Code: ui.ExitFailed, Hint: "nothing that is there is replaced: receive into another repository"},
		{Is: repo.ErrOtherGuest, Code: ui.ExitFailed},
		{Is: importer.ErrNotForeign, Code: ui.ExitUsage, Hint: "`qmchain-restore send` and `receive` take points from one repository to another"},
		{Is: importer.ErrDiffers, Code: ui.ExitDamaged, Hint: "the set is as it was: look at the storage of the repository and the memory"},
		{Is: repo.ErrLocked, Code: ui.ExitBusy, Hint: "wait for it to end, or give --lock-wait more time"},
		{Is: export.ErrUnfinished, Code: ui.ExitNeedsDoctor, Hint: "run it again when the cause is mended: it begins anew"},
		{Is: export.ErrDiffers, Code: ui.ExitDamaged, Hint: "the backup is as it was: look at what it was restored to, the storage and the memory"},
		{Is: export.ErrExists, Code: ui.ExitFailed, Hint: "--force writes over it; an existing file stays until the new one is whole"},
		{Is: export.ErrInUse, Code: ui.ExitBusy},
		{Is: export.ErrNoSpace, Code: ui.ExitFailed, Hint: "where much of the data is zeroes, less will do: --no-space-check goes on regardless"},
		{Is: export.ErrTooSmall, Code: ui.ExitFailed},
		{Is: export.ErrInside, Code: ui.ExitFailed, Hint: "choose a folder outside of the repository"},
		{Is: export.ErrKind, Code: ui.ExitFailed},
		{Is: nbd.ErrAddress, Code: ui.ExitUsage},
		{Is: nbd.ErrAddressInUse, Code: ui.ExitBusy},
		{Is: repo.ErrNotRepository, Code: ui.ExitNotFound, Hint: "is the share mounted?"},
		{Is: chain.ErrNoPoint, Code: ui.ExitNotFound, Hint: "`qmchain-restore list` shows what there is"},
		{Is: chain.ErrDamaged, Code: ui.ExitDamaged},
		// What is found only when an image is read.
		{Is: image.ErrChanged, Code: ui.ExitDamaged},
		{Is: qcow2.ErrCorrupt, Code: ui.ExitDamaged},
		{Is: virtnbd.ErrCorrupt, Code: ui.ExitDamaged},
		{Is: fs.ErrNotExist, Code: ui.ExitNotFound},
	}))
}
