// Qmchain-fuse shows backups as a read-only file system: every disk of every point as one raw image.
package main

import (
	"os"
	"strings"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/conf"
	"qmchain/cmd/internal/points"
	"qmchain/fusefs"
	"qmchain/internal/mountinfo"
	"qmchain/internal/ui"
)

type grammar struct {
	cli.Common
	Mount  mountCmd  `cmd:"" help:"Mount a repository, a directory of qmpbackup or virtnbdbackup, or a folder of such. Returns when the mount answers."`
	Umount umountCmd `cmd:"" help:"Unmount a repository, and wait until its server has ended."`
	Files  filesCmd  `cmd:"" help:"Mount the files in a point's disks, read-only. Returns when they are there."`
	Ls     lsCmd     `cmd:"" help:"List files in a point's disks, or the volumes that there are on them."`
	Cat    catCmd    `cmd:"" help:"Write files in a point's disks to standard output."`
	Cp     cpCmd     `cmd:"" help:"Copy files and folders out of a point's disks."`
}

func program() cli.Program {
	var g grammar
	return cli.Program{
		Name: "qmchain-fuse",
		Description: "Shows every point of every guest in a repository, or in a directory that qmpbackup or virtnbdbackup has written to: " +
			"MNT/GUEST/POINT/DISK.raw, DISK-part1.raw for its first partition, and MNT/GUEST/latest. The images are read-only; new points " +
			"appear by themselves.",
		Grammar:  &g,
		Common:   &g.Common,
		Bind:     []any{&g.Common},
		Scope:    conf.Scope{"fuse": {"mount", "files"}},
		Explain:  explain,
		Complete: offers(),
	}
}

// offers are what shells can offer: where cp copies to is a file of this host.
func offers() cli.Sources {
	sources := points.Sources()
	in := sources["file-in"]
	sources["copied"] = func(l *cli.Line) []cli.Offer {
		if len(l.Args) == 0 {
			return in(l)
		}
		return append(in(l), cli.OfferFiles)
	}
	sources["mounted"] = func(*cli.Line) (offers []cli.Offer) {
		mounts, _ := mountinfo.Read()
		for _, m := range mounts {
			if strings.HasPrefix(m.Type, "fuse.qmchain") {
				offers = append(offers, cli.Offer{Word: m.Point, Help: m.Source})
			}
		}
		return offers
	}
	return sources
}

func main() {
	os.Args = helperArgs(os.Args)
	cli.Main(program())
}

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	return cli.Explain(err, []cli.Cause{
		{Is: repo.ErrNotRepository, Code: ui.ExitNotFound, Hint: "is the share mounted? `qmchain-backup run --repo DIR` makes a repository"},
		{Is: chain.ErrDamaged, Code: ui.ExitDamaged},
		{Is: fusefs.ErrStale, Code: ui.ExitFailed, Hint: "`qmchain-fuse umount MNT`, or fusermount3 -uz MNT, as its owner or root clears it away"},
		{Is: fusefs.ErrMounted, Code: ui.ExitBusy},
		{Is: fusefs.ErrNested, Code: ui.ExitFailed, Hint: "mount it elsewhere"},
		{Is: fusefs.ErrNoFUSE, Code: ui.ExitFailed, Hint: "FUSE needs the kernel module fuse and the right to use /dev/fuse: root, or the package fuse3; in a container it must be allowed"},
		{Is: fusefs.ErrNotMounted, Code: ui.ExitNotFound, Hint: "`findmnt -t fuse.qmchain` shows what is mounted"},
		{Is: fusefs.ErrBusy, Code: ui.ExitBusy, Hint: "`fuser -vm MNT` shows by whom; --lazy detaches it all the same"},
		{Is: fusefs.ErrHangs, Code: ui.ExitFailed},
	})
}
