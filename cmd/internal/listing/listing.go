// Package listing is the command that lists the points in a repository, which several programs have.
package listing

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// Command is the command list.
type Command struct {
	Repo  string `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository."`
	JSON  bool   `name:"json" help:"Print one JSON document."`
	Guest string `arg:"" optional:"" help:"Only this guest."`
}

// Point is one point in JSON.
type Point struct {
	Guest       string            `json:"guest"`
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
}

// Run prints all points, oldest first. Where one can't be read it prints the others, and then fails.
func (c *Command) Run(_ context.Context, u *ui.UI, fsys durable.FS) error {
	r, err := repo.Open(c.Repo, fsys)
	if err != nil {
		return err
	}
	guests := []string{c.Guest}
	if c.Guest == "" {
		if guests, err = r.Guests(); err != nil {
			return err
		}
	}
	points := []Point{}
	var damaged error
	for _, name := range guests {
		g, err := r.Guest(name)
		if err != nil {
			return ui.Exit(ui.ExitUsage, err)
		}
		found, problems, err := g.Points()
		if err != nil {
			return err
		}
		if c.Guest != "" && len(found)+len(problems) == 0 {
			return fmt.Errorf("guest %s has no point in %s: %w", name, c.Repo, chain.ErrNoPoint)
		}
		for _, p := range problems {
			u.Log.Warnf("point left out: %v", p.Err)
			damaged = p.Err
		}
		for _, m := range found.Kept() {
			points = append(points, Of(m))
		}
	}
	err = u.Result(c.JSON, points, func(w io.Writer) error { return printAll(w, points) })
	if err == nil && damaged != nil {
		return fmt.Errorf("at least one point can't be read: %w", damaged)
	}
	return err
}

// Of is how a point is listed.
func Of(m *chain.Manifest) Point {
	p := Point{
		Guest: m.Guest.Name, ID: m.ID, Time: m.Time, Note: m.Note, Consistency: m.Consistency, Protected: m.Protected,
		Level: m.Level(), Disks: []Disk{},
	}
	for _, d := range m.Disks {
		ld := Disk{
			Name: d.Name, Level: d.Level, Reason: d.Reason, VirtualSize: d.VirtualSize, Bytes: d.Bytes, Format: "qcow2",
			File: filepath.Join(m.Guest.Name, repo.ImagesFolder, d.File),
		}
		if d.Parent != nil {
			ld.Parent = d.Parent.Point
		}
		p.Disks = append(p.Disks, ld)
	}
	return p
}

func printAll(w io.Writer, points []Point) error {
	fmt.Fprintln(w, "POINT\tTIME\tLEVEL\tDISK\tSIZE\tSTORED\tNOTE")
	for _, p := range points {
		name, when, note := p.Guest+"/"+string(p.ID), p.Time.Local().Format("2006-01-02 15:04:05"), p.Note
		for _, d := range p.Disks {
			_, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", name, when, d.Level, d.Name,
				humanize.IBytes(uint64(d.VirtualSize)), humanize.IBytes(uint64(d.Bytes)), note)
			if err != nil {
				return err
			}
			name, when, note = "", "", ""
		}
	}
	return nil
}
