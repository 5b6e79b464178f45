package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
)

var (
	cycleCount = flag.Int("cycles", 12, "stops and starts of VMs in TestCycles, for each version of Proxmox VE")
	cycleSeed  = flag.Uint64("cycles-seed", 0, "seed of TestCycles; 0: a random one")
)

// What the next point of a disk must be.
const (
	mustGoOn = "inc"
	mustNot  = "full"
	may      = "either" // the guest and its keeper have run a race
)

// TestCycles: VMs are stopped and started in all ways that Proxmox VE and their guests know, with our hook script, the keeper that
// it starts, and backups in between. Every point holds what the disks do, is an increment wherever the proof held, and a full with a
// reason elsewhere.
func TestCycles(t *testing.T) {
	t.Parallel()
	// The programs' tests can be the programs, on a node that is not this host.
	backup := filepath.Join(t.TempDir(), "qmchain-backup")
	testenv.Output(t, "go", "test", "-c", "-o", backup, "qmchain/cmd/qmchain-backup")
	for _, pve := range []int{8, 9} {
		t.Run(fmt.Sprintf("PVE %d", pve), func(t *testing.T) {
			t.Parallel()
			seed := *cycleSeed
			if seed == 0 {
				seed = rand.Uint64()
			}
			t.Logf("seed %d", seed)
			x := newCycles(t, pve, backup, seed)
			vms := []*cycledVM{
				x.add(110, []string{"scsi0", "virtio1"}, "scsi0: local:110/vm-110-disk-0.raw,discard=on,size=4M", "virtio1: thin:vm-110-disk-1,discard=on,size=2M"),
				x.add(111, []string{"scsi0"}, "scsi0: local:111/vm-111-disk-0.qcow2,discard=on,size=4M"),
			}
			x.QM("snapshot", "111", "base")
			vms[1].snapshots = true
			for i := range *cycleCount {
				vm := vms[i%2]
				vm.write(x.rand.IntN(6))
				if x.rand.IntN(4) > 0 {
					vm.run()
				}
				vm.write(x.rand.IntN(6))
				vm.cycle()
			}
			for _, vm := range vms {
				vm.run()
			}
			t.Logf("%d disks went on, %d got a full", x.levels[chain.Inc], x.levels[chain.Full])
		})
	}
}

// cycles is a node with VMs that are stopped and started.
type cycles struct {
	*rig
	repo, kept string
	rand       *rand.Rand
	units      *units
	log        []string
	levels     map[chain.Level]int
}

// cycledVM is one of them.
type cycledVM struct {
	*cycles
	id        string
	vmid      int
	disks     []string
	next      map[string]string // what the next point of a disk must be
	snapshots bool              // it has one, base
}

func newCycles(t *testing.T, pve int, backup string, seed uint64) *cycles {
	t.Helper()
	x := &cycles{rig: newRig(t), repo: t.TempDir(), kept: t.TempDir(), rand: rand.New(rand.NewPCG(seed, 3)), levels: map[chain.Level]int{}}
	x.PVE = pve
	x.AddStorage("lvmthin", "thin")
	x.write(x.config, fmt.Sprintf("repo = '%s'\n[backup]\nfleece-dir = '%s'\nkeep-dir = '%s'\n", x.repo, t.TempDir(), x.kept))
	node, err := json.Marshal(map[string]any{"Host": x.site.Host, "Locks": filepath.Join(x.Dir, "run/locks")})
	if err != nil {
		t.Fatal(err)
	}
	x.write(x.site.Backup, fmt.Sprintf("#!/bin/sh\nQMCHAIN_TEST_KILL_AT=0 QMCHAIN_TEST_NODE='%s' QMCHAIN_CONFIG='%s' exec '%s' \"$@\"\n", node, x.config, backup))
	t.Cleanup(func() {
		if t.Failed() || testing.Verbose() {
			t.Logf("what happened:\n%s", strings.Join(x.log, "\n"))
		}
		if t.Failed() {
			journal, _ := os.ReadFile(x.calls + ".journal")
			t.Logf("what the units say:\n%s", journal)
		}
	})
	x.units = startUnits(x)
	return x
}

// add adds a VM with our hook script, and starts it.
func (x *cycles) add(vmid int, disks []string, lines ...string) *cycledVM {
	x.t.Helper()
	vm := &cycledVM{cycles: x, id: strconv.Itoa(vmid), vmid: vmid, disks: disks, next: map[string]string{}}
	x.addVM(vmid, lines...)
	x.install(vm.id)
	vm.start()
	vm.expect(mustNot)
	return vm
}

func (x *cycles) note(format string, args ...any) {
	x.log = append(x.log, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// expect notes what the next point of disks must be; a disk whose tracking has ended stays without.
func (v *cycledVM) expect(what string, disks ...string) {
	if len(disks) == 0 {
		disks = v.disks
	}
	for _, d := range disks {
		if what != mustGoOn && v.next[d] != mustNot {
			v.next[d] = what
		}
	}
}

// write sends requests of random kinds to random disks.
func (v *cycledVM) write(n int) {
	v.t.Helper()
	for range n {
		off, length := v.rand.IntN(24)*64, 64*(1+v.rand.IntN(6))
		request := fmt.Sprintf("write -P %d %dk %dk", 1+v.rand.IntN(255), off+v.rand.IntN(64), length/(1+v.rand.IntN(40))+1)
		switch v.rand.IntN(6) {
		case 0:
			request = fmt.Sprintf("write -z -u %dk %dk", off, length)
		case 1:
			request = fmt.Sprintf("discard %dk %dk", off, length)
		}
		v.VM(v.vmid).IO(v.disks[v.rand.IntN(len(v.disks))], request)
	}
}

// flush brings to the volumes what QEMU still holds.
func (v *cycledVM) flush() {
	v.t.Helper()
	for _, d := range v.disks {
		v.VM(v.vmid).IO(d, "flush")
	}
}

func (v *cycledVM) stopped() {
	v.t.Helper()
	v.wait("the end of VM "+v.id, func() bool { return !v.VM(v.vmid).Alive() })
}

// start starts the VM, and has what was saved merged back.
func (v *cycledVM) start() {
	v.t.Helper()
	v.QM("start", v.id)
	v.merged()
}

func (v *cycledVM) merged() {
	v.t.Helper()
	v.wait("what was saved is merged back", func() bool {
		return !exists(filepath.Join(v.kept, v.id, "saved.json")) && !exists(filepath.Join(v.kept, v.id, "claimed.json"))
	})
}

// held waits until the VM's keeper would see it power off.
func (v *cycledVM) held() {
	v.t.Helper()
	v.wait("the keeper of VM "+v.id, func() bool { return v.KeptAlive(v.vmid) })
}

// asked has qm ask the guest to power off, which does so.
func (v *cycledVM) asked(command string) {
	v.t.Helper()
	v.held()
	vm, done := v.VM(v.vmid), make(chan string, 1)
	go func() {
		code, stdout, stderr := v.TryQM(command, v.id)
		if code != 0 {
			done <- fmt.Sprintf("qm %s: exit code %d: %s%s", command, code, stdout, stderr)
		}
		close(done)
	}()
	vm.WaitEvent("POWERDOWN", 2*time.Minute)
	vm.PowerOff()
	if text := <-done; text != "" {
		v.t.Fatal(text)
	}
}

// stop stops the VM in one of the ways over which increments go on.
func (v *cycledVM) stop() {
	v.t.Helper()
	ways := []string{"power-off", "shutdown", "stop"}
	way := ways[v.rand.IntN(len(ways))]
	v.note("  VM %s: %s", v.id, way)
	switch way {
	case "power-off":
		v.held()
		v.VM(v.vmid).PowerOff()
	case "shutdown":
		v.asked("shutdown")
	case "stop":
		v.QM("stop", v.id)
	}
	v.stopped()
}

// cycle is one stop and start.
func (v *cycledVM) cycle() {
	v.t.Helper()
	kinds := []string{
		"stop", "stop", "stop", "stop", "stop", "stop", "reboot", "reboot", "reset", "killed", "terminated", "shutdown forced", "volume written", "guest writes at once",
		"keeper killed before a power-off", "keeper killed before qm stop", "backed up while stopped", "vzdump while stopped",
	}
	if v.snapshots {
		kinds = append(kinds, "rolled back", "rolled back while it runs", "rolled back by hand", "snapshot while stopped", "snapshot while it runs")
	}
	kind := kinds[v.rand.IntN(len(kinds))]
	v.note("VM %s: %s, expecting %v", v.id, kind, v.next)
	switch kind {
	case "stop":
		v.stop()
		v.start()
	case "reboot":
		v.asked("reboot")
		v.merged()
	case "reset":
		v.QM("reset", v.id)
	case "killed":
		v.flush()
		v.expect(mustNot)
		v.VM(v.vmid).Kill()
		v.stopped()
		v.start()
	case "terminated":
		v.expect(mustNot)
		v.VM(v.vmid).Terminate()
		v.stopped()
		v.start()
	case "shutdown forced": // the guest does nothing
		v.expect(mustNot)
		v.QM("shutdown", v.id, "--timeout", "1", "--forceStop")
		v.stopped()
		v.start()
	case "volume written":
		v.stop()
		disk := v.disks[v.rand.IntN(len(v.disks))]
		v.unseen(disk, func(path string) {
			testenv.Output(v.t, "dd", "if="+path, "of="+path, "bs=512", "count=1", "conv=notrunc")
		})
		v.expect(mustNot, disk)
		v.start()
	case "guest writes at once":
		v.stop()
		v.expect(may)
		v.QM("start", v.id)
		v.write(1 + v.rand.IntN(3))
		v.merged()
	case "keeper killed before a power-off":
		v.units.kill(v.id)
		v.expect(mustNot)
		v.VM(v.vmid).PowerOff()
		v.stopped()
		v.start()
	case "keeper killed before qm stop":
		v.units.kill(v.id)
		v.QM("stop", v.id)
		v.stopped()
		v.start() // which starts it again
	case "backed up while stopped":
		v.stop()
		v.expect(mustNot)
		v.run()
		v.expect(mustNot)
		v.start()
	case "vzdump while stopped": // it has PVE start the VM, and stop it
		v.stop()
		v.QM("set", v.id, "--lock", "backup")
		v.QM("start", v.id, "--skiplock")
		v.merged()
		v.QM("stop", v.id, "--skiplock")
		v.stopped()
		v.QM("unlock", v.id)
		v.start()
	case "rolled back":
		v.stop()
		v.QM("rollback", v.id, "base") // to what the disk held in the beginning
		v.expect(mustNot)
		v.start()
	case "rolled back while it runs":
		v.QM("rollback", v.id, "base")
		v.stopped()
		v.expect(mustNot)
		v.start()
	case "rolled back by hand":
		// Without a new vmgenid, and with the time put back.
		v.stop()
		v.unseen("scsi0", func(path string) { testenv.Output(v.t, v.QEMU.Img, "snapshot", "-a", "base", path) })
		v.expect(mustNot)
		v.start()
	case "snapshot while stopped":
		v.stop()
		v.QM("snapshot", v.id, "other")
		v.QM("delsnapshot", v.id, "other")
		v.expect(mustNot)
		v.start()
	case "snapshot while it runs":
		v.QM("snapshot", v.id, "other")
		v.write(1 + v.rand.IntN(3))
		v.QM("delsnapshot", v.id, "other")
	}
}

// unseen changes the volume of a disk, and puts its time back as far as programs can.
func (v *cycledVM) unseen(disk string, change func(path string)) {
	v.t.Helper()
	path := v.VM(v.vmid).Disk(disk).Path
	info, err := os.Stat(path)
	if err == nil {
		change(path)
		err = os.Chtimes(path, info.ModTime(), info.ModTime())
	}
	if err != nil {
		v.t.Fatal(err)
	}
}

// run takes a point, which must hold what the disks do.
func (v *cycledVM) run() {
	v.t.Helper()
	cmd, stderr := exec.Command(v.site.Backup, "run", "-v", v.id), new(bytes.Buffer)
	cmd.Stderr = stderr
	out, err := cmd.Output()
	if code := cmd.ProcessState.ExitCode(); code != 0 && code != 4 {
		v.t.Fatalf("run: %v: %s", err, stderr)
	}
	_, id, _ := strings.Cut(strings.TrimSpace(string(out)), "/")
	text, err := os.ReadFile(filepath.Join(v.repo, v.id, id, chain.ManifestFile))
	if err != nil {
		v.t.Fatal(err)
	}
	m, err := chain.DecodeManifest(text)
	if err != nil {
		v.t.Fatal(err)
	}
	point := ledger.ReadPoint(v.t, v.QEMU, v.repo, v.id, m.ID)
	if len(point) != len(v.disks) {
		v.t.Fatalf("point %s has %d disks", id, len(point))
	}
	for _, d := range m.Disks {
		v.note("  VM %s: %s is %s: %s", v.id, d.Name, d.Level, d.Reason)
		v.levels[d.Level]++
		want := v.next[d.Name]
		if want == mustGoOn && d.Level != chain.Inc || want == mustNot && d.Level != chain.Full || d.Level == chain.Full && d.Reason == "" {
			v.t.Fatalf("disk %s is %s (%s), expected %s: %s", d.Name, d.Level, d.Reason, want, stderr)
		}
		if !bytes.Equal(point[d.Name], v.content(d.Name)) {
			v.t.Fatalf("disk %s of point %s, %s, is not what the VM has: %s", d.Name, id, d.Level, stderr)
		}
		v.next[d.Name] = mustGoOn
	}
}

// content is what a disk holds now, as its volume tells.
func (v *cycledVM) content(disk string) []byte {
	v.t.Helper()
	vm := v.VM(v.vmid)
	if vm.Alive() {
		vm.IO(disk, "flush")
	}
	d, raw := vm.Disk(disk), filepath.Join(v.t.TempDir(), disk)
	testenv.Output(v.t, v.QEMU.Img, "convert", "-U", "-f", d.Format, "-O", "raw", d.Path, raw)
	data, err := os.ReadFile(raw)
	if err != nil {
		v.t.Fatal(err)
	}
	return data
}

// units are the keepers that systemctl, which is a pipe to here, is told to start.
type units struct {
	mu      sync.Mutex
	keepers map[string]*exec.Cmd
}

func startUnits(x *cycles) *units {
	x.t.Helper()
	u := &units{keepers: map[string]*exec.Cmd{}}
	path := filepath.Join(x.Dir, "systemd")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		x.t.Fatal(err)
	}
	pipe, err := os.OpenFile(path, os.O_RDWR, 0) // open at both ends it has none
	if err != nil {
		x.t.Fatal(err)
	}
	x.write(filepath.Join(x.Bin, "systemctl"), fmt.Sprintf("#!/bin/sh\necho \"$*\" > '%s'\n", path))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for lines := bufio.NewScanner(pipe); lines.Scan(); {
			if m := keepUnit.FindStringSubmatch(lines.Text()); m != nil {
				u.start(x, m[1])
			}
		}
	}()
	x.t.Cleanup(func() {
		_ = pipe.Close()
		<-done
		for id := range u.keepers {
			u.kill(id)
		}
	})
	return u
}

var keepUnit = regexp.MustCompile(`start qmchain-keep@(\d+)\.service$`)

// start starts a keeper that is not there.
func (u *units) start(x *cycles, vmid string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.keepers[vmid] != nil {
		return
	}
	journal, err := os.OpenFile(x.calls+".journal", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err == nil {
		cmd := exec.Command(x.site.Backup, "keep", vmid)
		cmd.Stdout, cmd.Stderr = journal, journal
		if err = cmd.Start(); err == nil {
			u.keepers[vmid] = cmd
		}
		_ = journal.Close()
	}
	if err != nil {
		x.t.Errorf("keeper of VM %s: %v", vmid, err)
	}
}

// kill kills a keeper.
func (u *units) kill(vmid string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if cmd := u.keepers[vmid]; cmd != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	delete(u.keepers, vmid)
}
