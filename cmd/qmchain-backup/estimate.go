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
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

type estimateCmd struct {
	runFlags `embed:""`
	JSON     bool `name:"json" help:"Print one JSON document."`
}

func (c *estimateCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	if c.Socket == "" {
		return ui.Exit(ui.ExitUsage, errors.New("--socket of the running guest is missing"))
	}
	req, err := c.request()
	if err != nil {
		return err
	}
	return preview(ctx, u, fsys, &c.runFlags, req, c.JSON)
}

// planned is one disk in the output of estimate --json.
type planned struct {
	Name     string      `json:"name"`
	Level    chain.Level `json:"level"` // empty: left out
	Reason   string      `json:"reason"`
	Parent   chain.ID    `json:"parent"`
	Estimate int64       `json:"estimate"` // bytes to copy
}

// preview prints what a run would do.
func preview(ctx context.Context, u *ui.UI, fsys durable.FS, flags *runFlags, req backup.Request, asJSON bool) error {
	plan, err := backup.Preview(ctx, backup.Config{
		Request: req, Guest: flags.Name, Addr: flags.Socket, Log: u.Log, Now: time.Now,
		Repo: func() (*repo.Repo, error) {
			r, err := repo.Open(flags.Repo, fsys)
			if errors.Is(err, repo.ErrNotRepository) {
				return repo.Planned(flags.Repo)
			}
			return r, err
		},
	})
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
	return u.Result(asJSON, disks, func(w io.Writer) error {
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
