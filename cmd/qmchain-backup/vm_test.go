package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/internal/durable"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

// pve is a Proxmox VE node, and the program on it.
type pve struct {
	*pvetest.Node
	t      *testing.T
	host   node
	repo   string
	common []string // flags of all runs
	config string   // a configuration file
}

func newPVE(t *testing.T) *pve {
	t.Helper()
	n := pvetest.Install(t)
	p := &pve{Node: n, t: t, repo: t.TempDir(), host: node{
		Host:     proxmox.Host{Etc: n.Etc, Run: n.Run, Events: n.Events, VzdumpLock: n.VzdumpLock, Program: n.Program},
		Locks:    filepath.Join(n.Dir, "run/locks"),
		Sendmail: filepath.Join(n.Bin, "sendmail"),
	}}
	p.common = []string{"--repo", p.repo, "--fleece-dir", t.TempDir(), "--keep-dir", t.TempDir()}
	return p
}

// call runs the program in this process.
func (p *pve) call(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	env := cli.Env{Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }, Config: p.config}
	code = programOn(p.host, durable.FS{}).Run(p.t.Context(), args, env)
	checkJSON(p.t, args, out.Bytes())
	return code, out.String(), errs.String()
}

// run runs a backup.
func (p *pve) run(args ...string) (code int, stdout, stderr string) {
	return p.call(append(append([]string{"run"}, args...), p.common...)...)
}

// background begins a backup that takes some seconds, and returns when it has the VM's lock; wait awaits its end.
func (p *pve) background(vmid int, args ...string) (wait func() (code int, stdout, stderr string)) {
	p.t.Helper()
	type result struct {
		code           int
		stdout, stderr string
	}
	done := make(chan result, 1)
	go func() {
		code, stdout, stderr := p.run(append([]string{strconv.Itoa(vmid), "--speed-limit", "2MiB"}, args...)...)
		done <- result{code, stdout, stderr}
	}()
	p.await("the run's lock", func() bool { return p.lock(vmid) == "backup" && p.copying(vmid) })
	return func() (int, string, string) {
		r := <-done
		return r.code, r.stdout, r.stderr
	}
}

// copying tells whether a run is at its images.
func (p *pve) copying(vmid int) bool {
	found, _ := filepath.Glob(filepath.Join(p.repo, strconv.Itoa(vmid), "images", "*.qcow2")) // a valid pattern
	partial, _ := filepath.Glob(filepath.Join(p.repo, strconv.Itoa(vmid), ".*.partial"))
	return len(found) > 0 && len(partial) > 0
}

func (p *pve) await(what string, is func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// add adds a VM with a backup socket, its disk written to, and starts it.
func (p *pve) add(vmid int, lines ...string) {
	p.t.Helper()
	p.AddVM(vmid, append([]string{fmt.Sprintf("scsi0: local:%d/vm-%d-disk-0.qcow2,size=8M", vmid, vmid)}, lines...)...)
	p.socket(vmid)
	p.QM("start", strconv.Itoa(vmid))
	p.VM(vmid).IO("scsi0", fmt.Sprintf("write -P %d 0 6M", vmid%200+1))
}

func (p *pve) socket(vmid int) {
	p.t.Helper()
	if _, err := p.host.Host.AddSocket(p.t.Context(), proxmox.VMID(vmid), false); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pve) lock(vmid int) string {
	c, err := p.host.Host.Config(proxmox.VMID(vmid))
	if err != nil {
		return err.Error()
	}
	return c.Lock()
}

// point runs a backup that must succeed with that code, and returns the point and its disks' bytes.
func (p *pve) point(code int, vmid int, args ...string) (*chain.Manifest, map[string][]byte) {
	p.t.Helper()
	got, stdout, stderr := p.run(append([]string{strconv.Itoa(vmid)}, args...)...)
	if got != code {
		p.t.Fatalf("exit code %d, want %d: %s", got, code, stderr)
	}
	if lock := p.lock(vmid); lock != "" {
		p.t.Fatalf("the VM has the lock %s", lock)
	}
	return p.read(strings.TrimSpace(stdout))
}

// read reads the point GUEST/ID.
func (p *pve) read(name string) (*chain.Manifest, map[string][]byte) {
	p.t.Helper()
	guest, id, _ := strings.Cut(name, "/")
	text, err := os.ReadFile(filepath.Join(p.repo, guest, id, chain.ManifestFile))
	if err != nil {
		p.t.Fatal(err)
	}
	m, err := chain.DecodeManifest(text)
	if err != nil {
		p.t.Fatal(err)
	}
	return m, ledger.ReadPoint(p.t, p.QEMU, p.repo, guest, m.ID)
}

// holds compares a disk's first byte, which the tests write.
func (p *pve) holds(disks map[string][]byte, disk string, want byte) {
	p.t.Helper()
	if data := disks[disk]; len(data) == 0 || data[0] != want {
		p.t.Errorf("disk %s does not begin with %d", disk, want)
	}
}

func (p *pve) says(text string, parts ...string) {
	p.t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			p.t.Errorf("%q is not said: %s", part, text)
		}
	}
}

// TestRunByVMID: all that a VMID tells, in both of PVE's forms.
func TestRunByVMID(t *testing.T) {
	t.Parallel()
	for _, pveVersion := range []int{8, 9} {
		t.Run(fmt.Sprintf("PVE %d", pveVersion), func(t *testing.T) {
			t.Parallel()
			p := newPVE(t)
			p.PVE = pveVersion
			p.AddStorage("lvmthin", "thin")
			lines := []string{
				"bios: ovmf", "efidisk0: local:110/vm-110-disk-3.qcow2,efitype=4m,pre-enrolled-keys=0,size=528K",
				"virtio1: thin:vm-110-disk-1,size=4M", "sata2: local:110/vm-110-disk-2.qcow2,backup=0,size=2M",
				"tpmstate0: thin:vm-110-disk-4,size=4M,version=v2.0", "ide0: none,media=cdrom",
			}
			tpm := filepath.Join(p.Storage, "volumes/thin/vm-110-disk-4")
			if err := os.MkdirAll(filepath.Dir(tpm), 0o700); err != nil {
				t.Fatal(err)
			}
			state := bytes.Repeat([]byte("tpm!"), 1<<20)
			if err := os.WriteFile(tpm, state, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p.host.Host.FirewallPath(110), []byte("[OPTIONS]\nenable: 1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			p.add(110, lines...)
			p.VM(110).IO("virtio1", "write -P 9 0 64k")
			m, disks := p.point(0, 110)
			var names []string
			for _, d := range m.Disks {
				names = append(names, d.Name)
			}
			if got := strings.Join(names, " "); !strings.Contains(got, "scsi0") || !strings.Contains(got, "virtio1") || !strings.Contains(got, "efidisk0") || strings.Contains(got, "sata2") {
				t.Errorf("disks %s", got)
			}
			p.holds(disks, "scsi0", 111)
			p.holds(disks, "virtio1", 9)
			c, err := p.host.Host.Config(110)
			if err != nil {
				t.Fatal(err)
			}
			if m.Guest.Name != "110" || m.Guest.UUID != c.UUID() || m.Guest.VMName != "vm110" {
				t.Errorf("guest %+v", m.Guest)
			}
			dir := filepath.Join(p.repo, "110", string(m.ID), repo.GuestFilesFolder)
			for name, want := range map[string]string{"110.conf": c.Portable(), "110.fw": "[OPTIONS]\nenable: 1\n", "tpmstate0.raw": string(state)} {
				path := filepath.Join(dir, name)
				data, err := os.ReadFile(path)
				if err != nil || string(data) != want {
					t.Errorf("%s holds %.200q, %v", name, data, err)
				}
				if fi, err := os.Stat(path); err == nil && fi.Mode().Perm() != 0o600 {
					t.Errorf("%s: mode %v", name, fi.Mode())
				}
			}
			if strings.Contains(c.Portable(), "lock:") {
				t.Error("the lock is in the saved configuration")
			}
			p.VM(110).IO("scsi0", "write -P 42 0 64k")
			m, disks = p.point(0, 110)
			if m.Level() != chain.Inc {
				t.Errorf("level %s: %+v", m.Level(), m.Disks)
			}
			p.holds(disks, "scsi0", 42)
			if m, _ := p.point(0, 110, "--disk", "sata2"); len(m.Disks) != 1 || m.Disks[0].Name != "sata2" {
				t.Errorf("a disk with backup=0 that was asked for: %+v", m.Disks)
			}

			if code, stdout, stderr := p.call("info", "110"); code != 0 || !strings.Contains(stdout, "virtio1") {
				t.Errorf("info: exit code %d: %s%s", code, stdout, stderr)
			}
			if code, stdout, stderr := p.call("estimate", "110", "--repo", p.repo); code != 0 || !strings.Contains(stdout, "inc") || !strings.Contains(stdout, "backup=0") {
				t.Errorf("estimate: exit code %d: %s%s", code, stdout, stderr)
			}
			p.AddVM(111, "scsi0: local:111/vm-111-disk-0.qcow2,size=1M") // stopped
			if code, stdout, stderr := p.call("estimate", "--all", "--repo", p.repo); code != 0 || !strings.Contains(stdout, "110:") || strings.Contains(stdout, "111") {
				t.Errorf("estimate --all: exit code %d: %s%s", code, stdout, stderr)
			}
			if code, stdout, stderr := p.call("cleanup", "110", "--keep-dir", p.repo); code != 0 || strings.Count(stdout, "qmchain:") != 4 {
				t.Errorf("cleanup: exit code %d: %s%s", code, stdout, stderr)
			}
			if m, _ := p.point(4, 110); m.Level() != chain.Full {
				t.Errorf("after cleanup: %s", m.Level())
			}
		})
	}
}

// TestVMIDErrors: what can't be backed up is refused, with the reason, and nothing is changed.
func TestVMIDErrors(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)
	p.AddVM(111, "scsi0: local:111/vm-111-disk-0.qcow2,size=1M")
	p.QM("start", "111")
	p.AddVM(112, "template: 1")
	p.AddVM(113, "scsi0: ceph:vm-113-disk-0,size=1M")
	p.AddVM(114, "scsi0: local:114/vm-114-disk-0.vmdk,format=vmdk,size=1M")
	p.AddStorage("rbd", "ceph")
	p.AddVM(115, "scsi0: local:115/vm-115-disk-0.qcow2,size=1M")
	p.MoveAway(115, "pve2")
	p.AddContainer(105)
	before := p.Config(110)
	for _, test := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"111"}, 2, "no backup socket"},
		{[]string{"112"}, 2, "a template"},
		{[]string{"113"}, 1, "neither a file nor a block device"},
		{[]string{"114"}, 1, "vmdk"},
		{[]string{"115"}, 2, "on node pve2"},
		{[]string{"105"}, 2, "a container"},
		{[]string{"999"}, 2, "not found"},
		{[]string{"99"}, 80, "VMID"},
		{[]string{"110", "--socket", "/run/x"}, 80, "in one way"},
		{[]string{"110", "--name", "111"}, 80, "a name of digits alone is a VMID"},
		{[]string{"110", "111", "--name", "web"}, 80, "--name is for a single guest"},
		{[]string{"110", "--all"}, 80, "in one way"},
		{nil, 80, "say which guest"},
		{[]string{"--pool", "none"}, 2, "pool none"},
		{[]string{"--tag", "none"}, 2, "tag none"},
		{[]string{"110", "--disk", "scsi9"}, 2, "scsi9"},
		{[]string{"110", "--agent-socket", "/run/x"}, 80, "through Proxmox VE"},
		{[]string{"110", "--jobs", "0"}, 80, "--jobs"},
		{[]string{"110", "--mail-to", "a b"}, 80, "--mail-to"},
	} {
		code, stdout, stderr := p.run(append(test.args, "--lock-wait", "0s")...)
		if code != test.code || !strings.Contains(stderr, test.text) || stdout != "" {
			t.Errorf("run %q: exit code %d: %s%s", test.args, code, stdout, stderr)
		}
	}
	for _, lock := range []string{"backup", "snapshot", "snapshot-delete", "migrate", "clone", "rollback", "suspended"} {
		p.WriteConfig(110, "lock: "+lock+"\n"+before)
		code, _, stderr := p.run("110", "--lock-wait", "0s")
		if code != 3 || !strings.Contains(stderr, "locked ("+lock+")") || p.lock(110) != lock {
			t.Errorf("with lock %s: exit code %d, lock %q: %s", lock, code, p.lock(110), stderr)
		}
	}
	p.WriteConfig(110, before)
	if points, _ := filepath.Glob(filepath.Join(p.repo, "*", "2*")); len(points) > 0 {
		t.Errorf("points: %v", points)
	}
	// A lock that goes in time is waited for.
	p.WriteConfig(110, "lock: migrate\n"+before)
	time.AfterFunc(time.Second, func() { p.TryQM("unlock", "110") })
	p.point(0, 110, "--lock-wait", "20s")
	// A VM without its configuration's disk: QEMU could not plug it in, say.
	p.WriteConfig(110, before+"scsi5: local:110/vm-110-disk-5.qcow2,size=1M\n")
	code, _, stderr := p.run("110")
	if code != 4 || !strings.Contains(stderr, "disk scsi5 is in the VM's configuration") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// TestClone: a clone has the args, and takes over the socket, of the VM that it was cloned from.
func TestClone(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)
	p.point(0, 110)
	p.QM("stop", "110")
	p.QM("clone", "110", "112")
	p.QM("start", "110")
	p.QM("start", "112") // listens on 110's socket from now on
	p.VM(112).IO("scsi0", "write -P 66 0 64k")
	code, _, stderr := p.run("112")
	if code != 2 {
		t.Errorf("the clone: exit code %d", code)
	}
	p.says(stderr, "it is that of VM 110", "qmchain-args add")
	for _, command := range [][]string{{"run", "110"}, {"estimate", "110"}, {"doctor", "110", "--fix"}, {"cleanup", "110"}} {
		if code, _, stderr := p.call(append(command, "--repo", p.repo)...); code != 1 || !strings.Contains(stderr, "somebody else answers") {
			t.Errorf("%s: exit code %d: %s", command, code, stderr)
		}
	}
	if code, _, stderr := p.call("info", "110"); code != 1 || !strings.Contains(stderr, "somebody else answers") {
		t.Errorf("info: exit code %d: %s", code, stderr)
	}
	if p.lock(110)+p.lock(112) != "" {
		t.Error("a VM was left locked")
	}
	p.socket(112)
	for _, command := range []string{"stop", "start"} { // each takes the other's socket away when it stops
		p.QM(command, "110")
		p.QM(command, "112")
	}
	p.VM(110).IO("scsi0", "write -P 77 0 64k")
	m, disks := p.point(0, 110)
	if m.Level() != chain.Inc {
		t.Errorf("level %s: %s", m.Level(), m.Disks[0].Reason)
	}
	p.holds(disks, "scsi0", 77)
	m, disks = p.point(0, 112)
	if m.Guest.Name != "112" || m.Guest.VMName != "Copy-of-VM-vm110" {
		t.Errorf("guest %+v", m.Guest)
	}
	p.holds(disks, "scsi0", 66)

	// The VMID is used anew: neither VM's points are mixed with the other's.
	p.QM("stop", "110")
	p.QM("destroy", "110")
	p.add(110)
	if code, _, stderr := p.run("110"); code != 1 || !strings.Contains(stderr, "--adopt") {
		t.Errorf("a new VM 110: exit code %d: %s", code, stderr)
	}
	if p.lock(110) != "" {
		t.Error("left locked")
	}
	if m, _ := p.point(0, 110, "--name", "new-110"); m.Guest.Name != "new-110" {
		t.Errorf("guest %+v", m.Guest)
	}
	p.QM("stop", "110")
	if code, _, stderr := p.run("110"); code != 1 || !strings.Contains(stderr, "--adopt") {
		t.Errorf("the new VM 110, stopped: exit code %d: %s", code, stderr)
	}
	if m, _ := p.point(4, 110, "--adopt"); m.Level() != chain.Full {
		t.Errorf("adopted: %s", m.Level())
	}
}

// TestStoppedVM: its volumes are backed up, and nobody starts it meanwhile.
func TestStoppedVM(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.AddStorage("zfspool", "tank")
	cloudInit := filepath.Join(p.Storage, "images/110/vm-110-cloudinit.qcow2")
	if err := os.MkdirAll(filepath.Dir(cloudInit), 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.CreateDisk(t, p.QEMU, cloudInit, "qcow2", 1<<20)
	p.add(110, "virtio1: tank:vm-110-disk-1,size=1M", "sata2: local:110/vm-110-disk-2.qcow2,backup=0,size=1M",
		"ide2: local:110/vm-110-cloudinit.qcow2,media=cdrom,size=1M")
	p.point(0, 110)
	p.VM(110).IO("scsi0", "write -P 21 0 64k")
	p.QM("stop", "110")
	m, disks := p.point(0, 110) // the raw disk's tracking has gone with QEMU
	if len(m.Disks) != 2 || m.Disks[0].Level != chain.Inc || m.Disks[1].Level != chain.Full {
		t.Errorf("disks %+v", m.Disks)
	}
	p.holds(disks, "scsi0", 21)
	if _, err := os.Stat(filepath.Join(p.repo, "110", string(m.ID), "guest/110.conf")); err != nil {
		t.Error(err)
	}
	wait := p.background(110, "--level", "full", "--exclude-disk", "virtio1")
	if code, _, errs := p.TryQM("start", "110"); code == 0 || !strings.Contains(errs, "locked (backup)") {
		t.Errorf("a start in mid-run: %d %s", code, errs)
	}
	if code, _, stderr := wait(); code != 0 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	p.QM("start", "110")
	p.VM(110).IO("scsi0", "write -P 22 0 64k")
	m, disks = p.point(0, 110, "--disk", "scsi0")
	if m.Level() != chain.Inc {
		t.Errorf("back again: %s: %s", m.Level(), m.Disks[0].Reason)
	}
	p.holds(disks, "scsi0", 22)
	// A rollback makes a new vmgenid, and is possible once our bitmaps are gone.
	p.QM("stop", "110")
	if code, stdout, stderr := p.call("cleanup", "110", "--keep-dir", p.repo); code != 0 || strings.Count(stdout, "qmchain:") != 1 {
		t.Errorf("cleanup: exit code %d: %s%s", code, stdout, stderr)
	}
	if p.lock(110) != "" {
		t.Error("left locked")
	}
	p.WriteConfig(110, strings.Replace(p.Config(110), "vmgenid: ", "vmgenid: "+testenv.RandomUUID()+"\n#", 1))
	code, _, stderr := p.run("110", "--disk", "scsi0")
	if code != 4 || !strings.Contains(stderr, "a full instead of an increment") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// TestSnapshots: with our bitmaps where they stand in the way, cleanup makes a rollback possible; the next run says why it
// takes a full.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)
	p.point(0, 110)
	p.QM("stop", "110")
	p.QM("snapshot", "110", "before")
	if code, _, errs := p.TryQM("rollback", "110", "before"); code == 0 || !strings.Contains(errs, "bitmap") || p.lock(110) != "rollback" {
		t.Errorf("rollback over a persistent bitmap: %d, lock %q: %s", code, p.lock(110), errs)
	}
	if code, _, stderr := p.run("110", "--lock-wait", "0s"); code != 3 || !strings.Contains(stderr, "rollback") {
		t.Errorf("run: exit code %d: %s", code, stderr)
	}
	if code, stdout, stderr := p.call("cleanup", "110", "--keep-dir", p.repo); code != 0 || strings.Count(stdout, "qmchain:") != 1 {
		t.Errorf("cleanup: exit code %d: %s%s", code, stdout, stderr)
	}
	p.QM("unlock", "110")
	p.QM("rollback", "110", "before")
	p.QM("start", "110")
	if m, _ := p.point(4, 110); m.Level() != chain.Full || m.Disks[0].Tracking.Kind != chain.KindMemory {
		t.Errorf("after the rollback: %s, tracked in %s", m.Level(), m.Disks[0].Tracking.Kind)
	}
	if code, _, stderr := p.run("110", "--bitmaps", "persistent"); code != 0 || !strings.Contains(stderr, "`qm rollback` fails") {
		t.Errorf("persistent: exit code %d: %s", code, stderr)
	}
}

// TestMidRun: what happens to a VM while it is backed up.
func TestMidRun(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)

	wait := p.background(110, "--speed-limit", "1MiB") // ample for what is tried meanwhile
	if path, err := p.Vzdump(110); err == nil || !strings.Contains(err.Error(), "VM is locked (backup)") {
		t.Errorf("a vzdump in mid-run: %s, %v", path, err)
	}
	if code, _, errs := p.TryQM("set", "110", "--onboot", "1"); code == 0 || !strings.Contains(errs, "locked") {
		t.Errorf("qm set in mid-run: %d %s", code, errs)
	}
	if code, _, stderr := p.run("110", "--lock-wait", "0s"); code != 3 || !strings.Contains(stderr, "another run of ours") {
		t.Errorf("a second run: exit code %d: %s", code, stderr)
	}
	code, stdout, stderr := wait()
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	_, disks := p.read(strings.TrimSpace(stdout))
	p.holds(disks, "scsi0", 111)
	path, err := p.Vzdump(110)
	if err != nil {
		t.Fatal(err)
	}
	if dump, err := os.ReadFile(path); err != nil || !bytes.Equal(dump, disks["scsi0"]) {
		t.Errorf("vzdump's copy differs, %v", err)
	}
	if m, _ := p.point(0, 110); m.Level() != chain.Inc {
		t.Errorf("after vzdump: %s", m.Level())
	}

	// The guest powers off: QEMU is ours until the end.
	wait = p.background(110, "--level", "full")
	p.VM(110).PowerOff()
	if code, stdout, stderr = wait(); code != 0 && code != 1 {
		t.Errorf("power-off: exit code %d: %s", code, stderr)
	}
	if code == 0 {
		_, disks := p.read(strings.TrimSpace(stdout))
		p.holds(disks, "scsi0", 111)
	}
	p.await("QEMU's end", func() bool { return p.QM("status", "110") == "status: stopped\n" })
	if p.lock(110) != "" {
		t.Errorf("left locked: %s", p.lock(110))
	}
	t.Logf("a power-off in mid-run: exit code %d", code)
	if _, disks = p.point(0, 110); disks["scsi0"][0] != 111 {
		t.Error("the next point is wrong")
	}
}

// command is the program as a process of its own, on the node.
func (p *pve) command(args ...string) (*exec.Cmd, *bytes.Buffer) {
	p.t.Helper()
	self, err := os.Executable()
	if err != nil {
		p.t.Fatal(err)
	}
	text, err := json.Marshal(p.host)
	if err != nil {
		p.t.Fatal(err)
	}
	cmd, stderr := exec.Command(self, args...), new(bytes.Buffer)
	cmd.Env = append(os.Environ(), killAt+"=0", testNode+"="+string(text))
	cmd.Stderr = stderr
	cmd.WaitDelay = 10 * time.Second
	return cmd, stderr
}

// killed begins a run and kills it when it copies.
func (p *pve) killed(vmid int) {
	p.t.Helper()
	cmd, stderr := p.command(append([]string{"run", strconv.Itoa(vmid), "--level", "full", "--speed-limit", "1MiB"}, p.common...)...)
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.await("the run", func() bool { return p.copying(vmid) || cmd.ProcessState != nil })
	_ = cmd.Process.Kill()
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		p.t.Fatalf("%v: %s", err, stderr)
	}
	if p.lock(vmid) != "backup" {
		p.t.Fatalf("lock %q", p.lock(vmid))
	}
}

// TestKilledRun: a killed run's lock is given back, and nobody else's ever.
func TestKilledRun(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)
	p.point(0, 110)
	doctor := append([]string{"doctor", "110"}, p.common...)

	p.killed(110)
	p.point(0, 110)

	p.killed(110)
	code, stdout, stderr := p.call(doctor...)
	if code != 6 || !strings.Contains(stdout, "has left the VM's backup lock") || p.lock(110) != "backup" {
		t.Errorf("doctor: exit code %d: %s%s", code, stdout, stderr)
	}
	if code, stdout, stderr := p.call(append(doctor, "--fix")...); code != 0 || p.lock(110) != "" {
		t.Errorf("doctor --fix: exit code %d, lock %q: %s%s", code, p.lock(110), stdout, stderr)
	}
	p.point(0, 110)

	// Somebody has unlocked the VM since, and vzdump has locked it.
	p.killed(110)
	p.QM("unlock", "110")
	p.QM("set", "110", "--onboot", "1")
	p.QM("set", "110", "--lock", "backup")
	if code, _, stderr := p.run("110", "--lock-wait", "0s"); code != 3 || p.lock(110) != "backup" {
		t.Errorf("somebody else's lock: exit code %d, lock %q: %s", code, p.lock(110), stderr)
	}
	if code, stdout, _ := p.call(append(doctor, "--fix")...); code != 6 || p.lock(110) != "backup" {
		t.Errorf("doctor and somebody else's lock: exit code %d, lock %q: %s", code, p.lock(110), stdout)
	}
	p.QM("unlock", "110")
	p.point(0, 110)

	// Killed while it took the lock: what is there may be ours. Only the admin, with --fix, says so.
	record := fmt.Sprintf(`{"begun":%q}`, time.Now().Add(-time.Second).Format(time.RFC3339Nano))
	if err := os.WriteFile(filepath.Join(p.host.Locks, "110.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	p.QM("set", "110", "--lock", "backup")
	if code, _, stderr := p.run("110", "--lock-wait", "0s"); code != 3 || !strings.Contains(stderr, "killed while it took the lock") || p.lock(110) != "backup" {
		t.Errorf("exit code %d, lock %q: %s", code, p.lock(110), stderr)
	}
	if code, stdout, stderr := p.call(append(doctor, "--fix")...); code != 0 || p.lock(110) != "" {
		t.Errorf("doctor --fix: exit code %d, lock %q: %s%s", code, p.lock(110), stdout, stderr)
	}
	p.point(0, 110)

	// An interrupted run gives all back itself.
	cmd, _ := p.command(append([]string{"run", "110", "--level", "full", "--speed-limit", "1MiB"}, p.common...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.await("the run", func() bool { return p.copying(110) })
	_ = cmd.Process.Signal(os.Interrupt)
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 130 || p.lock(110) != "" {
		t.Errorf("interrupted: %v, lock %q", err, p.lock(110))
	}
}

// TestInHook: a hook script runs under the VM's lock file, where qm set would wait in vain.
func TestInHook(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(p.host)
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\n[ $2 = pre-stop ] || exit 0\n%s=0 %s='%s' %s run $1 --in-hook %s\n", killAt, testNode, text, self, strings.Join(p.common, " "))
	p.QM("set", "110", "--hookscript", p.AddSnippet("hook.sh", script))
	_, stdout, stderr := p.TryQM("stop", "110")
	i := strings.Index(stdout, "110/")
	if i < 0 || strings.Contains(stderr, "error") {
		t.Fatalf("no point: %s%s", stdout, stderr)
	}
	_, disks := p.read(strings.TrimSpace(stdout[i:]))
	p.holds(disks, "scsi0", 111)

	// Nothing would keep a stopped VM from being started meanwhile.
	if code, stdout, stderr := p.run("110", "--in-hook"); code != 3 || stdout != "" || !strings.Contains(stderr, "VM 110 has stopped") {
		t.Errorf("stopped: exit code %d: %s%s", code, stdout, stderr)
	}
}

// TestStoppedInactive: the volumes of a stopped VM that PVE has deactivated can't be read. In a group that is told of, and fails
// nothing.
func TestStoppedInactive(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.AddStorage("lvmthin", "thin")
	p.AddVM(110, "scsi0: thin:vm-110-disk-0,size=1M")
	p.AddVM(111, "scsi0: local:111/vm-111-disk-0.qcow2,size=1M")
	if err := os.RemoveAll(filepath.Join(p.Storage, "volumes/thin/vm-110-disk-0")); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := p.run("110")
	if code != 1 || stdout != "" {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	p.says(stderr, "not active on this node", "start the VM")
	report := filepath.Join(p.Dir, "report")
	code, stdout, stderr = p.run("--all", "--report", report)
	if code != 4 || !strings.HasPrefix(stdout, "111/") || strings.Count(stdout, "\n") != 1 {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	p.says(lineOf(string(text), "110"), "warning", "skipped", "not active on this node")
	if code, stdout, stderr := p.run("110", "111"); code != 7 || !strings.HasPrefix(stdout, "111/") {
		t.Errorf("by number: exit code %d: %s%s", code, stdout, stderr)
	}
	if p.lock(110) != "" {
		t.Errorf("lock %q", p.lock(110))
	}
}

// TestStoppedBlockDevice: a stopped VM's block devices are read as such.
func TestStoppedBlockDevice(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	file := filepath.Join(t.TempDir(), "volume")
	// What a guest writes is never taken for the format of its disk.
	testenv.CreateDisk(t, p.QEMU, file, "qcow2", 1<<20)
	if err := os.Truncate(file, 1<<20); err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(testenv.Output(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() { testenv.Output(t, "losetup", "--detach", device) })
	p.AddVM(110, "scsi0: "+device+",size=1M")
	m, disks := p.point(0, 110)
	if m.Disks[0].SourceFormat != "raw" || len(disks["scsi0"]) != 1<<20 || !bytes.HasPrefix(disks["scsi0"], []byte("QFI\xfb")) {
		t.Errorf("%+v", m.Disks)
	}
}

// TestFreezeByVMID: the VM's option agent says whether its file systems are frozen, through Proxmox VE.
func TestFreezeByVMID(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.Guest = true
	p.AddVM(110, "agent: 1", "memory: 384", "scsi0: local:110/vm-110-disk-0.qcow2,serial=scsi0,size=8M")
	p.socket(110)
	p.QM("start", "110")
	p.VM(110).WaitBoot()
	p.VM(110).Run(t.Context(), "mkfs.ext4 -q /dev/disk/scsi0 && mkdir -p /data && mount /dev/disk/scsi0 /data")
	if m, _ := p.point(0, 110); m.Consistency != chain.Frozen {
		t.Errorf("consistency %s", m.Consistency)
	}
	if got := p.QM("guest", "cmd", "110", "fsfreeze-status"); got != "thawed\n" {
		t.Errorf("left %s", got)
	}
	// A run that was killed in between has left its mark.
	p.VM(110).Execute("object-add", map[string]any{"qom-type": "throttle-group", "id": "qmchain-frozen"}, nil)
	p.QM("guest", "cmd", "110", "fsfreeze-freeze")
	if code, stdout, stderr := p.call("doctor", "110", "--repo", p.repo, "--keep-dir", p.repo, "--fix"); code != 0 {
		t.Errorf("doctor: exit code %d: %s%s", code, stdout, stderr)
	}
	if got := p.QM("guest", "cmd", "110", "fsfreeze-status"); got != "thawed\n" {
		t.Errorf("after doctor: %s", got)
	}
	if m, _ := p.point(0, 110, "--no-freeze"); m.Consistency != chain.Instant {
		t.Errorf("--no-freeze: consistency %s", m.Consistency)
	}
	p.WriteConfig(110, strings.Replace(p.Config(110), "agent: 1\n", "agent: 1,guest-fsfreeze=0\n", 1))
	if m, _ := p.point(0, 110); m.Consistency != chain.Instant {
		t.Errorf("guest-fsfreeze=0: consistency %s", m.Consistency)
	}
}

// TestKilledAnywhere: wherever a run is killed, the VM gets its lock back, and the next run goes on.
func TestKilledAnywhere(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.add(110)
	p.point(0, 110)
	for _, step := range []int{1, 2, 3, 4, 5, 6, 8, 11, 15, 20, 26} {
		cmd, stderr := p.command(append([]string{"run", "110"}, p.common...)...)
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", killAt, step))
		if err := cmd.Run(); err == nil {
			t.Logf("the run ended before step %d", step)
		} else if cmd.ProcessState.ExitCode() != -1 {
			t.Fatalf("step %d: %v: %s", step, err, stderr)
		}
		before := p.lock(110)
		code, _, text := p.run("110", "--lock-wait", "0s")
		if code == 3 && strings.Contains(text, "killed while it took the lock") {
			// Between qm's success and our note of it.
			if code, stdout, stderr := p.call(append([]string{"doctor", "110", "--fix"}, p.common...)...); code != 0 {
				t.Fatalf("step %d: doctor --fix: exit code %d: %s%s", step, code, stdout, stderr)
			}
			code, _, text = p.run("110", "--lock-wait", "0s")
			t.Logf("step %d: doctor was needed", step)
		}
		if code != 0 || p.lock(110) != "" {
			t.Fatalf("step %d, %s: the next run: exit code %d, lock %q before and %q after: %s", step, stderr, code, before, p.lock(110), text)
		}
		t.Logf("step %d: lock %q: %s", step, before, lastLine(stderr.String()))
	}
	m, disks := p.point(0, 110)
	if m.Level() != chain.Inc {
		t.Errorf("level %s", m.Level())
	}
	p.holds(disks, "scsi0", 111)
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// TestKeepByVMID: a VM's raw disk goes on over a power-off, as qmeventd leaves QEMU to the keeper for a moment.
func TestKeepByVMID(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	p.AddStorage("lvmthin", "thin")
	p.add(110, "virtio1: thin:vm-110-disk-1,size=2M")
	p.point(0, 110)
	p.VM(110).IO("virtio1", "write -P 31 0 64k")
	cmd, stderr := p.command(append([]string{"keep", "110"}, p.common[len(p.common)-2:]...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("keep: %v: %s", err, stderr)
		}
		if t.Failed() {
			t.Logf("keep: %s", stderr)
		}
	}()
	p.await("the keeper", func() bool { return p.KeptAlive(110) })
	p.VM(110).PowerOff()
	p.await("QEMU's end", func() bool {
		code, _, _ := p.TryQM("start", "110") // as long as it runs, it can't be started
		return code == 0
	})
	m, disks := p.point(0, 110)
	if m.Level() != chain.Inc {
		t.Errorf("level %s: %+v", m.Level(), m.Disks)
	}
	p.holds(disks, "virtio1", 31)
	for _, args := range [][]string{{"keep"}, {"keep", "110", "--socket", "/run/x"}, {"keep", "--socket", "/run/x"}} {
		if code, _, text := p.call(args...); code != 80 {
			t.Errorf("%q: exit code %d: %s", args, code, text)
		}
	}
}
