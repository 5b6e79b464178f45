// Run calls the benchmarks one after the other, and makes a page with plots of what they find.
//
//	go run ./internal/bench/run [-form quick|full] [-only REGEXP]      measure; record it, write BENCHMARKS.md and the plots
//	go run ./internal/bench/run -check [-form quick|full] [-only …]    measure; fail if ratios have fallen since that record
//	go run ./internal/bench/run -page [-form quick|full]               write BENCHMARKS.md and the plots of that record
//
// It is for root, in the module's folder. Each benchmark is a process in a mount and a PID namespace of its own, with a
// temporary folder of its own in $TMPDIR or /var/tmp: when it has ended, or was ended as it took too long, nothing of it is left. One
// that fails is told of on the page, and the others go on; then the exit code is 1, and the results are in dist/bench: what the
// tree has stays as it is. The exit code is 1 as well when -check finds that a ratio has fallen. Before that is said, the case
// was measured twice.
//
// With -out FOLDER the record, the page and the plots are there and not in the tree. -form smoke takes a few minutes at most
// and needs it: its figures mean nothing.
//
// With -only the other cases stay in the record as they are; the page tells which were measured by themselves.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"qmchain/internal/bench/figures"
)

// places are where the results are.
type places struct{ page, plots, record string }

// placesOf are those in the tree, or in a folder.
func placesOf(form, folder string) places {
	if folder != "" {
		return places{filepath.Join(folder, "BENCHMARKS.md"), folder, filepath.Join(folder, form+".json")}
	}
	return places{"BENCHMARKS.md", "packaging/doc", filepath.Join("internal/bench/testdata", form+".json")}
}

// Where other things are, from the module's folder.
const (
	failedFolder = "dist/bench" // results of which some are missing
	benchFolder  = "internal/bench"
	goScript     = "internal/testenv/go.sh"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func command(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	name := flags.String("form", "quick", "quick, full or smoke")
	only := flags.String("only", "", "only the `cases` whose names match")
	check := flags.Bool("check", false, "compare with the record")
	page := flags.Bool("page", false, "write the page of the record, without measuring")
	folder := flags.String("out", "", "`folder` for the results; empty: their places in the tree")
	if err := flags.Parse(args); err != nil {
		return err
	}
	form, err := formOf(*name)
	if err != nil {
		return err
	}
	some, err := chosen(*only)
	if err != nil {
		return err
	}
	if _, err := os.Stat(goScript); err != nil {
		return fmt.Errorf("this is not the module's folder: %w", err)
	}
	if form.name == smoke && *folder == "" {
		return errors.New("-form smoke: it needs -out, as its figures mean nothing")
	}
	at := placesOf(form.name, *folder)
	before, recorded := readRun(at.record)
	if (*check || *page) && recorded != nil {
		return fmt.Errorf("there is nothing recorded: %w", recorded)
	}
	if *page {
		return at.write(before)
	}
	if recorded != nil && !errors.Is(recorded, os.ErrNotExist) {
		return recorded
	}
	ctx, cancel := context.WithTimeout(ctx, form.total)
	defer cancel()
	m, err := newMeasuring(ctx, form, out)
	if err != nil {
		return err
	}
	defer m.close()
	if recorded == nil && !slices.Equal(before.Machine, m.head.Machine) {
		fmt.Fprintln(out, "the record is of another machine, or of other versions: ratios may differ for that")
	}
	now := m.run(ctx, some)
	if *check {
		return guard(ctx, m, before, now, some, out)
	}
	// At the end of its time it writes what it has; cases that there was no time for have failed.
	if errors.Is(ctx.Err(), context.Canceled) {
		return errors.New("interrupted, nothing was written")
	}
	failed := failed(now)
	if failed != nil && *folder == "" {
		at = placesOf(form.name, failedFolder)
		return errors.Join(at.keep(now), fmt.Errorf("%w; the record stays as it was, and what was measured is in %s", failed, failedFolder))
	}
	if recorded == nil {
		for _, f := range figures.Fallen(of(before, some), now) {
			fmt.Fprintln(out, "fallen since the record before:", f)
		}
	}
	if len(some) < len(cases) && recorded == nil {
		if now, err = joined(before, now); err != nil {
			return err
		}
	}
	return errors.Join(at.keep(now), failed)
}

// keep writes the record, the page and the plots of a run.
func (p places) keep(r figures.Run) error {
	text, err := r.Encode()
	if err == nil {
		err = os.MkdirAll(filepath.Dir(p.record), 0o755)
	}
	if err == nil {
		err = replace(p.record, text)
	}
	if err == nil {
		err = p.write(r)
	}
	return err
}

// replace writes a file, or leaves it as it was.
func replace(path string, text []byte) error {
	if err := os.WriteFile(path+".new", text, 0o644); err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	return os.Rename(path+".new", path)
}

// of is what a run has of some cases.
func of(r figures.Run, some []benchCase) figures.Run {
	r.Figures = slices.DeleteFunc(slices.Clone(r.Figures), func(f figures.Figure) bool {
		return !slices.ContainsFunc(some, func(c benchCase) bool { return c.owns(f.Case) })
	})
	return r
}

// guard measures cases again in which a ratio has fallen, and fails if it has then fallen, too.
func guard(ctx context.Context, m *measuring, before, now figures.Run, some []benchCase, out io.Writer) error {
	before = of(before, some)
	falls := figures.Fallen(before, now)
	if len(falls) > 0 && ctx.Err() == nil {
		fmt.Fprintf(out, "\n%d ratios have fallen; their cases once more\n", len(falls))
		again := slices.DeleteFunc(slices.Clone(some), func(c benchCase) bool {
			return !slices.ContainsFunc(falls, func(f figures.Fall) bool { return c.owns(f.Case) })
		})
		before.Figures = slices.DeleteFunc(before.Figures, func(f figures.Figure) bool {
			return !slices.ContainsFunc(falls, func(fall figures.Fall) bool { return fall.ID() == f.ID() })
		})
		falls = figures.Fallen(before, m.run(ctx, again))
	}
	if ctx.Err() != nil {
		return fmt.Errorf("cut off: %w", ctx.Err())
	}
	for _, f := range falls {
		fmt.Fprintln(out, "fallen:", f)
	}
	if len(falls) > 0 {
		return fmt.Errorf("%d ratios have fallen by more than a fifth since %s", len(falls), before.Time.Format(time.DateOnly))
	}
	fmt.Fprintln(out, "no ratio has fallen by more than a fifth since", before.Time.Format(time.DateOnly))
	return nil
}

// joined is the run before with the cases of now in place of its own, in the order that they have in a whole run.
func joined(before, now figures.Run) (figures.Run, error) {
	if !slices.Equal(before.Machine, now.Machine) {
		return now, errors.New("the record is of another machine, or other versions: measure all cases, without -only")
	}
	for _, c := range now.Cases {
		own := benchCase{name: c.Name}
		before.Figures = slices.DeleteFunc(before.Figures, func(f figures.Figure) bool { return own.owns(f.Case) })
		before.Cases = slices.DeleteFunc(before.Cases, func(b figures.Case) bool { return b.Name == c.Name })
	}
	before.Figures = append(before.Figures, now.Figures...)
	before.Cases = append(before.Cases, now.Cases...)
	place := func(name string) int {
		return slices.IndexFunc(cases, func(c benchCase) bool { return c.owns(name) })
	}
	slices.SortStableFunc(before.Figures, func(a, b figures.Figure) int { return place(a.Case) - place(b.Case) })
	slices.SortStableFunc(before.Cases, func(a, b figures.Case) int { return place(a.Name) - place(b.Name) })
	return before, nil
}

// failed tells of cases that went wrong.
func failed(r figures.Run) error {
	var names []string
	for _, c := range r.Cases {
		if c.Error != "" {
			names = append(names, c.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("not all was measured: %s; the page tells why", strings.Join(names, ", "))
}

// write writes the page and the plots. Plots that can't be drawn of this run go.
func (p places) write(r figures.Run) error {
	plots, err := figures.Plots(r)
	if err != nil {
		return err
	}
	for _, name := range figures.PlotFiles() {
		path := filepath.Join(p.plots, name)
		if plot, ok := plots[name]; ok {
			err = replace(path, plot)
		} else if err = os.Remove(path); errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		if err != nil {
			return err
		}
	}
	beside, err := filepath.Rel(filepath.Dir(p.page), p.plots)
	if err != nil {
		return err
	}
	return replace(p.page, figures.Markdown(r, filepath.ToSlash(beside)))
}

func readRun(path string) (r figures.Run, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if r, err = figures.Decode(text); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}
