package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/cmd/internal/vms"
	"qmchain/internal/durable"
	"qmchain/internal/pveguest"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type checkCmd struct {
	Repo   string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	MaxAge time.Duration `positive:"" default:"26h" placeholder:"TIME" help:"How old a guest's newest point may be."`
	JSON   bool          `conf:"no" name:"json" help:"Print one JSON document."`
	Guest  []string      `arg:"" optional:"" help:"Only these guests."`

	All     bool           `conf:"no" help:"All VMs of this Proxmox VE node, also those that have no point."`
	Pool    string         `conf:"no" placeholder:"NAME" complete:"pool" help:"The same for the VMs of a pool, as far as they are on this node."`
	Tag     string         `conf:"no" placeholder:"TAG" help:"The same for the VMs of this node that have a tag."`
	Exclude []proxmox.VMID `placeholder:"VMID" help:"Not this VM. Can be given several times."`
}

// Help is what "check --help" says in addition.
func (*checkCmd) Help() string {
	return `Of each guest's newest point it looks whether it is young enough, whether the images that it is read from are there, of the right size and the right ones, and whether verify has found damage in them. It reads no data: that is what "qmchain-restore verify" is for. Without --all, --pool and --tag it knows of the guests in the repository alone, and of none that was never backed up.`
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

// Run fails with exit code 1 where a point is too old, 2 where a guest has none, and 5 where the newest is known to be damaged.
func (c *checkCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, n node, named cli.Named) error {
	r, err := points.OpenRepo(c.Repo, fsys)
	if err != nil {
		return err
	}
	guests, err := c.guests(u, r, n.Host, named)
	if err != nil {
		return err
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
		if err := ctx.Err(); err != nil {
			return err
		}
		state, err := c.check(u, r, name, now)
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

// guests are the names of those to look at.
func (c *checkCmd) guests(u *ui.UI, r *repo.Repo, host proxmox.Host, named cli.Named) ([]string, error) {
	selection := proxmox.Selection{All: c.All, Pool: c.Pool, Tag: c.Tag, Exclude: c.Exclude}
	switch {
	case !selection.Many() && len(c.Guest) > 0:
		return c.Guest, nil
	case !selection.Many():
		names, err := r.Guests()
		return slices.DeleteFunc(names, func(name string) bool {
			return slices.ContainsFunc(c.Exclude, func(id proxmox.VMID) bool { return named(id.String()) == name })
		}), err
	case len(c.Guest) > 0, c.All && (c.Pool != "" || c.Tag != ""), c.Pool != "" && c.Tag != "":
		return nil, ui.Exit(ui.ExitUsage, errors.New("say which guests in one way: their names, --all, --pool or --tag"))
	}
	ids, notes, err := vms.Select(host, selection)
	if err != nil {
		return nil, err
	}
	for _, note := range notes {
		u.Log.Infof("left out: %s", note)
	}
	var names []string
	for _, id := range ids {
		config, err := host.Config(id)
		switch {
		case errors.Is(err, proxmox.ErrNotFound), errors.Is(err, proxmox.ErrElsewhere):
			continue // it went away meanwhile
		case err != nil:
			return nil, err
		case config.Template():
			u.Log.Infof("left out: VM %s is %v", id, pveguest.ErrTemplate)
			continue
		}
		names = append(names, named(id.String()))
	}
	return names, nil
}

// maxLooks bounds how often a guest is looked at whose points change meanwhile: what is removed or merged just then is not missing.
const maxLooks = 3

func (c *checkCmd) check(u *ui.UI, r *repo.Repo, name string, now time.Time) (s checked, err error) {
	g, err := r.Guest(name)
	if err != nil {
		return checked{Guest: name, State: checkUnreadable}, err
	}
	var known repo.Known
	var then chain.Points
	for looks := 1; ; looks++ {
		points, _, err := g.Look(&known)
		if err != nil {
			return checked{Guest: name, State: checkUnreadable}, err
		}
		s, err = c.newest(u, r, g, points, now)
		certain := s.State != checkDamaged && s.State != checkUnreadable
		if certain || looks == maxLooks || looks > 1 && slices.Equal(points, then) {
			return s, err
		}
		then = points
	}
}

// newest looks at the newest of a guest's points.
func (c *checkCmd) newest(u *ui.UI, r *repo.Repo, g *repo.Guest, all chain.Points, now time.Time) (s checked, err error) {
	s = checked{Guest: g.Name, State: checkUnreadable}
	if s.Point, err = g.Tip(); err != nil {
		return s, err
	}
	if s.Point == "" {
		s.State = checkNone
		err := fmt.Errorf("guest %s has no point: %w", g.Name, chain.ErrNoPoint)
		if len(c.Guest) > 0 {
			err = points.MeantGuest(err, g.Name, r.Guests)
		}
		return s, ui.Exit(ui.ExitNotFound, err)
	}
	m, err := g.Point(s.Point)
	if err == nil {
		s.Age = now.Sub(m.Time).Seconds()
		err = whole(u, g, all, m)
	}
	switch {
	case errors.Is(err, chain.ErrDamaged), errors.Is(err, fs.ErrNotExist):
		s.State = checkDamaged
		return s, ui.Exit(ui.ExitDamaged, err)
	case err != nil:
		return s, err
	}
	s.State = checkOK
	if age := now.Sub(m.Time); age > c.MaxAge {
		s.State = checkOld
		return s, ui.Exit(ui.ExitFailed, fmt.Errorf("guest %s: its newest point is %s old", g.Name, age.Round(time.Second)))
	}
	return s, nil
}

// whole makes sure that the images which a point's disks are read from are there and are the right ones, and that verify has not
// found them damaged.
func whole(u *ui.UI, g *repo.Guest, all chain.Points, m *chain.Manifest) error {
	damaged, err := g.Damaged(all)
	if err != nil {
		u.Log.Warnf("what verify has found is not known: %v", err)
	}
	for _, d := range m.Disks {
		if found, ok := damaged[m.Ref(d.Name)]; ok {
			return fmt.Errorf("%s/%s: disk %s: %w", g.Name, m.ID, d.Name, found.Err())
		}
		if err := g.CheckImages(all, m, d.Name); err != nil {
			return err
		}
	}
	return nil
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
		return "DAMAGED: " + s.Error
	}
	return "unreadable"
}

type infoCmd struct {
	oneFlags `embed:""`
	JSON     bool `conf:"no" name:"json" help:"Print one JSON document."`
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
