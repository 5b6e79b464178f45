package proxmox

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// What can be wrong with a VM or its host.
var (
	// ErrNoHost: there is no PVE here, or its cluster file system (pve-cluster.service) is not mounted.
	ErrNoHost = errors.New("no Proxmox VE host")
	// ErrNotFound: there is no such VM, pool or tag.
	ErrNotFound = errors.New("not found")
	// ErrElsewhere: the VM is another node's. The error's text says which.
	ErrElsewhere = errors.New("on another node")
	// ErrLocked: PVE has locked the VM's configuration. The error's text says what for.
	ErrLocked = errors.New("locked")
	// ErrBusy: PVE is doing something with the VM, or with all of them, and did not end within its time.
	ErrBusy = errors.New("busy")
	// ErrChanged: somebody else changed the configuration meanwhile.
	ErrChanged = errors.New("changed by somebody else meanwhile")
)

// VMID is the number of a VM, unique in its cluster.
type VMID int

// ParseVMID reads a VMID: 100 to 999999999, as PVE has them.
func ParseVMID(s string) (VMID, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 100 || n > 999_999_999 || strconv.Itoa(n) != s {
		return 0, fmt.Errorf("%q is not a VMID: it must be a number from 100 to 999999999", s)
	}
	return VMID(n), nil
}

func (v VMID) String() string { return strconv.Itoa(int(v)) }

// MarshalText makes it a string in JSON, as guests' names are.
func (v VMID) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText is ParseVMID, for command lines and JSON.
func (v *VMID) UnmarshalText(text []byte) error {
	id, err := ParseVMID(string(text))
	*v = id
	return err
}

// Host is where a PVE node has its things.
type Host struct {
	Etc        string // the cluster's file system: /etc/pve
	Run        string // pid files and sockets of VMs: /var/run/qemu-server
	Events     string // qmeventd's socket: /var/run/qmeventd.sock
	VzdumpLock string // locked with flock(2) while vzdump works: /var/run/vzdump.lock
	Program    string // qm; if empty, /usr/sbin/qm, else qm on PATH

	reads *etcReads // nil: the usual patience, and no bound on what hangs
}

// Local is the node that this runs on.
func Local() Host {
	return Host{
		Etc:        "/etc/pve",
		Run:        "/var/run/qemu-server",
		Events:     "/var/run/qmeventd.sock",
		VzdumpLock: "/var/run/vzdump.lock",
		reads:      newEtcReads(patience),
	}
}

// Node is the node's name, or "" where the cluster's file system does not tell.
func (h Host) Node() string {
	// Both are links into nodes/NAME.
	for _, link := range []string{"local", "qemu-server"} {
		target, err := h.readlink(filepath.Join(h.Etc, link))
		if err != nil {
			continue
		}
		if _, name, found := strings.Cut(filepath.ToSlash(target), "nodes/"); found {
			name, _, _ = strings.Cut(name, "/")
			return name
		}
	}
	return ""
}

// ConfigPath is the VM's configuration file, if it is this node's.
func (h Host) ConfigPath(vmid VMID) string {
	return filepath.Join(h.Etc, "qemu-server", vmid.String()+".conf")
}

// FirewallPath is the file of the VM's firewall rules. It is there only if the VM has some.
func (h Host) FirewallPath(vmid VMID) string {
	return filepath.Join(h.Etc, "firewall", vmid.String()+".fw")
}

// Config reads the VM's configuration. Its errors are ErrNotFound, ErrElsewhere, ErrNoHost, or those of reading, ErrHung among them.
func (h Host) Config(vmid VMID) (*Config, error) {
	text, err := h.readFile(h.ConfigPath(vmid))
	switch {
	case err == nil:
		return ParseConfig(vmid, text), nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, h.missing(vmid)
	}
	return nil, fmt.Errorf("VM %s: %w", vmid, err)
}

// missing says where the VM is that has no configuration here.
func (h Host) missing(vmid VMID) error {
	if err := h.check(); err != nil {
		return err
	}
	for _, kind := range []string{"qemu-server", "lxc"} {
		found, err := h.glob("nodes", "*", kind, vmid.String()+".conf")
		if err != nil {
			return fmt.Errorf("VM %s: %w", vmid, err)
		}
		if len(found) == 0 {
			continue
		}
		node := filepath.Base(filepath.Dir(filepath.Dir(found[0])))
		switch {
		case kind == "lxc":
			return fmt.Errorf("%s is a container on node %s, not a VM: %w", vmid, node, ErrNotFound)
		case node == h.Node():
			// It came here between the two looks.
			return fmt.Errorf("VM %s: %w", vmid, ErrChanged)
		}
		return fmt.Errorf("VM %s is on node %s: %w", vmid, node, ErrElsewhere)
	}
	return fmt.Errorf("VM %s: %w", vmid, ErrNotFound)
}

// check tells whether there is a PVE.
func (h Host) check() error {
	_, err := h.stat(filepath.Join(h.Etc, "qemu-server"))
	switch {
	case errors.Is(err, ErrHung):
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrNoHost, err)
	}
	return nil
}

// VMIDs lists this node's VMs, in ascending order.
func (h Host) VMIDs() ([]VMID, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	entries, err := h.readDir(filepath.Join(h.Etc, "qemu-server"))
	if err != nil {
		return nil, fmt.Errorf("VMs of this node: %w", err)
	}
	var ids []VMID
	for _, e := range entries {
		name, found := strings.CutSuffix(e.Name(), ".conf")
		if id, err := ParseVMID(name); found && err == nil {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}
