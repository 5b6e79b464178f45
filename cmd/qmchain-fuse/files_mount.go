package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/cmd/internal/cli"
	"qmchain/fusefs"
	"qmchain/fusefs/inside"
	"qmchain/internal/ui"
)

// filesCmd mounts the files of a point. It takes three processes:
//
//   - the first is the user's. It waits until the files are there, and ends;
//   - the keeper stays. It has nothing to do but to take away what is left when the worker is gone, however that came;
//   - the worker serves the disks, and is the parent of the appliance. It ends in an orderly way when the keeper dies.
//
// With --kernel the worker mounts, and a fourth process, its child, serves the volume: see inside.File. The commands that read
// have such a child, too.
type filesCmd struct {
	volumeFlags `embed:""`
	Foreground  bool   `conf:"no" short:"f" help:"Stay in the foreground, until the files are unmounted or a signal comes."`
	AllowOther  bool   `help:"Let other users in, as far as the modes of the guest's files do. With --kernel they can't be kept out of the mount itself: without this it must be below a folder of yours that is closed to all others, as /root is. A user of the guest counts as the user of this host with the same number."`
	ReadyFD     int    `hidden:""`
	Work        string `hidden:""` // of a worker and a volume's server: the folder for temporary files
	Serve       bool   `hidden:""` // this is a volume's server
	Point       string `arg:"" help:"The point: GUEST/latest, GUEST/ID, or GUEST/ and the beginning of an id."`
	Mnt         string `arg:"" help:"The folder to mount the files on."`
}

func (c *filesCmd) Run(ctx context.Context, u *ui.UI, common *cli.Common) error {
	switch {
	case c.Serve:
		return explainFiles(c.serve(ctx, u))
	case c.Work != "":
		return explainFiles(c.work(ctx, u, common))
	case c.Foreground:
		return explainFiles(c.keep(ctx, u, common))
	}
	server, err := startSelf(c.args(common, "--foreground"), true)
	if err != nil {
		return err
	}
	if err := server.awaitReady(ctx, c.readyLimit()); err != nil {
		return server.failed(err)
	}
	return nil
}

// readyLimit is how long the files may take to be there.
func (c *filesCmd) readyLimit() time.Duration { return c.Timeout + readyLimit }

// args are the arguments of a server, keeper or worker.
func (c *filesCmd) args(common *cli.Common, more ...string) []string {
	if c.AllowOther {
		more = append(more, "--allow-other")
	}
	return append(c.volumeFlags.args(common, append(more, "--ready-fd="+strconv.Itoa(readyFD))...), "--", c.Point, c.Mnt)
}

// keep starts a worker, waits for its end, and sees that nothing is left of it.
func (c *filesCmd) keep(ctx context.Context, u *ui.UI, common *cli.Common) (err error) {
	mnt, place, err := takePlace(c.Mnt)
	if err != nil {
		return err
	}
	defer place.Close()
	c.Mnt = mnt
	if err := c.checkSecluded(); err != nil {
		return err
	}
	if c.Repo, err = filepath.Abs(c.Repo); err != nil {
		return err
	}
	temp, err := inside.NewTemp(ctx, os.TempDir(), time.Now())
	if err != nil {
		return err
	}
	// What a worker that is killed leaves becomes this process's.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the parent of what is left: %w", err)
	}
	defer func() {
		undo := context.WithoutCancel(ctx)
		err = errors.Join(err, inside.Detach(undo, mnt))
		endChildren()
		if left := temp.Remove(undo); left != nil {
			u.Log.WithError(left).Warn("temporary files are left")
		}
	}()
	more := []string{"--work=" + temp.Dir}
	if c.ReadyFD > 0 {
		more = append(more, "--foreground=false")
	} else {
		more = append(more, "--foreground")
	}
	worker, err := startSelf(c.args(common, more...), false)
	if err != nil {
		return err
	}
	if err := worker.awaitReady(ctx, c.readyLimit()); err != nil {
		return worker.failed(err)
	}
	u.Log.Infof("files of %s are mounted at %s", c.Point, mnt)
	if err := os.Chdir("/"); err != nil {
		u.Log.WithError(err).Debug("working directory")
	}
	if c.ReadyFD > 0 {
		if err := sayReady(u, c.ReadyFD, true); err != nil {
			return worker.failed(err)
		}
	}
	select {
	case err = <-worker.ended:
		worker.ended <- err
	case <-ctx.Done():
	}
	if err := worker.failed(nil); err != nil {
		return err
	}
	u.Log.Infof("%s is unmounted", mnt)
	return nil
}

// checkSecluded sees that other users can't get to a mount of the kernel's, if they are not to.
func (c *filesCmd) checkSecluded() error {
	if !c.Kernel || c.AllowOther || os.Geteuid() != 0 { // who is not root gets no such mount
		return nil
	}
	secluded, err := inside.Secluded(c.Mnt)
	if err != nil || secluded {
		return err
	}
	return ui.Exit(ui.ExitUsage, ui.Hint(
		fmt.Errorf("%s: with --kernel all users of this host would be let into it: no folder above it is root's and closed to others", c.Mnt),
		"mount it below a folder with mode 0700, as /root; or let them in with --allow-other"))
}

// takePlace resolves a mount point and locks it, so that there is one keeper for a place, whose end can be waited for.
func takePlace(mnt string) (string, *os.File, error) {
	path, err := filepath.Abs(mnt)
	if err != nil {
		return "", nil, err
	}
	if ours, err := inside.Mounted(path); err == nil && ours {
		return "", nil, ui.Exit(ui.ExitBusy, fmt.Errorf("%s: %w", path, fusefs.ErrMounted))
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", nil, fmt.Errorf("mount point: %w", err)
	}
	place, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", nil, fmt.Errorf("mount point: %w", err)
	}
	// Some file systems have no locks on folders.
	if err := unix.Flock(int(place.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		_ = place.Close()
		return "", nil, ui.Exit(ui.ExitBusy, fmt.Errorf("%s: another process holds a lock on it: %w", path, fusefs.ErrMounted))
	}
	return path, place, nil
}

// work mounts the files and stays until the mount ends.
func (c *filesCmd) work(ctx context.Context, u *ui.UI, common *cli.Common) error {
	// The keeper's death is told several times, as its threads end one after the other. Only the first is to count.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM)
	defer clearAfter(context.WithoutCancel(ctx), os.Getppid(), c.Work)
	o, err := c.open(ctx, u, c.Point)
	if err != nil {
		return err
	}
	defer o.close()
	starting, _, stop := newTimer(ctx, c.Timeout)
	view, err := c.start(starting, u, common, o, place{c.Mnt, c.Work, c.AllowOther, !c.Foreground})
	stop()
	if err != nil {
		return err
	}
	defer view.Close()
	if err := os.Chdir("/"); err != nil {
		u.Log.WithError(err).Debug("working directory")
	}
	if err := sayReady(u, c.ReadyFD, !c.Foreground); err != nil {
		return err
	}
	select {
	case <-view.Done():
		return view.Err()
	case <-ctx.Done():
	}
	undo := context.WithoutCancel(ctx)
	for deadline := time.Now().Add(busyPatience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = inside.Unmount(undo, c.Mnt, false); !errors.Is(err, inside.ErrBusy) {
			break
		}
	}
	if errors.Is(err, inside.ErrBusy) {
		u.Log.Warn("the mount is in use: it is detached, and what is open gets errors from now on")
		return nil // Close does it
	}
	select {
	case <-view.Done():
	case <-time.After(endLimit):
	}
	return nil
}

// clearAfter does what a dead keeper can't do any more. Its death is told when its first thread ends, and the lock on its
// folder goes with the last.
func clearAfter(ctx context.Context, keeper int, temp string) {
	for deadline := time.Now().Add(deathPatience); ; time.Sleep(20 * time.Millisecond) {
		if inside.RemoveAbandoned(ctx, temp) {
			return
		}
		if os.Getppid() == keeper && time.Now().After(deadline) || time.Now().After(deadline.Add(busyPatience)) {
			return
		}
	}
}

// deathPatience is how long the death of a process may take.
const deathPatience = 200 * time.Millisecond

// busyPatience is how long a worker that is told to end waits for files that are in use.
const busyPatience = 3 * time.Second

// unmountFiles unmounts the files of a point, if such are mounted there, and waits for the end of their keeper.
func unmountFiles(ctx context.Context, mnt string, lazy bool) (bool, error) {
	if _, err := os.Readlink(mnt); err == nil {
		if path, err := filepath.EvalSymlinks(mnt); err == nil {
			mnt = path
		}
	}
	// What can't be looked at is left to the other way, which says why.
	if ours, _ := inside.Mounted(mnt); !ours {
		return false, nil
	}
	if err := inside.Unmount(ctx, mnt, lazy); err != nil || lazy {
		return true, explainFiles(err)
	}
	for deadline := time.Now().Add(keeperLimit); ; time.Sleep(50 * time.Millisecond) {
		f, err := os.OpenFile(mnt, os.O_RDONLY|unix.O_DIRECTORY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		if err != nil {
			return true, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		_ = f.Close()
		switch {
		case !errors.Is(err, unix.EWOULDBLOCK):
			return true, nil
		case time.Now().After(deadline):
			return true, errors.New("unmounted, but its server has not ended")
		case ctx.Err() != nil:
			return true, ctx.Err()
		}
	}
}

// keeperLimit is how long an appliance may take to end.
const keeperLimit = 40 * time.Second
