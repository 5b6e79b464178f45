package backup

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/internal/child"
	"qmchain/qmp"
)

const (
	keepPrefix = "qmchain-keep" // of the nodes of sidecar images

	// tidyLimit bounds the taking away of what a saving or merging has put into the guest.
	tidyLimit = 5 * time.Second
)

// carrier carries tracking bitmaps in memory over the end of a QEMU process. Its caller holds the guest's lock.
type carrier struct {
	qmp     *qmp.Client
	guest   string
	kept    Kept
	qemuImg string
	log     logrus.FieldLogger
	now     func() time.Time
}

// tracked reports whether a bitmap ends with the QEMU process and is worth carrying over that.
func tracked(b qmp.DirtyBitmap) bool {
	_, ours := chain.ParseBitmapName(b.Name)
	return ours && !b.Persistent && !b.Inconsistent && b.Recording
}

// stopped are the run states in which vCPUs don't run and the disks are still this QEMU's.
var stopped = map[string]bool{
	"shutdown": true, "paused": true, "prelaunch": true, "io-error": true, "guest-panicked": true, "internal-error": true, "watchdog": true,
}

// pid is the QEMU process: what listens on the socket, unless somebody has passed it that or stands in between; such a process
// does not have the disks open, which openIn finds.
func (c *carrier) pid() (int, error) {
	pid := c.qmp.PeerPID()
	if pid == 0 {
		return 0, fmt.Errorf("its QEMU process is not known, and may be on another host: %w", errNoProof)
	}
	return pid, nil
}

func (c *carrier) checkStopped(ctx context.Context) error {
	status, err := c.qmp.QueryStatus(ctx)
	if err == nil && (status.Running || !stopped[status.Status]) {
		err = fmt.Errorf("the guest is %s: bitmaps are saved when it has stopped: %w", status.Status, ErrBusy)
	}
	return err
}

// running is a job that is under way; "": none is.
func running(jobs []qmp.Job) string {
	for _, j := range jobs {
		if j.Status != "concluded" && j.Status != "null" {
			return fmt.Sprintf("%s (%s)", j.ID, j.Type)
		}
	}
	return ""
}

// checkAlone makes sure that nobody but the guest writes to its disks: jobs and exports do so although it has stopped.
func (c *carrier) checkAlone(ctx context.Context) error {
	jobs, err := c.qmp.QueryJobs(ctx)
	if err != nil {
		return err
	}
	if job := running(jobs); job != "" {
		return fmt.Errorf("job %s is under way: %w", job, ErrBusy)
	}
	export, err := exported(ctx, c.qmp)
	if err == nil && export != "" {
		err = fmt.Errorf("QEMU exports disks to others (%s): %w", export, ErrBusy)
	}
	return err
}

// exported is an export of a disk to others; "": there is none.
func exported(ctx context.Context, client *qmp.Client) (string, error) {
	var exports []struct{ ID string }
	err := client.Execute(ctx, "query-block-exports", nil, &exports)
	if err != nil || len(exports) == 0 {
		return "", err
	}
	return exports[0].ID, nil
}

// save saves the bitmaps of a guest that has stopped, in place of what was saved before. It returns how many disks' it saved.
// What can't be saved of a disk is refused, with the reason; the others' are saved all the same.
func (c *carrier) save(ctx context.Context) (disks int, err error) {
	if err := c.checkStopped(ctx); err != nil {
		return 0, err
	}
	if err := c.kept.folder(c.guest); err != nil {
		return 0, err
	}
	if err := c.kept.clear(c.guest); err != nil {
		return 0, err
	}
	// When a guest powers off, QEMU tells so before all is on disk. A stop drains what is under way, and flushes, whatever the state.
	if err := c.qmp.Stop(ctx); err != nil {
		return 0, err
	}
	v, err := lookBlock(ctx, c.qmp)
	if err != nil {
		return 0, err
	}
	saved := savedGuest{Time: c.now().UTC()}
	if saved.Guest, err = lookIdentity(ctx, c.qmp); err != nil {
		return 0, err
	}
	refused := make(refusals)
	pid, pidErr := c.pid()
	alone := c.checkAlone(ctx)
	blocked := cmp.Or(alone, pidErr)
	first := time.Now()
	sidecars := 0
	for _, name := range slices.Sorted(maps.Keys(v.nodes)) {
		n := v.nodes[name]
		if n.info.ReadOnly || !slices.ContainsFunc(n.info.DirtyBitmaps, tracked) {
			continue
		}
		d, err := c.saveDisk(ctx, v, n, sidecars, pid, blocked)
		sidecars++
		if err == nil {
			saved.Disks = append(saved.Disks, d)
			continue
		}
		c.log.Warnf("bitmaps of node %s are not saved: %v", name, err)
		for _, b := range n.info.DirtyBitmaps {
			if tracked(b) {
				refused[b.Name] = fmt.Sprintf("it could not be saved when the guest stopped: %v", err)
			}
		}
		if ctx.Err() != nil || errors.Is(err, qmp.ErrDisconnected) {
			return 0, errors.Join(err, c.kept.writeRefusals(c.guest, refused))
		}
	}
	// What is written from here on must show in the volumes.
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(time.Until(first.Add(settleTime))):
	}
	saved.Disks = slices.DeleteFunc(saved.Disks, func(d savedDisk) bool {
		err := unmoved(ctx, pid, v, d)
		if err == nil {
			return false
		}
		c.log.Warnf("bitmaps of node %s are not saved: %v", d.Node, err)
		for _, b := range d.Bitmaps {
			refused[b.Name] = fmt.Sprintf("it could not be saved when the guest stopped: %v", err)
		}
		return true
	})
	if err := c.checkStopped(ctx); err != nil {
		return 0, err
	}
	if err := c.kept.writeRefusals(c.guest, refused); err != nil {
		return 0, err
	}
	if alone != nil && len(refused) > 0 {
		return 0, alone
	}
	if len(saved.Disks) == 0 {
		return 0, nil
	}
	if err := c.checkAlone(ctx); err != nil { // somebody has begun meanwhile
		return 0, err
	}
	return len(saved.Disks), c.kept.write(c.guest, saved)
}

// unmoved makes sure that the volumes of a disk that is being saved stand still.
func unmoved(ctx context.Context, pid int, v *view, d savedDisk) error {
	again, err := v.volumes(ctx, pid, d.Node)
	if err == nil && !slices.EqualFunc(again, d.Volumes, volume.equal) {
		err = errors.New("somebody writes to it though the guest has stopped")
	}
	return err
}

// volumes reads the state of all that the bytes of a node lie in, backing images included.
func (v *view) volumes(ctx context.Context, pid int, name string) ([]volume, error) {
	n := v.nodes[name]
	if n == nil {
		return nil, fmt.Errorf("node %s is not there", name)
	}
	if len(n.children) == 0 {
		vol, err := readVolume(ctx, pid, n.driver, n.filename)
		return []volume{vol}, err
	}
	var all []volume
	for _, edge := range slices.Sorted(maps.Keys(n.children)) {
		volumes, err := v.volumes(ctx, pid, n.children[edge])
		if err != nil {
			return nil, err
		}
		all = append(all, volumes...)
	}
	return all, nil
}

// saveDisk copies the bitmaps of one disk into a sidecar image.
func (c *carrier) saveDisk(ctx context.Context, v *view, n *node, i, pid int, blocked error) (d savedDisk, err error) {
	if blocked != nil {
		return d, blocked
	}
	d = savedDisk{Node: n.name, Driver: n.driver, Window: windowOf(n), Size: n.size, Sidecar: sidecarName(i)}
	if d.Volumes, err = v.volumes(ctx, pid, n.name); err != nil {
		return d, err
	}
	path, err := c.makeSidecar(ctx, d)
	if err != nil {
		return d, err
	}
	side := nodeName(keepPrefix, i)
	var actions []qmp.Action
	for _, b := range n.info.DirtyBitmaps {
		if !tracked(b) {
			continue
		}
		if b.Busy {
			return d, fmt.Errorf("bitmap %s is in use by another job: %w", b.Name, ErrBusy)
		}
		d.Bitmaps = append(d.Bitmaps, savedBitmap{b.Name, b.Granularity, b.Count})
		actions = append(actions, addBitmap(side, b.Name, b.Granularity, true), qmp.BitmapMerge(side, b.Name, qmp.BitmapRef{Node: n.name, Name: b.Name}))
	}
	options := imageOptions(side, map[string]any{"driver": "file", "node-name": side + fileSuffix, "filename": path}, false)
	if err := c.qmp.BlockdevAdd(ctx, options); err != nil {
		return d, fmt.Errorf("%w: can QEMU's user open files in %s?", err, c.kept.Dir)
	}
	defer func() { err = errors.Join(err, c.tidy(ctx, del(side))) }()
	if err := c.qmp.Transaction(ctx, actions...); err != nil {
		return d, err
	}
	// Bitmaps are stored when an image closes, and QEMU tells nobody when it can't; on the way to read-only it does.
	if err := c.qmp.BlockdevReopen(ctx, imageOptions(side, side+fileSuffix, true)); err != nil {
		return d, err
	}
	d.SHA256, err = syncSum(path)
	return d, err
}

// tidy does a step that takes something of ours out of the guest, also when the caller's time is over.
func (c *carrier) tidy(ctx context.Context, st step) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyLimit)
	defer cancel()
	return c.qmp.Execute(ctx, st.command, st.args, nil)
}

// addBitmap is qmp.BitmapAdd with a granularity. A persistent one is for a sidecar, and does not record.
func addBitmap(node, name string, granularity int64, sidecar bool) qmp.Action {
	a := qmp.Action{Type: "block-dirty-bitmap-add"}
	a.Data = map[string]any{"node": node, "name": name, "granularity": granularity, "persistent": sidecar, "disabled": sidecar}
	return a
}

// makeSidecar makes the empty image that a disk's bitmaps go into.
func (c *carrier) makeSidecar(ctx context.Context, d savedDisk) (string, error) {
	path, err := filepath.Abs(c.kept.path(c.guest, d.Sidecar))
	if err != nil {
		return "", err
	}
	if err := c.kept.FS.Step("create", path); err != nil {
		return "", err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	_, err = child.Run(ctx, time.Minute, c.qemuImg, "create", "-q", "-f", "qcow2", path, fmt.Sprint(d.Size))
	return path, err
}

// syncSum brings a file to disk and returns its SHA-256.
func syncSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return "", err
	}
	return sum(path)
}

func sum(path string) (string, error) {
	text, err := os.ReadFile(path) // a sidecar: 2 MiB for each TiB of the disk
	digest := sha256.Sum256(text)
	return hex.EncodeToString(digest[:]), err
}
