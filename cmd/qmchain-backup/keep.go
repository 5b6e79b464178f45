package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/notify"
	"qmchain/internal/durable"
	"qmchain/internal/pveguest"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type keepCmd struct {
	oneFlags `embed:""`
	Name     string        `placeholder:"GUEST" help:"The guest's name in its repositories. A VM's is its VMID, if nothing else is said."`
	KeepDir  string        `placeholder:"DIR" help:"Where bitmaps are kept while the guest is stopped: local, and QEMU must be able to open files there. Default: /var/lib/qmchain/kept as root, else qmchain/kept in the user's cache folder."`
	Limit    time.Duration `positive:"" default:"10s" placeholder:"TIME" help:"How long the end of QEMU may be held up."`
	Quit     bool          `conf:"no" help:"End QEMU when the bitmaps are saved, or can't be: for a QEMU with -no-shutdown that nobody else ends."`
	Once     bool          `conf:"no" help:"End with the QEMU process, in place of waiting for the next."`
	Save     bool          `conf:"no" help:"Only save, now: the guest has stopped."`
	Stop     bool          `conf:"no" help:"Only save, now: pause the guest, save, and wait until somebody ends QEMU, or end it with --quit. If nobody does, the guest goes on."`
	Restore  bool          `conf:"no" help:"Only merge back, now: the guest has just started."`
}

// Help is what "keep --help" says in addition.
func (*keepCmd) Help() string {
	return `The guest's QMP socket is used for a moment now and then, so that runs can use the same. A VM is kept from being ended by qmeventd while bitmaps are saved, and need not run yet.`
}

func (c *keepCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, n node, again cli.Again) error {
	var g grammar
	if err := again(c.section(c.Name), &g); err != nil {
		return err
	}
	c = &g.Keep
	switch {
	case (c.VMID == 0) == (c.Socket == ""):
		return ui.Exit(ui.ExitUsage, errors.New("say which guest in one way: a VMID or --socket"))
	case c.VMID == 0 && c.Name == "":
		return ui.Exit(ui.ExitUsage, errors.New("missing flags: --name=GUEST"))
	case c.Name == "":
		c.Name = c.VMID.String()
	}
	if err := chain.CheckGuestName(c.Name); err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	if c.Limit < time.Second || c.Limit > time.Minute {
		return ui.Exit(ui.ExitUsage, errors.New("--limit must be from 1s to 1m"))
	}
	only := 0
	for _, set := range []bool{c.Save, c.Stop, c.Restore} {
		if set {
			only++
		}
	}
	if only > 1 || c.Restore && c.Quit || only > 0 && c.Once {
		return ui.Exit(ui.ExitUsage, errors.New("--save, --stop and --restore are one each, --once is with none of them, and --quit is not with --restore"))
	}
	kept, err := makeKept(c.KeepDir, fsys)
	if err != nil {
		return err
	}
	k := &backup.Keeper{
		Guest: c.Name, Addr: c.Socket, Kept: kept, QemuImg: "qemu-img", Limit: c.Limit, Quit: c.Quit, Once: c.Once,
		Log: u.Log, Now: time.Now,
	}
	if c.VMID != 0 {
		vm := &watched{site: n.site(fsys, 0, u.Log), vmid: c.VMID}
		k.Addr, k.Guard, k.KeepAlive = n.Host.Socket(c.VMID).Path(), vm, vm
	}
	if c.Stop {
		k.Saved = func() {
			if err := notify.Of(os.Getenv).Tell("READY=1"); err != nil {
				u.Log.Warn(err)
			}
		}
	}
	switch {
	case c.Save:
		return k.Save(ctx)
	case c.Stop:
		return k.Stop(ctx)
	case c.Restore:
		return k.Restore(ctx)
	}
	return k.Keep(ctx)
}

// watched is a VM for its keeper: a guard of whatever QEMU it has just now.
type watched struct {
	backup.Guard // the keeper takes no guest
	site         pveguest.Site
	vmid         proxmox.VMID
	alive        *proxmox.Alive // nil: it is not held
}

var _ backup.KeepAlive = (*watched)(nil)

// Check implements backup.Guard.
func (w *watched) Check(who backup.Peer) error {
	vm, err := w.site.Find(w.vmid)
	if err != nil {
		return err
	}
	return vm.Check(who)
}

// Hold implements backup.KeepAlive.
func (w *watched) Hold(ctx context.Context) (err error) {
	if w.alive != nil {
		return w.alive.Repeat(ctx)
	}
	w.alive, err = w.site.Host.KeepAlive(ctx, w.vmid)
	return err
}

// Release implements backup.KeepAlive.
func (w *watched) Release() {
	if w.alive != nil {
		_ = w.alive.Close()
	}
	w.alive = nil
}

// Needed implements backup.KeepAlive: a backup, vzdump's or a run's, holds PVE's lock from beginning to end.
func (w *watched) Needed(context.Context) (string, error) {
	config, err := w.site.Host.Config(w.vmid)
	switch {
	case errors.Is(err, proxmox.ErrNotFound), errors.Is(err, proxmox.ErrElsewhere): // the VM has gone
		return "", nil
	case err != nil:
		return "", err
	case config.Lock() == "backup":
		return "the VM is locked for a backup", nil
	}
	return "", nil
}

// Status implements backup.KeepAlive.
func (w *watched) Status(ctx context.Context) (string, error) {
	return w.site.Host.Status(ctx, w.vmid)
}

// keptAt is where bitmaps are kept: in the folder given, or in the default one, if a keeper has made that.
func keptAt(given string, fsys durable.FS) (backup.Kept, error) {
	if given != "" {
		if info, err := os.Stat(given); err != nil || !info.IsDir() {
			return backup.Kept{}, ui.Exit(ui.ExitNotFound, fmt.Errorf("--keep-dir: %s is not a folder", given))
		}
		return backup.Kept{Dir: given, FS: fsys}, nil
	}
	dir, err := defaultKeepDir()
	if err != nil {
		return backup.Kept{}, err
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return backup.Kept{}, nil
	}
	return backup.Kept{Dir: dir, FS: fsys}, nil
}

func defaultKeepDir() (string, error) {
	base := "/var/lib"
	if os.Geteuid() != 0 {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", fmt.Errorf("no folder for bitmaps: %w", err)
		}
	}
	return filepath.Join(base, "qmchain", "kept"), nil
}

// makeKept is keptAt, and makes the default folder.
func makeKept(given string, fsys durable.FS) (backup.Kept, error) {
	if given == "" {
		dir, err := defaultKeepDir()
		if err != nil {
			return backup.Kept{}, err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return backup.Kept{}, fmt.Errorf("no folder for bitmaps: %w", err)
		}
	}
	return keptAt(given, fsys)
}
