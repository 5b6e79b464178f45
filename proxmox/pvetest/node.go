package pvetest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"qmchain/internal/testenv"
)

// Node is a node of a cluster. Its exported fields may be changed before the first `qm`.
type Node struct {
	Dir  string // the folder of all that follows; short, as sockets are in it
	Name string // pve1

	Etc        string // etc/pve
	Run        string // run/qemu-server
	Events     string // run/qmeventd.sock
	VzdumpLock string // run/vzdump.lock
	Bin        string // the folder with qm
	Program    string // qm in there
	Storage    string // var/lib/vz, the storage local

	QEMU testenv.QEMU // starts the VMs
	PVE  int          // 8 or 9: the form of the command line
	// Guest makes VMs boot Linux (see testenv.Config); otherwise they halt.
	Guest bool
	// LockTimeout is how long qm waits for a VM's lock: 10 s.
	LockTimeout time.Duration

	tb       testenv.TB
	server   *server
	monitors *monitors

	mu     sync.Mutex
	vms    map[string]*testenv.VM
	faults func(at string) error // see SetFault
}

// Install makes a node, with the host's QEMU and PVE 9's command lines. All of it goes when the test ends.
func Install(tb testenv.TB) *Node {
	tb.Helper()
	// A socket's path holds 107 bytes, and a test's own temp folder has the test's name in it.
	dir, err := os.MkdirTemp("", "pve")
	if err != nil {
		tb.Fatalf("pvetest: %v", err)
	}
	n := &Node{
		Dir: dir, Name: "pve1",
		Etc:         filepath.Join(dir, "etc/pve"),
		Run:         filepath.Join(dir, "run/qemu-server"),
		Events:      filepath.Join(dir, "run/qmeventd.sock"),
		VzdumpLock:  filepath.Join(dir, "run/vzdump.lock"),
		Bin:         filepath.Join(dir, "bin"),
		Program:     filepath.Join(dir, "bin/qm"),
		Storage:     filepath.Join(dir, "var/lib/vz"),
		QEMU:        testenv.Host(tb),
		PVE:         9,
		LockTimeout: 10 * time.Second,
		tb:          tb, vms: map[string]*testenv.VM{},
	}
	// Registered first, it runs last: when QEMU has gone.
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("pvetest: %v", err)
		}
	})
	for _, d := range []string{
		n.configDir(n.Name), filepath.Join(n.Etc, "nodes", n.Name, "lxc"), filepath.Join(n.Etc, "firewall"), n.Run, n.Bin,
		filepath.Join(n.Storage, "images"), filepath.Join(n.Storage, "snippets"), filepath.Join(dir, "run/lock"),
	} {
		n.fatal(os.MkdirAll(d, 0o700))
	}
	n.fatal(os.Symlink("nodes/"+n.Name, filepath.Join(n.Etc, "local")))
	n.fatal(os.Symlink("nodes/"+n.Name+"/qemu-server", filepath.Join(n.Etc, "qemu-server")))
	n.fatal(n.serve())
	n.fatal(n.listenEvents())
	return n
}

func (n *Node) fatal(err error) {
	n.tb.Helper()
	if err != nil {
		n.tb.Fatalf("pvetest: %v", err)
	}
}

func (n *Node) configDir(node string) string {
	return filepath.Join(n.Etc, "nodes", node, "qemu-server")
}

func (n *Node) configPath(vmid string) string {
	return filepath.Join(n.configDir(n.Name), vmid+".conf")
}

// WriteConfig writes a VM's configuration file as it is, as an editor does.
func (n *Node) WriteConfig(vmid int, text string) {
	n.tb.Helper()
	n.fatal(writeFile(n.configPath(strconv.Itoa(vmid)), text))
}

// Config is the text of a VM's configuration file.
func (n *Node) Config(vmid int) string {
	n.tb.Helper()
	text, err := os.ReadFile(n.configPath(strconv.Itoa(vmid)))
	n.fatal(err)
	return string(text)
}

// AddVM writes a configuration, as PVE writes it, with the given lines added to what a VM needs, and makes the volumes of the storage local
// that it names.
func (n *Node) AddVM(vmid int, lines ...string) {
	n.tb.Helper()
	text := strings.Join(append([]string{
		"memory: 64", "name: vm" + strconv.Itoa(vmid), "ostype: l26", "scsihw: virtio-scsi-single",
		"smbios1: uuid=" + testenv.RandomUUID(), "vmgenid: " + testenv.RandomUUID(),
	}, lines...), "\n") + "\n"
	for _, d := range parseConf(text).drives() {
		if d.cdrom() || filepath.IsAbs(d.volume) {
			continue
		}
		path := n.layout().volume(d.volume)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		size, err := d.size()
		n.fatal(err)
		n.fatal(os.MkdirAll(filepath.Dir(path), 0o700))
		testenv.CreateDisk(n.tb, n.QEMU, path, d.format(), size)
	}
	n.WriteConfig(vmid, parseConf(text).String())
}

// MoveAway puts a VM's configuration to another node, as a migration ends.
func (n *Node) MoveAway(vmid int, node string) {
	n.tb.Helper()
	n.fatal(os.MkdirAll(n.configDir(node), 0o700))
	id := strconv.Itoa(vmid)
	n.fatal(os.Rename(n.configPath(id), filepath.Join(n.configDir(node), id+".conf")))
}

// AddContainer adds a container's configuration.
func (n *Node) AddContainer(vmid int) {
	n.tb.Helper()
	n.fatal(writeFile(filepath.Join(n.Etc, "nodes", n.Name, "lxc", strconv.Itoa(vmid)+".conf"), "hostname: ct\n"))
}

// AddHA adds a VM to the resources of PVE's high availability, with that state. Nothing here is done about it.
func (n *Node) AddHA(vmid int, state string) {
	n.tb.Helper()
	n.fatal(os.MkdirAll(filepath.Join(n.Etc, "ha"), 0o700))
	f, err := os.OpenFile(filepath.Join(n.Etc, "ha/resources.cfg"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	n.fatal(err)
	_, err = fmt.Fprintf(f, "vm: %d\n\tstate %s\n\n", vmid, state)
	n.fatal(err)
	n.fatal(f.Close())
}

// AddPool adds a pool to the users' configuration.
func (n *Node) AddPool(name string, vmids ...int) {
	n.tb.Helper()
	members := make([]string, len(vmids))
	for i, id := range vmids {
		members[i] = strconv.Itoa(id)
	}
	f, err := os.OpenFile(filepath.Join(n.Etc, "user.cfg"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	n.fatal(err)
	_, err = fmt.Fprintf(f, "pool:%s:a comment:%s:local:\n", name, strings.Join(members, ","))
	n.fatal(err)
	n.fatal(f.Close())
}

// VM is the running VM, for what a guest does. It fails the test if the VM was never started.
func (n *Node) VM(vmid int) *testenv.VM {
	n.tb.Helper()
	vm := n.vm(strconv.Itoa(vmid))
	if vm == nil {
		n.tb.Fatalf("pvetest: VM %d does not run", vmid)
	}
	return vm
}

// vm is the VM as it was last started, or nil.
func (n *Node) vm(vmid string) *testenv.VM {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.vms[vmid]
}

func (n *Node) setVM(vmid string, vm *testenv.VM) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.vms[vmid] = vm
}

// QM runs qm and fails the test if that fails.
func (n *Node) QM(args ...string) (stdout string) {
	n.tb.Helper()
	code, out, errs := n.TryQM(args...)
	if code != 0 {
		n.tb.Fatalf("pvetest: qm %s: exit code %d: %s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// TryQM runs qm.
func (n *Node) TryQM(args ...string) (code int, stdout, stderr string) {
	var out, errs strings.Builder
	code = n.qm(n.server.ctx, args, &out, &errs)
	return code, out.String(), errs.String()
}

// writeFile replaces a file at once, as pmxcfs does.
func writeFile(path, text string) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	if _, err := tmp.WriteString(text); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
