package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/source"
	"qmchain/chain/verify"
	"qmchain/cmd/internal/points"
	"qmchain/internal/ui"
)

type verifyCmd struct {
	Repo string   `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	Deep bool     `help:"Also read the disks, as a restore would."`
	Jobs int      `default:"0" placeholder:"N" help:"How many pieces to read at a time. 0: what fits the machine."`
	JSON bool     `conf:"no" name:"json" help:"Print one JSON document."`
	What []string `arg:"" optional:"" name:"guest|point" help:"Only these guests and points, with all that they need. A point is GUEST/latest, GUEST/ID, or GUEST/ and the beginning of an id."`
}

// verified is the output of verify --json.
type verified struct {
	Set     string          `json:"set"`
	Kind    source.Kind     `json:"kind"`
	Deep    bool            `json:"deep"`
	QemuImg bool            `json:"qemu_img"` // it was there to check images
	State   verify.State    `json:"state"`
	Guests  []*verify.Guest `json:"guests"`
}

// Run fails with exit code 5 where a backup is damaged, 1 where something could not be read, and 4 where a foreign disk may not
// be what the guest had, or qemu-img is missing.
func (c *verifyCmd) Run(ctx context.Context, u *ui.UI) error {
	if c.Jobs < 0 {
		return ui.Exit(ui.ExitUsage, errors.New("--jobs can't be negative"))
	}
	set, err := points.OpenSet(c.Repo)
	if err != nil {
		return err
	}
	defer set.Close()
	guests, err := c.guests(set)
	if err != nil {
		return err
	}
	check := verify.Checker{Set: set, Deep: c.Deep, Jobs: c.Jobs}
	if check.QemuImg, err = exec.LookPath("qemu-img"); err != nil {
		check.QemuImg = ""
		u.Log.Warn("qemu-img is not installed: whether the tables of the images contradict one another is not looked at")
	}
	out := verified{Set: set.Dir(), Kind: set.Kind(), Deep: c.Deep, QemuImg: check.QemuImg != "", State: verify.Good, Guests: []*verify.Guest{}}
	failed := c.verify(ctx, u, check, guests, &out)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if failed != nil {
		out.State = verify.Worse(out.State, verify.Unknown) // of what is not in the document nothing good is known
	}
	err = u.Result(c.JSON, out, func(w io.Writer) error {
		for _, g := range out.Guests {
			if err := printGuest(w, g); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return out.verdict(failed)
}

// asked is what is to be verified of a guest.
type asked struct {
	guest  string
	points []string // all, if there are none
}

// guests says what is to be verified.
func (c *verifyCmd) guests(set source.Set) ([]asked, error) {
	if len(c.What) == 0 {
		names, err := set.Guests()
		if err != nil {
			return nil, err
		}
		var all []asked
		for _, n := range names {
			all = append(all, asked{guest: n})
		}
		return all, nil
	}
	var list []asked
	whole := map[string]bool{}
	for _, what := range c.What {
		guest, point, isPoint := strings.Cut(what, "/")
		if isPoint {
			ref, err := points.Parse(what)
			if err != nil {
				return nil, err
			}
			guest, point = ref.Guest, ref.Point
		} else if err := chain.CheckGuestName(guest); err != nil {
			return nil, ui.Exit(ui.ExitUsage, err)
		}
		i := slices.IndexFunc(list, func(a asked) bool { return a.guest == guest })
		if i < 0 {
			i = len(list)
			list = append(list, asked{guest: guest})
		}
		if !isPoint {
			whole[guest] = true
		}
		list[i].points = append(list[i].points, point)
	}
	for i := range list {
		if whole[list[i].guest] {
			list[i].points = nil
		}
	}
	return list, nil
}

// verify verifies all guests. Where one can't be, it goes on with the others, and returns the error in the end.
func (c *verifyCmd) verify(ctx context.Context, u *ui.UI, check verify.Checker, guests []asked, out *verified) (failed error) {
	bars := u.NewProgress("checked")
	defer bars.Done()
	for _, a := range guests {
		check.Progress = bars.Bar(a.guest, 0).Set
		began := time.Now()
		g, err := check.Guest(ctx, a.guest, a.points...)
		if err == nil && len(c.What) > 0 && len(g.Points)+len(g.Findings) == 0 {
			err = fmt.Errorf("guest %s has no point: %w", a.guest, chain.ErrNoPoint)
		}
		if err != nil {
			err = points.MeantGuest(err, a.guest, check.Set.Guests)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			if len(guests) > 1 {
				u.Log.Error(err)
			}
			failed = err
			continue
		}
		out.Guests = append(out.Guests, g)
		out.State = verify.Worse(out.State, g.State)
		noteVerified(ctx, u, check, began, g)
	}
	return failed
}

// verdict is the error that tells what was found.
func (v *verified) verdict(failed error) error {
	bad, all := 0, 0
	for _, g := range v.Guests {
		for _, p := range g.Points {
			all++
			if p.State == verify.Damaged {
				bad++
			}
		}
	}
	has := func(k verify.Kind) bool {
		return slices.ContainsFunc(v.Guests, func(g *verify.Guest) bool { return g.Has(k) })
	}
	switch {
	case v.State == verify.Damaged:
		err := fmt.Errorf("%d of %d points are not whole: %w", bad, all, chain.ErrDamaged)
		if v.Kind == source.Qmchain {
			err = ui.Hint(err, "nothing more is built on it: the next run takes a full of the disks whose chain it is. Where there is another copy of the file, put it in its place, and verify again")
		}
		return ui.Exit(ui.ExitDamaged, err)
	case failed != nil:
		return failed
	case v.State == verify.Unknown:
		return ui.Exit(ui.ExitFailed, errors.New("not everything could be read"))
	case has(verify.Warning):
		return ui.Exit(ui.ExitPartly, errors.New("disks may not be what the guest had"))
	case !v.QemuImg:
		return ui.Exit(ui.ExitPartly, errors.New("qemu-img is not installed"))
	}
	return nil
}

// printGuest prints a summary, what was found, and which disks of which points are good all the same.
func printGuest(w io.Writer, g *verify.Guest) error {
	disks, good := 0, 0
	var still []entry
	for i, p := range g.Points {
		var names []string
		for _, d := range p.Disks {
			if d.State == verify.Good {
				names = append(names, d.Name)
			}
		}
		disks += len(p.Disks)
		good += len(names)
		switch {
		case len(names) == 0:
		case len(names) == len(p.Disks):
			still = append(still, entry{i, ""})
		default:
			still = append(still, entry{i, strings.Join(names, ", ")})
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s: ", g.Guest, g.State)
	if g.State == verify.Good {
		fmt.Fprintf(&b, "%s, %s", count(len(g.Points), "point"), count(disks, "disk"))
	} else {
		fmt.Fprintf(&b, "%d of %s of %s are good", good, count(disks, "disk"), count(len(g.Points), "point"))
	}
	fmt.Fprintf(&b, "; %s, %s\n", count(g.Files, "file"), humanize.IBytes(uint64(g.Bytes)))
	for _, f := range g.Findings {
		fmt.Fprintf(&b, "  %s: ", f.Kind)
		if f.File != "" {
			fmt.Fprintf(&b, "%s: ", f.File)
		}
		fmt.Fprintf(&b, "%s\n", f.Text)
		if list := affected(g, f); len(list) > 0 && f.Kind != verify.Leak {
			fmt.Fprintf(&b, "    affects %s\n", strings.Join(list, ", "))
		}
	}
	if g.State != verify.Good && len(still) > 0 {
		fmt.Fprintf(&b, "  still good: %s\n", strings.Join(inRuns(g, still), ", "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// entry is one of a guest's points, by its index, and what of it is meant: "" is all.
type entry struct {
	point int
	what  string
}

// affected names the disks that a finding concerns.
func affected(g *verify.Guest, f verify.Finding) []string {
	var list []entry
	for i, p := range g.Points {
		var disks []string
		all := false
		for _, r := range f.Affects {
			if r.Point == p.ID {
				disks = append(disks, r.Disk)
				all = all || r.Disk == ""
			}
		}
		switch {
		case all:
			list = append(list, entry{i, ""})
		case len(disks) > 0:
			list = append(list, entry{i, strings.Join(disks, ", ")})
		}
	}
	return inRuns(g, list)
}

// inRuns names points; those that follow one another and of which the same is meant by the first and the last.
func inRuns(g *verify.Guest, list []entry) []string {
	var texts []string
	for len(list) > 0 {
		n := 1
		for n < len(list) && list[n].point == list[0].point+n && list[n].what == list[0].what {
			n++
		}
		if n < 3 {
			n = 1
		}
		text := g.Points[list[0].point].ID
		if n > 1 {
			text += " to " + g.Points[list[n-1].point].ID
		}
		if list[0].what != "" {
			text += " (" + list[0].what + ")"
		}
		texts = append(texts, text)
		list = list[n:]
	}
	return texts
}
