package main

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
)

var (
	keepCycles = flag.Int("keep-cycles", 12, "stops and starts of each guest in TestKeepCycles")
	keepSeed   = flag.Uint64("keep-seed", 0, "seed of TestKeepCycles; 0: a random one")
)

// What the next point of a disk must be.
const (
	mustGoOn = "inc"
	mustNot  = "full"
	may      = "either" // the guest and its keeper have run a race
)

// cycles is a guest with a raw disk and one with an internal snapshot, which is stopped and started in all ways, with the real
// program as its keeper. Every point must hold what the disks do, be an increment wherever the proof held, and a full with a
// reason elsewhere.
type cycles struct {
	*bench
	rand   *rand.Rand
	dir    string // of what is kept
	keeper *exec.Cmd
	stderr *bytes.Buffer
	ended  chan struct{} // closed when the keeper has ended
	next   map[string]string
	log    []string
	levels map[chain.Level]int
}

func TestKeepCycles(t *testing.T) {
	t.Parallel()
	for _, q := range testenv.QEMUs(t) {
		style := testenv.Drive
		if q.AtLeast(10, 0) {
			style = testenv.Throttle
		}
		t.Run(q.Name+"/"+style.String(), func(t *testing.T) {
			t.Parallel()
			seed := *keepSeed
			if seed == 0 {
				seed = rand.Uint64()
			}
			t.Logf("seed %d", seed)
			disks := []testenv.Disk{{ID: "scsi0", Size: 4 << 20, Format: "raw", Discard: "unmap"}, {ID: "virtio1", Size: 4 << 20, Discard: "unmap"}}
			disks[1].Path = filepath.Join(t.TempDir(), "disk.qcow2")
			testenv.CreateDisk(t, q, disks[1].Path, "qcow2", 4<<20)
			testenv.Output(t, q.Img, "snapshot", "-c", "empty", disks[1].Path)
			vm := testenv.Start(t, testenv.Config{QEMU: q, Style: style, Disks: disks, NoShutdown: true})
			x := &cycles{
				bench: &bench{t, vm, ledger.New(t, vm, rand.Uint64(), disks...), t.TempDir(), t.TempDir()},
				rand:  rand.New(rand.NewPCG(seed, 2)), dir: t.TempDir(), next: make(map[string]string), levels: make(map[chain.Level]int),
			}
			defer func() {
				if t.Failed() {
					t.Logf("what happened:\n%s", strings.Join(x.log, "\n"))
				}
			}()
			defer x.killKeeper()
			x.expect(mustNot)
			for range *keepCycles {
				x.ledger.Forget()
				x.write(x.rand.IntN(8))
				if x.rand.IntN(4) > 0 {
					x.run()
				}
				x.write(x.rand.IntN(8))
				x.cycle()
			}
			x.run()
			t.Logf("%d disks went on, %d got a full", x.levels[chain.Inc], x.levels[chain.Full])
		})
	}
}

func (x *cycles) note(format string, args ...any) {
	x.log = append(x.log, fmt.Sprintf(format, args...))
}

// expect notes what the next point of disks must be; a disk whose tracking has ended stays without.
func (x *cycles) expect(what string, disks ...string) {
	if len(disks) == 0 {
		disks = []string{"scsi0", "virtio1"}
	}
	for _, d := range disks {
		if what != mustGoOn && x.next[d] != mustNot {
			x.next[d] = what
		}
	}
}

// keep starts a keeper, if there is none, which dies before that step in the file system, if that is not 0.
func (x *cycles) keep(kill int) {
	x.t.Helper()
	x.killKeeper()
	x.keeper, x.stderr = x.command(kill, "keep", "-v", "--socket", x.vm.Socket, "--name", "web", "--keep-dir", x.dir, "--quit", "--limit", "1m")
	if err := x.keeper.Start(); err != nil {
		x.t.Fatal(err)
	}
	x.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		_ = cmd.Wait()
		close(ended)
	}(x.keeper, x.ended)
}

func (x *cycles) killKeeper() {
	if x.keeper == nil {
		return
	}
	_ = x.keeper.Process.Kill()
	<-x.ended
	x.note("  keeper: %s", x.stderr)
	x.keeper = nil
}

// wait waits until something is so, or the keeper has ended.
func (x *cycles) wait(what string, is func() bool) {
	x.t.Helper()
	for range 3000 {
		if is() {
			return
		}
		select {
		case <-x.ended:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
	x.t.Fatalf("waited in vain until %s: %s", what, x.stderr)
}

// start starts the guest again, and has what was saved merged back.
func (x *cycles) start() {
	x.t.Helper()
	x.vm.Restart()
	x.merged()
}

func (x *cycles) merged() {
	x.t.Helper()
	x.wait("what was saved is merged back", func() bool {
		left, err := filepath.Glob(filepath.Join(x.dir, "web", "*[dr].json"))
		refused := 0
		for _, path := range left {
			if strings.HasSuffix(path, "refused.json") {
				refused++
			}
		}
		return err == nil && len(left) == refused
	})
}

// powerOff powers the guest off; its keeper ends QEMU, or dies, and then its supervisor does.
func (x *cycles) powerOff() {
	x.t.Helper()
	x.vm.PowerOff()
	x.wait("QEMU has ended", func() bool { return !x.vm.Alive() })
	if x.vm.Alive() {
		x.wait("the guest is off", func() bool { return x.vm.Status() == "shutdown" })
		x.vm.Quit()
	}
}

// cycle is one stop and start.
func (x *cycles) cycle() {
	x.t.Helper()
	kind := []string{
		"power off", "power off", "power off", "hard stop", "quit", "terminated", "killed", "reset", "volume written", "rolled back", "image written",
		"without a keeper", "keeper killed in saving", "keeper killed in merging", "guest writes at once", "started twice", "keeper is late",
	}[x.rand.IntN(17)]
	step := 1 + x.rand.IntN(14)
	x.note("%s (%d), expecting %v", kind, step, x.next)
	switch kind {
	case "power off":
		x.keep(0)
		x.powerOff()
		x.start()
	case "hard stop":
		x.killKeeper()
		cmd, stderr := x.command(0, "keep", "--socket", x.vm.Socket, "--name", "web", "--keep-dir", x.dir, "--stop", "--quit", "--limit", "1m")
		if err := cmd.Run(); err != nil {
			x.t.Fatalf("%v: %s", err, stderr)
		}
		x.keep(0)
		x.start()
	case "quit", "terminated", "killed":
		x.keep(0)
		for _, id := range []string{"scsi0", "virtio1"} {
			x.vm.IO(id, "flush")
		}
		map[string]func(){"quit": x.vm.Quit, "terminated": x.vm.Terminate, "killed": x.vm.Kill}[kind]()
		x.expect(mustNot)
		x.start()
	case "reset":
		x.vm.Execute("system_reset", nil, nil)
	case "volume written", "image written":
		x.keep(0)
		x.powerOff()
		disk := map[string]string{"volume written": "scsi0", "image written": "virtio1"}[kind]
		path := x.vm.Disk(disk).Path
		info, err := os.Stat(path)
		if err != nil {
			x.t.Fatal(err)
		}
		// What is written is what is there: the ledger stays right. The times are put back as far as they can be.
		testenv.Output(x.t, "dd", "if="+path, "of="+path, "bs=512", "count=1", "conv=notrunc")
		if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
			x.t.Fatal(err)
		}
		x.expect(mustNot, disk)
		x.start()
	case "rolled back":
		// To where it is: the ledger stays right.
		x.keep(0)
		x.powerOff()
		path := x.vm.Disk("virtio1").Path
		for _, option := range []string{"-c", "-a", "-d"} {
			testenv.Output(x.t, x.vm.Config().QEMU.Img, "snapshot", option, "now", path)
		}
		x.expect(mustNot, "virtio1")
		if x.rand.IntN(2) == 0 {
			x.note("  with another vmgenid")
			x.expect(mustNot)
			x.vm.Reconfigure(func(c *testenv.Config) { c.VMGenID = testenv.RandomUUID() })
			x.start()
			return
		}
		x.start()
	case "without a keeper":
		x.killKeeper()
		x.vm.PowerOff()
		x.expect(mustNot)
		x.start()
	case "keeper killed in saving":
		x.keep(step)
		x.powerOff()
		x.expect(may)
		x.keep(0)
		x.start()
	case "keeper killed in merging":
		x.keep(0)
		x.powerOff()
		x.keep(step)
		x.expect(may)
		x.start()
	case "guest writes at once":
		x.keep(0)
		x.powerOff()
		x.expect(may)
		x.vm.Restart()
		x.write(1 + x.rand.IntN(3))
		x.merged()
	case "started twice":
		x.keep(0)
		x.powerOff()
		x.killKeeper()
		x.vm.Restart()
		for _, disk := range []string{"scsi0", "virtio1"} {
			if err := x.ledger.Fill(disk, x.rand.IntN(8000)*512, 512, byte(step)); err != nil {
				x.t.Fatal(err)
			}
		}
		x.vm.Quit()
		x.expect(mustNot)
		x.keep(0)
		x.start()
	case "keeper is late":
		x.keep(0)
		x.powerOff()
		x.killKeeper()
		x.vm.Restart()
		if err := x.ledger.Fill("scsi0", 0, 512, byte(step)); err != nil {
			x.t.Fatal(err)
		}
		x.expect(mustNot, "scsi0")
		x.expect(may, "virtio1") // it may be written to before the run merges back what is left
	}
}

// run takes a point.
func (x *cycles) run() {
	x.t.Helper()
	cmd, stderr := x.command(0, append(x.args(x.vm.Socket), "--keep-dir", x.dir)...)
	out, err := cmd.Output()
	if code := cmd.ProcessState.ExitCode(); code != 0 && code != 4 {
		x.t.Fatalf("%v: %s", err, stderr)
	}
	_, id, _ := strings.Cut(strings.TrimSpace(string(out)), "/")
	text, err := os.ReadFile(filepath.Join(x.repo, "web", id, chain.ManifestFile))
	if err != nil {
		x.t.Fatal(err)
	}
	m, err := chain.DecodeManifest(text)
	if err != nil {
		x.t.Fatal(err)
	}
	disks := ledger.ReadPoint(x.t, x.vm.Config().QEMU, x.repo, "web", m.ID)
	if _, err := x.ledger.Instant(disks, x.ledger.Now(), x.ledger.Now()); err != nil {
		x.t.Fatalf("point %s: %v", id, err)
	}
	for _, d := range m.Disks {
		x.note("  run: %s is %s %s", d.Name, d.Level, d.Reason)
		x.levels[d.Level]++
		want := x.next[d.Name]
		switch {
		case want == mustGoOn && d.Level != chain.Inc, want == mustNot && d.Level != chain.Full, d.Level == chain.Full && d.Reason == "":
			x.t.Fatalf("disk %s is %s (%s), expected %s: %s", d.Name, d.Level, d.Reason, want, stderr)
		case d.Tracking == nil || d.Tracking.Kind != chain.KindMemory:
			x.t.Fatalf("disk %s: tracking is %+v", d.Name, d.Tracking)
		}
		x.next[d.Name] = mustGoOn
	}
}

// What keep has saved is seen by the doctor while the guest runs without it, and taken away by him and by cleanup.
func TestKeptLeftovers(t *testing.T) {
	t.Parallel()
	q := testenv.Host(t)
	disks := []testenv.Disk{{ID: "scsi0", Size: 4 << 20, Format: "raw", Discard: "unmap"}}
	vm := testenv.Start(t, testenv.Config{QEMU: q, Disks: disks, NoShutdown: true})
	b := &bench{t, vm, ledger.New(t, vm, rand.Uint64(), disks...), t.TempDir(), t.TempDir()}
	kept := t.TempDir()
	do := func(code int, text string, args ...string) {
		t.Helper()
		got, stdout, stderr := call(t, append(args, "--keep-dir", kept)...)
		if got != code || !strings.Contains(stdout+stderr, text) {
			t.Errorf("%q: exit code %d: %s%s", args, got, stdout, stderr)
		}
	}
	save := func() {
		t.Helper()
		do(0, "", b.args(vm.Socket)...)
		do(0, "saved", "keep", "--socket", vm.Socket, "--name", "web", "--stop", "--quit", "--limit", "1m")
		if err := vm.Wait(time.Minute); err != nil {
			t.Error(err)
		}
	}
	doctor := []string{"doctor", "--name", "web", "--repo", b.repo, "--fleece-dir", b.fleece}
	save()
	do(0, "all is well", doctor...) // the guest is stopped: that is what it is for
	vm.Restart()
	do(6, "nobody has merged back", append(doctor, "--socket", vm.Socket)...)
	do(0, "all is well", append(doctor, "--socket", vm.Socket, "--fix")...)
	b.write(3)
	do(0, "inc", b.args(vm.Socket)...) // for the doctor has merged it back
	save()
	do(0, "qmchain:", "cleanup", "--name", "web")
	vm.Restart()
	do(4, "no bitmap records", b.args(vm.Socket)...)

	vm.Quit()
	for _, test := range []struct {
		code int
		text string
		args []string
	}{
		{80, "one each", []string{"--save", "--stop"}},
		{80, "--limit", []string{"--limit", "1h"}},
		{80, "guest's name", []string{"--name", "../web"}},
		{2, "no such file", []string{"--save"}},
		{2, "no such file", []string{"--restore"}},
	} {
		do(test.code, test.text, append([]string{"keep", "--socket", vm.Socket, "--name", "web"}, test.args...)...)
	}
}
