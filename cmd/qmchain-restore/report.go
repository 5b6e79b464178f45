package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/report"
	"qmchain/internal/ui"
)

type reportCmd struct {
	Repo   string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	HTML   string        `conf:"no" name:"html" placeholder:"FILE" help:"Write the report as a page to FILE, in one step; - is standard output. A new file can be read by its owner alone; one that is there keeps its mode."`
	MaxAge time.Duration `positive:"" default:"26h" placeholder:"TIME" help:"How old a guest's newest point may be."`
	JSON   bool          `conf:"no" name:"json" help:"Print one JSON document."`
	Guest  []string      `arg:"" optional:"" help:"Only these guests."`
}

// Help is what "report --help" says in addition.
func (*reportCmd) Help() string {
	return `The exit code is 5 where points are known not to be whole; 1 where they are, and a guest's state is bad all the same, as its newest point is too old or its last drill failed, or where something could not be read; else 0, also with warnings.`
}

// Run fails as Help says; what there is to report is reported all the same.
func (c *reportCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, std pipes) error {
	switch {
	case c.MaxAge <= 0:
		return ui.Exit(ui.ExitUsage, errors.New("--max-age must be more than 0s"))
	case c.HTML == "-" && c.JSON:
		return ui.Exit(ui.ExitUsage, errors.New("--html - and --json both print to standard output"))
	}
	for _, name := range c.Guest {
		if err := chain.CheckGuestName(name); err != nil {
			return ui.Exit(ui.ExitUsage, err)
		}
	}
	set, err := points.OpenSet(c.Repo)
	if err != nil {
		return err
	}
	defer set.Close()
	host, _ := os.Hostname() // without it the page does not say
	r, err := report.Look(ctx, set, report.Options{Now: time.Now(), MaxAge: c.MaxAge, Guests: c.Guest, Host: host, Version: cli.Version})
	if err != nil {
		return err
	}
	switch c.HTML {
	case "":
	case "-":
		if err := ui.Shown(r.Page(std.out)); err != nil {
			return err
		}
		return verdictOf(r)
	default:
		if err := writePage(fsys, c.HTML, r); err != nil {
			return fmt.Errorf("--html: %w", err)
		}
		u.Log.Infof("%s: %s, %s", c.HTML, count(len(r.Guests), "guest"), count(r.Points, "point"))
	}
	if c.HTML == "" || c.JSON {
		if err := u.Result(c.JSON, r, func(w io.Writer) error { return printReport(w, r) }); err != nil {
			return err
		}
	}
	return verdictOf(r)
}

// writePage writes the page as a whole or not at all. It names guests and sizes, so a new file is the owner's alone; who has
// made one for others, as for a web server, means others to read it.
func writePage(fsys durable.FS, path string, r *report.Report) error {
	mode := fs.FileMode(0o600)
	info, err := os.Lstat(path)
	switch {
	case err == nil && !info.Mode().IsRegular():
		return fmt.Errorf("%s is there, and is no regular file", path)
	case err == nil:
		mode = info.Mode().Perm()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	var page bytes.Buffer
	if err := r.Page(&page); err != nil {
		return err
	}
	return fsys.WriteFile(path, page.Bytes(), mode)
}

// verdictOf is the error that tells of damage, of what could not be looked at, and of guests that are in a bad way otherwise.
func verdictOf(r *report.Report) error {
	bad, all := 0, 0
	for _, g := range r.Guests {
		for _, p := range g.Points {
			if p.Removed {
				continue
			}
			all++
			if len(p.Damage) > 0 {
				bad++
			}
		}
	}
	switch {
	case bad == 0 && slices.ContainsFunc(r.Guests, func(g *report.Guest) bool { return g.Unreadable }):
		return errors.New("not everything could be read")
	case bad == 0:
		return inBadWay(r)
	}
	return fmt.Errorf("%d of %s not known to be whole: %w", bad, count(all, "point"), chain.ErrDamaged)
}

// inBadWay is the error that names guests whose state is bad though their points are whole.
func inBadWay(r *report.Report) error {
	var names []string
	why := ""
	for _, g := range r.Guests {
		if g.State != report.Bad {
			continue
		}
		names = append(names, g.Name)
		i := slices.IndexFunc(g.Remarks, func(remark report.Remark) bool { return remark.State == report.Bad })
		if i >= 0 && why == "" {
			why = ": " + g.Remarks[i].Text
		}
	}
	switch len(names) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("guest %s is in a bad way%s", names[0], why)
	}
	return fmt.Errorf("%d of %s are in a bad way: %s", len(names), count(len(r.Guests), "guest"), strings.Join(names, ", "))
}

func printReport(w io.Writer, r *report.Report) error {
	ago := func(t *time.Time) string {
		if t == nil {
			return "never"
		}
		return humanize.RelTime(*t, r.Created, "ago", "from now")
	}
	if _, err := fmt.Fprintln(w, "GUEST\tSTATE\tLAST POINT\tPOINTS\tSTORED\tVERIFIED\tDRILL"); err != nil {
		return err
	}
	for _, g := range r.Guests {
		points := 0
		for _, p := range g.Points {
			if !p.Removed {
				points++
			}
		}
		verified, drill := "never", "never"
		if v := g.Verified; v != nil {
			verified = map[bool]string{true: "", false: "DAMAGED "}[v.Good] + ago(&v.Time)
		}
		if d := g.Drilled; d != nil {
			drill = map[bool]string{true: "passed ", false: "FAILED "}[d.Passed] + ago(&d.Time)
		}
		if _, err := fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", g.Name, g.State, ago(g.Last), points, humanize.IBytes(uint64(g.Bytes)), verified, drill); err != nil {
			return err
		}
	}
	head := "\nGUEST\tREMARK\n" // a table of its own
	for _, g := range r.Guests {
		for _, remark := range g.Remarks {
			if _, err := fmt.Fprintf(w, "%s%s\t%s: %s\n", head, g.Name, remark.State, remark.Text); err != nil {
				return err
			}
			head = ""
		}
	}
	return nil
}
