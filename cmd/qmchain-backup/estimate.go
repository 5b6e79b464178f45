package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

type estimateCmd struct {
	runFlags `embed:""`
	JSON     bool `conf:"no" name:"json" help:"Print one JSON document; of several guests one a line."`
}

// Run shows the plan of each of the guests.
func (c *estimateCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, n node, again cli.Again) error {
	guests, err := c.choose(u, n.Host, false)
	if err != nil {
		return err
	}
	return previewAll(ctx, u, fsys, n, guests, c.JSON, func(guest string) (*runFlags, error) {
		var g grammar
		err := again(guest, &g)
		return &g.Estimate.runFlags, err
	})
}

// previewAll shows the plans of guests, each with its own settings. With several, one that can't be planned is one of the report.
func previewAll(ctx context.Context, u *ui.UI, fsys durable.FS, n node, guests guests, asJSON bool, own func(string) (*runFlags, error)) error {
	failed := 0
	for _, guest := range guests.names {
		flags, err := own(guest)
		if err == nil {
			err = preview(ctx, u, fsys, n, guests, guest, flags, asJSON)
		}
		switch {
		case err == nil:
		case !guests.several() || ctx.Err() != nil:
			return err
		case guests.group && ui.ExitCode(explain(err)) == ui.ExitNotFound:
			u.Log.WithField("guest", guest).Infof("left out: %v", err) // stopped, a template, or gone
		default:
			failed++
			u.Log.WithField("guest", guest).Error(err)
		}
	}
	if failed > 0 {
		return ui.Exit(ui.ExitSomeFailed, fmt.Errorf("%d of %d guests failed", failed, len(guests.names)))
	}
	return nil
}

// planned is one disk in the output of estimate --json.
type planned struct {
	Name     string      `json:"name"`
	Level    chain.Level `json:"level"` // empty: left out
	Reason   string      `json:"reason"`
	Parent   chain.ID    `json:"parent"`
	Estimate int64       `json:"estimate"` // bytes to copy
}

// plannedGuest is one of several guests in it.
type plannedGuest struct {
	Guest string    `json:"guest"`
	Disks []planned `json:"disks"`
}

// preview prints what a run would do.
func preview(ctx context.Context, u *ui.UI, fsys durable.FS, n node, guests guests, guest string, flags *runFlags, asJSON bool) error {
	req, err := flags.request()
	if err != nil {
		return err
	}
	cfg := backup.Config{
		Request: req, Guest: guest, Addr: flags.Socket, Log: u.Log, Now: time.Now,
		Repo: func() (*repo.Repo, error) {
			r, err := repo.Open(flags.Repo, fsys)
			if errors.Is(err, repo.ErrNotRepository) {
				r, err = repo.Planned(flags.Repo)
			}
			return r, points.MeantDir(err, flags.Repo)
		},
	}
	if flags.Name != "" {
		cfg.Guest = flags.Name
	}
	if guests.vms {
		vm, err := n.find(fsys, 0, u.Log, guests.vmid(guest))
		if err != nil {
			return err
		}
		if !vm.Running() {
			return fmt.Errorf("VM %s is stopped: what would be copied is known of running ones only: %w", vm.ID, backup.ErrNotFound)
		}
		cfg.Guard, cfg.Skip = vm, vm.Skip()
		if cfg.Addr, err = vm.Socket(); err != nil {
			return err
		}
	}
	plan, err := backup.Preview(ctx, cfg)
	if err != nil {
		return err
	}
	disks := []planned{}
	for _, d := range plan.Disks {
		p := planned{Name: d.Name, Level: d.Level, Reason: d.Reason, Estimate: d.Estimate}
		if d.Parent != nil {
			p.Parent = d.Parent.Point.ID
		}
		disks = append(disks, p)
	}
	for _, d := range plan.Left {
		disks = append(disks, planned{Name: d.Name, Reason: d.Left})
	}
	if asJSON && guests.several() {
		return u.Event(plannedGuest{cfg.Guest, disks})
	}
	return u.Result(asJSON, disks, func(w io.Writer) error {
		if guests.several() {
			fmt.Fprintf(w, "%s:\n", cfg.Guest)
		}
		fmt.Fprintln(w, "DISK\tLEVEL\tABOUT\tREMARK")
		for _, d := range disks {
			level, size, remark := string(d.Level), humanize.IBytes(uint64(d.Estimate)), d.Reason
			if level == "" {
				level, size = "-", "-"
			}
			if d.Parent != "" {
				remark = "since " + string(d.Parent)
			}
			if _, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", d.Name, level, size, remark); err != nil {
				return err
			}
		}
		return nil
	})
}
