package pvetest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Vzdump is `vzdump VMID --mode snapshot`, as far as others see it: it holds its lock file, sets the VM's lock, copies the
// first disk of the running VM with a job of QEMU's, and gives both back. It returns the copy's path, a raw image.
func (n *Node) Vzdump(vmid int) (path string, err error) {
	f, err := os.OpenFile(n.VzdumpLock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	defer func() { _ = unix.Flock(int(f.Fd()), unix.LOCK_UN) }()
	id := strconv.Itoa(vmid)
	if code, _, errs := n.TryQM("set", id, "--lock", "backup"); code != 0 {
		return "", fmt.Errorf("ERROR: Backup of VM %d failed - %s", vmid, errs)
	}
	defer func() {
		if code, _, errs := n.TryQM("unlock", id); code != 0 {
			err = errors.Join(err, errors.New(errs))
		}
	}()
	vm := n.VM(vmid)
	disk := vm.Config().Disks[0]
	path = filepath.Join(n.Storage, "vzdump-"+id+".raw")
	job := map[string]any{"job-id": "vzdump", "device": "drive-" + disk.ID, "target": path, "format": "raw", "sync": "full"}
	if err := vm.Try("drive-backup", job, nil); err != nil {
		return "", err
	}
	for deadline := time.Now().Add(exitLimit); ; time.Sleep(10 * time.Millisecond) {
		var jobs []struct{ ID string }
		if err := vm.Try("query-jobs", nil, &jobs); err != nil {
			return "", err
		}
		if len(jobs) == 0 {
			return path, nil
		}
		if time.Now().After(deadline) {
			return "", errors.New("the job does not end")
		}
	}
}
