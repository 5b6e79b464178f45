package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

type doctorCmd struct {
	Name        string        `required:"" placeholder:"GUEST" help:"The guest's name in the repository."`
	Repo        string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	Socket      string        `placeholder:"ADDR" help:"The running guest's QMP socket."`
	Offline     []string      `placeholder:"IMAGE" help:"A qcow2 image of the stopped guest. Can be given several times; give all of them."`
	AgentSocket string        `placeholder:"ADDR" help:"The guest agent's socket, to thaw the guest where a run has left it frozen."`
	FleeceDir   string        `placeholder:"DIR" help:"The folder for fleece images, where it is not the default."`
	LockWait    time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for another run to end."`
	Fix         bool          `help:"Put right what can be put right."`
	BreakLock   string        `placeholder:"LOCK" help:"Take away this lock of a run that has certainly ended, on another host for one."`
	JSON        bool          `name:"json" help:"Print one JSON document."`
}

func (c *doctorCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	if err := chain.CheckGuestName(c.Name); err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	if c.Socket != "" && len(c.Offline) > 0 {
		return ui.Exit(ui.ExitUsage, errors.New("--socket is for a running guest, --offline for a stopped one"))
	}
	fleece, err := fleeceDir(c.FleeceDir)
	if err != nil {
		return err
	}
	cfg := backup.Config{
		Guest: c.Name, Addr: c.Socket, LockWait: c.LockWait, Log: u.Log, Now: time.Now,
		Fleecing: backup.Fleecing{Dir: fleece},
		Repo:     func() (*repo.Repo, error) { return repo.Open(c.Repo, fsys) },
	}
	if c.AgentSocket != "" {
		cfg.Agent = backup.SocketAgent{Addr: c.AgentSocket}
	}
	findings, err := backup.Doctor(ctx, cfg, c.Offline, c.Fix, c.BreakLock)
	if err != nil {
		return err
	}
	err = u.Result(c.JSON, findings, func(w io.Writer) error {
		if len(findings) == 0 {
			_, err := fmt.Fprintln(w, "all is well")
			return err
		}
		for _, f := range findings {
			if _, err := fmt.Fprintf(w, "%s\t%s\n", f.Where, f.What); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || len(findings) == 0 {
		return err
	}
	err = fmt.Errorf("%d findings", len(findings))
	if !c.Fix {
		err = ui.Hint(err, "--fix puts right what can be put right")
	}
	return ui.Exit(ui.ExitNeedsDoctor, err)
}

type cleanupCmd struct {
	Socket   string        `placeholder:"ADDR" help:"The running guest's QMP socket."`
	Offline  []string      `placeholder:"IMAGE" help:"A qcow2 image of a stopped guest. Can be given several times."`
	Repo     string        `env:"QMCHAIN_REPO" placeholder:"DIR" help:"Only the bitmaps of this repository."`
	LockWait time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for a run to end."`
}

func (c *cleanupCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	if (c.Socket == "") == (len(c.Offline) == 0) {
		return ui.Exit(ui.ExitUsage, errors.New("say which guest: --socket of a running one, or --offline with a stopped one's images"))
	}
	id := ""
	if c.Repo != "" {
		r, err := repo.Open(c.Repo, fsys)
		if err != nil {
			return err
		}
		id = r.ShortID()
	}
	var removed []string
	var err error
	if c.Socket != "" {
		removed, err = backup.Cleanup(ctx, c.Socket, id, c.LockWait)
	} else {
		removed, err = backup.CleanupImages(ctx, "qemu-img", c.Offline, id)
	}
	if err != nil {
		return err
	}
	return u.Result(false, nil, func(w io.Writer) error {
		for _, name := range removed {
			if _, err := fmt.Fprintln(w, name); err != nil {
				return err
			}
		}
		return nil
	})
}
