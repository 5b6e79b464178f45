package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"qmchain/chain"
	"qmchain/internal/child"
	"qmchain/qmp"
)

// OfflineImage is a disk of a stopped guest. Its format is always told, never found out: a guest can write another
// format's header into a raw disk.
type OfflineImage struct {
	Disk   string
	Format string // "qcow2" or "raw"
	Path   string
}

// ParseOfflineImage reads DISK=FORMAT:PATH.
func ParseOfflineImage(s string) (OfflineImage, error) {
	disk, rest, ok := strings.Cut(s, "=")
	format, path, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 || path == "" || format != "qcow2" && format != "raw" {
		return OfflineImage{}, fmt.Errorf("%q is not DISK=FORMAT:PATH with the format qcow2 or raw, such as scsi0=qcow2:/images/a.qcow2", s)
	}
	return OfflineImage{disk, format, path}, chain.CheckDiskName(disk)
}

// ErrInUse is wrapped where an image of a guest that should be stopped is in use.
var ErrInUse = errors.New("in use")

const (
	daemonStartLimit = 20 * time.Second
	daemonStopLimit  = time.Minute
)

// daemon is a qemu-storage-daemon that has the images of a stopped guest open, for writing as their bitmaps change. It holds
// QEMU's locks on them, so that the guest can't start meanwhile.
type daemon struct {
	dir     string
	socket  string
	process *child.Process
}

// imageNode is the name of a disk's node in the daemon.
func imageNode(i int) string { return fmt.Sprintf("disk%d", i) }

func startDaemon(ctx context.Context, cfg Config) (_ *daemon, err error) {
	d := &daemon{}
	if d.dir, err = os.MkdirTemp("", "qmchain-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = d.stop()
		}
	}()
	d.socket = filepath.Join(d.dir, "qmp")
	args := []string{"--chardev", "socket,id=qmp,server=on,wait=off,path=" + d.socket, "--monitor", "chardev=qmp"}
	for i, image := range cfg.Offline {
		path, err := filepath.Abs(image.Path)
		if err != nil {
			return nil, err
		}
		fi, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", image.Disk, err)
		}
		protocol := "file"
		if fi.Mode()&os.ModeDevice != 0 {
			protocol = "host_device"
		}
		// In QEMU's option syntax a comma in a value is written twice.
		args = append(args, "--blockdev", fmt.Sprintf("driver=%s,node-name=%s,file.driver=%s,file.filename=%s", image.Format, imageNode(i), protocol, strings.ReplaceAll(path, ",", ",,")))
	}
	if d.process, err = child.Start("qemu-storage-daemon", args...); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, daemonStartLimit)
	defer cancel()
	for {
		if _, err := os.Stat(d.socket); err == nil {
			// The socket's file comes before somebody listens on it, and that before the images: it answers when all are open.
			client, err := qmp.Dial(ctx, d.socket)
			if err == nil {
				return d, client.Close()
			}
			if !errors.Is(err, qmp.ErrDisconnected) && !errors.Is(err, syscall.ECONNREFUSED) {
				return nil, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("qemu-storage-daemon: %w", ctx.Err())
		case <-d.process.Done():
			err := d.process.Err()
			if err != nil && strings.Contains(err.Error(), "lock") {
				return nil, fmt.Errorf("an image is %w, does the guest run? %w", ErrInUse, err)
			}
			return nil, fmt.Errorf("qemu-storage-daemon ended at once: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// stop ends the daemon in an orderly way, which is when bitmaps are stored in the images, and removes its folder.
func (d *daemon) stop() error {
	var err error
	if d.process != nil {
		// At a SIGTERM the daemon sets a flag, and misses it where it was just about to wait for something to happen.
		err = d.process.StopAgain(daemonStopLimit, time.Second)
	}
	return errors.Join(err, os.RemoveAll(d.dir))
}

// offlineDisks are the disks of a stopped guest.
func (v *view) offlineDisks() ([]Disk, error) {
	var disks []Disk
	seen := make(map[string]bool)
	for i, image := range v.images {
		n := v.nodes[imageNode(i)]
		if n == nil {
			return nil, fmt.Errorf("disk %s: its node is gone", image.Disk)
		}
		if seen[image.Disk] {
			return nil, fmt.Errorf("disk %s is named twice", image.Disk)
		}
		seen[image.Disk] = true
		disks = append(disks, Disk{
			Name: image.Disk, Size: n.size, Driver: n.driver, File: image.Path, allocated: min(n.info.Image.ActualSize, n.size),
			top: n.name, below: n.name, format: n.name, bitmaps: n.info.DirtyBitmaps, compat: compatOf(n.info),
			snapshots: v.snapshots[n.name],
		})
	}
	return disks, nil
}
