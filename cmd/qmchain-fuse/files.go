package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/source"
	"qmchain/cmd/internal/cli"
	"qmchain/fusefs/inside"
	"qmchain/internal/ui"
)

// volumeFlags say which files of a point are meant, and who reads them.
type volumeFlags struct {
	Repo    string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	Disk    string        `placeholder:"D" help:"The disk. Default: all of them, with what the guest's fstab says is where."`
	Part    string        `xor:"volume" placeholder:"N" help:"The partition, by its number."`
	LV      string        `name:"lv" xor:"volume" placeholder:"VG/LV" help:"The logical volume of LVM."`
	Journal string        `default:"replay" enum:"replay,skip" help:"What becomes of changes that are only in the file system's journal, as in each backup of a guest that was not frozen: replay, on something that is thrown away; or skip."`
	Kernel  bool          `help:"Let this host's kernel read the file system, through a loop device. Fast, and needs no libguestfs; but the kernel is not made for disks that somebody has tampered with, and a guest could take over the host. Where udev runs, it also gives the loop device links in /dev/disk/by-uuid and by-label that the guest has chosen. Only for guests that you trust."`
	Timeout time.Duration `default:"5m" placeholder:"TIME" help:"Give up if nothing happens for so long."`
}

// errTimeout is the cause of an end for lack of progress.
var errTimeout = errors.New("nothing has happened for too long")

// explainFiles gives errors of this file's commands their exit codes and hints.
func explainFiles(err error) error {
	for _, e := range []struct {
		is   error
		code int
		hint string
	}{
		{inside.ErrNoAppliance, ui.ExitFailed, "`apt install guestmount libguestfs-xfs`. --kernel does without, but lets this host's kernel read what a guest has written: only for guests that you trust"},
		{inside.ErrNotRoot, ui.ExitFailed, "without --kernel an appliance reads them"},
		{inside.ErrAmbiguous, ui.ExitUsage, "--disk, --part and --lv say which"},
		{inside.ErrNotFound, ui.ExitNotFound, ""},
		{inside.ErrNoFiles, ui.ExitFailed, ""},
		{inside.ErrBusy, ui.ExitBusy, "`fuser -vm MNT` shows by whom; --lazy detaches it all the same"},
		{inside.ErrNotFile, ui.ExitFailed, "cp -r copies folders"},
		{errTimeout, ui.ExitFailed, "--timeout gives it more time; without KVM an appliance is slow"},
		{chain.ErrNoPoint, ui.ExitNotFound, "`qmchain-restore list` shows what there is"},
		{fs.ErrExist, ui.ExitFailed, "nothing that is there is replaced"},
		{fs.ErrNotExist, ui.ExitNotFound, ""},
	} {
		if errors.Is(err, e.is) {
			if e.hint != "" && ui.HintOf(err) == "" {
				err = ui.Hint(err, e.hint)
			}
			return ui.Exit(e.code, err)
		}
	}
	return err
}

// opened is a point with its disks open.
type opened struct {
	*chain.Manifest
	set     source.Set
	disks   []inside.Disk
	volumes []inside.Volume
}

func (o *opened) name() string { return o.Guest.Name + "/" + string(o.ID) }

// open opens a point, and finds the volumes on its disks.
func (f *volumeFlags) open(ctx context.Context, u *ui.UI, name string) (_ *opened, err error) {
	ref, err := chain.ParseRef(name)
	if err != nil {
		return nil, ui.Exit(ui.ExitUsage, err)
	}
	set, err := source.Open(f.Repo)
	if err != nil {
		return nil, err
	}
	o := &opened{set: set}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	guest, err := set.Guest(ref.Guest)
	if err != nil {
		return nil, err
	}
	points, err := guest.Points()
	if err != nil {
		return nil, err
	}
	o.Manifest, err = points.All.Resolve(ref.Point)
	for _, p := range points.Problems {
		// Silently taking the one before for the latest would be to show old files.
		latest := ref.Point == "latest" && (o.Manifest == nil || p.Point > string(o.ID))
		if p.Disk == "" && (latest || strings.HasPrefix(p.Point, ref.Point)) {
			return nil, fmt.Errorf("%s: that is a point that can't be read: %w", name, p.Err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", ref.Guest, err)
	}
	if err := f.openDisks(o, points); err != nil {
		return nil, err
	}
	for _, w := range points.Warnings {
		if w.Point == string(o.ID) && (w.Disk == "" || f.Disk == "" || w.Disk == f.Disk) {
			u.Log.Warnf("disk %s: %v", w.Disk, w.Err)
		}
	}
	o.volumes, err = inside.Find(ctx, o.disks, func(err error) { u.Log.Warnf("%s: %v", o.name(), err) })
	return o, err
}

// openDisks opens the disks that can have files on them.
func (f *volumeFlags) openDisks(o *opened, points *source.Points) error {
	pool := image.NewPool(image.PoolOptions{MaxFiles: openImages()})
	var names []string
	for _, d := range o.Disks {
		names = append(names, d.Name)
		// The state of a TPM is in no file system.
		if f.Disk != d.Name && (f.Disk != "" || strings.HasPrefix(d.Name, "tpmstate")) {
			continue
		}
		img, err := points.OpenDisk(pool, o.Manifest, d.Name)
		if err != nil {
			return err
		}
		o.disks = append(o.disks, inside.Disk{Name: d.Name, Image: img})
	}
	if f.Disk != "" && !slices.Contains(names, f.Disk) {
		return fmt.Errorf("point %s has no disk %q, only %s: %w", o.name(), f.Disk, strings.Join(names, ", "), chain.ErrNoPoint)
	}
	return nil
}

// openImages is how many image files may be open: half of what the system allows.
func openImages() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0 // the pool's default
	}
	return int(min(limit.Cur/2, 2048))
}

func (o *opened) close() {
	for _, d := range o.disks {
		_ = d.Close() // nothing was written
	}
	_ = o.set.Close()
}

// choose returns the volume that is meant; nil: what is where is for an appliance to find out.
func (f *volumeFlags) choose(o *opened) (*inside.Volume, error) {
	v, err := inside.Choose(o.volumes, inside.Want{Disk: f.Disk, Part: f.Part, LV: f.LV})
	switch {
	case err == nil:
		return &v, nil
	case f.Part == "" && f.LV == "" && !f.Kernel && f.Journal == "replay" && inside.Inspectable(o.volumes):
		return nil, nil
	}
	return nil, fmt.Errorf("point %s: %w", o.name(), err)
}

// args are the arguments of a process that goes on with the command files. The point is the caller's to name.
func (f *volumeFlags) args(common *cli.Common, more ...string) []string {
	args := append([]string{"files", "--repo=" + f.Repo, "--journal=" + f.Journal, "--timeout=" + f.Timeout.String()}, more...)
	for _, o := range []struct{ name, value string }{{"disk", f.Disk}, {"part", f.Part}, {"lv", f.LV}, {"log-file", common.LogFile}} {
		if o.value != "" {
			args = append(args, "--"+o.name+"="+o.value)
		}
	}
	for _, o := range []struct {
		name string
		on   bool
	}{{"kernel", f.Kernel}, {"quiet", common.Quiet}, {"verbose", common.Verbose}} {
		if o.on {
			args = append(args, "--"+o.name)
		}
	}
	return args
}

// source is how mount(8) shows a view of the point.
func (o *opened) source(v *inside.Volume) string {
	if v == nil {
		return o.name()
	}
	return o.name() + ":" + v.String()
}

// place is where files are made visible.
type place struct {
	dir        string // empty: for this process alone
	temp       string
	allowOther bool
	background bool // this process is about to let go of the terminal
}

// start makes the files visible. What ends it early is ctx's cause.
func (f *volumeFlags) start(ctx context.Context, u *ui.UI, common *cli.Common, o *opened, at place) (*inside.View, error) {
	v, err := f.choose(o)
	if err != nil {
		return nil, err
	}
	skip := f.Journal == "skip"
	if f.Kernel {
		server, err := f.server(common, o, at)
		if err != nil {
			return nil, err
		}
		view, err := inside.Kernel{Volume: *v, SkipJournal: skip, Dir: at.dir, Source: o.source(v), Server: server}.Mount(ctx)
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Exited() {
			err = ui.Reported(exit.ExitCode())
		}
		return view, err
	}
	what := "what the guest's fstab names"
	if v != nil {
		what = fmt.Sprintf("%s (%s)", v, v.Type)
	}
	u.Log.Infof("%s: starting an appliance for %s", o.name(), what)
	view, err := inside.Appliance{
		Volume: v, Disks: o.disks, SkipJournal: skip, Dir: at.dir, AllowOther: at.allowOther, Source: o.source(v),
		Temp: at.temp, Env: os.Environ(), Log: u.Log,
	}.Start(ctx)
	if err != nil && v == nil && ctx.Err() == nil && !errors.Is(err, inside.ErrNoAppliance) {
		return nil, ui.Hint(fmt.Errorf("point %s: %w", o.name(), inside.WithVolumes(err, o.volumes)), "--disk, --part and --lv choose one volume")
	}
	return view, err
}

// timer ends a context when nothing happens for too long.
type timer struct {
	*time.Timer
	limit time.Duration
}

// newTimer returns a context that ends so, and its timer. stop ends both.
func newTimer(ctx context.Context, limit time.Duration) (context.Context, *timer, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	t := &timer{time.AfterFunc(limit, func() { cancel(fmt.Errorf("%w: %s", errTimeout, limit)) }), limit}
	return ctx, t, func() {
		t.Stop()
		cancel(nil)
	}
}

// progress gives it the whole time again.
func (t *timer) progress() { t.Reset(t.limit) }
