package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/term"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/stream"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// pipes are standard input and output where they carry a stream.
type pipes struct {
	in  io.Reader
	out io.Writer
}

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

type sendCmd struct {
	Repo     string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	All      []string      `conf:"no" placeholder:"GUEST" help:"Send all points of this guest. Can be given several times."`
	Have     string        `conf:"no" placeholder:"FILE" help:"Leave out what is in this list, which receive --list prints; - is standard input."`
	LockWait time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for one who merges what is needed."`
	Point    []string      `arg:"" optional:"" help:"Points, each of which comes with all that it is read from."`
}

func (c *sendCmd) Run(ctx context.Context, u *ui.UI, p pipes) error {
	wants, err := c.wants()
	if err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	if isTerminal(p.out) {
		return ui.Exit(ui.ExitUsage, errors.New("a stream is not for a terminal: `… send … | ssh HOST qmchain-restore receive …`, or write it to a file"))
	}
	have, err := c.have(p.in)
	if err != nil {
		return fmt.Errorf("--have: %w", err)
	}
	r, err := points.OpenRepo(c.Repo, durable.FS{})
	if err != nil {
		return err
	}
	s, err := stream.Prepare(ctx, r, wants, have, c.LockWait)
	if err != nil {
		return meantWants(err, r, wants)
	}
	defer s.Close()
	total := s.Bytes()
	u.Log.Infof("sending %d points, %s", s.Points(), humanize.IBytes(uint64(total)))
	bars := u.NewProgress("sent")
	bar := bars.Bar("sent", total)
	err = s.Send(ctx, p.out, func(done int64) { bar.Set(done, total) })
	bars.Done()
	if errors.Is(err, syscall.EPIPE) {
		return ui.Hint(fmt.Errorf("standard output: the receiver has ended: %w", err), "what it says is the reason")
	}
	if err != nil {
		return err
	}
	for _, p := range s.Problems {
		u.Log.Warnf("point left out: %v", p.Err)
	}
	if len(s.Problems) > 0 {
		return fmt.Errorf("at least one point can't be read: %w", s.Problems[0].Err)
	}
	return nil
}

// wants sorts what the user named by guest.
func (c *sendCmd) wants() (wants []stream.Want, err error) {
	if len(c.Point)+len(c.All) == 0 {
		return nil, errors.New("say what to send: points, or --all GUEST")
	}
	of := func(guest string) *stream.Want {
		i := slices.IndexFunc(wants, func(w stream.Want) bool { return w.Guest == guest })
		if i < 0 {
			i = len(wants)
			wants = append(wants, stream.Want{Guest: guest})
		}
		return &wants[i]
	}
	for _, s := range c.Point {
		ref, err := points.Parse(s)
		if err != nil {
			return nil, err
		}
		w := of(ref.Guest)
		w.Points = append(w.Points, ref.Point)
	}
	for _, guest := range c.All {
		if err := chain.CheckGuestName(guest); err != nil {
			return nil, err
		}
		of(guest).All = true
	}
	return wants, nil
}

// meantWants gives an error about a guest that is not there the name that may have been meant.
func meantWants(err error, r *repo.Repo, wants []stream.Want) error {
	all, listErr := r.Guests()
	if listErr != nil {
		return err
	}
	for _, w := range wants {
		if !slices.Contains(all, w.Guest) {
			return points.MeantGuest(err, w.Guest, func() ([]string, error) { return all, nil })
		}
	}
	return err
}

func (c *sendCmd) have(stdin io.Reader) (*stream.Have, error) {
	switch c.Have {
	case "":
		return nil, nil
	case "-":
		return stream.ReadHave(stdin)
	}
	f, err := os.Open(c.Have)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return stream.ReadHave(f)
}
