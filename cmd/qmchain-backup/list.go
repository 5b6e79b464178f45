package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

type checkCmd struct {
	Repo   string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	MaxAge time.Duration `default:"26h" placeholder:"TIME" help:"How old a guest's newest point may be."`
	JSON   bool          `name:"json" help:"Print one JSON document."`
	Guest  []string      `arg:"" optional:"" help:"Only these guests."`
}

// checked is one guest in the output of check --json.
type checked struct {
	Guest string     `json:"guest"`
	State checkState `json:"state"`
	Point chain.ID   `json:"point"` // the newest; empty: it has none
	Age   float64    `json:"age"`   // of that, in seconds; 0 where it can't be told
	Error string     `json:"error"`
}

// checkState is how a guest's newest point is.
type checkState string

const (
	checkOK         checkState = "ok"
	checkOld        checkState = "old"
	checkNone       checkState = "none"
	checkDamaged    checkState = "damaged"
	checkUnreadable checkState = "unreadable" // now
)

// Run fails with exit code 1 where a point is too old, 2 where a guest has none, and 5 where the newest can't be read.
func (c *checkCmd) Run(_ context.Context, u *ui.UI, fsys durable.FS) error {
	r, err := points.OpenRepo(c.Repo, fsys)
	if err != nil {
		return err
	}
	guests := c.Guest
	if len(guests) == 0 {
		if guests, err = r.Guests(); err != nil {
			return err
		}
	}
	for _, name := range guests {
		if err := chain.CheckGuestName(name); err != nil {
			return ui.Exit(ui.ExitUsage, err)
		}
	}
	var worst error
	all := []checked{}
	now := time.Now()
	for _, name := range guests {
		state, err := c.check(r, name, now)
		if err != nil {
			state.Error = err.Error()
			if ui.ExitCode(err) >= ui.ExitCode(worst) {
				worst = err
			}
		}
		all = append(all, state)
	}
	err = u.Result(c.JSON, all, func(w io.Writer) error {
		for _, s := range all {
			if _, err := fmt.Fprintf(w, "%s\t%s\n", s.Guest, s); err != nil {
				return err
			}
		}
		return nil
	})
	return cmp.Or(err, worst)
}

func (c *checkCmd) check(r *repo.Repo, name string, now time.Time) (s checked, err error) {
	s.Guest, s.State = name, checkUnreadable
	g, err := r.Guest(name)
	if err != nil {
		return s, err
	}
	if s.Point, err = g.Tip(); err != nil {
		return s, err
	}
	if s.Point == "" {
		s.State = checkNone
		return s, ui.Exit(ui.ExitNotFound, points.MeantGuest(fmt.Errorf("guest %s has no point: %w", name, chain.ErrNoPoint), name, r.Guests))
	}
	m, err := g.Point(s.Point)
	if err != nil {
		s.State = checkDamaged
		return s, ui.Exit(ui.ExitDamaged, err)
	}
	age := now.Sub(m.Time)
	s.State, s.Age = checkOK, age.Seconds()
	if age > c.MaxAge {
		s.State = checkOld
		return s, ui.Exit(ui.ExitFailed, fmt.Errorf("guest %s: its newest point is %s old", name, age.Round(time.Second)))
	}
	return s, nil
}

// String is what people are told.
func (s checked) String() string {
	old := fmt.Sprintf("%s old: %s", (time.Duration(s.Age) * time.Second), s.Point)
	switch s.State {
	case checkOK:
		return "ok, " + old
	case checkOld:
		return "TOO OLD, " + old
	case checkNone:
		return "no point"
	case checkDamaged:
		return "damaged: " + string(s.Point)
	}
	return "unreadable"
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
