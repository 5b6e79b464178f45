// Package listing is the command that lists points, which several programs have: as a tree of the chains of each guest, or in
// JSON.
package listing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/internal/ui"
)

// Command is the command list.
type Command struct {
	Repo  string   `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	Long  bool     `short:"l" conf:"no" help:"Also the disks of each point, and when it was taken by this host's clock."`
	Watch interval `conf:"no" help:"Show it again every 5 seconds, or every N with --watch=N, until Ctrl-C."`
	JSON  bool     `name:"json" conf:"no" help:"Print one JSON document."`
	Guest string   `arg:"" optional:"" help:"Only this guest."`
}

// Help is what "list --help" says in addition.
func (*Command) Help() string {
	return `A chain is a full with all that descends from it, and stands under the full. AGE is how long ago the point was taken, SIZE that of its disks, and STORED what its images take; of a guest, AGE is that of its newest point, and STORED is all of it. In a point of several levels the remark says which disk has which. No image is looked at: a remark on damage is what "qmchain-restore verify" has found before, and "qmchain-backup check" looks at the images of each guest's newest point.`
}

// Examples implements cli.Exemplary.
func (*Command) Examples() []cli.Example {
	return []cli.Example{
		{For: "all guests, with their chains", Line: "list --repo /mnt/backup/qmchain"},
		{For: "one guest, while it is backed up", Line: "list --repo /mnt/backup/qmchain --watch 110"},
		{For: "what stores most", Line: `list --repo /mnt/backup/qmchain --json | jq -r 'sort_by([.disks[].bytes] | add) | last | .id'`},
	}
}

// Point is one point in JSON.
type Point struct {
	Guest       string            `json:"guest"`
	VMName      string            `json:"vm_name"`
	ID          chain.ID          `json:"id"`
	Time        time.Time         `json:"time"`
	Note        string            `json:"note"`
	Consistency chain.Consistency `json:"consistency"`
	Protected   bool              `json:"protected"`
	Level       chain.Level       `json:"level"`
	Disks       []Disk            `json:"disks"`
}

// Disk is one disk of a point.
type Disk struct {
	Name        string      `json:"name"`
	Level       chain.Level `json:"level"`
	Reason      string      `json:"reason"`
	Parent      chain.ID    `json:"parent"`
	VirtualSize int64       `json:"virtual_size"`
	Bytes       int64       `json:"bytes"`
	Format      string      `json:"format"`
	File        string      `json:"file"` // relative to the repository
	// Damage is what verify has found of the images that the disk is read from.
	Damage string `json:"damage,omitempty"`
}

// Run lists all points, oldest first. Where one, or a disk of it, can't be read it lists the others all the same, and then fails.
func (c *Command) Run(ctx context.Context, u *ui.UI) error {
	if c.Watch > 0 && c.JSON {
		return ui.Exit(ui.ExitUsage, errors.New("--watch is for people: it goes with no --json"))
	}
	set, err := points.OpenSet(c.Repo)
	if err != nil {
		return err
	}
	if c.Watch > 0 {
		return c.watch(ctx, u, set) // which may not come back from a share that hangs
	}
	defer set.Close()
	// Of each guest only its rows are kept: of a large repository that is a fraction.
	now, rows := time.Now(), tree{heading}
	found := listing{points: []Point{}}
	err = c.each(ctx, set, func(of listing) {
		if c.JSON {
			found.add(of)
			return
		}
		rows = append(rows, of.rows(now, c.Long)...)
		of.points = nil
		found.add(of)
	})
	if err != nil {
		return err
	}
	for _, p := range found.problems {
		u.Log.Warn(p.text)
	}
	err = u.Result(c.JSON, found.points, func(w io.Writer) error { return rows.print(w, u.Unicode(), u.Width()) })
	if err == nil && found.damaged != nil {
		return fmt.Errorf("not all points can be read: %w", found.damaged)
	}
	return err
}

// listing is what was found.
type listing struct {
	points   []Point // of each guest the oldest first
	problems []problem
	damaged  error // nil: all could be read
}

// problem is something that is wrong with a point.
type problem struct {
	guest, point string
	lost         bool // the point is not among the points
	text         string
}

// add adds what was found of another guest.
func (l *listing) add(of listing) {
	l.points = append(l.points, of.points...)
	l.problems = append(l.problems, of.problems...)
	l.damaged = cmp.Or(of.damaged, l.damaged)
}

// look reads what there is.
func (c *Command) look(ctx context.Context, set source.Set) (found listing, err error) {
	err = c.each(ctx, set, func(of listing) { found.add(of) })
	return found, err
}

// each reads one guest after the other, the next while do works on the one before.
func (c *Command) each(ctx context.Context, set source.Set, do func(listing)) (err error) {
	guests := []string{c.Guest}
	if c.Guest == "" {
		if guests, err = set.Guests(); err != nil {
			return err
		}
	}
	type guest struct {
		name    string
		of      *source.Points
		damaged repo.Damaged
		unknown error // why what is damaged is not known
		err     error
	}
	read := make(chan guest)
	go func() {
		defer close(read)
		for _, name := range guests {
			of, err := points.Of(set, name)
			if c.Guest == "" && errors.Is(err, chain.ErrNoPoint) {
				continue // its last point has just gone, or its first is being made
			}
			g := guest{name: name, of: of, err: err}
			if err == nil {
				g.damaged, g.unknown = source.Damaged(set, name, of)
			}
			select {
			case read <- g:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done(): // whatever a share does that hangs
			return ctx.Err()
		case g, more := <-read:
			if !more {
				return ctx.Err() // of which the reading may have ended
			}
			if g.err != nil {
				return g.err
			}
			found := listingOf(g.name, g.of, g.damaged)
			if g.unknown != nil {
				found.problems = append(found.problems, problem{guest: g.name, text: fmt.Sprintf("what verify has found is not known: %v", g.unknown)})
			}
			do(found)
		}
	}
}

func listingOf(name string, of *source.Points, damaged repo.Damaged) (found listing) {
	for _, p := range of.Problems {
		problem := problem{name, p.Point, p.Disk == "", fmt.Sprintf("point left out: %v", p.Err)}
		if p.Disk != "" {
			problem.text = fmt.Sprintf("%s/%s: disk %s can't be read: %v", name, p.Point, p.Disk, p.Err)
		}
		found.problems = append(found.problems, problem)
		found.damaged = p.Err
	}
	for _, p := range of.Warnings {
		found.problems = append(found.problems, problem{name, p.Point, false, fmt.Sprintf("%s/%s: disk %s: %v", name, p.Point, p.Disk, p.Err)})
	}
	for _, m := range of.All.Kept() {
		p := listed(m, of)
		for i := range p.Disks {
			if v, ok := damaged[m.Ref(p.Disks[i].Name)]; ok {
				p.Disks[i].Damage = v.String()
			}
		}
		found.points = append(found.points, p)
	}
	return found
}

// listed is how a point is listed, whoever has written it.
func listed(m *chain.Manifest, from source.Reader) Point {
	p := Of(m)
	for i := range m.Disks {
		if l, ok := from.Image(chain.Layer{Point: m, Disk: &m.Disks[i]}); ok {
			p.Disks[i].File, p.Disks[i].Format = l.Name, l.Format.String()
		}
	}
	return p
}

// Of is how a point of a repository is listed.
func Of(m *chain.Manifest) Point {
	p := Point{
		Guest: m.Guest.Name, VMName: m.Guest.VMName, ID: m.ID, Time: m.Time, Note: m.Note, Consistency: m.Consistency, Protected: m.Protected,
		Level: m.Level(), Disks: []Disk{},
	}
	for _, d := range m.Disks {
		ld := Disk{
			Name: d.Name, Level: d.Level, Reason: d.Reason, VirtualSize: d.VirtualSize, Bytes: d.Bytes, Format: "qcow2",
			File: m.Guest.Name + "/" + repo.ImagesFolder + "/" + d.File,
		}
		if d.Parent != nil {
			ld.Parent = d.Parent.Point
		}
		p.Disks = append(p.Disks, ld)
	}
	return p
}
