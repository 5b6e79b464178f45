package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/export"
	"qmchain/cmd/internal/points"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

type imageCmd struct {
	points.Flags `embed:""`
	Output       string        `conf:"no" required:"" short:"o" placeholder:"PATH" help:"A file, a block device, or a folder that is there: each disk becomes DISK.raw or DISK.qcow2 in it."`
	Format       export.Format `enum:"auto,raw,qcow2" default:"auto" help:"raw or qcow2; auto: what the name of a file for --output ends in, .raw or .qcow2; else raw."`
	Compress     bool          `help:"Compress the data, with --format qcow2."`
	Force        bool          `conf:"no" help:"Write over an existing file, or a device that is not empty."`
	Verify       bool          `help:"First compare the image files with their check sums, and write nothing if they differ. When all is written, read it from the disk again and compare. Without it no check sum is looked at."`
	Jobs         int           `default:"0" placeholder:"N" help:"How many pieces to read and write at a time. 0: what fits the machine."`
	NoSpaceCheck bool          `conf:"no" help:"Begin even if the space may not do."`
	DryRun       bool          `conf:"no" short:"n" help:"Print what would be done, and do nothing."`
	JSON         bool          `conf:"no" name:"json" help:"Print one JSON document."`
}

// restored is the output of image --json.
type restored struct {
	Guest  string         `json:"guest"`
	ID     chain.ID       `json:"id"`
	DryRun bool           `json:"dry_run"`
	Disks  []restoredDisk `json:"disks"`
}

type restoredDisk struct {
	Name     string        `json:"name"`
	Output   string        `json:"output"`
	Format   export.Format `json:"format"`
	Device   bool          `json:"device"`
	Replaces bool          `json:"replaces"` // there was, or is, something that is written over
	Size     int64         `json:"size"`     // bytes, of the disk
	Data     int64         `json:"data"`     // bytes of it that are not known to be zeroes
	Seconds  float64       `json:"seconds"`  // it took to write
	Verified bool          `json:"verified"`
	Damage   string        `json:"damage,omitempty"` // that verify has found before
}

// Help is what "image --help" says in addition.
func (*imageCmd) Help() string {
	return `What is read are the data of the images, and not their check sums: a disk whose image was changed is restored as it is now. --verify compares first. Where "qmchain-restore verify" has found damage before, the disks are written all the same, and the exit code is 5; but with --force they take the place of nothing.`
}

// formatAuto stands for a format that the name of the output tells.
const formatAuto export.Format = "auto"

// formatOf is the format for an output of which the user has not said it.
func formatOf(output string) export.Format {
	info, err := os.Stat(output)
	named := err != nil || info.Mode().IsRegular() // a folder or a device can have any name
	if named && strings.EqualFold(filepath.Ext(output), "."+string(export.Qcow2)) {
		return export.Qcow2
	}
	return export.Raw
}

func (c *imageCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	if c.Format == formatAuto {
		c.Format = formatOf(c.Output)
	}
	if err := c.check(); err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	p, err := openPoint(c.Repo, c.Point)
	if err != nil {
		return err
	}
	defer p.Close()
	names, err := p.Choose(c.Disk)
	if err != nil {
		return err
	}
	outputs, err := c.outputs(names)
	if err != nil {
		return err
	}
	disks, closeAll, err := p.OpenDisks(names)
	if err != nil {
		return err
	}
	defer closeAll()
	var plans []*export.Plan
	for i, d := range disks {
		plan, err := export.Look(ctx, d, outputs[i], export.Options{
			Format: c.Format, Compress: c.Compress, Force: c.Force, Jobs: c.Jobs, Outside: p.Set.Dir(), FS: fsys,
		})
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		plans = append(plans, plan)
	}
	if err := export.CheckSpace(plans); err != nil && !c.NoSpaceCheck {
		return err
	}
	done := restored{Guest: p.Guest.Name, ID: p.ID, DryRun: c.DryRun}
	for i, plan := range plans {
		done.Disks = append(done.Disks, restoredDisk{
			Name: names[i], Output: plan.Output, Format: c.Format, Device: plan.Device, Replaces: plan.Replaces, Size: plan.Size, Data: plan.Data,
		})
		if plan.Room > plan.Size {
			u.Log.Infof("%s is larger than disk %s: its last %s stay as they are", plan.Output, names[i], humanize.IBytes(uint64(plan.Room-plan.Size)))
		}
	}
	doubts := p.Doubts(names)
	for _, d := range doubts {
		u.Log.Warn(d)
	}
	damage, err := p.damageNow(ctx, u, names, c.Verify && !c.DryRun)
	if err != nil {
		return err
	}
	for i, name := range names {
		if damage[name] != nil {
			done.Disks[i].Damage = damage[name].Error()
			if plan := plans[i]; c.Force && (plan.Replaces || plan.Device) {
				return p.notReplaced(damage[name], plan.Output, "another --output, where nothing is yet, takes it all the same")
			}
		}
	}
	if c.DryRun {
		return u.Result(c.JSON, done, func(w io.Writer) error { return printPlan(w, done.Disks) })
	}
	if err := c.write(ctx, u, plans, done.Disks); err != nil {
		return err
	}
	err = u.Done(c.JSON, done, func(w io.Writer) error {
		for _, d := range done.Disks {
			if _, err := fmt.Fprintln(w, d.Output); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && len(damage) > 0 {
		return restoredDamaged(p, damage)
	}
	if err == nil && len(doubts) > 0 {
		return ui.Exit(ui.ExitPartly, fmt.Errorf("all that is there is restored, but it may not be what the guest had: %w", doubts[0]))
	}
	return err
}

// check looks at the flags that kong can't.
func (c *imageCmd) check() error {
	switch {
	case c.Compress && c.Format != export.Qcow2:
		return errors.New("--compress needs --format qcow2")
	case c.Jobs < 0 || c.Jobs > export.MaxJobs:
		return fmt.Errorf("--jobs must be 0 to %d", export.MaxJobs)
	case c.Output == "-":
		return errors.New("a disk can't be written to standard output: it has holes")
	}
	return nil
}

// outputs returns what each disk is to be written to.
func (c *imageCmd) outputs(disks []string) ([]string, error) {
	info, err := os.Stat(c.Output)
	isFolder := err == nil && info.IsDir()
	switch {
	case isFolder:
	case strings.HasSuffix(c.Output, "/"):
		return nil, fmt.Errorf("--output: %w", errors.Join(err, fmt.Errorf("%s is not a folder", c.Output)))
	case len(disks) > 1:
		return nil, ui.Exit(ui.ExitUsage, fmt.Errorf("--output: %s is not a folder, which %d disks need: make one, or choose one of %s with --disk",
			c.Output, len(disks), strings.Join(disks, ", ")))
	default:
		return []string{c.Output}, nil
	}
	var outputs []string
	for _, d := range disks {
		name := d + "." + string(c.Format)
		if filepath.Base(name) != name {
			return nil, fmt.Errorf("disk %q can't be a file's name: restore it alone, with --disk and a file for --output", d)
		}
		outputs = append(outputs, filepath.Join(c.Output, name))
	}
	return outputs, nil
}

// write writes all disks, and only when all of them are whole gives them their names.
func (c *imageCmd) write(ctx context.Context, u *ui.UI, plans []*export.Plan, disks []restoredDisk) (err error) {
	bars := u.NewProgress("copied")
	defer bars.Done()
	var writers []*export.Writer
	defer func() {
		for _, w := range writers {
			err = errors.Join(err, w.Close())
		}
	}()
	for _, plan := range plans {
		w, err := plan.Start(ctx)
		if err != nil {
			return err
		}
		writers = append(writers, w)
	}
	for i, w := range writers {
		began := time.Now()
		if err := w.Write(ctx, bars.Bar(disks[i].Name, plans[i].Work()).Set); err != nil {
			return err
		}
		took := time.Since(began)
		disks[i].Seconds = took.Seconds()
		u.Log.Infof("disk %s: %s of data in %s", disks[i].Name, humanize.IBytes(uint64(plans[i].Data)), took.Round(time.Millisecond))
		if !c.Verify {
			continue
		}
		if err := w.Verify(ctx, bars.Bar(disks[i].Name+", check", plans[i].Size).Set); err != nil {
			return err
		}
		disks[i].Verified = true
	}
	for _, w := range writers {
		if err := w.Commit(ctx); err != nil {
			return err
		}
	}
	return nil
}

func printPlan(w io.Writer, disks []restoredDisk) error {
	fmt.Fprintln(w, "DISK\tSIZE\tDATA\tFORMAT\tREMARK\tOUTPUT")
	for _, d := range disks {
		remark := ""
		switch {
		case d.Device:
			remark = "a device"
		case d.Replaces:
			remark = "replaces a file"
		}
		_, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", d.Name, humanize.IBytes(uint64(d.Size)), humanize.IBytes(uint64(d.Data)), d.Format, remark, d.Output)
		if err != nil {
			return err
		}
	}
	return nil
}
