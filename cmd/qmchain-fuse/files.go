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
	"syscall"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/fusefs/inside"
	"qmchain/internal/ui"
)

// volumeFlags say which files of a point are meant, and who reads them.
type volumeFlags struct {
	Repo    string        `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository, or a directory with backups of qmpbackup or virtnbdbackup."`
	Disk    string        `conf:"no" placeholder:"D" help:"The disk. Default: all of them, with what the guest's fstab says is where."`
	Part    string        `conf:"no" xor:"volume" placeholder:"N" help:"The partition, by its number."`
	LV      string        `conf:"no" name:"lv" xor:"volume" placeholder:"VG/LV" help:"The logical volume of LVM."`
	Journal string        `default:"replay" enum:"replay,skip" help:"What becomes of changes that are only in the file system's journal, as in each backup of a guest that was not frozen: replay, on something that is thrown away; or skip."`
	Kernel  bool          `conf:"no" help:"Let this host's kernel read the file system, through a loop device. Fast, and needs no libguestfs; but the kernel is not made for disks that somebody has tampered with, and a guest could take over the host. Where udev runs, it also gives the loop device links in /dev/disk/by-uuid and by-label that the guest has chosen. Only for guests that you trust."`
	Timeout time.Duration `positive:"" default:"5m" placeholder:"TIME" help:"Give up if nothing happens for so long."`
}

// errTimeout is the cause of an end for lack of progress.
var errTimeout = errors.New("nothing has happened for too long")

// explainFiles gives errors of this file's commands their exit codes and hints.
func explainFiles(err error) error {
	return cli.Explain(err, []cli.Cause{
		{Is: inside.ErrNoAppliance, Code: ui.ExitFailed, Hint: "`apt install guestmount libguestfs-xfs`. --kernel does without, but lets this host's kernel read what a guest has written: only for guests that you trust"},
		{Is: inside.ErrNotRoot, Code: ui.ExitFailed, Hint: "without --kernel an appliance reads them"},
		{Is: inside.ErrAmbiguous, Code: ui.ExitUsage, Hint: "--disk, --part and --lv say which"},
		{Is: inside.ErrNotFound, Code: ui.ExitNotFound},
		{Is: inside.ErrNoFiles, Code: ui.ExitFailed},
		{Is: inside.ErrBusy, Code: ui.ExitBusy, Hint: "`fuser -vm MNT` shows by whom; --lazy detaches it all the same"},
		{Is: inside.ErrNotFile, Code: ui.ExitFailed, Hint: "cp -r copies folders"},
		{Is: syscall.EISDIR, Code: ui.ExitFailed, Hint: "cp -r copies folders, with all that is in them"},
		{Is: errTimeout, Code: ui.ExitFailed, Hint: "--timeout gives it more time; without KVM an appliance is slow"},
		{Is: chain.ErrNoPoint, Code: ui.ExitNotFound, Hint: "`qmchain-restore list` shows what there is"},
		{Is: fs.ErrExist, Code: ui.ExitFailed, Hint: "nothing that is there is replaced"},
		{Is: repo.ErrNotRepository, Code: ui.ExitNotFound, Hint: "is the share mounted?"},
		{Is: fs.ErrNotExist, Code: ui.ExitNotFound},
	})
}

// opened is a point with its disks open.
type opened struct {
	*points.Point
	disks    []inside.Disk
	volumes  []inside.Volume
	closeAll func()
}

// open opens a point, those of its disks that can have files on them, and finds the volumes on these.
func (f *volumeFlags) open(ctx context.Context, u *ui.UI, name string) (_ *opened, err error) {
	p, err := points.Open(f.Repo, name, image.PoolOptions{})
	if err != nil {
		return nil, err
	}
	o := &opened{Point: p, closeAll: func() {}}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	var asked []string
	if f.Disk != "" {
		asked = []string{f.Disk}
	}
	names, err := p.Choose(asked)
	if err != nil {
		return nil, err
	}
	// The state of a TPM is in no file system.
	names = slices.DeleteFunc(names, func(disk string) bool { return f.Disk == "" && strings.HasPrefix(disk, "tpmstate") })
	disks, closeAll, err := p.OpenDisks(names)
	if err != nil {
		return nil, err
	}
	o.closeAll = closeAll
	for _, d := range disks {
		o.disks = append(o.disks, inside.Disk{Name: d.Name, Image: d.Image})
	}
	for _, doubt := range p.Doubts(names) {
		u.Log.Warn(doubt)
	}
	o.volumes, err = inside.Find(ctx, o.disks, func(err error) { u.Log.Warnf("%s: %v", o.Name(), err) })
	return o, err
}

func (o *opened) close() {
	o.closeAll()
	_ = o.Close() // nothing was written
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
	return nil, fmt.Errorf("point %s: %w", o.Name(), err)
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
		return o.Name()
	}
	return o.Name() + ":" + v.String()
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
	u.Log.Infof("%s: starting an appliance for %s", o.Name(), what)
	view, err := inside.Appliance{
		Volume: v, Disks: o.disks, SkipJournal: skip, Dir: at.dir, AllowOther: at.allowOther, Source: o.source(v),
		Temp: at.temp, Env: os.Environ(), Log: u.Log,
	}.Start(ctx)
	if err != nil && v == nil && ctx.Err() == nil && !errors.Is(err, inside.ErrNoAppliance) {
		return nil, ui.Hint(fmt.Errorf("point %s: %w", o.Name(), inside.WithVolumes(err, o.volumes)), "--disk, --part and --lv choose one volume")
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
