package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"qmchain/cmd/internal/cli"
	"qmchain/fusefs/inside"
	"qmchain/internal/ui"
)

// server is the process that serves the chosen volume of a point to the kernel: this program once more, which opens the same
// point for itself. What there is to warn of has been said.
func (f *volumeFlags) server(common *cli.Common, o *opened, at place) (*exec.Cmd, error) {
	if err := keepInherited(); err != nil {
		return nil, err
	}
	quiet := *common
	quiet.Quiet = true
	args := f.args(&quiet, "--serve", "--work="+at.temp)
	if !at.background {
		args = append(args, "--foreground")
	}
	cmd := exec.Command("/proc/self/exe", append(args, "--", o.Name(), "/")...)
	cmd.Args[0] = os.Args[0]
	cmd.Stderr = os.Stderr
	return cmd, nil
}

// serve is what that process does.
func (c *filesCmd) serve(ctx context.Context, u *ui.UI) error {
	// It ends with its parent or at its word: a signal that all processes of a service get must not be the end of a mount that
	// the parent is about to take away in an orderly way.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	o, err := c.open(ctx, u, c.Point)
	if err != nil {
		return err
	}
	v, err := c.choose(o)
	if err != nil {
		o.close()
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	if !c.Foreground {
		if err := u.Background("qmchain-fuse"); err != nil {
			return err
		}
	}
	// The disks are not closed: that could hang, and here the process ends.
	return inside.File{
		Volume: *v, SkipJournal: c.Journal == "skip", Source: o.source(v), Temp: c.Work, Log: u.Log,
	}.Serve(context.WithoutCancel(ctx))
}
