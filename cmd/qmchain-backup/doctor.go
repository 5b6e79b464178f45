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
	"qmchain/cmd/internal/cli"
	"qmchain/internal/durable"
	"qmchain/internal/pveguest"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type doctorCmd struct {
	oneFlags    `embed:""`
	Name        string        `placeholder:"GUEST" help:"The guest's name in the repository. A VM's is its VMID, if nothing else is said."`
	Repo        string        `env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	Offline     []string      `conf:"no" placeholder:"IMAGE" help:"A qcow2 image of the stopped guest. Can be given several times; give all of them."`
	AgentSocket string        `conf:"no" placeholder:"ADDR" help:"The guest agent's socket, to thaw the guest where a run has left it frozen."`
	FleeceDir   string        `placeholder:"DIR" help:"The folder for fleece images, where it is not the default."`
	KeepDir     string        `placeholder:"DIR" help:"Where keep keeps bitmaps, if that is not its default."`
	LockWait    time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for another run to end."`
	Fix         bool          `conf:"no" help:"Put right what can be put right."`
	BreakLock   string        `conf:"no" placeholder:"LOCK" help:"Take away this lock of a run that has certainly ended, on another host for one."`
	JSON        bool          `conf:"no" name:"json" help:"Print one JSON document."`
}

func (c *doctorCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, n node, again cli.Again) error {
	var g grammar
	if err := again(c.section(c.Name), &g); err != nil {
		return err
	}
	c = &g.Doctor
	if c.Name == "" && c.VMID != 0 {
		c.Name = c.VMID.String()
	}
	switch {
	case c.Name == "":
		return ui.Exit(ui.ExitUsage, errors.New("say which guest: a VMID or --name"))
	case c.Repo == "":
		return ui.Exit(ui.ExitUsage, errors.New("missing flags: --repo=DIR"))
	}
	if err := chain.CheckGuestName(c.Name); err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	if len(c.Offline) > 0 && (c.Socket != "" || c.VMID != 0) {
		return ui.Exit(ui.ExitUsage, errors.New("--socket is for a running guest, --offline for a stopped one, and a VM's images are found"))
	}
	vm, addr, err := c.find(n, fsys, c.LockWait, u.Log)
	switch {
	case errors.Is(err, proxmox.ErrNotFound) || errors.Is(err, proxmox.ErrElsewhere) || errors.Is(err, pveguest.ErrTemplate) || errors.Is(err, pveguest.ErrNoSocket):
		u.Log.Warnf("only what is outside of the guest is looked at: %v", err)
	case err != nil:
		return err
	}
	left := ""
	if vm != nil {
		// First, as PVE may do nothing for a VM that is locked.
		if left, err = vm.Left(ctx, c.Fix); err != nil {
			return err
		}
		if !vm.Running() {
			if c.Fix {
				release, err := hold(ctx, vm)
				if err != nil {
					return err
				}
				defer giveBack(ctx, u, release)
			}
			if c.Offline, err = images(ctx, vm); err != nil {
				u.Log.Warnf("the VM's images are not looked at: %v", err)
			}
		}
	}
	fleece, err := fleeceDir(c.FleeceDir)
	if err != nil {
		return err
	}
	kept, err := keptAt(c.KeepDir, fsys)
	if err != nil {
		return err
	}
	cfg := backup.Config{
		Kept: kept, Guest: c.Name, Addr: addr, Guard: guardOf(vm), LockWait: c.LockWait, Log: u.Log, Now: time.Now,
		Fleecing: backup.Fleecing{Dir: fleece},
		Repo:     func() (*repo.Repo, error) { return repo.Open(c.Repo, fsys) },
	}
	switch {
	case vm != nil && vm.Running():
		cfg.Agent = vm.Thawer()
	case c.AgentSocket != "":
		cfg.Agent = backup.SocketAgent{Addr: c.AgentSocket}
	}
	findings, err := backup.Doctor(ctx, cfg, c.Offline, c.Fix, c.BreakLock)
	if err != nil {
		return err
	}
	if left != "" {
		findings = append(findings, backup.Finding{Where: "Proxmox VE", What: left, Fixable: true})
	}
	err = u.Result(c.JSON, append([]backup.Finding{}, findings...), func(w io.Writer) error {
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
	oneFlags `embed:""`
	Offline  []string      `conf:"no" placeholder:"IMAGE" help:"A qcow2 image of a stopped guest; a VM's are found. Can be given several times."`
	Repo     string        `conf:"no" placeholder:"DIR" help:"Only the bitmaps of this repository. By default those of all: one is enough to keep a VM from being rolled back."`
	Name     string        `placeholder:"GUEST" help:"Also, or only, the bitmaps that keep has saved under this name, of all repositories. For a VM those of its VMID go in any case."`
	KeepDir  string        `placeholder:"DIR" help:"Where keep keeps bitmaps, if that is not its default."`
	LockWait time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for a run to end."`
	JSON     bool          `conf:"no" name:"json" help:"Print one JSON document."`
}

// cleaned is the output of cleanup --json.
type cleaned struct {
	Removed []string `json:"removed"` // bitmaps, by name
}

func (c *cleanupCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, n node, again cli.Again) error {
	var g grammar
	if err := again(c.section(c.Name), &g); err != nil {
		return err
	}
	c = &g.Cleanup
	vm, addr, err := c.find(n, fsys, c.LockWait, u.Log)
	if err != nil {
		return err
	}
	if vm != nil {
		if len(c.Offline) > 0 {
			return ui.Exit(ui.ExitUsage, errors.New("say which guest in one way: a VMID or --offline"))
		}
		if c.Name == "" {
			c.Name = vm.ID.String()
		}
		if !vm.Running() {
			release, err := hold(ctx, vm)
			if err != nil {
				return err
			}
			defer giveBack(ctx, u, release)
			if c.Offline, err = images(ctx, vm); err != nil {
				return err
			}
		}
	}
	c.Socket = addr
	if c.Socket != "" && len(c.Offline) > 0 || c.Socket == "" && len(c.Offline) == 0 && c.Name == "" {
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
	if c.Name != "" {
		kept, err := keptAt(c.KeepDir, fsys)
		if err != nil {
			return err
		}
		if removed, err = kept.Discard(c.Name); err != nil {
			return err
		}
	}
	var more []string
	if c.Socket != "" {
		more, err = backup.Cleanup(ctx, addr, guardOf(vm), id, c.LockWait)
	} else {
		more, err = backup.CleanupImages(ctx, "qemu-img", c.Offline, id)
	}
	removed = append(removed, more...)
	if err != nil {
		return err
	}
	return u.Result(c.JSON, cleaned{append([]string{}, removed...)}, func(w io.Writer) error {
		for _, name := range removed {
			if _, err := fmt.Fprintln(w, name); err != nil {
				return err
			}
		}
		return nil
	})
}

// hold keeps a stopped VM from being started. After a rollback that failed because of our bitmaps PVE's own lock does: it is
// there until the admin takes it away.
func hold(ctx context.Context, vm *pveguest.VM) (release func(context.Context) error, err error) {
	if vm.Config.Lock() == "rollback" {
		return func(context.Context) error { return nil }, nil
	}
	return vm.Take(ctx)
}

func giveBack(ctx context.Context, u *ui.UI, release func(context.Context) error) {
	if err := release(context.WithoutCancel(ctx)); err != nil {
		u.Log.Warnf("the VM is not given back: %v", err)
	}
}
