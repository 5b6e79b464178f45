// Qmchain-fuse shows backups as a read-only file system: every disk of every point as one raw image.
package main

import (
	"errors"
	"os"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/conf"
	"qmchain/fusefs"
	"qmchain/internal/ui"
)

type grammar struct {
	cli.Common
	Mount  mountCmd  `cmd:"" help:"Mount a repository, or a directory of qmpbackup or virtnbdbackup. Returns when the mount answers."`
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
		Grammar: &g,
		Common:  &g.Common,
		Bind:    []any{&g.Common},
		Scope:   conf.Scope{"fuse": {"mount", "files"}},
		Explain: explain,
	}
}

func main() {
	os.Args = helperArgs(os.Args)
	cli.Main(program())
}

// explain gives an error its exit code and, where there is one, the next step.
func explain(err error) error {
	for _, e := range []struct {
		is   error
		code int
		hint string
	}{
		{repo.ErrNotRepository, ui.ExitNotFound, "is the share mounted? `qmchain-backup run --repo DIR` makes a repository"},
		{chain.ErrDamaged, ui.ExitDamaged, ""},
		{fusefs.ErrStale, ui.ExitFailed, "`qmchain-fuse umount MNT`, or fusermount3 -uz MNT, as its owner or root clears it away"},
		{fusefs.ErrMounted, ui.ExitBusy, ""},
		{fusefs.ErrNested, ui.ExitFailed, "mount it elsewhere"},
		{fusefs.ErrNoFUSE, ui.ExitFailed, "FUSE needs the kernel module fuse and the right to use /dev/fuse: root, or the package fuse3; in a container it must be allowed"},
		{fusefs.ErrNotMounted, ui.ExitNotFound, ""},
		{fusefs.ErrBusy, ui.ExitBusy, "`fuser -vm MNT` shows by whom; --lazy detaches it all the same"},
		{fusefs.ErrHangs, ui.ExitFailed, ""},
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
