package doctest

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"qmchain/internal/testenv"
	"qmchain/proxmox/pvetest"
)

// world is the machine of a document's reader, and what the test knows of it.
type world struct {
	tb      testing.TB
	shell   *shell
	node    *pvetest.Node
	sums    map[string][32]byte // of disks as raw images, by VMID.DISK: what they were when VMs were made
	example string              // the id of the point that stands for those in the documents
	output  string              // of the last command
}

// newWorld installs the programs.
func newWorld(tb testing.TB) *world {
	w := &world{tb: tb, sums: map[string][32]byte{}}
	programs, err := filepath.Glob(filepath.Join(os.Getenv(insidePrograms), "qmchain-*"))
	check(tb, err)
	for _, program := range programs {
		link := filepath.Join("/usr/bin", filepath.Base(program))
		_ = os.Remove(link) // of a package that this host has
		check(tb, os.Symlink(program, link))
	}
	_ = os.RemoveAll("/etc/qmchain")
	check(tb, os.MkdirAll("/mnt/backup", 0o755))
	w.shell = newShell(tb, slices.Concat(w.appliance(), []string{
		"HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}))
	return w
}

// appliance is the environment in which libguestfs finds a kernel and does without KVM.
func (w *world) appliance() []string {
	env := []string{"LIBGUESTFS_BACKEND=direct", "LIBGUESTFS_BACKEND_SETTINGS=force_tcg"}
	if installed, _ := filepath.Glob("/boot/vmlinuz-*"); len(installed) > 0 {
		return env
	}
	cache, err := testenv.CacheDir()
	check(w.tb, err)
	kernels, _ := filepath.Glob(filepath.Join(cache, "appliance/boot/vmlinuz-*")) // a valid pattern
	if len(kernels) != 1 {
		w.tb.Fatalf("kernels in %s: %v (make setup)", cache, kernels)
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	return append(env, "SUPERMIN_KERNEL="+kernels[0], "SUPERMIN_KERNEL_VERSION="+version,
		"SUPERMIN_MODULES="+filepath.Join(cache, "appliance/lib/modules", version))
}

// do runs commands that are no document's.
func (w *world) do(format string, args ...any) string {
	w.tb.Helper()
	command := fmt.Sprintf(format, args...)
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", command)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.tb.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// proxmox makes this machine a node of Proxmox VE.
func (w *world) proxmox() {
	w.node = pvetest.Install(w.tb)
	local := "dir: local\n\tpath /var/lib/vz\n\tcontent images,iso,snippets\n\n"
	check(w.tb, os.WriteFile(filepath.Join(w.node.Etc, "storage.cfg"), []byte(local), 0o600))
	w.do(`mkdir -p /etc/pve /run/qemu-server /var/lib/vz
		mount --bind %s /etc/pve
		mount --bind %s /run/qemu-server
		mount --bind %s /var/lib/vz
		ln -s %s /run/qmeventd.sock
		ln -s %s /run/vzdump.lock
		ln -sf %s %s/pvesm /usr/sbin/`,
		w.node.Etc, w.node.Run, w.node.Storage, w.node.Events, w.node.VzdumpLock, w.node.Program, w.node.Bin)
	// From now on all paths are those of a real node.
	w.node.Etc, w.node.Run, w.node.Storage = "/etc/pve", "/var/run/qemu-server", "/var/lib/vz"
	// Reports are mailed.
	w.program("/usr/sbin/sendmail", `cat >>/root/mail`)
}

// program writes one of the reader's.
func (w *world) program(path, script string) {
	check(w.tb, os.MkdirAll(filepath.Dir(path), 0o755))
	check(w.tb, os.WriteFile(path+".new", []byte("#!/bin/sh\n"+script+"\n"), 0o755))
	check(w.tb, os.Rename(path+".new", path))
}

// files is what the guests have on the file system of their first disks, /etc/fstab among it.
func (w *world) files() string {
	dir := "/root/files"
	w.do(`mkdir -p %[1]s/etc %[1]s/srv/www; echo 'LABEL=root / ext4 defaults 0 1' >%[1]s/etc/fstab; echo hello >%[1]s/srv/www/index.html`, dir)
	return dir
}

// disk makes an image of 32 MiB with a partition and an ext4 in it.
func (w *world) disk(path string) {
	dir := w.files()
	w.do(`raw=%[1]s.raw; mkdir -p "$(dirname "$raw")"; rm -f "$raw"; truncate -s 32M "$raw"
		echo 'start=2048, size=61440, type=linux' | sfdisk --quiet --label gpt "$raw"
		mkfs.ext4 -q -F -L root -E offset=1048576 -d %[2]s "$raw" 30M
		qemu-img convert -f raw -O qcow2 "$raw" %[1]s; rm "$raw"`, path, dir)
}

// addVM makes a VM of two disks, and starts it.
func (w *world) addVM(vmid int, lines ...string) {
	w.disk(fmt.Sprintf("%s/images/%d/vm-%d-disk-0.qcow2", w.node.Storage, vmid, vmid))
	w.node.AddVM(vmid, append([]string{
		fmt.Sprintf("scsi0: local:%d/vm-%d-disk-0.qcow2,size=32M", vmid, vmid),
		fmt.Sprintf("virtio1: local:%d/vm-%d-disk-1.qcow2,size=8M", vmid, vmid),
		"boot: order=scsi0",
	}, lines...)...)
	for _, disk := range []string{"scsi0", "virtio1"} {
		w.remember(vmid, disk)
	}
	w.startVM(vmid)
}

// startVM starts a VM. As it has no operating system the test does what one does when the power button is pressed.
func (w *world) startVM(vmid int) {
	w.node.QM("start", strconv.Itoa(vmid))
	vm := w.node.VM(vmid)
	stop := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		for vm.Alive() {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if slices.ContainsFunc(vm.Events(), func(e testenv.Event) bool { return e.Name == "POWERDOWN" }) {
				vm.PowerOff()
				return
			}
		}
	})
	w.tb.Cleanup(func() { close(stop); done.Wait() })
}

// restartVM is what changes of args take effect with.
func (w *world) restartVM(vmid int) {
	w.node.QM("stop", strconv.Itoa(vmid))
	w.startVM(vmid)
}

// socket gives a VM its backup socket.
func (w *world) socket(vmid int) {
	w.do("qmchain-args add --quiet %d", vmid)
	w.restartVM(vmid)
}

// volume is the image of a VM's disk.
func (w *world) volume(vmid int, disk string) string {
	for line := range strings.Lines(w.node.Config(vmid)) {
		if rest, ok := strings.CutPrefix(line, disk+": "); ok {
			return w.node.VolumePath(strings.Split(strings.TrimSpace(rest), ",")[0])
		}
	}
	w.tb.Fatalf("VM %d has no %s", vmid, disk)
	return ""
}

func (w *world) remember(vmid int, disk string) {
	w.sums[fmt.Sprintf("%d.%s", vmid, disk)] = w.sumOf(w.volume(vmid, disk))
}

// sumOf is of an image as the guest sees it.
func (w *world) sumOf(path string) [32]byte {
	raw := filepath.Join(os.TempDir(), "sum.raw")
	format := "raw"
	if filepath.Ext(path) == ".qcow2" {
		format = "qcow2"
	}
	w.do("qemu-img convert -U -f %s -O raw %s %s", format, path, raw)
	f, err := os.Open(raw)
	check(w.tb, err)
	h := sha256.New()
	_, err = io.Copy(h, f)
	check(w.tb, err)
	check(w.tb, f.Close())
	check(w.tb, os.Remove(raw))
	return [32]byte(h.Sum(nil))
}

// same compares an image with a disk as it was when its VM was made.
func (w *world) same(path string, vmid int, disk string) {
	w.tb.Helper()
	if w.sumOf(path) != w.sums[fmt.Sprintf("%d.%s", vmid, disk)] {
		w.tb.Errorf("%s is not what %s of %d was", path, disk, vmid)
	}
}

// plain starts the guest web, with more arguments.
func (w *world) plain(args ...string) *testenv.VM {
	if _, err := os.Stat("/images/web.qcow2"); err != nil {
		w.disk("/images/web.qcow2")
	}
	vm := testenv.Start(w.tb, testenv.Config{
		QEMU: testenv.Host(w.tb), Style: testenv.Drive, Name: "web", Args: args,
		Disks: []testenv.Disk{{ID: "virtio0", Path: "/images/web.qcow2"}},
	})
	w.sums["0.virtio0"] = w.sumOf("/images/web.qcow2")
	return vm
}

// points are a guest's ids, oldest first.
func (w *world) points(repo, guest string) []string {
	dirs, err := filepath.Glob(filepath.Join(repo, guest, "2*"))
	check(w.tb, err)
	var ids []string
	for _, dir := range dirs {
		ids = append(ids, filepath.Base(dir))
	}
	slices.Sort(ids)
	return ids
}

// backups makes points of a VM, with other data in each but on the first disk's file system, and has the oldest stand for
// the examples'.
func (w *world) backups(vmid, points int) {
	w.socket(vmid)
	w.do("mkdir -p %s", repository)
	for i := range points {
		if i > 0 {
			w.node.VM(vmid).IO("virtio1", fmt.Sprintf("write -P %d %dk 64k", i, 64*i))
		}
		w.do("qmchain-backup --quiet run %d --repo %s", vmid, repository)
	}
	w.example = w.points(repository, strconv.Itoa(vmid))[0]
}

// says wants the last command to have said something.
func (w *world) says(parts ...string) {
	w.tb.Helper()
	for _, part := range parts {
		if !strings.Contains(w.output, part) {
			w.tb.Errorf("%q is not said: %s", part, w.output)
		}
	}
}

// levels are those of a guest's points, oldest first.
func (w *world) levels(repo, guest string, want ...string) {
	w.tb.Helper()
	out := w.do(`qmchain-restore list --repo %s %s --json`, repo, guest)
	var points []struct{ Level string }
	check(w.tb, json.Unmarshal([]byte(out), &points))
	var got []string
	for _, p := range points {
		got = append(got, p.Level)
	}
	if !slices.Equal(got, want) {
		w.tb.Errorf("%s: levels %q, want %q\n%s", guest, got, want, out)
	}
}
