package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/stream"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

type receiveCmd struct {
	Repo     string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository. It is made in an empty folder."`
	List     bool          `conf:"no" help:"Receive nothing; print what is there, for send --have."`
	Adopt    bool          `conf:"no" help:"Let points of another guest, as its UUID tells, come to those of the guest that has their name here."`
	LockWait time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for those who make or remove points of the guest."`
	JSON     bool          `conf:"no" name:"json" help:"Print one JSON document."`
}

// receivedPoint is one point in the output of receive --json.
type receivedPoint struct {
	Guest   string   `json:"guest"`
	ID      chain.ID `json:"id"`
	Base    bool     `json:"base"`    // no point here, but points are read through it
	There   bool     `json:"there"`   // it was there already
	Removed bool     `json:"removed"` // it was there already, removed but still needed, and stays so
}

func (c *receiveCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, p pipes) error {
	if c.List {
		return c.list(u, fsys, p.out)
	}
	if isTerminal(p.in) {
		return ui.Exit(ui.ExitUsage, errors.New("a stream does not come from a terminal: `… send … | qmchain-restore receive …`"))
	}
	bars := u.NewProgress("received")
	bar := bars.Bar("received", 0)
	r := stream.Receiver{
		Open:  func() (*repo.Repo, error) { return repo.OpenOrCreate(c.Repo, fsys) },
		Adopt: c.Adopt, LockWait: c.LockWait, Log: u.Log, Progress: bar.Set,
	}
	list, err := r.Receive(ctx, p.in)
	bars.Done()
	points := []receivedPoint{}
	removed, fresh := 0, 0
	for _, p := range list {
		points = append(points, receivedPoint(p))
		if p.Removed {
			removed++
			u.Log.Warnf("%s/%s was removed here, though points are still read through it: it stays so", p.Guest, p.ID)
		}
		if !p.There {
			fresh++
		}
	}
	printErr := u.Done(c.JSON, points, func(w io.Writer) error {
		for _, p := range points {
			if p.There || p.Base {
				continue
			}
			if _, err := fmt.Fprintf(w, "%s/%s\n", p.Guest, p.ID); err != nil {
				return err
			}
		}
		return nil
	})
	u.Log.Infof("%d points are in place, %d were there before", fresh, len(list)-fresh)
	switch {
	case errors.Is(err, repo.ErrOtherGuest):
		return ui.Hint(err, "--adopt lets them come together")
	case errors.Is(err, stream.ErrStream):
		return ui.Hint(err, "what the sender says is the reason; send again when it is mended: it goes on after the points that are in place")
	case err != nil:
		return err
	case printErr != nil:
		return printErr
	case removed > 0:
		return ui.Exit(ui.ExitPartly, fmt.Errorf("%d points were removed here before, and stay so", removed))
	}
	return nil
}

// list prints what is there. A folder in which a repository can be made has nothing.
func (c *receiveCmd) list(u *ui.UI, fsys durable.FS, w io.Writer) error {
	r, err := repo.Open(c.Repo, fsys)
	if errors.Is(err, repo.ErrNotRepository) {
		r = nil
		_, err = repo.Planned(c.Repo)
	}
	if err != nil {
		return err
	}
	have, problems, err := stream.ListHave(r)
	if err != nil {
		return err
	}
	if err := ui.Shown(have.Write(w)); err != nil {
		return err
	}
	for _, p := range problems {
		u.Log.Warnf("point left out: %v", p.Err)
	}
	return nil
}
