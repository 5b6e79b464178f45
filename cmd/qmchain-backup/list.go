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

type checkCmd struct {
	Repo   string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	MaxAge time.Duration `default:"26h" placeholder:"TIME" help:"How old a guest's newest point may be."`
	Guest  []string      `arg:"" optional:"" help:"Only these guests."`
}

// Run fails with exit code 1 where a point is too old, 2 where a guest has none, and 5 where the newest can't be read.
func (c *checkCmd) Run(_ context.Context, u *ui.UI, fsys durable.FS) error {
	r, err := repo.Open(c.Repo, fsys)
	if err != nil {
		return err
	}
	guests := c.Guest
	if len(guests) == 0 {
		if guests, err = r.Guests(); err != nil {
			return err
		}
	}
	var worst error
	now := time.Now()
	err = u.Result(false, nil, func(w io.Writer) error {
		for _, name := range guests {
			state, err := c.check(r, name, now)
			if _, werr := fmt.Fprintf(w, "%s\t%s\n", name, state); werr != nil {
				return werr
			}
			if err != nil && ui.ExitCode(err) >= ui.ExitCode(worst) {
				worst = err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return worst
}

func (c *checkCmd) check(r *repo.Repo, name string, now time.Time) (state string, err error) {
	g, err := r.Guest(name)
	if err != nil {
		return "no such guest", ui.Exit(ui.ExitUsage, err)
	}
	tip, err := g.Tip()
	if err != nil {
		return "unreadable", err
	}
	if tip == "" {
		return "no point", ui.Exit(ui.ExitNotFound, fmt.Errorf("guest %s has no point: %w", name, chain.ErrNoPoint))
	}
	m, err := g.Point(tip)
	if err != nil {
		return "damaged: " + string(tip), ui.Exit(ui.ExitDamaged, err)
	}
	age := now.Sub(m.Time)
	state = fmt.Sprintf("%s old: %s", age.Round(time.Second), tip)
	if age > c.MaxAge {
		return "TOO OLD, " + state, ui.Exit(ui.ExitFailed, fmt.Errorf("guest %s: its newest point is %s old", name, age.Round(time.Second)))
	}
	return "ok, " + state, nil
}

type infoCmd struct {
	oneFlags `embed:""`
	JSON     bool `name:"json" help:"Print one JSON document."`
}

func (c *infoCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, n node) error {
	vm, addr, err := c.find(n, fsys, 0, u.Log)
	if err == nil && addr == "" {
		err = ui.Exit(ui.ExitUsage, errors.New("say which running guest: a VMID or --socket"))
		if vm != nil {
			err = fmt.Errorf("VM %s is stopped: %w", vm.ID, backup.ErrNotFound)
		}
	}
	if err != nil {
		return err
	}
	info, err := backup.Inspect(ctx, addr, guardOf(vm))
	if err != nil {
		return err
	}
	return u.Result(c.JSON, info, func(w io.Writer) error {
		fmt.Fprintf(w, "name\t%s\nuuid\t%s\nvmgenid\t%s\nqemu\t%s\nstatus\t%s\n", info.Guest.VMName, info.Guest.UUID, info.Guest.VMGenID, info.QEMU, info.Status)
		for _, j := range info.Jobs {
			fmt.Fprintf(w, "job\t%s\n", j)
		}
		fmt.Fprintln(w, "\nDISK\tSIZE\tFORMAT\tTRACKED SINCE\tCHANGED\tREMARK")
		for _, d := range info.Disks {
			since, changed, remark := "-", "-", d.Left
			for _, b := range d.Bitmaps {
				since, changed = string(b.Point), humanize.IBytes(uint64(b.Dirty))
				switch {
				case b.Inconsistent:
					remark = "bitmap is inconsistent"
				case !b.Recording:
					remark = "bitmap does not record"
				}
			}
			if _, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", d.Name, humanize.IBytes(uint64(d.Size)), d.Driver, since, changed, remark); err != nil {
				return err
			}
		}
		return nil
	})
}
