package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/standard"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// standardFlags are those of the commands that make standard chains.
type standardFlags struct {
	Repo      string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	Disk      []string      `conf:"no" placeholder:"D" help:"Only this disk. Can be given several times."`
	Until     string        `conf:"no" placeholder:"POINT" complete:"id" help:"The point up to which. Default: the newest, copies aside."`
	Output    string        `conf:"no" short:"o" xor:"where" placeholder:"DIR" help:"Write to this folder, which must be empty or is made."`
	InPlace   bool          `conf:"no" xor:"where" help:"Change the backups of qmpbackup themselves."`
	RateLimit string        `placeholder:"SIZE" help:"Read, or merge, at most so many bytes per second, such as 50MiB."`
	LockWait  time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for who removes points of the guest."`
	DryRun    bool          `conf:"no" short:"n" help:"Print what would be done, and do nothing."`
	JSON      bool          `conf:"no" name:"json" help:"Print one JSON document."`
	Guest     string        `arg:"" help:"The guest."`
}

type (
	rebaseCmd struct {
		standardFlags `embed:""`
	}
	commitCmd struct {
		standardFlags `embed:""`
	}
	snapshotsCmd struct {
		standardFlags `embed:""`
	}
)

func (c *rebaseCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	return c.run(ctx, u, fsys, standard.Rebase)
}

func (c *commitCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	return c.run(ctx, u, fsys, standard.Commit)
}

func (c *snapshotsCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	return c.run(ctx, u, fsys, standard.Snapshots)
}

// standardPlan is the output with --json.
type standardPlan struct {
	*standard.Plan
	DryRun bool `json:"dry_run"`
}

func (c *standardFlags) run(ctx context.Context, u *ui.UI, fsys durable.FS, command standard.Command) error {
	rate, err := cli.Size("--rate-limit", c.RateLimit)
	if err != nil {
		return err
	}
	if (c.Output == "") != c.InPlace {
		return ui.Exit(ui.ExitUsage, errors.New("--output DIR or --in-place says where the result goes"))
	}
	if err := chain.CheckGuestName(c.Guest); err != nil {
		if ref, refErr := chain.ParseRef(c.Guest); refErr == nil {
			err = ui.Hint(fmt.Errorf("%s is a point, and a guest is asked for", c.Guest), fmt.Sprintf("`qmchain-restore %s %s --until %s` is all up to it", command, ref.Guest, ref.Point))
		}
		return ui.Exit(ui.ExitUsage, err)
	}
	set, err := points.OpenSet(c.Repo)
	if err != nil {
		return err
	}
	defer set.Close()
	if _, err := points.Of(set, c.Guest); err != nil {
		return err
	}
	var bars ui.Progress
	job, err := standard.Open(ctx, standard.Request{
		Command: command, Set: set, Guest: c.Guest, Until: c.Until, Disks: c.Disk, Output: c.Output,
		DryRun: c.DryRun, RateLimit: rate, LockWait: c.LockWait, FS: fsys, Log: u.Log,
		Progress: func(disk string, total int64) func(done, total int64) { return bars.Bar(disk, total).Set },
	})
	if err != nil {
		return err
	}
	defer job.Close()
	for _, d := range slices.Concat(job.Plan.Damage, job.Plan.Doubts) {
		u.Log.Warnf("%v", d)
	}
	if !c.DryRun {
		bars = u.NewProgress("copied")
		err := job.Run(ctx)
		bars.Done()
		if err != nil {
			return err
		}
	}
	tell := u.Done
	if c.DryRun {
		tell = u.Result
	}
	err = tell(c.JSON, standardPlan{&job.Plan, c.DryRun}, func(w io.Writer) error { return printStandard(w, &job.Plan, c.DryRun) })
	switch {
	case err != nil || c.DryRun:
	case len(job.Plan.Damage) > 0:
		err = fmt.Errorf("the images are made of what is there now, which is not what the guest had: %w", job.Plan.Damage[0])
		return ui.Exit(ui.ExitDamaged, ui.Hint(err, "`qmchain-restore verify` names the points that are still good; --until takes one"))
	case len(job.Plan.Doubts) > 0:
		return ui.Exit(ui.ExitPartly, errors.New("this may not be what the guest had: see the warnings"))
	}
	return err
}

func printStandard(w io.Writer, p *standard.Plan, dryRun bool) error {
	if !dryRun {
		for _, r := range p.Results {
			if _, err := fmt.Fprintln(w, r.File); err != nil {
				return err
			}
		}
		return nil
	}
	if len(p.Steps) == 0 {
		_, err := fmt.Fprintln(w, "nothing is to be done")
		return err
	}
	fmt.Fprintln(w, "ACTION\tDISK\tBYTES\tFILE\tFROM, OR WHAT IT SAYS")
	for _, s := range p.Steps {
		bytes := ""
		if s.Bytes > 0 {
			bytes = humanize.IBytes(uint64(s.Bytes))
		}
		if _, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", s.Action, s.Disk, bytes, s.File, s.From); err != nil {
			return err
		}
	}
	return nil
}
