// Package listing is the command that lists points, which several programs have.
package listing

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/internal/ui"
)

// Command is the command list.
type Command struct {
	Repo  string `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
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

// Run prints all points, oldest first. Where one, or a disk of it, can't be read it prints all the same, and then fails.
func (c *Command) Run(_ context.Context, u *ui.UI) error {
	set, err := source.Open(c.Repo)
	if err != nil {
		return err
	}
	defer set.Close()
	guests := []string{c.Guest}
	if c.Guest == "" {
		if guests, err = set.Guests(); err != nil {
			return err
		}
	} else if err := chain.CheckGuestName(c.Guest); err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	points := []Point{}
	var damaged error
	for _, name := range guests {
		g, err := set.Guest(name)
		if err != nil {
			return err
		}
		found, err := g.Points()
		if err != nil {
			return err
		}
		if c.Guest != "" && len(found.All)+len(found.Problems) == 0 {
			return fmt.Errorf("guest %s has no point in %s: %w", name, c.Repo, chain.ErrNoPoint)
		}
		for _, p := range found.Problems {
			if p.Disk == "" {
				u.Log.Warnf("point left out: %v", p.Err)
			} else {
				u.Log.Warnf("%s/%s: disk %s can't be read: %v", name, p.Point, p.Disk, p.Err)
			}
			damaged = p.Err
		}
		for _, p := range found.Warnings {
			u.Log.Warnf("%s/%s: disk %s: %v", name, p.Point, p.Disk, p.Err)
		}
		for _, m := range found.All.Kept() {
			points = append(points, of(m, found))
		}
	}
	err = u.Result(c.JSON, points, func(w io.Writer) error { return printAll(w, points) })
	if err == nil && damaged != nil {
		return fmt.Errorf("not all points can be read: %w", damaged)
	}
	return err
}

// of is how a point is listed, whoever has written it.
func of(m *chain.Manifest, from source.Reader) Point {
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
		name, when, note := p.Guest+"/"+string(p.ID), p.Time.Local().Format("2006-01-02 15:04:05"), strings.Join(strings.Fields(p.Note), " ")
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
