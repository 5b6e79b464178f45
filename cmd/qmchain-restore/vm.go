package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"qmchain/chain"
	"qmchain/chain/export"
	"qmchain/cmd/internal/points"
	"qmchain/fusefs"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
	"qmchain/internal/vmrestore"
	"qmchain/proxmox"
)

type vmCmd struct {
	points.Flags `embed:""`
	VMID         *proxmox.VMID `conf:"no" name:"vmid" placeholder:"N" help:"Of the new VM. Default: the one that it had."`
	Storage      []string      `placeholder:"[D=]S" complete:"storage" help:"The storage for all disks, or with D= for one. Default: that which each was on. Can be given several times."`
	Unique       bool          `conf:"no" help:"New MAC addresses and a new UUID, for a copy beside the VM."`
	Start        bool          `conf:"no" help:"Start the VM when all is there."`
	Live         bool          `conf:"no" help:"Start the VM at once and move its data while it runs; returns when that is done. Needs Proxmox VE 8.2. What the guest writes is lost if it fails before."`
	Force        bool          `conf:"no" help:"Replace a VM of that VMID, which must be stopped and have no snapshots. It stays whole until the new disks are there, so both need space."`
	Config       string        `conf:"no" placeholder:"FILE" help:"Take the VM's configuration from FILE in place of the point: of backups that hold none. Its disks must have the names of the point's."`
	Staging      string        `placeholder:"DIR" help:"Write the disks to DIR first and import them from there, in place of a mount."`
	Verify       bool          `help:"First compare the image files with their check sums, and do nothing if they differ. Without it no check sum is looked at."`
	DryRun       bool          `conf:"no" short:"n" help:"Print the commands of qm, and do nothing."`
	JSON         bool          `conf:"no" name:"json" help:"Print one JSON document."`
}

// restoredVM is the output of vm --json.
type restoredVM struct {
	Guest  string       `json:"guest"`
	ID     chain.ID     `json:"id"`
	VMID   proxmox.VMID `json:"vmid"`
	DryRun bool         `json:"dry_run"`
	Disks  []placedDisk `json:"disks"`
	Notes  []string     `json:"notes"`    // what is not as it was
	Steps  []string     `json:"commands"` // in their order
}

type placedDisk struct {
	Name    string `json:"name"`
	Storage string `json:"storage"`
	Size    int64  `json:"size"` // bytes
}

func (c *vmCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, host proxmox.Host) (err error) {
	o, err := c.options()
	if err != nil {
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
	vm, err := c.vm(p)
	if err != nil {
		return err
	}
	if o.VMID == 0 {
		o.VMID = vm.config.VMID
	}
	if o.VMID == 0 {
		return ui.Exit(ui.ExitUsage, errors.New("--vmid is missing, and the configuration's file is not called VMID.conf"))
	}
	dir, remove, err := privateDir(ctx, os.TempDir())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	staging := ""
	if c.Staging != "" {
		var remove func() error
		if staging, remove, err = c.stagingDir(ctx); err != nil {
			return fmt.Errorf("--staging: %w", err)
		}
		defer func() { err = errors.Join(err, remove()) }()
	}
	files, err := c.files(p, names, dir, staging)
	if err != nil {
		return err
	}
	// Open from now to the end, they can't be removed.
	disks, closeAll, err := p.OpenDisks(names)
	if err != nil {
		return err
	}
	defer closeAll()
	if err := c.checkDisguises(disks); err != nil {
		return err
	}
	if err := vm.writeStates(dir, files); err != nil {
		return err
	}
	sizes := map[string]int64{}
	for name, state := range vm.states {
		sizes[name] = int64(len(state))
	}
	for _, d := range p.Disks {
		sizes[d.Name] = d.VirtualSize
	}
	site, err := c.site(host, vm, o, dir)
	if err != nil {
		return err
	}
	plan, err := vmrestore.NewPlan(vmrestore.Point{
		Name: p.Name(), Config: vm.config, Firewall: vm.firewall, Disks: slices.Sorted(maps.Keys(sizes)), Files: files,
	}, o, site)
	if err != nil {
		return err
	}
	for _, d := range p.Doubts(names) {
		plan.Notes = append(plan.Notes, vmrestore.Note{Text: d.Error(), Loss: true})
	}
	for _, n := range plan.Notes {
		u.Log.Warn(n.Text)
	}
	damage, err := p.damageNow(ctx, u, names, c.Verify && !c.DryRun)
	if err != nil {
		return err
	}
	out := c.result(p, plan, sizes)
	for _, name := range names {
		if damage[name] != nil {
			out.Notes = append(out.Notes, damage[name].Error())
			if site.Old != nil {
				return p.notReplaced(damage[name], "VM "+o.VMID.String(), "with --vmid N in place of --force a VM of its own is made")
			}
		}
	}
	if !c.DryRun {
		if err := c.restore(ctx, u, fsys, host, p, plan, disks, sizes, dir, staging); err != nil {
			return err
		}
	}
	tell := u.Done
	if c.DryRun {
		tell = u.Result
	}
	err = tell(c.JSON, out, func(w io.Writer) error { return out.print(w) })
	if err == nil && len(damage) > 0 && !c.DryRun {
		return restoredDamaged(p, damage)
	}
	if loss := plan.Loss(); err == nil && loss != "" && !c.DryRun {
		return ui.Exit(ui.ExitPartly, fmt.Errorf("VM %s is restored, but not quite as it was: %s", o.VMID, loss))
	}
	return err
}

// options reads the flags that kong can't.
func (c *vmCmd) options() (vmrestore.Options, error) {
	o := vmrestore.Options{Storages: map[string]string{}, Unique: c.Unique, Live: c.Live, Start: c.Start && !c.Live}
	if c.VMID != nil {
		o.VMID = *c.VMID
	}
	for _, text := range c.Storage {
		disk, storage, one := strings.Cut(text, "=")
		switch {
		case !one && (o.Storage != "" || text == ""), one && (o.Storages[disk] != "" || disk == "" || storage == ""):
			return o, fmt.Errorf("--storage %s: it must be one storage for all disks, or DISK=STORAGE, each once", text)
		case one:
			o.Storages[disk] = storage
		default:
			o.Storage = text
		}
	}
	if c.Live && c.Force {
		return o, errors.New("--live makes a new VM: it can't be used with --force")
	}
	return o, nil
}

func (c *vmCmd) vm(p *point) (*savedVM, error) {
	if c.Config == "" {
		vm, err := p.savedVM()
		if errors.Is(err, chain.ErrNoPoint) {
			err = ui.Hint(err, "--config FILE takes it from a file; `qmchain-restore image` restores the disks alone")
		}
		return vm, err
	}
	vm, err := givenVM(c.Config)
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	return vm, nil
}

// stagingDir makes a folder for the disks.
func (c *vmCmd) stagingDir(ctx context.Context) (dir string, remove func() error, err error) {
	parent, err := filepath.Abs(c.Staging)
	if err != nil {
		return "", nil, err
	}
	return privateDir(ctx, parent)
}

// mountDir is where the points are mounted, in the private folder.
func mountDir(dir string) string { return filepath.Join(dir, "mnt") }

// files says where qm will read the disks.
func (c *vmCmd) files(p *point, names []string, dir, staging string) (map[string]string, error) {
	from, ext := filepath.Join(mountDir(dir), p.Guest.Name, string(p.ID)), ".raw"
	if staging != "" {
		from, ext = staging, ".qcow2"
	}
	files := map[string]string{}
	for _, name := range names {
		path := filepath.Join(from, name+ext)
		if strings.ContainsAny(path, ",\n") {
			return nil, fmt.Errorf("%q: qm can't read a path with a comma: set TMPDIR, or --staging, to another folder", path)
		}
		files[name] = path
	}
	return files, nil
}

// site looks at the host.
func (c *vmCmd) site(host proxmox.Host, vm *savedVM, o vmrestore.Options, dir string) (site vmrestore.Site, err error) {
	site = vmrestore.Site{Socket: host.Socket(o.VMID), Exists: exists, Dir: dir, NewUUID: newUUID}
	if site.Storages, err = host.Storages(); err != nil {
		return site, err
	}
	if original := vm.config.VMID; original != 0 && original != o.VMID {
		err := host.CheckFree(original)
		if err != nil && !errors.Is(err, proxmox.ErrTaken) {
			return site, err
		}
		site.Twin = err != nil
	}
	err = host.CheckFree(o.VMID)
	if errors.Is(err, proxmox.ErrTaken) {
		if vmrestore.Unfinished(host, o.VMID) {
			return site, ui.Hint(fmt.Errorf("%w, which a restore that was killed has left unfinished", err),
				fmt.Sprintf("`qm destroy %s --skiplock 1` removes it", o.VMID))
		}
		if c.Force {
			site.Old, err = vmrestore.CheckReplaceable(host, o.VMID)
		}
	}
	return site, err
}

// newUUID makes a random UUID.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// checkDisguises refuses disks that PVE would take for something else.
func (c *vmCmd) checkDisguises(disks []points.Disk) error {
	if c.Staging != "" {
		return nil // qcow2 files are what they are
	}
	for _, d := range disks {
		format, err := vmrestore.Disguise(d)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		if format != "" {
			return ui.Hint(fmt.Errorf("disk %s begins as a %s image does, and Proxmox VE would take it for one: %w", d.Name, format, vmrestore.ErrCannot),
				"--staging DIR imports it in another way, with the space for the disks in DIR")
		}
	}
	return nil
}

// writeStates writes the states of TPMs to files, and adds those to files.
func (vm *savedVM) writeStates(dir string, files map[string]string) error {
	for name, state := range vm.states {
		files[name] = filepath.Join(dir, name+".raw")
		if err := os.WriteFile(files[name], state, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// result is what will be printed.
func (c *vmCmd) result(p *point, plan *vmrestore.Plan, sizes map[string]int64) restoredVM {
	out := restoredVM{Guest: p.Guest.Name, ID: p.ID, VMID: plan.VMID, DryRun: c.DryRun, Disks: []placedDisk{}, Notes: []string{}, Steps: []string{}}
	for _, d := range plan.Drives {
		if d.File != "" {
			out.Disks = append(out.Disks, placedDisk{d.ID, d.Storage, sizes[d.ID]})
		}
	}
	for _, n := range plan.Notes {
		out.Notes = append(out.Notes, n.Text)
	}
	for _, s := range plan.Steps(func(id string) string { return "<new volume of " + id + ">" }) {
		out.Steps = append(out.Steps, s.String())
	}
	return out
}

func (r restoredVM) print(w io.Writer) error {
	if !r.DryRun {
		_, err := fmt.Fprintln(w, r.VMID)
		return err
	}
	for _, s := range r.Steps {
		if _, err := fmt.Fprintln(w, s); err != nil {
			return err
		}
	}
	return nil
}

// restore serves the disks as files, and has the plan carried out.
func (c *vmCmd) restore(ctx context.Context, u *ui.UI, fsys durable.FS, host proxmox.Host, p *point, plan *vmrestore.Plan, disks []points.Disk, sizes map[string]int64, dir, staging string) (err error) {
	bars := u.NewProgress("copied")
	defer bars.Done()
	if c.Staging != "" {
		err = c.stage(ctx, fsys, bars, p, disks, staging)
	} else {
		var unmount func() error
		if unmount, err = mountPoints(ctx, u, p, dir); err == nil {
			defer func() { err = errors.Join(err, unmount()) }()
		}
	}
	if err != nil {
		return err
	}
	for _, d := range disks {
		sizes[vmrestore.AllDisks] += d.Size()
	}
	running := map[string]ui.Bar{}
	runner := vmrestore.Runner{Host: host, Log: u.Log, Progress: func(drive string, part float64) {
		size := sizes[drive]
		if running[drive] == nil {
			running[drive] = bars.Bar(drive, size)
		}
		running[drive].Set(int64(part*float64(size)), size)
	}}
	return runner.Run(ctx, plan)
}

// mountPoints mounts all points in the private folder.
func mountPoints(ctx context.Context, u *ui.UI, p *point, dir string) (unmount func() error, err error) {
	if err := os.Mkdir(mountDir(dir), 0o700); err != nil {
		return nil, err
	}
	mounted, err := fusefs.Mount(ctx, fusefs.Options{Set: p.Set, Dir: mountDir(dir), Log: u.Log})
	if err != nil {
		return nil, ui.Hint(err, "--staging DIR does without a mount")
	}
	return func() error { return mounted.Unmount(context.WithoutCancel(ctx)) }, nil
}

// stage writes the disks to files.
func (c *vmCmd) stage(ctx context.Context, fsys durable.FS, bars ui.Progress, p *point, disks []points.Disk, dir string) error {
	var plans []*export.Plan
	for _, d := range disks {
		plan, err := export.Look(ctx, d, filepath.Join(dir, d.Name+".qcow2"), export.Options{Format: export.Qcow2, Outside: p.Set.Dir(), FS: fsys})
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		plans = append(plans, plan)
	}
	if err := export.CheckSpace(plans); err != nil {
		return fmt.Errorf("--staging: %w", err)
	}
	for i, plan := range plans {
		w, err := plan.Start(ctx)
		if err != nil {
			return err
		}
		err = w.Write(ctx, bars.Bar(disks[i].Name+", to a file", plan.Work()).Set)
		if err == nil {
			err = w.Commit(ctx)
		}
		if err := errors.Join(err, w.Close()); err != nil {
			return fmt.Errorf("disk %s: %w", disks[i].Name, err)
		}
	}
	return nil
}
