package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/retain"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// removing are the flags of all that removes points.
type removing struct {
	Repo      string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	RateLimit string        `placeholder:"SIZE" help:"Merge at most this much a second, such as 50MiB."`
	LockWait  time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for another one who removes points of the guest."`
}

// sweep removes what choose chooses, which can be nothing, and does away with what is left of removed points, as far as that is
// possible now. By force also points that runs build on: one that is under way would fail at its end, and is waited for.
func (c *removing) sweep(ctx context.Context, u *ui.UI, g *repo.Guest, force bool, choose func(chain.Points) ([]chain.ID, error)) error {
	rate, err := cli.Size("--rate-limit", c.RateLimit)
	if err != nil {
		return err
	}
	runs := func() {}
	if force {
		lock, err := g.Lock(ctx, c.LockWait)
		if err != nil {
			return fmt.Errorf("a run may be under way that builds on what is to be removed: %w", err)
		}
		runs = sync.OnceFunc(lock.Unlock)
		defer runs()
	}
	lock, err := g.LockPrune(ctx, c.LockWait)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	points, problems, err := g.Points()
	if err != nil {
		return err
	}
	for _, p := range problems {
		u.Log.Warnf("%v: nothing of what it may need is done away with", p.Err)
	}
	ids, err := choose(points)
	if err != nil {
		return err
	}
	r := &retain.Remover{Guest: g, Log: u.Log, RateLimit: rate}
	if err := r.Remove(points, force, ids...); err != nil {
		return err
	}
	runs()
	left, err := r.Sweep(ctx)
	for _, l := range left {
		if err != nil && strings.Contains(err.Error(), l.Why) {
			continue // the error says it
		}
		u.Log.Infof("%s/%s is removed, but its space is not free yet: %s", g.Name, l.ID, l.Why)
	}
	if errors.Is(err, chain.ErrDamaged) {
		err = fmt.Errorf("the space of points that are removed is not free yet, as damage is not merged into those that are kept: %w", err)
		err = ui.Hint(err, "`qmchain-restore verify` names what is damaged; `qmchain-backup run --level full` begins a chain that needs none of it, and once the old one's points are removed too, all of their space is free")
	}
	return err
}

type pruneCmd struct {
	removing `embed:""`

	KeepLast    int  `placeholder:"N" help:"Keep the last N points."`
	KeepHourly  int  `placeholder:"N" help:"Keep the last point of each of the last N hours that have one."`
	KeepDaily   int  `placeholder:"N" help:"The same for days."`
	KeepWeekly  int  `placeholder:"N" help:"The same for weeks."`
	KeepMonthly int  `placeholder:"N" help:"The same for months."`
	KeepYearly  int  `placeholder:"N" help:"The same for years."`
	KeepAll     bool `help:"Keep all points; only do away with what is left of removed ones."`
	DryRun      bool `conf:"no" short:"n" help:"Only show what would be kept and removed."`
	JSON        bool `conf:"no" name:"json" help:"Print one JSON document."`

	Guest []string `arg:"" optional:"" help:"Only these guests."`
}

// prunedPoint is one point in the output of prune --json.
type prunedPoint struct {
	Guest  string    `json:"guest"`
	ID     chain.ID  `json:"id"`
	Time   time.Time `json:"time"`
	Bytes  int64     `json:"bytes"` // of its images
	Keep   bool      `json:"keep"`
	Reason string    `json:"reason"` // why it is kept
}

// prunedOf is a point that is removed.
func prunedOf(guest string, m *chain.Manifest) prunedPoint {
	p := prunedPoint{Guest: guest, ID: m.ID, Time: m.Time}
	for _, d := range m.Disks {
		p.Bytes += d.Bytes
	}
	return p
}

// Run goes on with the other guests where one fails, and fails at the end.
func (c *pruneCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	policy := retain.Policy{Last: c.KeepLast, Hourly: c.KeepHourly, Daily: c.KeepDaily, Weekly: c.KeepWeekly, Monthly: c.KeepMonthly, Yearly: c.KeepYearly}
	switch {
	case min(c.KeepLast, c.KeepHourly, c.KeepDaily, c.KeepWeekly, c.KeepMonthly, c.KeepYearly) < 0:
		return ui.Exit(ui.ExitUsage, errors.New("nothing can be kept a negative number of times"))
	case policy.KeepsAll() && !c.KeepAll:
		return ui.Exit(ui.ExitUsage, errors.New("say what to keep: --keep-last, --keep-hourly, --keep-daily, --keep-weekly, --keep-monthly, --keep-yearly, or --keep-all"))
	case !policy.KeepsAll() && c.KeepAll:
		return ui.Exit(ui.ExitUsage, errors.New("--keep-all goes with no other --keep option"))
	}
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
	pruned := []prunedPoint{}
	var failed error
	for _, name := range guests {
		list, err := c.prune(ctx, u, r, name, policy)
		pruned = append(pruned, list...)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			if len(guests) > 1 {
				u.Log.WithField("guest", name).Error(err)
			}
			failed = err
		}
	}
	tell := u.Done
	if c.DryRun {
		tell = u.Result
	}
	err = tell(c.JSON, pruned, func(w io.Writer) error { return printPruned(w, pruned) })
	if failed == nil {
		return err
	}
	if len(guests) > 1 {
		return ui.Exit(ui.ExitSomeFailed, fmt.Errorf("not all guests were pruned: %w", failed))
	}
	return failed
}

func (c *pruneCmd) prune(ctx context.Context, u *ui.UI, r *repo.Repo, name string, policy retain.Policy) (list []prunedPoint, err error) {
	g, err := r.Guest(name)
	if err != nil {
		return nil, ui.Exit(ui.ExitUsage, err)
	}
	// Where there is no point any more, there can be what is left of removed ones.
	if _, err := os.Lstat(g.Dir); errors.Is(err, fs.ErrNotExist) {
		return nil, points.MeantGuest(fmt.Errorf("guest %s has no point: %w", name, chain.ErrNoPoint), name, r.Guests)
	}
	choose := func(points chain.Points) (remove []chain.ID, err error) {
		for _, v := range policy.Apply(points) {
			p := prunedOf(name, v.Point)
			p.Keep, p.Reason = v.Keep, v.Reason
			list = append(list, p)
			if !v.Keep {
				remove = append(remove, p.ID)
			}
		}
		return remove, nil
	}
	if !c.DryRun {
		return list, c.sweep(ctx, u, g, false, func(points chain.Points) ([]chain.ID, error) {
			ids, err := choose(points)
			return ids, err
		})
	}
	points, _, err := g.Points()
	if err != nil {
		return nil, err
	}
	_, err = choose(points)
	return list, err
}

func printPruned(w io.Writer, points []prunedPoint) error {
	if len(points) == 0 {
		return nil
	}
	if _, err := fmt.Fprintln(w, "POINT\tTIME\tSIZE\t\tWHY"); err != nil {
		return err
	}
	for _, p := range points {
		what := map[bool]string{true: "keep", false: "remove"}[p.Keep]
		_, err := fmt.Fprintf(w, "%s/%s\t%s\t%s\t%s\t%s\n", p.Guest, p.ID, p.Time.Local().Format("2006-01-02 15:04:05"), humanize.IBytes(uint64(p.Bytes)), what, p.Reason)
		if err != nil {
			return err
		}
	}
	return nil
}

type removeCmd struct {
	removing `embed:""`
	Force    bool     `conf:"no" help:"Also points from which increments go on: the next run takes a full then. A run that is under way is waited for, as long as --lock-wait says; none begins meanwhile."`
	JSON     bool     `conf:"no" name:"json" help:"Print one JSON document: the points that are removed, as prune prints them."`
	Point    []string `arg:"" help:"Points, as GUEST/ID, GUEST/latest, or GUEST/ and the beginning of an id."`
}

// Run removes all points or, where one can't be removed, none of that guest's.
func (c *removeCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	removed := []prunedPoint{}
	err := eachGuest(c.Repo, fsys, c.Point, func(g *repo.Guest, names []string) error {
		// What is the latest now may not be it any more once the locks are there.
		points, _, err := g.Points()
		if err != nil {
			return err
		}
		ids, err := resolve(points, g.Name, names)
		if err != nil {
			return err
		}
		err = c.sweep(ctx, u, g, c.Force, func(chain.Points) ([]chain.ID, error) { return ids, nil })
		left := chain.Points{}
		if err != nil { // before they were removed, or after it
			var problems []repo.Problem
			var lookErr error
			if left, problems, lookErr = g.Points(); lookErr != nil || len(problems) > 0 {
				return err
			}
		}
		for _, id := range ids {
			if m := left.Find(id); m == nil || !slices.Contains(left.Kept(), m) {
				removed = append(removed, prunedOf(g.Name, points.Find(id)))
			}
		}
		return err
	})
	if !c.JSON || err != nil && len(removed) == 0 {
		return err
	}
	return cmp.Or(err, u.Done(true, removed, nil))
}

type protectCmd struct {
	Repo  string   `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	JSON  bool     `conf:"no" name:"json" help:"Print one JSON document: the points, and that they are protected, or not any more."`
	Point []string `arg:"" help:"Points, as GUEST/ID, GUEST/latest, or GUEST/ and the beginning of an id."`
}

// protectedPoint is one point in the output of protect --json and unprotect --json.
type protectedPoint struct {
	Guest     string   `json:"guest"`
	ID        chain.ID `json:"id"`
	Protected bool     `json:"protected"`
}

func (c *protectCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	return c.set(ctx, u, fsys, true)
}

type unprotectCmd struct {
	protectCmd `embed:""`
}

func (c *unprotectCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	return c.set(ctx, u, fsys, false)
}

func (c *protectCmd) set(ctx context.Context, u *ui.UI, fsys durable.FS, protected bool) error {
	set := []protectedPoint{}
	err := eachGuest(c.Repo, fsys, c.Point, func(g *repo.Guest, names []string) error {
		ids, err := protect(ctx, g, names, protected)
		for _, id := range ids {
			set = append(set, protectedPoint{g.Name, id, protected})
		}
		return err
	})
	if !c.JSON || err != nil && len(set) == 0 {
		return err
	}
	return cmp.Or(err, u.Done(true, set, nil))
}

// protect returns the points that are protected now, or not any more.
func protect(ctx context.Context, g *repo.Guest, names []string, protected bool) (done []chain.ID, err error) {
	lock, err := g.LockPrune(ctx, time.Minute)
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	points, _, err := g.Points()
	if err != nil {
		return nil, err
	}
	ids, err := resolve(points, g.Name, names)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		err := g.Rewrite(repo.FolderOf(points.Find(id)), func(m *chain.Manifest) error {
			m.Protected = protected
			return nil
		})
		if err != nil {
			return done, err
		}
		done = append(done, id)
	}
	return done, nil
}

// eachGuest calls do for each guest of which the user has named points, with what the user called them.
func eachGuest(dir string, fsys durable.FS, refs []string, do func(g *repo.Guest, names []string) error) error {
	names := make(map[string][]string)
	var order []string
	for _, s := range refs {
		ref, err := points.Parse(s)
		if err != nil {
			return err
		}
		if names[ref.Guest] == nil {
			order = append(order, ref.Guest)
		}
		names[ref.Guest] = append(names[ref.Guest], ref.Point)
	}
	r, err := points.OpenRepo(dir, fsys)
	if err != nil {
		return err
	}
	for _, name := range order {
		g, err := r.Guest(name)
		if err != nil {
			return err
		}
		// Before anything is locked, which makes files in the guest's folder.
		if tip, err := g.Tip(); err != nil || tip == "" {
			none := points.MeantGuest(fmt.Errorf("guest %s has no point: %w", name, chain.ErrNoPoint), name, r.Guests)
			return cmp.Or(err, none)
		}
		if err := do(g, names[name]); err != nil {
			return err
		}
	}
	return nil
}

// resolve finds the points that the user named.
func resolve(all chain.Points, guest string, names []string) ([]chain.ID, error) {
	var ids []chain.ID
	for _, name := range names {
		m, err := all.Resolve(name)
		if err != nil {
			return nil, fmt.Errorf("guest %s: %w", guest, points.MeantPoint(err, name, all))
		}
		if !slices.Contains(ids, m.ID) {
			ids = append(ids, m.ID)
		}
	}
	return ids, nil
}
