package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
	"qmchain/internal/testenv"
	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

// testNode, a proxmox.Host as JSON, is the host of the program.
const testNode = "QMCHAIN_TEST_NODE"

func testHost(text string) proxmox.Host {
	host := proxmox.Local()
	if text != "" {
		if err := json.Unmarshal([]byte(text), &host); err != nil {
			panic(err)
		}
	}
	return host
}

// vmRig is a node, and a repository with a point of a VM.
type vmRig struct {
	t     *testing.T
	node  *pvetest.Node
	guest *repotest.Guest
	repo  string
	point *chain.Manifest
	tmp   string
	env   []string
}

const (
	vmSize  = 4 << 20
	efiSize = 540672 // what QEMU's flash shows of the volume
)

// fullConfig has something of everything.
const fullConfig = `#web server%3A keep
#second line
agent: 1
args: -rtc 'base=utc' -chardev socket,id=qmchain,path=RUN/110-backup.qmp,server=on,wait=off -mon chardev=qmchain,mode=control
bios: ovmf
boot: order=scsi0;sata2;net0
efidisk0: local:110/vm-110-disk-3.qcow2,efitype=4m,pre-enrolled-keys=1,size=528K
ide0: local:iso/debian.iso,media=cdrom,size=600M
ide2: local:110/vm-110-cloudinit.qcow2,media=cdrom,size=4M
kvm: 0
machine: q35
memory: 64
meta: creation-qemu=10.0.13,ctime=1795172015
name: web
net0: virtio=BC:24:11:50:6C:F3,bridge=vmbr0,firewall=1
protection: 1
sata2: local:110/vm-110-disk-2.qcow2,backup=0,size=48M
scsi0: local:110/vm-110-disk-0.qcow2,discard=on,iothread=1,size=4M,ssd=1
scsihw: virtio-scsi-single
smbios1: uuid=3afdd324-5022-4756-b3ce-7614878a4a02,family=web
sshkeys: ssh-ed25519%20AAAA%20admin%40web%0A
tags: prod;web
tpmstate0: other:vm-110-disk-4,size=4M,version=v2.0
virtio1: other:vm-110-disk-1,cache=writeback,size=4M
vmgenid: 9a037514-e9bd-449f-9bdf-80befe73f126
`

const firewallRules = "[OPTIONS]\nenable: 1\n"

func newVMRig(t *testing.T, config string) *vmRig {
	t.Helper()
	r := &vmRig{t: t, node: pvetest.Install(t), repo: t.TempDir(), tmp: t.TempDir()}
	// What a program that was killed has left is in the way of the folder's removal.
	t.Cleanup(func() {
		mounts, _ := filepath.Glob(filepath.Join(r.tmp, privatePrefix+"*/mnt")) // a valid pattern
		for _, dir := range mounts {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	r.node.AddStorage("lvmthin", "other")
	cfg, err := os.ReadFile(filepath.Join(r.node.Etc, "storage.cfg"))
	if err != nil {
		t.Fatal(err)
	}
	// The storage local has its folder where this node has it.
	local := fmt.Sprintf("dir: local\n\tpath %s\n\tcontent images,iso,snippets\n\n", r.node.Storage)
	if err := os.WriteFile(filepath.Join(r.node.Etc, "storage.cfg"), append([]byte(local), cfg...), 0o600); err != nil {
		t.Fatal(err)
	}
	host, err := json.Marshal(proxmox.Host{Etc: r.node.Etc, Run: r.node.Run, Events: r.node.Events, VzdumpLock: r.node.VzdumpLock, Program: r.node.Program})
	if err != nil {
		t.Fatal(err)
	}
	r.env = append(os.Environ(), testNode+"="+string(host), "TMPDIR="+r.tmp)
	r.guest = repotest.NewGuest(t, repotest.New(t, r.repo), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	r.guest.SetFiles(map[string][]byte{
		"110.conf": []byte(strings.ReplaceAll(config, "RUN", r.node.Run)), "110.fw": []byte(firewallRules), "tpmstate0.raw": bytes.Repeat([]byte("tpm!"), 1<<20),
	})
	for i := range byte(2) {
		r.point = r.guest.Add(
			repotest.Disk{Name: "scsi0", Size: vmSize, Write: repotest.RandomWrites(uint64(i), 10, vmSize, 10+20*i)},
			repotest.Disk{Name: "virtio1", Size: vmSize, Write: repotest.RandomWrites(uint64(i)+50, 5, vmSize, 100+20*i)},
			repotest.Disk{Name: "efidisk0", Size: efiSize, Write: []repotest.Write{{Off: 0, Len: 4096, Fill: 7 + i}}},
		)
	}
	return r
}

// run runs qmchain-restore vm for the newest point.
func (r *vmRig) run(args ...string) (code int, stdout, stderr string) {
	r.t.Helper()
	cmd := exec.CommandContext(r.t.Context(), "qmchain-restore", append([]string{"vm", "--repo", r.repo, "110/latest"}, args...)...)
	cmd.Env = r.env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	if left, err := os.ReadDir(r.tmp); err != nil || len(left) > 0 {
		r.t.Errorf("left in TMPDIR: %v, %v", left, err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func (r *vmRig) must(args ...string) string {
	r.t.Helper()
	code, out, errs := r.run(args...)
	if code != 0 {
		r.t.Fatalf("vm %q: exit code %d: %s", args, code, errs)
	}
	return out
}

// fails expects an exit code and a text.
func (r *vmRig) fails(code int, says string, args ...string) {
	r.t.Helper()
	got, _, errs := r.run(args...)
	if got != code || !strings.Contains(errs, says) {
		r.t.Errorf("vm %q: exit code %d, want %d and %q: %s", args, got, code, says, errs)
	}
}

func (r *vmRig) config(vmid int) proxmox.Options {
	r.t.Helper()
	return proxmox.ParseConfig(proxmox.VMID(vmid), []byte(r.node.Config(vmid))).Options
}

// holds compares volumes with what the point has.
func (r *vmRig) holds(options proxmox.Options, disks ...string) {
	r.t.Helper()
	for _, disk := range disks {
		volume, _, _ := strings.Cut(options[disk], ",")
		raw := filepath.Join(r.t.TempDir(), "raw")
		format := "raw"
		if strings.HasSuffix(volume, ".qcow2") {
			format = "qcow2"
		}
		testenv.Output(r.t, "qemu-img", "convert", "-f", format, "-O", "raw", r.node.VolumePath(volume), raw)
		got, err := os.ReadFile(raw)
		if err != nil {
			r.t.Fatal(err)
		}
		if want := r.guest.Want(r.point.ID, disk); !bytes.Equal(got, want) {
			r.t.Errorf("%s (%s) is not what the point holds: %d bytes, want %d", disk, volume, len(got), len(want))
		}
	}
}

// state is all that PVE has: its configurations, and the volumes.
func (r *vmRig) state() map[string]string {
	r.t.Helper()
	all := map[string]string{}
	for _, dir := range []string{r.node.Etc, r.node.Storage} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			all[path] = fmt.Sprintf("%x", sha256.Sum256(data))
			if strings.HasSuffix(path, ".conf") {
				all[path] = string(data)
			}
			return err
		})
		if err != nil {
			r.t.Fatal(err)
		}
	}
	return all
}

func (r *vmRig) unchanged(what string, before map[string]string) {
	r.t.Helper()
	if diff := cmp.Diff(before, r.state()); diff != "" {
		r.t.Errorf("%s: it changed what was there, or left something: %s", what, diff)
	}
}

// A VM comes back as it was, under its own VMID.
func TestVM(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, fullConfig)
	before := r.state()
	plan := r.must("--dry-run")
	r.unchanged("a dry run", before)
	for _, want := range []string{"qm create 110 --lock create ", "qm set 110 --skiplock 1 --scsi0 local:0,import-from=", "qm unlock 110\n"} {
		if !strings.Contains(plan, want) {
			t.Errorf("the dry run does not say %q: %s", want, plan)
		}
	}
	if out := r.must(); out != "110\n" {
		t.Errorf("it printed %q", out)
	}
	got := r.config(110)
	r.holds(got, "scsi0", "virtio1", "efidisk0")
	state, _, _ := strings.Cut(got["tpmstate0"], ",")
	if data, err := os.ReadFile(r.node.VolumePath(state)); err != nil || !bytes.Equal(data, bytes.Repeat([]byte("tpm!"), 1<<20)) {
		t.Errorf("the TPM's state: %v", err)
	}
	if rules, err := os.ReadFile(filepath.Join(r.node.Etc, "firewall/110.fw")); err != nil || string(rules) != firewallRules {
		t.Errorf("firewall: %q, %v", rules, err)
	}
	if !strings.HasPrefix(r.node.Config(110), "#web server%3A keep\n#second line\n") {
		t.Errorf("description: %s", r.node.Config(110))
	}
	want := proxmox.ParseConfig(110, []byte(strings.ReplaceAll(fullConfig, "RUN", r.node.Run))).Options
	for _, gone := range []string{"sata2", "meta"} {
		delete(want, gone)
	}
	want["boot"] = "order=scsi0;net0"
	want["ide0"] = "none,media=cdrom"
	want["ide2"] = "local:110/vm-110-cloudinit.qcow2,media=cdrom"
	if got["vmgenid"] == want["vmgenid"] {
		t.Error("vmgenid is the old one")
	}
	for _, o := range []proxmox.Options{got, want} {
		delete(o, "vmgenid")
		for id, value := range o {
			if proxmox.IsDrive(id) && !strings.Contains(value, "cdrom") {
				_, options, _ := strings.Cut(value, ",")
				o[id] = normal(options)
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the configuration (-was +is): %s", diff)
	}
	r.node.QM("start", "110")
	r.node.VM(110).IO("scsi0", "read 0 64k")
	r.fails(1, "VM 110 on node pve1: there is one already")
}

// normal are a drive's options without its size, sorted.
func normal(options string) string {
	parts := slices.DeleteFunc(strings.Split(options, ","), func(p string) bool { return strings.HasPrefix(p, "size=") })
	slices.Sort(parts)
	return strings.Join(parts, ",")
}

// A copy beside the VM has its own identity and its own socket.
func TestVMUnique(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, strings.Replace(fullConfig, "protection: 1\n", "hookscript: local:snippets/gone.sh\n", 1))
	r.node.AddVM(110, "scsi0: local:110/vm-110-disk-0.qcow2,size=1M")
	before := r.state()
	code, out, errs := r.run("--vmid", "120", "--unique", "--storage", "other", "--storage", "scsi0=local", "--start", "--json")
	var result restoredVM
	if err := json.Unmarshal([]byte(out), &result); err != nil || code != 4 || result.VMID != 120 || len(result.Disks) != 4 || !strings.Contains(errs, "gone.sh") {
		t.Fatalf("exit code %d, %+v, %v: %s", code, result, err, errs)
	}
	got := r.config(120)
	r.node.QM("stop", "120")
	r.holds(got, "scsi0", "virtio1", "efidisk0")
	for key, want := range map[string]string{"scsi0": "local:120/vm-120-disk-0.qcow2,", "virtio1": "other:vm-120-disk-", "efidisk0": "other:vm-120-disk-", "ide2": "other:vm-120-cloudinit,"} {
		if !strings.HasPrefix(got[key], want) {
			t.Errorf("%s: %s is not on %s", key, got[key], want)
		}
	}
	if !strings.Contains(got["args"], "/120-backup.qmp") || strings.Contains(got["args"], "110-backup") || !strings.HasPrefix(got["args"], "-rtc 'base=utc' ") {
		t.Errorf("args: %s", got["args"])
	}
	if strings.Contains(got["net0"], "BC:24:11:50:6C:F3") || !strings.HasSuffix(got["net0"], ",bridge=vmbr0,firewall=1") {
		t.Errorf("net0: %s", got["net0"])
	}
	if strings.Contains(got["smbios1"], "3afdd324") || !strings.HasSuffix(got["smbios1"], ",family=web") {
		t.Errorf("smbios1: %s", got["smbios1"])
	}
	r.node.QM("destroy", "120")
	r.unchanged("a copy that was removed again", before)
}

// failEverywhere fails the first command of qm, then the second, and so on; and so each import in its middle. It ends when
// none is left.
func (r *vmRig) failEverywhere(args []string, check func(at string, code int, stderr string)) {
	r.t.Helper()
	for k := 1; ; k++ {
		n, failed := 0, ""
		r.node.SetFault(func(at string) error {
			if strings.HasPrefix(at, "option ") {
				return nil
			}
			if n++; n != k {
				return nil
			}
			failed = at
			return errors.New("made to fail")
		})
		code, _, errs := r.run(args...)
		r.node.SetFault(nil)
		if failed == "" {
			if code != 0 || k < 5 {
				r.t.Errorf("without a failure, after %d with: exit code %d: %s", k-1, code, errs)
			}
			return
		}
		check(failed, code, errs)
	}
}

// Whatever fails, nothing is left, and nothing of what was there has changed.
func TestVMFails(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, strings.Replace(fullConfig, "protection: 1\n", "", 1))
	r.node.AddVM(111, "scsi0: other:vm-111-disk-0,size=1M")
	if err := os.WriteFile(filepath.Join(r.node.Etc, "firewall/110.fw"), []byte("of an earlier VM"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := r.state()
	r.failEverywhere([]string{"--disk", "scsi0", "--disk", "efidisk0"}, func(at string, code int, stderr string) {
		if !strings.HasPrefix(at, "unlock") {
			if code != 1 || !strings.Contains(stderr, "made to fail") {
				t.Errorf("%s: exit code %d: %s", at, code, stderr)
			}
			r.unchanged(at, before)
			return
		}
		if code != 4 || !strings.Contains(stderr, "the VM is restored, but") {
			t.Errorf("%s: exit code %d: %s", at, code, stderr)
		}
		r.holds(r.config(110), "scsi0")
		r.node.QM("destroy", "110", "--skiplock", "1")
	})
	// Somebody else's VM that comes in between is not touched.
	r.node.QM("destroy", "110")
	r.node.SetFault(func(at string) error {
		if strings.HasPrefix(at, "create") {
			r.node.AddVM(110)
		}
		return nil
	})
	r.fails(1, "already exists")
	r.node.SetFault(nil)
	if got := r.config(110); got["name"] != "vm110" {
		t.Errorf("somebody else's VM: %v", got)
	}
}

func TestVMInterrupted(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, fullConfig)
	before := r.state()
	for _, where := range []string{"create", "import", "set 110 --skiplock 1 --boot"} {
		cmd := exec.CommandContext(t.Context(), "qmchain-restore", "vm", "--repo", r.repo, "110/latest")
		cmd.Env = r.env
		var errs bytes.Buffer
		cmd.Stderr = &errs
		started := make(chan struct{})
		r.node.SetFault(func(at string) error {
			if strings.HasPrefix(at, where) {
				<-started
				_ = cmd.Process.Signal(syscall.SIGINT)
				time.Sleep(100 * time.Millisecond) // until it has arrived
			}
			return nil
		})
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		close(started)
		_ = cmd.Wait() // the exit code tells
		r.node.SetFault(nil)
		// Whatever is short is done to its end, and told as it is.
		if code := cmd.ProcessState.ExitCode(); code != 130 {
			if where[0] == 's' && code == 0 {
				r.node.QM("set", "110", "--protection", "0")
				r.node.QM("destroy", "110")
				continue
			}
			t.Errorf("%s: exit code %d: %s", where, code, errs.String())
		}
		r.unchanged(where, before)
	}
}

// A restore that is killed leaves a VM that says what it is; the next one removes all else.
func TestVMKilled(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, fullConfig)
	before := r.state()
	cmd := exec.CommandContext(t.Context(), "qmchain-restore", "vm", "--repo", r.repo, "110/latest")
	cmd.Env = r.env
	started, ended := make(chan struct{}), make(chan struct{})
	r.node.SetFault(func(at string) error {
		if strings.HasSuffix(at, "virtio1.raw") && strings.HasPrefix(at, "import") {
			<-started
			_ = cmd.Process.Kill()
			<-ended
			return errors.New("the file has gone")
		}
		return nil
	})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	close(started)
	_ = cmd.Wait() // killed
	close(ended)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if code, _, _ := r.node.TryQM("config", "110"); code == 0 && r.config(110)["lock"] == "create" {
			// Its qm has done with it when it gives its lock.
			if code, _, _ := r.node.TryQM("set", "110", "--skiplock", "1", "--onboot", "0"); code == 0 {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("no VM is left locked")
		}
	}
	r.node.SetFault(nil)
	if code, _, errs := r.node.TryQM("start", "110"); code == 0 || !strings.Contains(errs, "locked (create)") {
		t.Errorf("start of a part of a VM: %d %s", code, errs)
	}
	r.fails(1, "a restore that was killed has left unfinished") // and nothing in TMPDIR
	r.node.QM("destroy", "110", "--skiplock", "1")
	r.unchanged("when that was removed", before)
	r.must()
	r.holds(r.config(110), "scsi0", "virtio1")
}

// replaced is the VM that is replaced in tests.
func (r *vmRig) replaced(lines ...string) {
	r.node.AddVM(110, append([]string{
		"scsi0: local:110/vm-110-disk-0.qcow2,size=1M", "scsi1: other:vm-110-disk-1,size=2M", "ide2: local:110/vm-110-cloudinit.qcow2,media=cdrom,size=4M",
		"unused0: local:110/vm-110-disk-7.qcow2", "onboot: 1",
	}, lines...)...)
	for volume, format := range map[string]string{"local:110/vm-110-cloudinit.qcow2": "qcow2", "local:110/vm-110-disk-7.qcow2": "qcow2"} {
		testenv.CreateDisk(r.t, r.node.QEMU, r.node.VolumePath(volume), format, 1<<20)
	}
}

// A VM that is replaced is whole until the other one is.
func TestVMReplaces(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, strings.Replace(fullConfig, "protection: 1\n", "", 1))
	r.replaced()
	before := r.state()
	old := r.config(110)
	r.fails(1, "--force replaces a VM")
	plan := r.must("--force", "--dry-run")
	r.unchanged("a dry run", before)
	if !strings.Contains(plan, "qm disk import 110 ") || !strings.Contains(plan, "--scsi0 '<new volume of scsi0>,discard=on") {
		t.Errorf("dry run: %s", plan)
	}
	// The exchange of the configuration fails half-way, which leaves changes pending.
	for _, option := range []string{"option args", "option scsi0", "option virtio1"} {
		failed := false
		r.node.SetFault(func(at string) error {
			if at == option && !failed {
				failed = true
				return errors.New("made to fail")
			}
			return nil
		})
		r.fails(1, "made to fail", "--force")
		r.unchanged(option, before)
	}
	r.node.SetFault(nil)
	r.failEverywhere([]string{"--force", "--disk", "scsi0"}, func(at string, code int, stderr string) {
		switch {
		case strings.HasPrefix(at, "unlock") || strings.Contains(at, "--delete unused"):
			if code != 4 || !strings.Contains(stderr, "the VM is restored, but") {
				t.Errorf("%s: exit code %d: %s", at, code, stderr)
			}
			r.holds(r.config(110), "scsi0")
			// Back to the beginning.
			r.node.QM("destroy", "110", "--skiplock", "1")
			r.replaced("smbios1: "+old["smbios1"], "vmgenid: "+old["vmgenid"])
			before = r.state()
		default:
			if code != 1 || !strings.Contains(stderr, "made to fail") {
				t.Errorf("%s: exit code %d: %s", at, code, stderr)
			}
			r.unchanged(at, before)
		}
	})
	got := r.config(110)
	r.holds(got, "scsi0")
	if got["onboot"] != "" || got["scsi1"] != "" || got["name"] != "web" || got["lock"] != "" || got["vmgenid"] == old["vmgenid"] || got["boot"] != "order=scsi0;net0" || got["virtio1"] != "" {
		t.Errorf("the new configuration: %v", got)
	}
	var unused []string
	for _, key := range slices.Sorted(maps.Keys(got)) {
		if strings.HasPrefix(key, "unused") {
			unused = append(unused, got[key])
		}
	}
	// What was unused stays so, and a disk whose place no other has taken becomes it: it may be in no backup.
	slices.Sort(unused)
	if !slices.Equal(unused, []string{"local:110/vm-110-disk-7.qcow2", "other:vm-110-disk-1"}) {
		t.Errorf("unused volumes are %q", unused)
	}
	for _, volume := range unused {
		if _, err := os.Stat(r.node.VolumePath(volume)); err != nil {
			t.Errorf("%s: %v", volume, err)
		}
	}
	if _, err := os.Stat(r.node.VolumePath("local:110/vm-110-disk-0.qcow2")); err == nil && !strings.Contains(got["scsi0"], "vm-110-disk-0.qcow2") {
		t.Error("the old volume of scsi0 is still there")
	}
	r.node.QM("start", "110")
	state := r.state()
	r.fails(3, "VM 110 runs", "--force")
	r.node.QM("stop", "110")
	for _, test := range []struct {
		line, says string
		code       int
	}{
		{"lock: backup", "locked (backup)", 3},
		{"template: 1", "it is a template", 1},
		{"protection: 1", "it is protected", 1},
		{"\n[PENDING]\nonboot: 1", "it has pending changes", 1},
		{"\n[first]\nsnaptime: 1", "it has snapshots", 1},
	} {
		r.node.WriteConfig(110, state[filepath.Join(r.node.Etc, "nodes/pve1/qemu-server/110.conf")]+test.line+"\n")
		was := r.state()
		r.fails(test.code, test.says, "--force")
		r.unchanged(test.line, was)
	}
}

// What can't be done is said before anything is.
func TestVMRefuses(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, strings.Replace(fullConfig, "virtio1: other:", "virtio1: gone:", 1))
	r.node.AddVM(111)
	r.node.MoveAway(111, "pve2")
	r.node.AddContainer(112)
	before := r.state()
	r.fails(1, "drive virtio1: it was on storage")
	r.fails(1, "drive efidisk0: this host has no storage", "--storage", "none")
	r.fails(1, "the VM has no such drive", "--storage", "scsi9=local", "--storage", "local")
	r.fails(80, "each once", "--storage", "local", "--storage", "other")
	r.fails(80, "--live", "--live", "--force")
	r.fails(80, "VMID", "--vmid", "7")
	r.fails(1, "VM 111 on node pve2", "--vmid", "111")
	r.fails(2, "on another node", "--vmid", "111", "--force")
	r.fails(1, "container 112", "--vmid", "112")
	r.fails(2, "is a container", "--vmid", "112", "--force")
	r.fails(2, "has no disk", "--disk", "scsi5")
	r.fails(2, "no such file", "--config", "/nowhere/110.conf")
	r.unchanged("refusals", before)
	r.guest.SetFiles(nil)
	r.guest.Add(repotest.Disk{Name: "scsi0", Size: vmSize}, repotest.Disk{Name: "data", Size: vmSize})
	r.fails(2, "holds no configuration")

	// With a configuration from a file it goes, and tells what has no place in it.
	config := filepath.Join(t.TempDir(), "vm.conf")
	if err := os.WriteFile(config, []byte("memory: 64\nscsi0: local:110/vm-110-disk-0.raw,size=4M\nscsi1: local:110/vm-110-disk-1.raw,size=4M\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.fails(80, "--vmid is missing", "--config", config)
	r.fails(4, "disk data is in no drive of the saved configuration", "--config", config, "--vmid", "130")
	if got := r.config(130); !strings.HasPrefix(got["scsi0"], "local:130/vm-130-disk-0.raw") || got["scsi1"] != "" {
		t.Errorf("with a configuration from a file: %v", got)
	}
}

// A disk that begins as an image of another format does would be taken for that.
func TestVMDisguise(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, "memory: 64\nscsi0: local:110/vm-110-disk-0.qcow2,size=4M\n")
	luks := filepath.Join(t.TempDir(), "luks")
	data := make([]byte, vmSize)
	copy(data, "LUKS\xba\xbe\x00\x02")
	copy(data[1<<20:], "secret")
	if err := os.WriteFile(luks, data, 0o600); err != nil {
		t.Fatal(err)
	}
	r.point = r.guest.Add(repotest.Disk{Name: "scsi0", Full: true, Image: luks})
	before := r.state()
	r.fails(1, "disk scsi0 begins as a luks image does")
	r.unchanged("refused", before)
	staging := t.TempDir()
	r.must("--staging", staging)
	got := r.config(110)
	r.holds(got, "scsi0")
	if got["vmgenid"] != "0" && got["vmgenid"] != "" {
		t.Errorf("it had no vmgenid, and has %s", got["vmgenid"])
	}
	if left, err := os.ReadDir(staging); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A live restore runs at once, on what the mount shows, and in the end on its own volumes.
func TestVMLive(t *testing.T) {
	t.Parallel()
	config := strings.Replace(fullConfig, "tpmstate0: other:vm-110-disk-4,size=4M,version=v2.0\n", "", 1)
	r := newVMRig(t, config)
	before := r.state()
	r.node.SetFault(func(at string) error {
		if at == "live virtio1" {
			if data := r.node.VM(110).IO("virtio1", "read -v 0 512"); data == "" {
				return errors.New("nothing to read")
			}
			return errors.New("made to fail")
		}
		return nil
	})
	r.fails(1, "made to fail", "--live")
	r.unchanged("a live restore that failed", before)
	r.node.SetFault(nil)
	r.must("--live")
	got := r.config(110)
	if got["lock"] != "" || got["protection"] != "1" || r.node.QM("status", "110") != "status: running\n" {
		t.Errorf("%v, %s", got, r.node.QM("status", "110"))
	}
	r.node.VM(110).IO("scsi0", "read 0 64k")
	r.node.QM("stop", "110")
	r.holds(got, "scsi0", "virtio1", "efidisk0")

	tpm := newVMRig(t, fullConfig)
	tpm.fails(1, "a live restore of a VM with the state of a TPM", "--live")
}

// A drill's guest is made of what the VM had.
func TestDrillLikeTheVM(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, config string
		flags        []string
		want, not    []string
	}{
		{
			"pc, LSI, IDE", "memory: 384\nsockets: 2\nboot: order=ide0;scsi9\nide0: a:1\nsmbios1: uuid=3afdd324-5022-4756-b3ce-7614878a4a02\n", nil,
			[]string{" pc,accel=tcg", "-m 384 ", "-smp 2 ", "lsi,id=scsi1 ", "bus=scsi1.0,scsi-id=2,", "ide-hd,bus=ide.0,unit=0,drive=disk0,bootindex=1 ", "-uuid 3afdd324-"},
			[]string{"pflash"},
		},
		{
			"q35, UEFI", "memory: 999999\ncores: 64\nmachine: pc-q35-9.2+pve1\nbios: ovmf\nscsihw: virtio-scsi-single\nboot: order=scsi9;ide0\n", nil,
			[]string{" q35,accel=tcg", "-m 4096 ", "pflash1=disk2", "virtio-scsi-pci,id=scsi ", "ide-hd,bus=sata.0,", "drive=disk0,bootindex=1"},
			[]string{"-uuid", "lsi"},
		},
		{
			"flags", "memory: 384\nmachine: q35\n",
			[]string{"--memory", "128MiB", "--machine", "pc", "--cpus", "1", "--boot", "scsi9"},
			[]string{" pc,accel=tcg", "-m 128 ", "-smp 1 ", "scsi-hd,bus=scsi1.0,scsi-id=2,drive=disk0,bootindex=1"},
			nil,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			g := repotest.NewGuest(t, repotest.New(t, filepath.Join(dir)), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
			g.SetFiles(map[string][]byte{"110.conf": []byte(test.config)})
			g.Add(repotest.Disk{Name: "ide0", Size: 1 << 20}, repotest.Disk{Name: "scsi9", Size: 1 << 20}, repotest.Disk{Name: "efidisk0", Size: efiSize})
			tmp := t.TempDir()
			qemu := filepath.Join(tmp, "qemu")
			if err := testenv.WriteProgram(qemu, fmt.Sprintf("#!/bin/sh\necho \"$@\" > %s/args\nexec qemu-system-x86_64 \"$@\"\n", tmp)); err != nil {
				t.Fatal(err)
			}
			firmware := filepath.Join(tmp, "firmware")
			if err := os.WriteFile(firmware, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "qmchain-restore", append([]string{
				"drill", "--repo", dir, "110/latest", "--accel", "tcg", "--qemu", qemu, "--firmware", firmware, "--text", "never said", "--timeout", "1s",
			}, test.flags...)...)
			out, _ := cmd.CombinedOutput() // the exit code tells
			if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "no sign of life") {
				t.Fatalf("%s: %s", cmd.ProcessState, out)
			}
			args, err := os.ReadFile(filepath.Join(tmp, "args"))
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range test.want {
				if !strings.Contains(string(args), want) {
					t.Errorf("no %q in %s", want, args)
				}
			}
			for _, not := range test.not {
				if strings.Contains(string(args), not) {
					t.Errorf("%q in %s", not, args)
				}
			}
		})
	}
}
