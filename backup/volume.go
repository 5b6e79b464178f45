package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/internal/child"
	"qmchain/internal/mountinfo"
)

// A volume is one file or block device that a disk's bytes lie in, in a state that can be told from any later one: two equal
// volumes are one and the same, and nobody has written to it in between.
//
// What proves that is the kernel's word, never a name:
//
//   - A file has an inode, a time of birth, and a change time (ctime) that each write moves and that no program can set back.
//     It holds until the host is restarted: what was written in place is on disk seconds before the file's new times are, even
//     with fdatasync(2), and a crash in between puts the times back (seen on ext4 and xfs). It does not hold where times are
//     kept in whole seconds or in memory for long (lazytime), nor on file systems that are not listed in fileSystems.
//   - A block device has counters of what was written and discarded, for as long as this instance of it exists, which the
//     kernel numbers (diskseq). A device-mapper device also has a table, which lvconvert and the like exchange below a device
//     that stays: merging an LVM snapshot back writes to its origin beside the counters, but not without another table, or, when
//     another snapshot is taken after it, another instance of the device below. A device that was deactivated, or a host that
//     was rebooted, has lost the proof. So has one that other hosts can write to: counters are the host's. Hence the short
//     list in local. ZFS volumes can be rolled back with their counters standing still, and are not on it.
//
// Nothing of this tells of somebody who writes below the volume: to the disk that a file system lies on, a partition of the
// device, or a storage system that puts a whole LUN back. Nor of one who has the kernel stop counting (queue/iostats) and go
// on, or writes past the block layer with commands of SCSI or NVMe (sg_format, nvme format). Nor of a file server that
// crashes, when a client has written just before: its times can be put back like those of a host.
type volume struct {
	Path   string        `json:"path"` // for people
	File   *fileState    `json:"file,omitempty"`
	Device []deviceState `json:"device,omitempty"` // the device itself, and those that it is made of
}

type fileState struct {
	Boot    string `json:"boot"` // the kernel's boot id
	Inode   uint64 `json:"inode"`
	Size    int64  `json:"size"`
	Born    stamp  `json:"born"`
	Written stamp  `json:"written"`
	Changed stamp  `json:"changed"`
}

// stamp is a file's time: seconds and nanoseconds, as the file system has them.
type stamp struct {
	Sec  int64  `json:"sec"`
	Nsec uint32 `json:"nsec"`
}

type deviceState struct {
	Boot     string `json:"boot"`     // the kernel's boot id
	Instance string `json:"instance"` // diskseq
	Size     string `json:"size"`     // sectors
	Counters string `json:"counters"` // sectors written, sectors discarded
	UUID     string `json:"uuid,omitempty"`
	Table    string `json:"table,omitempty"`
	// Backing is the file of a loop device, which can be written to beside it.
	Backing *fileState `json:"backing,omitempty"`
}

// equal reports whether nothing was written to the volume between two readings. Paths are not compared: a rename moves the
// change time.
func (v volume) equal(w volume) bool { return v.change(w) == "" }

// change says how a later reading of the volume differs; "": nothing was written in between.
func (v volume) change(later volume) string {
	switch {
	case v.File != nil && later.File != nil:
		if *v.File == *later.File {
			return ""
		}
		if v.File.Boot != later.File.Boot {
			return "the host was restarted, and a crash can put a file's times back"
		}
	case len(v.Device) == 0 || len(v.Device) != len(later.Device):
	default:
		for i, d := range v.Device {
			switch e := later.Device[i]; {
			case d.Boot != e.Boot:
				return "the host was restarted, and its devices do not remember writes"
			case d.Instance != e.Instance:
				return "its device was taken away while the guest was stopped, and with that what tells of writes"
			case !d.equal(e):
				return changed
			}
		}
		return ""
	}
	return changed
}

const changed = "it was written to or replaced while the guest was stopped"

func (d deviceState) equal(e deviceState) bool {
	if (d.Backing == nil) != (e.Backing == nil) || d.Backing != nil && *d.Backing != *e.Backing {
		return false
	}
	d.Backing, e.Backing = nil, nil
	return d == e
}

// errNoProof is wrapped where a volume can't be told from a later state of itself.
var errNoProof = errors.New("nothing proves that nobody writes to it")

// settleTime is how long a file must stand still before its times are taken: the kernel's clock for them ticks every 1 to
// 10 ms, and a second write in the same tick would not move them.
const settleTime = 50 * time.Millisecond

// readVolume reads the state of a file or block device that a QEMU process has open; driver is that of its node.
func readVolume(ctx context.Context, pid int, driver, path string) (volume, error) {
	v := volume{Path: path}
	if driver != "file" && driver != "host_device" {
		return v, fmt.Errorf("storage of the kind %s: %w", driver, errNoProof)
	}
	if !filepath.IsAbs(path) {
		// QEMU names it as its command line does, which is relative to a folder that need not be ours.
		return v, fmt.Errorf("%s is no absolute path: %w", path, errNoProof)
	}
	err := openIn(pid, path)
	if err == nil && driver == "file" {
		v.File, err = readFile(path)
	} else if err == nil {
		v.Device, err = readDevice(ctx, path)
	}
	if err != nil {
		return v, fmt.Errorf("volume %s: %w", path, err)
	}
	return v, nil
}

// openIn makes sure that a process has open what we see under a path: in another mount namespace, or on another host, the same
// path is another file.
func openIn(pid int, path string) error {
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		return err
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoProof, err)
	}
	for _, fd := range fds {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(dir, fd.Name()), &st) != nil {
			continue
		}
		device := st.Mode&unix.S_IFMT == unix.S_IFBLK && want.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == want.Rdev
		if device || st.Dev == want.Dev && st.Ino == want.Ino {
			return nil
		}
	}
	return fmt.Errorf("process %d, which listens on the QMP socket, does not have it open: %w", pid, errNoProof)
}

// fileSystems are the magic numbers (statfs(2)) of those whose times can be relied on.
var fileSystems = map[int64]string{
	0xef53: "ext4", 0x58465342: "xfs", 0x9123683e: "btrfs", 0x2fc12fc1: "zfs", 0x01021994: "tmpfs", 0xf2f52010: "f2fs",
	0x6969: "nfs", 0x794c7630: "overlay",
}

func readFile(path string) (*fileState, error) {
	// NFS asks the server for a file's times when it is opened. Without O_NONBLOCK the opening of a FIFO would hang.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &sfs); err != nil {
		return nil, fmt.Errorf("statfs: %w", err)
	}
	if fileSystems[sfs.Type&0xffffffff] == "" {
		return nil, fmt.Errorf("file system of the kind %#x: %w", sfs.Type, errNoProof)
	}
	var st unix.Statx_t
	flags := unix.AT_EMPTY_PATH | unix.AT_STATX_FORCE_SYNC
	if err := unix.Statx(int(f.Fd()), "", flags, unix.STATX_BASIC_STATS|unix.STATX_BTIME|unix.STATX_MNT_ID, &st); err != nil {
		return nil, fmt.Errorf("statx: %w", err)
	}
	switch lazy, err := lazyTimes(st.Mnt_id); {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("no regular file: %w", errNoProof)
	case err != nil:
		return nil, err
	case lazy:
		return nil, fmt.Errorf("mounted with lazytime: %w", errNoProof)
	}
	return fileStateOf(&st)
}

func fileStateOf(st *unix.Statx_t) (*fileState, error) {
	if st.Mtime.Nsec == 0 && st.Ctime.Nsec == 0 {
		return nil, fmt.Errorf("its file system keeps whole seconds only: %w", errNoProof)
	}
	boot, _, err := here()
	if err != nil {
		return nil, err
	}
	when := func(t unix.StatxTimestamp) stamp { return stamp{t.Sec, t.Nsec} }
	return &fileState{Boot: boot, Inode: st.Ino, Size: int64(st.Size), Born: when(st.Btime), Written: when(st.Mtime), Changed: when(st.Ctime)}, nil
}

// lazyTimes reports whether a mount keeps times in memory, where a crash of the host loses them.
func lazyTimes(mount uint64) (bool, error) {
	mounts, err := mountinfo.Read()
	if err != nil {
		return false, err
	}
	for _, m := range mounts {
		if m.ID == strconv.FormatUint(mount, 10) {
			return slices.Contains(strings.Split(m.Options, ","), "lazytime"), nil
		}
	}
	return false, fmt.Errorf("its mount is not known: %w", errNoProof)
}

const maxDevices = 64 // that one device is made of

func readDevice(ctx context.Context, path string) ([]deviceState, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil, fmt.Errorf("no block device: %w", errNoProof)
	}
	if err := writeBack(ctx, path); err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return nil, err
	}
	return readDeviceAt(ctx, dir)
}

// readDeviceAt reads the state of the device that has that folder in sysfs.
// writeBackLimit is long for what a guest that has stopped has left in the page cache: nothing.
const writeBackLimit = 5 * time.Second

// writeBack has the kernel write what the page cache has of a device. What was written only there is not in the counters yet.
func writeBack(ctx context.Context, path string) error {
	done := make(chan error, 1)
	go func() { // a device can hang
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(unix.Fsync(fd), unix.Close(fd))
		}
		done <- err
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(writeBackLimit):
		err = errors.New("it does not answer")
	}
	if err != nil {
		return fmt.Errorf("device %s: %w: what was written to it can't be counted: %w", path, errNoProof, err)
	}
	return nil
}

func readDeviceAt(ctx context.Context, dir string) (states []deviceState, err error) {
	err = eachDevice(dir, func(dir string) error {
		if len(states) == maxDevices {
			return fmt.Errorf("made of more than %d devices: %w", maxDevices, errNoProof)
		}
		state, err := deviceAt(ctx, dir)
		// The counters of what it is made of move for others' sake. That these are local, and still the same, is what counts.
		if len(states) > 0 {
			state.Counters, state.Backing = "", nil
		}
		states = append(states, state)
		return err
	})
	return states, err
}

// eachDevice calls f for a block device's folder in sysfs, and for those of the devices that it is made of.
func eachDevice(dir string, f func(dir string) error) error {
	if err := f(dir); err != nil {
		return err
	}
	slaves, err := os.ReadDir(filepath.Join(dir, "slaves")) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, s := range slaves {
		slave, err := filepath.EvalSymlinks(filepath.Join(dir, "slaves", s.Name()))
		if err != nil {
			return err
		}
		if err := eachDevice(slave, f); err != nil {
			return err
		}
	}
	if len(slaves) == 0 {
		return local(dir)
	}
	return nil
}

// local makes sure that no other host can write to a device.
func local(dir string) error {
	name := filepath.Base(dir)
	switch {
	case strings.HasPrefix(name, "zd"):
		return fmt.Errorf("device %s is a ZFS volume, and can be rolled back unseen: %w", name, errNoProof)
	case strings.HasPrefix(name, "loop"), strings.HasPrefix(name, "ram"), strings.HasPrefix(name, "zram"):
		return nil
	case strings.Contains(dir, "/nvme/") && strings.Contains(dir, "/pci"), strings.Contains(dir, "/ata"):
		return nil
	}
	return fmt.Errorf("device %s may not be this host's alone: %w", name, errNoProof)
}

// deviceAt reads a device's state. The fields of its stat file are described in the kernel's Documentation/block/stat.rst.
func deviceAt(ctx context.Context, dir string) (d deviceState, err error) {
	disk := dir
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		disk = filepath.Dir(dir)
	}
	read := func(dir, name string) string {
		text, readErr := os.ReadFile(filepath.Join(dir, name))
		if readErr != nil && err == nil {
			err = fmt.Errorf("device %s: %w: %w", filepath.Base(dir), errNoProof, readErr)
		}
		return strings.TrimSpace(string(text))
	}
	if d.Boot, _, err = here(); err != nil {
		return d, err
	}
	d.Instance, d.Size = read(disk, "diskseq"), read(dir, "size")
	counters, counting := strings.Fields(read(dir, "stat")), read(disk, "queue/iostats")
	switch {
	case err != nil:
		return d, err
	case len(counters) < 15 || counting != "1":
		return d, fmt.Errorf("device %s does not count its writes: %w", filepath.Base(dir), errNoProof)
	}
	// Not how many writes: a flush, such as writeBack's, counts as one.
	d.Counters = counters[6] + " " + counters[13]
	if _, statErr := os.Stat(filepath.Join(dir, "dm")); statErr == nil {
		d.UUID = read(dir, "dm/uuid")
		table, err := child.Run(ctx, 5*time.Second, "dmsetup", "table", read(dir, "dm/name"))
		if err != nil || d.UUID == "" {
			return d, fmt.Errorf("device %s: %w: no table: %w", filepath.Base(dir), errNoProof, err)
		}
		d.Table = string(table)
	}
	if file, readErr := os.ReadFile(filepath.Join(dir, "loop/backing_file")); readErr == nil {
		if d.Backing, err = readFile(strings.TrimSuffix(string(file), "\n")); err != nil {
			return d, fmt.Errorf("device %s: its file: %w", filepath.Base(dir), err)
		}
	}
	return d, err
}
