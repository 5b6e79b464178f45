package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/cmd/internal/cli"
	"qmchain/internal/durable"
	"qmchain/internal/fleet"
	"qmchain/internal/ui"
)

// runFlags are the flags that run and estimate share.
type runFlags struct {
	guestFlags  `embed:""`
	Repo        string      `env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository. The first run makes one in an empty folder."`
	Level       chain.Level `enum:"auto,full,inc,diff,copy" default:"auto" help:"auto: an increment of each disk where that is safe, else a full; full: begin new chains; inc: fail where an increment is not possible; diff: as inc, but the next increment is since the same point again; copy: a full outside of any chain."`
	Disk        []string    `placeholder:"D" help:"Only this disk, even if it has backup=0. Can be given several times."`
	ExcludeDisk []string    `placeholder:"D" help:"Not this disk. Can be given several times."`
	NewChain    string      `placeholder:"WHEN" help:"When auto begins a new chain: monthly, weekly, daily, points:N or age:30d. A chain counts from the oldest point that prune has left of it."`
	Adopt       bool        `conf:"no" help:"Go on though the newest point is of a guest with another UUID."`
}

// request checks the flags that kong can't.
func (f *runFlags) request() (backup.Request, error) {
	req := backup.Request{Level: f.Level, Disks: f.Disk, Exclude: f.ExcludeDisk, Adopt: f.Adopt}
	if f.Repo == "" {
		return req, ui.Exit(ui.ExitUsage, errors.New("missing flags: --repo=DIR"))
	}
	var err error
	if req.NewChain, err = backup.ParseRotation(f.NewChain); err != nil {
		return req, ui.Exit(ui.ExitUsage, fmt.Errorf("--new-chain: %w", err))
	}
	return req, nil
}

type runCmd struct {
	runFlags    `embed:""`
	reportFlags `embed:""`
	Jobs        int           `default:"1" placeholder:"N" help:"Back up at most N guests at once. By default one after the other: the repository is mostly what is slow, and each guest's disks are copied at once anyway."`
	Threshold   string        `placeholder:"SIZE" help:"Make no point if less than SIZE (such as 64MiB) has changed."`
	Note        string        `conf:"no" placeholder:"TEXT" help:"A note to keep with the point."`
	LockWait    time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for another run, or Proxmox VE's lock on a VM, to end."`

	FleeceDir   string        `placeholder:"DIR" help:"Where to save what the guest overwrites while it is backed up: local, fast, with space for it. Default: /var/lib/qmchain/fleece as root, else qmchain/fleece in the user's cache folder."`
	FleeceLimit string        `placeholder:"SIZE" help:"The most that one disk may take there; more fails the backup."`
	CbwTimeout  time.Duration `positive:"" name:"cbw-timeout" default:"15s" placeholder:"TIME" help:"How long a write of the guest may wait until what it overwrites is saved; longer fails the backup."`
	Bitmaps     string        `enum:"auto,persistent,memory" default:"auto" help:"Where tracking is kept: in the disk's qcow2 image, or in QEMU's memory (see keep). auto: in memory for raw disks and for those with internal snapshots, as a persistent bitmap keeps QEMU from going back to one."`
	KeepDir     string        `placeholder:"DIR" help:"Where keep keeps bitmaps, if that is not its default."`
	NoFleece    bool          `help:"Copy directly to the repository. A slow or failing repository then slows or fails the guest's own writes."`

	Compress    string `enum:"zstd,zlib,none" default:"none" help:"Compress the images: zstd or zlib."`
	SpeedLimit  string `placeholder:"SIZE" help:"Copy at most SIZE a second of each disk."`
	DiskJobs    int    `default:"0" placeholder:"N" help:"Copy at most N disks of a guest at once. 0: all."`
	ClusterSize string `placeholder:"SIZE" help:"Cluster size of the images, 64KiB by default. Larger ones make increments larger."`
	Aio         string `enum:"threads,native,io_uring,default" default:"default" help:"How QEMU writes the images: threads, native (with --direct) or io_uring."`
	Direct      bool   `help:"QEMU writes the images past the host's page cache."`

	AgentSocket   string        `conf:"no" placeholder:"ADDR" help:"With --socket: the guest agent's socket, to freeze the guest's file systems for the instant of the point. In Windows guests this asks the VSS writers for a backup, which can make databases cut their logs. A VM's own option agent says whether it is frozen."`
	FreezeFs      []string      `placeholder:"PATH" help:"With --agent-socket: freeze only the file system that the guest has mounted there. Can be given several times."`
	FreezeTimeout time.Duration `positive:"" default:"30s" placeholder:"TIME" help:"How long freezing may take; then the point is taken without it."`
	NoFreeze      bool          `help:"Don't freeze file systems, whatever the VM's option agent says."`
	Pause         bool          `help:"Pause the guest for the instant of the point."`

	JSON        bool     `conf:"no" name:"json" help:"Print events, one JSON document a line, in place of the point's name. With --dry-run, what estimate prints."`
	MetricsFile string   `placeholder:"FILE" help:"Write metrics to FILE for node_exporter's textfile collector."`
	Offline     []string `conf:"no" placeholder:"DISK=FORMAT:PATH" help:"In place of --socket: back up this image of a stopped guest, such as scsi0=qcow2:/images/a.qcow2. Can be given several times. Those of a stopped VM are found."`
	Init        bool     `conf:"no" help:"Make a repository even if the guest is tracked for another one."`
	InHook      bool     `conf:"no" hidden:"" help:"This runs in a hook script of the VM's: go without Proxmox VE's lock on it, which the hook's caller holds."`
	DryRun      bool     `conf:"no" short:"n" help:"Print what would be done, and do nothing."`
}

// of is the command with the settings of one guest.
func (*runCmd) of(guest string, again cli.Again) (*runCmd, error) {
	var g grammar
	err := again(guest, &g)
	return &g.Run, err
}

// Run backs up each of the guests. The error of a single one is the command's; of several each has its line in the report.
func (c *runCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS, n node, again cli.Again) error {
	guests, err := c.choose(u, n.Host, len(c.Offline) > 0)
	if err != nil {
		return err
	}
	if err := c.reportFlags.check(); err != nil {
		return err
	}
	if c.Jobs < 1 {
		return ui.Exit(ui.ExitUsage, errors.New("--jobs must be at least 1"))
	}
	if c.DryRun {
		if len(c.Offline) > 0 {
			return ui.Exit(ui.ExitUsage, errors.New("--dry-run needs a running guest"))
		}
		return previewAll(ctx, u, fsys, n, guests, c.JSON, func(guest string) (*runFlags, error) {
			own, err := c.of(guest, again)
			return &own.runFlags, err
		})
	}
	if len(guests.names) == 0 {
		return nil
	}
	shown := newDisplay(u, c.JSON, guests.several())
	runs, making := make(map[string]*run), new(sync.Mutex)
	for _, guest := range guests.names {
		own, err := c.of(guest, again)
		if err != nil {
			err = fmt.Errorf("guest %s: %w", guest, err)
			if !guests.several() {
				return err
			}
			own = c // and the others are backed up
		}
		runs[guest] = &run{err: err, cmd: own, fsys: fsys, node: n, guest: guest, guests: guests, shown: shown, log: u.Log.WithFields(nil), making: making}
		if guests.several() {
			runs[guest].log = u.Log.WithField("guest", guest)
		}
	}
	began := time.Now()
	outcomes := fleet.Each(ctx, guests.names, c.Jobs, func(ctx context.Context, guest string) fleet.Outcome {
		r := runs[guest]
		r.began = time.Now()
		r.err = r.do(ctx)
		r.took = time.Since(r.began)
		r.tell()
		return r.outcome()
	})
	shown.end()
	if c.MetricsFile != "" {
		if err := metrics(c.MetricsFile, guests.names, runs); err != nil {
			u.Log.Warnf("--metrics-file: %v", err)
		}
	}
	report := fleet.Report{Host: n.name(), Repo: c.Repo, Began: began, Took: time.Since(began), Outcomes: outcomes}
	reportErr := c.reportFlags.send(ctx, u, n, report, shown)
	if !guests.several() {
		if err := runs[guests.names[0]].err; err != nil {
			return err
		}
		return reportErr
	}
	switch code := fleet.Code(outcomes); code {
	case ui.ExitOK:
		return reportErr
	case ui.ExitInterrupted:
		return ui.Exit(code, context.Canceled)
	case ui.ExitPartly:
		return ui.Exit(code, fmt.Errorf("%d of %d guests with warnings", fleet.Count(outcomes, fleet.Warning), len(outcomes)))
	default:
		return ui.Exit(code, fmt.Errorf("%d of %d guests failed", fleet.Count(outcomes, fleet.Failed), len(outcomes)))
	}
}

func (c *runCmd) copying() (copying backup.Copying, err error) {
	copying = backup.Copying{Jobs: c.DiskJobs, Direct: c.Direct}
	if c.Compress != "none" {
		copying.Compress = c.Compress
	}
	if c.Aio != "default" {
		copying.AIO = c.Aio
	}
	if copying.Speed, err = cli.Size("--speed-limit", c.SpeedLimit); err != nil {
		return copying, err
	}
	if copying.ClusterSize, err = cli.Size("--cluster-size", c.ClusterSize); err != nil {
		return copying, err
	}
	if n := copying.ClusterSize; n != 0 && (n < 4<<10 || n > 2<<20 || n&(n-1) != 0) {
		return copying, ui.Exit(ui.ExitUsage, errors.New("--cluster-size must be a power of two from 4KiB to 2MiB"))
	}
	if c.DiskJobs < 0 {
		return copying, ui.Exit(ui.ExitUsage, errors.New("--disk-jobs can't be negative"))
	}
	if c.Aio == "native" && !c.Direct {
		return copying, ui.Exit(ui.ExitUsage, errors.New("--aio native needs --direct"))
	}
	return copying, nil
}

func (c *runCmd) fleecing() (fleecing backup.Fleecing, err error) {
	fleecing = backup.Fleecing{Off: c.NoFleece, Timeout: c.CbwTimeout}
	if fleecing.Limit, err = cli.Size("--fleece-limit", c.FleeceLimit); err != nil {
		return fleecing, err
	}
	if fleecing.Limit != 0 && (fleecing.Limit < 1<<20 || fleecing.Limit%512 != 0) {
		return fleecing, ui.Exit(ui.ExitUsage, errors.New("--fleece-limit must be at least 1MiB, and a multiple of 512 bytes"))
	}
	if c.CbwTimeout < time.Second || c.CbwTimeout > time.Hour || c.CbwTimeout%time.Second != 0 {
		return fleecing, ui.Exit(ui.ExitUsage, errors.New("--cbw-timeout must be whole seconds, from 1s to 1h"))
	}
	return fleecing, nil
}

// fleeceDir returns the folder for fleece images: the one given, or the default, which it makes.
func fleeceDir(given string) (string, error) {
	if given != "" {
		info, err := os.Stat(given)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return "", ui.Exit(ui.ExitNotFound, fmt.Errorf("--fleece-dir: %w", err))
		case err != nil:
			return "", fmt.Errorf("--fleece-dir: %w", err)
		case !info.IsDir():
			return "", ui.Exit(ui.ExitNotFound, fmt.Errorf("--fleece-dir: %s is not a folder", given))
		}
		return given, nil
	}
	base := "/var/lib"
	if os.Geteuid() != 0 {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", fmt.Errorf("no folder for fleece images: %w", err)
		}
	}
	dir := filepath.Join(base, "qmchain", "fleece")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("no folder for fleece images: %w", err)
	}
	return dir, nil
}
