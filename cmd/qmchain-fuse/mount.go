package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain/source"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/notify"
	"qmchain/cmd/internal/points"
	"qmchain/fusefs"
	"qmchain/internal/ui"
)

type mountCmd struct {
	Foreground  bool     `conf:"no" short:"f" help:"Stay in the foreground, until the mount is unmounted or a signal comes. Tells systemd when it is ready (Type=notify)."`
	Options     []string `short:"o" placeholder:"OPT" help:"allow_other: let other users in, as far as the modes of its files do; uid=N, gid=N: show all as owned by them, with the rights that the repository's owner and group have; umask=NNN: show modes of 0555 (folders) and 0444 (files) less these bits, whatever the repository's are; metrics_file=FILE: as --metrics-file; debug: with -v, log every request. Options of mount(8) and fstab that make no difference here are accepted."`
	MetricsFile string   `placeholder:"FILE" help:"Write counters to FILE every 15 seconds, in the text format of Prometheus (for node_exporter: NAME.prom in its textfile directory). They are also in MNT/.stats."`
	ReadyFD     int      `conf:"no" hidden:""`
	Sloppy      bool     `conf:"no" hidden:""` // of mount(8), as the next one
	Fake        bool     `conf:"no" hidden:""`
	Repo        string   `arg:"" help:"The repository, a directory with backups of qmpbackup or virtnbdbackup, or a folder with several of these."`
	Mnt         string   `arg:"" help:"The folder to mount it on."`
}

// How long the background server may take to answer, and to end when it must.
const (
	readyLimit = 90 * time.Second
	endLimit   = 20 * time.Second
)

// metricsLimit is how long the end waits for the counters to be written a last time.
const metricsLimit = 3 * time.Second

// readyByte is what the server sends to who started it.
const readyByte = '!'

func (c *mountCmd) Run(ctx context.Context, u *ui.UI, common *cli.Common) error {
	opts, err := parseOptions(c.Options, c.Sloppy)
	if err != nil {
		return ui.Exit(ui.ExitUsage, ui.Hint(err, "`qmchain-fuse mount --help` lists the options"))
	}
	if opts.metricsFile != "" && c.MetricsFile == "" {
		c.MetricsFile = opts.metricsFile
	}
	if c.MetricsFile != "" {
		if c.MetricsFile, err = filepath.Abs(c.MetricsFile); err != nil { // the server leaves its working directory
			return err
		}
	}
	if c.Fake {
		set, _, err := c.open()
		if err == nil {
			err = set.Close()
		}
		return err
	}
	if c.Foreground {
		return c.serve(ctx, u, opts)
	}
	return c.background(ctx, common)
}

// serve mounts and stays until the mount ends.
func (c *mountCmd) serve(ctx context.Context, u *ui.UI, opts options) error {
	// A log that nobody reads any more must not kill a server: the mount would be left dead.
	signal.Ignore(syscall.SIGPIPE)

	set, mnt, err := c.open()
	if err != nil {
		return err
	}
	defer set.Close()
	var systemd notify.Systemd
	if c.ReadyFD == 0 { // else it waits for another process
		systemd = notify.Of(os.Getenv)
	}
	m, err := fusefs.Mount(ctx, fusefs.Options{Set: set, Dir: mnt, AllowOther: opts.allowOther, View: opts.view, Debug: opts.debug, Log: u.Log})
	if errors.Is(err, fusefs.ErrStale) {
		return ui.Hint(err, "`qmchain-fuse umount "+mnt+"` clears it away")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return ui.Exit(ui.ExitNotFound, ui.Hint(err, "`mkdir "+mnt+"` makes it"))
	}
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("ended before the mount was ready: %w", err)
	}
	if err != nil {
		return err
	}
	what := "repository"
	switch set.Kind() {
	case source.Qmchain:
	case source.Several:
		what = "folder"
	default:
		what = fmt.Sprintf("backups of %s in", set.Kind())
	}
	u.Log.Infof("%s %s is mounted at %s", what, set.Dir(), mnt)
	if c.MetricsFile != "" {
		keeping, stop := context.WithCancel(context.Background())
		kept := make(chan struct{})
		go func() {
			metricsFile{c.MetricsFile, m.Stats, u.Log}.keep(keeping)
			close(kept)
		}()
		defer func() {
			stop()
			select {
			case <-kept:
			case <-time.After(metricsLimit):
			}
		}()
	}
	// Else the server would hold the file system that it was started in.
	if err := os.Chdir("/"); err != nil {
		u.Log.WithError(err).Debug("working directory")
	}
	if c.ReadyFD > 0 {
		if err := c.ready(u); err != nil {
			return errors.Join(err, m.Unmount(context.WithoutCancel(ctx)))
		}
	}
	if err := systemd.Tell("READY=1", notify.Status("%s %s is mounted at %s", what, set.Dir(), mnt)); err != nil {
		u.Log.WithError(err).Warn("systemd does not know that the mount is ready")
	}
	select {
	case <-m.Done():
		err = m.Wait()
	case <-ctx.Done():
		u.Log.Debug("told to end")
		if err := systemd.Tell("STOPPING=1", notify.Status("unmounting %s", mnt)); err != nil {
			u.Log.WithError(err).Debug("systemd does not know that the mount ends")
		}
		err = m.Unmount(context.WithoutCancel(ctx))
	}
	if errors.Is(err, fusefs.ErrBusy) {
		// Gone for all who are here; for the others this process's end is the end.
		u.Log.WithError(err).Debug("unmount")
		err = nil
	}
	u.Log.Infof("%s is unmounted", mnt)
	return err
}

// open opens what is to be mounted, and returns the absolute path of the mount point.
func (c *mountCmd) open() (source.Set, string, error) {
	dir, err := filepath.Abs(c.Repo)
	if err != nil {
		return nil, "", err
	}
	mnt, err := filepath.Abs(c.Mnt)
	if err != nil {
		return nil, "", err
	}
	set, err := points.OpenSets(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", ui.Exit(ui.ExitNotFound, err)
	}
	return set, mnt, err
}

// ready tells the waiting process that the mount answers, and lets go of the terminal, with a session of its own.
func (c *mountCmd) ready(u *ui.UI) error {
	f := os.NewFile(uintptr(c.ReadyFD), "ready")
	if f == nil {
		return fmt.Errorf("no descriptor %d to say that the mount is ready", c.ReadyFD)
	}
	defer f.Close()
	if err := u.Background("qmchain-fuse"); err != nil {
		return err
	}
	if _, err := unix.Setsid(); err != nil {
		return fmt.Errorf("a session of its own: %w", err)
	}
	if _, err := f.Write([]byte{readyByte}); err != nil {
		return fmt.Errorf("who started the mount has gone: %w", err)
	}
	return nil
}

// background starts this program again as the server, and returns when the mount answers. Until
// then the server says on our standard error what is wrong.
func (c *mountCmd) background(ctx context.Context, common *cli.Common) error {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ours.Close()
	// What else we have inherited, a script's lock for one, is not for a server to keep.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close what was inherited: %w", err)
	}
	const fd = 3 // of the first of ExtraFiles
	cmd := exec.Command("/proc/self/exe", c.args(fd, common)...)
	cmd.Args[0] = os.Args[0]
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	// It gets a session of its own when it is ready, and not before: while systemd mounts for an automount point, the kernel
	// has all wait who come to the place, but those in systemd's own process group.
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	ready := make(chan bool, 1)
	go func() {
		b := make([]byte, 1)
		n, _ := ours.Read(b)
		ready <- n == 1 && b[0] == readyByte
	}()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var why error
	select {
	case ok := <-ready:
		if ok {
			return nil
		}
	case <-ctx.Done():
		why = ctx.Err()
	case <-time.After(readyLimit):
		why = fmt.Errorf("the mount does not answer within %s", readyLimit)
	}
	return c.failed(cmd.Process, ended, why)
}

// failed ends a server that did not come up, and says why it did not.
func (c *mountCmd) failed(p *os.Process, ended <-chan error, why error) error {
	if why != nil {
		_ = p.Signal(syscall.SIGTERM)
	}
	var err error
	select {
	case err = <-ended:
	case <-time.After(endLimit):
		_ = p.Kill()
		err = errors.New("it does not end")
	}
	var exit *exec.ExitError
	switch {
	case why != nil:
		return why
	case errors.As(err, &exit) && exit.Exited():
		return ui.Reported(exit.ExitCode())
	case err != nil:
		return fmt.Errorf("the server failed: %w", err)
	}
	return errors.New("the server ended at once")
}

// args are the arguments of the server.
func (c *mountCmd) args(fd int, common *cli.Common) []string {
	args := []string{"mount", "--foreground", fmt.Sprintf("--ready-fd=%d", fd)}
	if common.Quiet {
		args = append(args, "--quiet")
	}
	if common.Verbose {
		args = append(args, "--verbose")
	}
	if common.LogFile != "" {
		args = append(args, "--log-file="+common.LogFile)
	}
	if c.MetricsFile != "" {
		args = append(args, "--metrics-file="+c.MetricsFile)
	}
	if c.Sloppy {
		args = append(args, "--sloppy")
	}
	for _, o := range c.Options {
		args = append(args, "-o"+strings.ReplaceAll(o, ",", `\,`))
	}
	return append(args, "--", c.Repo, c.Mnt)
}

type umountCmd struct {
	Lazy bool   `short:"l" help:"Detach the mount though it is in use, and don't wait: what is open works until it is closed, and the server ends then."`
	Mnt  string `arg:"" complete:"mounted" help:"Where the repository is mounted."`
}

func (c *umountCmd) Run(ctx context.Context, u *ui.UI) error {
	if files, err := unmountFiles(ctx, c.Mnt, c.Lazy); files {
		return err
	}
	err := fusefs.Unmount(ctx, c.Mnt, c.Lazy)
	if err == nil {
		u.Log.Debugf("%s is unmounted", c.Mnt)
	}
	return err
}
