package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// runFlags are the flags that run and estimate share.
type runFlags struct {
	Socket      string      `placeholder:"ADDR" help:"The guest's QMP socket: a path, unix:PATH or tcp:HOST:PORT."`
	Name        string      `required:"" placeholder:"GUEST" help:"The guest's name in the repository."`
	Repo        string      `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"The repository. The first run makes one in an empty folder."`
	Level       chain.Level `enum:"auto,full,inc,diff,copy" default:"auto" help:"auto: an increment of each disk where that is safe, else a full; full: begin new chains; inc: fail where an increment is not possible; diff: as inc, but the next increment is since the same point again; copy: a full outside of any chain."`
	Disk        []string    `placeholder:"D" help:"Only this disk. Can be given several times."`
	ExcludeDisk []string    `placeholder:"D" help:"Not this disk. Can be given several times."`
	NewChain    string      `placeholder:"WHEN" help:"When auto begins a new chain: monthly, weekly, daily, points:N or age:30d."`
	Adopt       bool        `help:"Go on though the newest point is of a guest with another UUID."`
}

// request checks the flags that kong can't.
func (f *runFlags) request() (backup.Request, error) {
	req := backup.Request{Level: f.Level, Disks: f.Disk, Exclude: f.ExcludeDisk, Adopt: f.Adopt}
	if err := chain.CheckGuestName(f.Name); err != nil {
		return req, ui.Exit(ui.ExitUsage, err)
	}
	var err error
	if req.NewChain, err = backup.ParseRotation(f.NewChain); err != nil {
		return req, ui.Exit(ui.ExitUsage, fmt.Errorf("--new-chain: %w", err))
	}
	return req, nil
}

type runCmd struct {
	runFlags  `embed:""`
	Threshold string        `placeholder:"SIZE" help:"Make no point if less than SIZE (such as 64MiB) has changed."`
	Note      string        `placeholder:"TEXT" help:"A note to keep with the point."`
	LockWait  time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait for another run to end."`

	FleeceDir   string        `placeholder:"DIR" help:"Where to save what the guest overwrites while it is backed up: local, fast, with space for it. Default: /var/lib/qmchain/fleece as root, else qmchain/fleece in the user's cache folder."`
	FleeceLimit string        `placeholder:"SIZE" help:"The most that one disk may take there; more fails the backup."`
	CbwTimeout  time.Duration `name:"cbw-timeout" default:"15s" placeholder:"TIME" help:"How long a write of the guest may wait until what it overwrites is saved; longer fails the backup."`
	NoFleece    bool          `help:"Copy directly to the repository. A slow or failing repository then slows or fails the guest's own writes."`

	Compress    string `enum:"zstd,zlib,none" default:"none" help:"Compress the images: zstd or zlib."`
	SpeedLimit  string `placeholder:"SIZE" help:"Copy at most SIZE a second of each disk."`
	Jobs        int    `default:"0" placeholder:"N" help:"Copy at most N disks at once. 0: all."`
	ClusterSize string `placeholder:"SIZE" help:"Cluster size of the images, 64KiB by default. Larger ones make increments larger."`
	Aio         string `enum:"threads,native,io_uring,default" default:"default" help:"How QEMU writes the images: threads, native (with --direct) or io_uring."`
	Direct      bool   `help:"QEMU writes the images past the host's page cache."`

	AgentSocket   string        `placeholder:"ADDR" help:"The guest agent's socket: freeze the guest's file systems for the instant of the point. In Windows guests this asks the VSS writers for a backup, which can make databases cut their logs."`
	FreezeFs      []string      `placeholder:"PATH" help:"Freeze only the file system that the guest has mounted there. Can be given several times."`
	FreezeTimeout time.Duration `default:"30s" placeholder:"TIME" help:"How long freezing may take; then the point is taken without it."`
	Pause         bool          `help:"Pause the guest for the instant of the point."`

	JSON        bool     `name:"json" help:"Print events, one JSON document a line, in place of the point's name."`
	MetricsFile string   `placeholder:"FILE" help:"Write metrics to FILE for node_exporter's textfile collector."`
	Offline     []string `placeholder:"DISK=FORMAT:PATH" help:"In place of --socket: back up this image of a stopped guest, such as scsi0=qcow2:/images/a.qcow2. Can be given several times."`
	Init        bool     `help:"Make a repository even if the guest is tracked for another one."`
	DryRun      bool     `help:"Print what would be done, and do nothing."`
}

func (c *runCmd) Run(ctx context.Context, u *ui.UI, fsys durable.FS) error {
	req, err := c.request()
	if err != nil {
		return err
	}
	req.Note = c.Note
	if req.Threshold, err = cli.Size("--threshold", c.Threshold); err != nil {
		return err
	}
	copying, err := c.copying()
	if err != nil {
		return err
	}
	fleecing, err := c.fleecing()
	if err != nil {
		return err
	}
	var offline []backup.OfflineImage
	for _, o := range c.Offline {
		image, err := backup.ParseOfflineImage(o)
		if err != nil {
			return ui.Exit(ui.ExitUsage, fmt.Errorf("--offline: %w", err))
		}
		offline = append(offline, image)
	}
	if (c.Socket == "") == (len(offline) == 0) {
		return ui.Exit(ui.ExitUsage, errors.New("say which guest: --socket of a running one, or --offline with the images of a stopped one"))
	}
	if c.DryRun {
		if len(offline) > 0 {
			return ui.Exit(ui.ExitUsage, errors.New("--dry-run needs a running guest"))
		}
		return preview(ctx, u, fsys, &c.runFlags, req, false)
	}
	if fleecing.Dir, err = fleeceDir(c.FleeceDir); err != nil {
		return err
	}
	if len(c.FreezeFs) > 0 && c.AgentSocket == "" {
		return ui.Exit(ui.ExitUsage, errors.New("--freeze-fs needs --agent-socket"))
	}
	var agent backup.Agent
	if c.AgentSocket != "" {
		agent = backup.SocketAgent{Addr: c.AgentSocket, Mountpoints: c.FreezeFs}
	}
	progress := newObserver(u, c.JSON)
	cfg := backup.Config{
		Request:     req,
		Guest:       c.Name,
		Addr:        c.Socket,
		Repo:        func() (*repo.Repo, error) { return repo.Open(c.Repo, fsys) },
		Create:      func() (*repo.Repo, error) { return repo.OpenOrCreate(c.Repo, fsys) },
		Init:        c.Init,
		Offline:     offline,
		Fleecing:    fleecing,
		Copying:     copying,
		LockWait:    c.LockWait,
		Agent:       agent,
		FreezeLimit: c.FreezeTimeout,
		Pause:       c.Pause,
		Log:         u.Log,
		Progress:    progress,
		Now:         time.Now,
	}
	began := time.Now()
	result, err := backup.Run(ctx, cfg)
	if endErr := progress.end(result, time.Since(began), err); err == nil {
		err = endErr
	}
	if c.MetricsFile != "" {
		if metricsErr := metrics(c.MetricsFile, c.Name, result, began, err); metricsErr != nil {
			u.Log.Warnf("--metrics-file: %v", metricsErr)
		}
	}
	if err != nil {
		return err
	}
	if result.Point == nil {
		return nil // less has changed than the threshold
	}
	var bytes uint64
	for _, d := range result.Point.Disks {
		bytes += uint64(d.Bytes)
	}
	took := time.Since(began)
	for _, d := range result.Point.Disks {
		u.Log.Infof("disk %s: %s of %s, %s", d.Name, humanize.IBytes(uint64(d.Bytes)), humanize.IBytes(uint64(d.VirtualSize)), d.Level)
	}
	u.Log.Infof("point %s/%s: %s, %s, %s in %s (%s/s)", c.Name, result.Point.ID, result.Point.Level(), result.Point.Consistency,
		humanize.IBytes(bytes), took.Round(time.Millisecond), humanize.IBytes(uint64(float64(bytes)/took.Seconds())))
	if !c.JSON {
		err = u.Result(false, nil, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s/%s\n", c.Name, result.Point.ID)
			return err
		})
	}
	if err == nil && result.StillFrozen {
		return fmt.Errorf("point %s/%s is good, but the guest may still be frozen: %w", c.Name, result.Point.ID, backup.ErrNeedsDoctor)
	}
	if err == nil && len(result.Warnings) > 0 {
		return ui.Exit(ui.ExitPartly, fmt.Errorf("point %s/%s is good, but not all went as asked: %s", c.Name, result.Point.ID, result.Warnings[0]))
	}
	return err
}

func (c *runCmd) copying() (copying backup.Copying, err error) {
	copying = backup.Copying{Jobs: c.Jobs, Direct: c.Direct}
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
	if c.Jobs < 0 {
		return copying, ui.Exit(ui.ExitUsage, errors.New("--jobs can't be negative"))
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
