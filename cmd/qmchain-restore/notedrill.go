package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// noteDrillCmd is for drills that had no write access to the repository.
type noteDrillCmd struct {
	Repo  string `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	Guest string `arg:"" help:"The guest that was drilled."`
	File  string `arg:"" help:"What drill has written with --result or --json; - is standard input."`
}

const (
	maxResult = 1 << 20
	maxWhy    = 1000
)

// Run trusts the file in nothing but whether that guest has started: a drill's guest that has broken out may have written it.
func (c *noteDrillCmd) Run(ctx context.Context, fsys durable.FS, std pipes) error {
	r, err := points.OpenRepo(c.Repo, fsys)
	if err != nil {
		return err
	}
	g, err := r.Guest(c.Guest)
	if err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	d, err := readDrilled(c.File, std.in)
	switch {
	case err != nil:
		return err
	case d.Guest != c.Guest:
		return ui.Exit(ui.ExitUsage, fmt.Errorf("%s: it is the result of another guest's drill", c.File))
	case d.Time.IsZero() || time.Until(d.Time) > time.Hour:
		return ui.Exit(ui.ExitUsage, fmt.Errorf("%s: it has no time, or one that has not come", c.File))
	}
	folders, err := g.Folders()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(folders, func(f repo.Folder) bool { return f.ID == d.ID && !f.Base }) {
		return fmt.Errorf("guest %s: point %s: %w", c.Guest, d.ID, chain.ErrNoPoint)
	}
	known, err := g.Checked()
	if err == nil && slices.ContainsFunc(known.Drilled, func(k repo.Drilled) bool { return k.Point == d.ID && k.Time.After(d.Time) }) {
		return fmt.Errorf("guest %s: the result of a later drill of point %s is there already", c.Guest, d.ID)
	}
	return g.NoteChecked(ctx, d.record())
}

// record is what is kept of a drill.
func (d drilled) record() repo.Checked {
	return repo.Checked{Drilled: []repo.Drilled{{Point: d.ID, Time: d.Time, Passed: d.Passed, Why: d.Why, Seconds: float64(int64(d.Seconds*10)) / 10}}}
}

func (d drilled) write(path string) error {
	text, err := json.MarshalIndent(d, "", " ")
	if err != nil {
		return err
	}
	return durable.FS{}.WriteFile(path, append(text, '\n'), 0o600)
}

func readDrilled(path string, in io.Reader) (d drilled, err error) {
	if path != "-" {
		// No link is followed, and a FIFO does not hang us.
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return d, err
		}
		defer f.Close()
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			return d, errors.Join(err, fmt.Errorf("%s is not a regular file", path))
		}
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, maxResult+1))
	if err != nil {
		return d, err
	}
	if len(text) > maxResult {
		return d, ui.Exit(ui.ExitUsage, fmt.Errorf("%s: it has more than %d bytes", path, maxResult))
	}
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(&d); err != nil {
		return d, ui.Exit(ui.ExitUsage, fmt.Errorf("%s is not what drill writes: %w", path, err))
	}
	if d.ID, err = chain.ParseID(string(d.ID)); err != nil {
		return d, ui.Exit(ui.ExitUsage, fmt.Errorf("%s: %w", path, err))
	}
	d.Time, d.Seconds = d.Time.UTC().Truncate(time.Second), min(max(d.Seconds, 0), 1e9)
	d.Why = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, d.Why)
	d.Why = strings.ToValidUTF8(d.Why[:min(len(d.Why), maxWhy)], "")
	return d, nil
}
