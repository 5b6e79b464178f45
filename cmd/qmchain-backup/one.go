package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/sirupsen/logrus"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/cmd/internal/vms"
	"qmchain/internal/durable"
	"qmchain/internal/fleet"
	"qmchain/internal/pveguest"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

// run is the backup of one guest.
type run struct {
	cmd    *runCmd // with the guest's own settings
	fsys   durable.FS
	node   node
	guest  string // as it was chosen
	guests guests
	shown  *display
	log    *logrus.Entry
	// making is held while a repository is made: the first run can be one of many guests at once.
	making *sync.Mutex

	vm     *pveguest.VM // nil: a plain guest, or not found
	result *backup.Result
	err    error // from the beginning, where its settings are wrong
	began  time.Time
	took   time.Duration
}

// name is the guest's name in the repository.
func (r *run) name() string {
	if r.cmd.Name != "" {
		return r.cmd.Name
	}
	return r.guest
}

// do takes the point. An error with ui.ExitPartly or backup.ErrNeedsDoctor means that it stands all the same.
func (r *run) do(ctx context.Context) error {
	if r.err != nil {
		return r.err
	}
	cfg, err := r.config()
	if err != nil {
		return err
	}
	if err := chain.CheckGuestName(cfg.Guest); err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	if r.guests.vms {
		err = r.addVM(ctx, &cfg)
	} else {
		err = r.addPlain(&cfg)
	}
	if err != nil {
		return err
	}
	observer := r.shown.of(cfg.Guest)
	cfg.Progress = observer
	r.result, err = backup.Run(ctx, cfg)
	if r.vm != nil {
		r.afterVM(&err)
	}
	told := observer.end(r.result, time.Since(r.began), err)
	switch {
	case err != nil:
		return err
	case r.result.Point == nil: // less has changed than the threshold
		return ui.Exit(ui.ExitPartly, told)
	case !r.cmd.JSON:
		told = r.shown.result(func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s/%s\n", cfg.Guest, r.result.Point.ID)
			return err
		})
	}
	good := fmt.Sprintf("point %s/%s is good", cfg.Guest, r.result.Point.ID)
	switch {
	case r.result.StillFrozen:
		return fmt.Errorf("%s, but the guest may still be frozen: %w", good, backup.ErrNeedsDoctor)
	case r.vm != nil && r.vm.LockLeft != nil:
		return fmt.Errorf("%s, but the VM is still locked: %w: %w", good, backup.ErrNeedsDoctor, r.vm.LockLeft)
	case len(r.result.Warnings) > 0:
		return ui.Exit(ui.ExitPartly, fmt.Errorf("%s, but not all went as asked: %s", good, r.result.Warnings[0]))
	case told != nil:
		return ui.Exit(ui.ExitPartly, fmt.Errorf("%s, but can't be told: %w", good, told))
	}
	return nil
}

// config is what does not depend on where the guest is.
func (r *run) config() (cfg backup.Config, err error) {
	c := r.cmd
	req, err := c.request()
	if err != nil {
		return cfg, err
	}
	req.Note = c.Note
	if c.Bitmaps != "auto" {
		req.Bitmaps = c.Bitmaps
	}
	if req.Threshold, err = cli.Size("--threshold", c.Threshold); err != nil {
		return cfg, err
	}
	copying, err := c.copying()
	if err != nil {
		return cfg, err
	}
	fleecing, err := c.fleecing()
	if err != nil {
		return cfg, err
	}
	if fleecing.Dir, err = fleeceDir(c.FleeceDir); err != nil {
		return cfg, err
	}
	kept, err := keptAt(c.KeepDir, r.fsys)
	if err != nil {
		return cfg, err
	}
	if len(c.FreezeFs) > 0 && c.AgentSocket == "" {
		return cfg, ui.Exit(ui.ExitUsage, errors.New("--freeze-fs needs --agent-socket"))
	}
	return backup.Config{
		Request: req,
		Guest:   r.name(),
		Repo:    func() (*repo.Repo, error) { return repo.Open(c.Repo, r.fsys) },
		Create: func() (*repo.Repo, error) {
			r.making.Lock()
			defer r.making.Unlock()
			made, err := repo.OpenOrCreate(c.Repo, r.fsys)
			return made, points.MeantDir(err, c.Repo)
		},
		Init:        c.Init,
		Kept:        kept,
		Fleecing:    fleecing,
		Copying:     copying,
		LockWait:    c.LockWait,
		FreezeLimit: c.FreezeTimeout,
		Pause:       c.Pause,
		Log:         r.log,
		Now:         time.Now,
	}, nil
}

// addPlain says where a guest of plain QEMU is.
func (r *run) addPlain(cfg *backup.Config) error {
	cfg.Addr = r.cmd.Socket
	for _, o := range r.cmd.Offline {
		image, err := backup.ParseOfflineImage(o)
		if err != nil {
			return ui.Exit(ui.ExitUsage, fmt.Errorf("--offline: %w", err))
		}
		cfg.Offline = append(cfg.Offline, image)
	}
	if r.cmd.AgentSocket != "" && !r.cmd.NoFreeze {
		cfg.Agent = backup.SocketAgent{Addr: r.cmd.AgentSocket, Mountpoints: r.cmd.FreezeFs}
	}
	return nil
}

// addVM says where a VM is.
func (r *run) addVM(ctx context.Context, cfg *backup.Config) (err error) {
	if r.cmd.AgentSocket != "" {
		return ui.Exit(ui.ExitUsage, errors.New("--agent-socket is for --socket: a VM's agent is asked through Proxmox VE"))
	}
	site := r.node.site(r.fsys, r.cmd.LockWait, r.log)
	site.InHook = r.cmd.InHook
	id := r.guests.vmid(r.guest)
	if r.vm, err = site.Find(id); err != nil {
		return vms.Meant(err, r.node.Host, id)
	}
	vm := r.vm
	if names := vm.Config.Snapshots; len(names) > 0 && r.cmd.Bitmaps == chain.KindPersistent {
		r.log.Warnf("VM %s has snapshots: with persistent bitmaps `qm rollback` fails, until `qmchain-backup cleanup %s` has removed them", vm.ID, vm.ID)
	}
	cfg.Guard = vm
	switch {
	case !vm.Running() && site.InHook:
		// Without PVE's lock nothing would keep QEMU from opening the images beside us once the hook is over.
		return ui.Exit(ui.ExitBusy, fmt.Errorf("VM %s has stopped: in a hook script only a running VM is backed up, as Proxmox VE's lock, which keeps a stopped one from being started, can't be taken there", vm.ID))
	case !vm.Running():
		cfg.Identity = vm.Identity()
		cfg.Offline, cfg.Request, err = vm.Images(ctx, cfg.Request)
		if r.guests.group && errors.Is(err, proxmox.ErrInactive) {
			// Of one that was asked for by number it is a failure. In a group it is to be expected, but not to be passed over.
			return ui.Exit(ui.ExitPartly, errors.New("skipped: "+err.Error()))
		}
		return err
	}
	cfg.Skip = vm.Skip()
	if !r.cmd.NoFreeze {
		cfg.Agent = vm.Agent()
	}
	cfg.Addr, err = vm.Socket()
	return err
}

// afterVM adds what only the configuration tells.
func (r *run) afterVM(err *error) {
	switch {
	case *err == nil && r.vm.Running():
		for _, disk := range r.vm.Missing(r.result.Plan) {
			text := fmt.Sprintf("disk %s is in the VM's configuration, but its QEMU has no such disk", disk)
			r.log.Warn(text)
			r.result.Warnings = append(r.result.Warnings, text)
		}
	case *err == nil:
	case r.vm.LockLeft != nil:
		*err = fmt.Errorf("%w; and the VM is still locked: %w: %w", *err, backup.ErrNeedsDoctor, r.vm.LockLeft)
	default:
		*err = explainDial(*err)
	}
}

// explainDial says of a running VM's socket that it is not there.
func explainDial(err error) error {
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" && (errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)) {
		return fmt.Errorf("the VM runs, but there is %w to talk to: %w", pveguest.ErrNoSocket, err)
	}
	return err
}

// tell says in the log what came of the run, where the command's own end does not.
func (r *run) tell() {
	if r.err != nil && r.guests.several() && !r.leftOut() {
		if code := ui.ExitCode(explain(r.err)); code == ui.ExitPartly {
			r.log.Warn(r.err)
		} else {
			r.log.Error(r.err)
		}
	}
	if r.result == nil || r.result.Point == nil {
		return
	}
	p := r.result.Point
	for _, d := range p.Disks {
		r.log.Infof("disk %s: %s of %s, %s", d.Name, humanize.IBytes(uint64(d.Bytes)), humanize.IBytes(uint64(d.VirtualSize)), d.Level)
	}
	_, stored := sizes(p)
	r.log.Infof("point %s/%s: %s, %s, %s in %s (%s/s)", r.name(), p.ID, p.Level(), p.Consistency,
		humanize.IBytes(uint64(stored)), r.took.Round(time.Millisecond), humanize.IBytes(uint64(float64(stored)/r.took.Seconds())))
}

// sizes are those of a point's disks and of its images.
func sizes(p *chain.Manifest) (size, stored int64) {
	for _, d := range p.Disks {
		size, stored = size+d.VirtualSize, stored+d.Bytes
	}
	return size, stored
}

// leftOut tells whether there is nothing to back up that a group is expected to have: templates, and what has gone.
func (r *run) leftOut() bool {
	gone := errors.Is(r.err, proxmox.ErrNotFound) || errors.Is(r.err, proxmox.ErrElsewhere)
	return r.guests.group && (errors.Is(r.err, pveguest.ErrTemplate) || gone)
}

// outcome is the guest's line in the report.
func (r *run) outcome() fleet.Outcome {
	o := fleet.Outcome{Verdict: fleet.Good}
	if r.vm != nil {
		o.Name = r.vm.Config.Name()
	}
	if r.result != nil {
		o.Remarks = r.result.Warnings
		if p := r.result.Point; p != nil {
			o.Point, o.Level = string(p.ID), string(p.Level())
			o.Size, o.Stored = sizes(p)
		} else if r.err == nil {
			o.Verdict, o.Remarks = fleet.Skipped, []string{"less has changed than the threshold"}
		}
	}
	if r.err == nil {
		return o
	}
	explained := explain(r.err)
	o.Code = ui.ExitCode(explained)
	switch {
	case r.leftOut():
		o.Verdict, o.Code, o.Remarks = fleet.Skipped, ui.ExitOK, []string{r.err.Error()}
	case o.Code == ui.ExitPartly:
		o.Verdict = fleet.Warning
		if r.result == nil {
			o.Remarks = []string{r.err.Error()} // it is left out, and should not be
		}
	default:
		o.Verdict, o.Remarks = fleet.Failed, []string{r.err.Error()}
		if hint := ui.HintOf(explained); hint != "" {
			o.Remarks = append(o.Remarks, hint)
		}
	}
	return o
}
