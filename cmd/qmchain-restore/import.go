package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"qmchain/chain"
	"qmchain/chain/importer"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

type importCmd struct {
	Repo     string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository. It is made in an empty folder."`
	Name     string        `conf:"no" placeholder:"GUEST" help:"The guest's name in the repository; else that in the set."`
	Verify   bool          `help:"Compare every byte of each imported disk with the set's."`
	LockWait time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for those who make or remove points of the guest."`
	JSON     bool          `conf:"no" name:"json" help:"Print one JSON document."`
	Set      string        `arg:"" placeholder:"FOREIGN-DIR" help:"The directory that qmpbackup or virtnbdbackup wrote its backups to."`
	Point    []string      `arg:"" optional:"" complete:"none" help:"Only these points, by id, or the beginning of one."`
}

// importedPoint is one point in the output of import --json.
type importedPoint struct {
	Guest    string   `json:"guest"`
	ID       chain.ID `json:"id"`
	There    bool     `json:"there"`    // it was imported before
	Skipped  bool     `json:"skipped"`  // it was not imported
	Problems []string `json:"problems"` // what was left out of it, and what is doubtful in it
}

func (c *importCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	if c.Name != "" {
		if err := chain.CheckGuestName(c.Name); err != nil {
			return ui.Exit(ui.ExitUsage, fmt.Errorf("--name: %w", err))
		}
	}
	set, err := points.OpenSet(c.Set)
	if err != nil {
		return err
	}
	defer set.Close()
	bars := u.NewProgress("copied")
	bar := bars.Bar("imported", 0)
	list, err := importer.Import(ctx, importer.Config{
		Set: set, Guest: c.Name, Points: c.Point, LockWait: c.LockWait, Verify: c.Verify, Log: u.Log,
		Open: func() (*repo.Repo, error) { return repo.OpenOrCreate(c.Repo, fsys) },
		Progress: func(at string, done, total int64) {
			bar.Note(at)
			bar.Set(done, total)
		},
	})
	bars.Done()
	points := []importedPoint{}
	problems, good := 0, 0
	for _, p := range list {
		if p.Problems == nil {
			p.Problems = []string{}
		}
		points = append(points, importedPoint(p))
		if len(p.Problems) > 0 {
			problems++
		}
		if !p.Skipped {
			good++
		}
	}
	printErr := u.Done(c.JSON, points, func(w io.Writer) error {
		for _, p := range points {
			if p.There || p.Skipped {
				continue
			}
			if _, err := fmt.Fprintf(w, "%s/%s\n", p.Guest, p.ID); err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case errors.Is(err, repo.ErrOtherGuest):
		return ui.Hint(err, "--name gives the guest another name")
	case err != nil:
		return err
	case printErr != nil:
		return printErr
	case good == 0:
		return fmt.Errorf("no point of %s can be imported: %w", c.Set, chain.ErrDamaged)
	case problems > 0:
		return ui.Exit(ui.ExitPartly, fmt.Errorf("%d of %d points were not imported as a whole, or have something doubtful: see above, and the points' notes", problems, len(list)))
	}
	return nil
}
