package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/internal/durable"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

var (
	tortureRuns = flag.Int("torture-runs", 25, "runs of each guest in TestTorture")
	tortureSeed = flag.Uint64("torture-seed", 0, "seed of TestTorture; 0: a random one")
)

// torture is one guest's long life: writes, restarts, crashes, resizes, and runs of the real program that go wrong in all
// ways at random moments. Every point that comes to be must hold what the disks held at one instant of its run; a run without
// a fault must succeed; and it must be an increment wherever nothing has happened that ends tracking.
type torture struct {
	*bench
	rand *rand.Rand
	// Two repositories back up the guest, each with its own tracking: repos[0] and repos[1]. The one in use is bench.repo.
	repos [2]string
	// tracked is false for a disk that must get a full next, as something has ended its tracking, for each repository.
	tracked [2]map[string]bool
	sums    map[string][sha256.Size]byte
	log     []string
}

func (x *torture) note(format string, args ...any) {
	x.log = append(x.log, fmt.Sprintf(format, args...))
}

func TestTorture(t *testing.T) {
	t.Parallel()
	for _, q := range testenv.QEMUs(t) {
		for _, style := range []testenv.Style{testenv.Drive, testenv.Throttle} {
			t.Run(q.Name+"/"+style.String(), func(t *testing.T) {
				t.Parallel()
				seed := *tortureSeed
				if seed == 0 {
					seed = rand.Uint64()
				}
				t.Logf("seed %d", seed)
				x := &torture{
					bench: newBench(t, q, style), rand: rand.New(rand.NewPCG(seed, 1)),
					sums: make(map[string][sha256.Size]byte),
				}
				for i := range x.repos {
					x.repos[i], x.tracked[i] = t.TempDir(), make(map[string]bool)
				}
				defer func() {
					if t.Failed() {
						t.Logf("what happened:\n%s", strings.Join(x.log[max(0, len(x.log)-40):], "\n"))
					}
				}()
				for range *tortureRuns {
					x.ledger.Forget()
					x.repo = x.repos[min(1, x.rand.IntN(4)/3)]
					x.write(x.rand.IntN(15))
					x.event()
					x.write(x.rand.IntN(5))
					x.faultyRun()
					if x.rand.IntN(3) == 0 {
						x.write(x.rand.IntN(5))
						x.goodRun(chain.Level("auto"))
					}
				}
				for _, x.repo = range x.repos {
					x.goodRun(chain.Level("auto"))
					x.recheck()
				}
				t.Logf("%d points", len(x.sums))
			})
		}
	}
}

// event is something that happens to a guest between two runs.
func (x *torture) event() {
	switch x.rand.IntN(16) {
	case 14, 15:
		kill := x.rand.IntN(60)
		x.note("prune, killed at step %d", kill)
		if prune := x.prune(kill); prune != nil {
			prune(kill > 0)
		}
	case 0:
		x.note("restart")
		x.vm.Restart()
	case 1:
		x.note("sigterm and restart")
		x.vm.Terminate()
		x.vm.Restart()
	case 2:
		x.note("QEMU killed")
		x.flush()
		x.vm.Kill()
		x.vm.Restart()
		x.lost("scsi0")
		x.lost("virtio1")
	case 3:
		disk := []string{"scsi0", "virtio1"}[x.rand.IntN(2)]
		x.resize(disk, x.ledger.Size(disk)+int64(1+x.rand.IntN(20))*512*33)
	case 4:
		disk := []string{"scsi0", "virtio1"}[x.rand.IntN(2)]
		if size := x.ledger.Size(disk) - 1<<20; size >= 2<<20 {
			x.resize(disk, size)
		}
	case 5:
		x.note("disks swapped")
		x.vm.Reconfigure(func(c *testenv.Config) {
			a, b := x.vm.Disk("scsi0"), x.vm.Disk("virtio1")
			c.Disks[0].Path, c.Disks[0].Size, c.Disks[1].Path, c.Disks[1].Size = b.Path, b.Size, a.Path, a.Size
		})
		x.ledger.Swap("scsi0", "virtio1")
		for _, tracked := range x.tracked {
			tracked["scsi0"], tracked["virtio1"] = tracked["virtio1"], tracked["scsi0"]
		}
	case 6:
		x.note("paused for a while")
		x.vm.Execute("stop", nil, nil)
		x.vm.Execute("cont", nil, nil)
	}
}

// prune starts to remove points, in a process that dies before step kill; 0: it does not. The function that it returns waits
// for its end. It is nil where there is nothing yet.
func (x *torture) prune(kill int) (wait func(mayDie bool)) {
	x.t.Helper()
	if len(x.points()) == 0 {
		return nil
	}
	cmd, stderr := x.command(kill, "prune", "--repo", x.repo, "--keep-last", strconv.Itoa(2+x.rand.IntN(4)), "--lock-wait", "1m")
	if err := cmd.Start(); err != nil {
		x.t.Fatal(err)
	}
	return func(mayDie bool) {
		x.t.Helper()
		if err := cmd.Wait(); err != nil && (!mayDie || cmd.ProcessState.ExitCode() != -1) {
			x.t.Fatalf("prune: %v: %s", err, stderr)
		}
	}
}

// lost notes that a disk's tracking has ended.
func (x *torture) lost(disk string) {
	for _, tracked := range x.tracked {
		tracked[disk] = false
	}
}

// now is what the repository in use tracks.
func (x *torture) now() map[string]bool {
	if x.repo == x.repos[0] {
		return x.tracked[0]
	}
	return x.tracked[1]
}

func (x *torture) flush() {
	for _, id := range []string{"scsi0", "virtio1"} {
		x.vm.IO(id, "flush")
	}
}

// resize changes a disk's size, unless QEMU refuses.
func (x *torture) resize(disk string, size int64) {
	var devices []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted struct {
			Node string `json:"node-name"`
		} `json:"inserted"`
	}
	x.vm.Execute("query-block", nil, &devices)
	for _, d := range devices {
		if !strings.Contains(d.Device+d.QDev, disk) {
			continue
		}
		err := x.vm.Try("block_resize", map[string]any{"node-name": d.Inserted.Node, "size": size}, nil)
		x.note("resize %s from %d to %d: %v", disk, x.ledger.Size(disk), size, err)
		if err == nil {
			if size < x.ledger.Size(disk) {
				x.lost(disk)
			}
			x.ledger.Resize(disk, size)
		}
		return
	}
	x.t.Fatalf("no device %s in %+v", disk, devices)
}

// points are the ids of all points that are there.
func (x *torture) points() map[string]bool {
	x.t.Helper()
	ids := make(map[string]bool)
	found, err := filepath.Glob(filepath.Join(x.repo, "web", "2*"))
	if err != nil {
		x.t.Fatal(err)
	}
	for _, p := range found {
		ids[filepath.Base(p)] = true
	}
	return ids
}

// committed checks the point that a run has made, if it has, against the time of that run. It reports whether there is one.
func (x *torture) committed(before map[string]bool, from int) *chain.Manifest {
	x.t.Helper()
	var made *chain.Manifest
	for id := range x.points() {
		if before[id] {
			continue
		}
		if made != nil {
			x.t.Fatalf("one run has made two points")
		}
		text, err := os.ReadFile(filepath.Join(x.repo, "web", id, chain.ManifestFile))
		if err != nil {
			x.t.Fatal(err)
		}
		if made, err = chain.DecodeManifest(text); err != nil {
			x.t.Fatal(err)
		}
		disks := ledger.ReadPoint(x.t, x.vm.Config().QEMU, x.repo, "web", made.ID)
		if _, err := x.ledger.Instant(disks, from, x.ledger.Now()); err != nil {
			x.t.Fatalf("point %s: %v", id, err)
		}
		for name, data := range disks {
			x.sums[x.repo+id+"/"+name] = sha256.Sum256(data)
		}
		for _, d := range made.Disks {
			x.note("  point %s: %s is %s %s", id, d.Name, d.Level, d.Reason)
			if x.now()[d.Name] && d.Level == chain.Full && d.Reason != "asked for" {
				x.t.Fatalf("point %s: disk %s is a full: %s", id, d.Name, d.Reason)
			}
			if !x.now()[d.Name] && d.Level.Overlay() {
				x.t.Fatalf("point %s: disk %s is an increment, though its tracking had ended", id, d.Name)
			}
			if d.Level.Tracked() {
				x.now()[d.Name] = true
			}
		}
	}
	return made
}

// goodRun is a run without a fault.
func (x *torture) goodRun(level chain.Level) {
	x.t.Helper()
	before, from := x.points(), x.ledger.Now()
	cmd, stderr := x.command(0, append(x.args(x.vm.Socket), "--init", "--level", string(level))...)
	err := cmd.Run()
	x.note("a good run, level %s: %v", level, err)
	if code := cmd.ProcessState.ExitCode(); code != 0 && code != 4 {
		x.t.Fatalf("exit code %d: %s", code, stderr)
	}
	if x.committed(before, from) == nil {
		x.t.Fatalf("no point: %s", stderr)
	}
	x.guestIsClean()
}

// failTarget has writes to the images of a point fail in QEMU, the first one or a later one, one or all from then on.
func failTarget(cmd *qmptest.CommandSeen, at int) {
	var c map[string]any
	if cmd.Name != "blockdev-add" || json.Unmarshal(cmd.Line, &c) != nil {
		return
	}
	args := c["arguments"].(map[string]any)
	file, ok := args["file"].(map[string]any)
	if name, _ := args["node-name"].(string); !ok || !strings.HasPrefix(name, "qmchain-tgt") {
		return
	}
	event := []string{"cluster_alloc", "write_aio"}[at/3%2]
	fail := map[string]any{
		"event": event, "iotype": []string{"write", "write-zeroes"}[at%2], "errno": []int{28, 5}[at/2%2], "once": at%3 == 0, "state": 1 + at%4,
	}
	if at%3 == 1 {
		delete(fail, "iotype")
	}
	if at%4 == 0 {
		fail["event"] = "none" // from the beginning on
	}
	var states []any
	for i := range at % 4 {
		states = append(states, map[string]any{"event": event, "state": i + 1, "new_state": i + 2})
	}
	debug := map[string]any{"driver": "blkdebug", "node-name": file["node-name"], "image": file, "inject-error": []any{fail}, "set-state": states}
	delete(file, "node-name")
	if states == nil {
		delete(debug, "set-state")
	}
	args["file"] = debug
	line, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	cmd.Line = append(line, '\n')
}

// guestIsClean makes sure that the guest runs and that nothing of ours is in it but one bitmap a disk of the repository in
// use, and what runs for the other one have left to that one's next run: bitmaps.
func (x *torture) guestIsClean() {
	x.t.Helper()
	if got := x.vm.Status(); got != "running" {
		x.t.Fatalf("the guest is %s", got)
	}
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Name string `json:"name"`
		} `json:"dirty-bitmaps"`
	}
	x.vm.Execute("query-named-block-nodes", map[string]any{"flat": true}, &nodes)
	r, err := repo.Open(x.repo, durable.FS{})
	if err != nil {
		x.t.Fatal(err)
	}
	for _, n := range nodes {
		own := 0
		for _, b := range n.Bitmaps {
			if strings.HasPrefix(b.Name, "qmchain:"+r.ShortID()+":") {
				own++
			}
		}
		if strings.HasPrefix(n.Name, "qmchain") || own > 1 {
			x.t.Fatalf("left in the guest: %+v", n)
		}
	}
}

// faultyRun is a run to which something happens, most times.
func (x *torture) faultyRun() {
	x.t.Helper()
	level := []string{"auto", "auto", "auto", "auto", "full", "diff", "copy"}[x.rand.IntN(7)]
	if level == "diff" && (!x.now()["scsi0"] || !x.now()["virtio1"]) {
		level = "auto"
	}
	at := 1 + x.rand.IntN(70) // of the commands, or of the steps in the file system
	fault := []string{
		"none", "kill at command", "kill at step", "connection lost", "connection lost after", "command refused", "killed at any time", "terminated",
		"job cancelled", "fleece full", "QEMU killed", "QEMU quits", "step fails", "power loss", "agent is dead",
		"target fails",
	}[x.rand.IntN(16)]
	x.note("run, level %s, fault %q at %d", level, fault, at)

	before, from := x.points(), x.ledger.Now()
	var process atomic.Pointer[os.Process]
	var proxy atomic.Pointer[qmptest.Proxy]
	kill := func() { process.Load().Kill() } //nolint:errcheck // it may have ended
	var died atomic.Bool
	dead := make(chan struct{}) // closed when QEMU has ended
	hooks := qmptest.Hooks{
		Before: func(n int, cmds []qmptest.CommandSeen) qmptest.Verdict {
			if !died.Load() && n%3 == at%3 {
				x.write(1)
			}
			if fault == "target fails" {
				for i := range cmds {
					failTarget(&cmds[i], at)
				}
			}
			if n != at {
				return qmptest.Verdict{}
			}
			switch fault {
			case "kill at command":
				kill()
				return qmptest.Verdict{Drop: true}
			case "connection lost":
				return qmptest.Verdict{Drop: true}
			case "command refused":
				return qmptest.Verdict{Fail: &qmp.Error{Class: qmp.ClassGeneric, Desc: "made-up refusal"}}
			case "job cancelled":
				var jobs []struct{ ID string }
				x.vm.Execute("query-jobs", nil, &jobs)
				for _, j := range jobs {
					_ = x.vm.Try("job-cancel", map[string]any{"id": j.ID}, nil)
				}
			case "QEMU killed":
				died.Store(true)
				x.flush()
				x.vm.Kill()
				close(dead)
			case "QEMU quits":
				died.Store(true)
				x.vm.Quit()
				close(dead)
			}
			return qmptest.Verdict{}
		},
		After: func(n int, cmd qmptest.CommandSeen, _ json.RawMessage) {
			switch {
			case died.Load():
			case fault == "connection lost after" && n == at:
				proxy.Load().Drop()
			case cmd.Name == "blockdev-reopen":
				x.write(10)
				if fault == "fleece full" {
					if err := x.ledger.Fill("scsi0", 0, 2<<20, byte(at)); err != nil {
						x.t.Error(err)
					}
				}
			}
		},
	}
	proxy.Store(qmptest.NewProxy(x.t, x.vm.Socket, hooks))
	args := append(x.args(proxy.Load().Addr()), "--init", "--level", level)
	killStep := 0
	switch fault {
	case "fleece full":
		args = append(args, "--fleece-limit", "1MiB")
	case "agent is dead":
		args = append(args, "--agent-socket", x.vm.AgentSocket, "--freeze-timeout", "100ms")
	case "kill at step", "power loss":
		killStep = at
	}
	if x.rand.IntN(5) == 0 {
		x.note("  and points are removed meanwhile")
		if prune := x.prune(0); prune != nil {
			defer prune(false)
		}
	}
	var code int
	var text string
	if fault == "step fails" {
		code, text = x.failAtStep(at, args)
	} else {
		cmd, stderr := x.command(killStep, args...)
		if err := cmd.Start(); err != nil {
			x.t.Fatal(err)
		}
		process.Store(cmd.Process)
		switch fault {
		case "killed at any time":
			time.AfterFunc(time.Duration(x.rand.IntN(250))*time.Millisecond, kill)
		case "terminated":
			delay := time.Duration(20+x.rand.IntN(230)) * time.Millisecond // so that it has got ready for signals
			time.AfterFunc(delay, func() { _ = process.Load().Signal(syscall.SIGTERM) })
		}
		err := cmd.Wait()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			x.t.Fatal(err)
		}
		code, text = cmd.ProcessState.ExitCode(), stderr.String()
	}
	x.note("  exit code %d", code)
	if strings.Contains(text, "panic") {
		x.t.Fatalf("%s", text)
	}
	if died.Load() {
		<-dead
		x.vm.Restart()
	}
	if fault == "power loss" {
		x.losePower()
	}
	made := x.committed(before, from)
	if (fault == "none" || fault == "agent is dead") && made == nil {
		x.t.Fatalf("a run without a fault made no point: exit code %d: %s", code, text)
	}
	if fault == "QEMU killed" && died.Load() {
		// Bitmaps that were loaded are inconsistent now, and those of this session are lost.
		x.lost("scsi0")
		x.lost("virtio1")
	}
	if got := x.vm.Status(); got != "running" {
		x.t.Fatalf("the guest is %s after %q", got, fault)
	}
}

// losePower makes of the unfinished point what a file system may make of it when the host loses power before a commit: files
// that were not synced are empty or cut.
func (x *torture) losePower() {
	folders, _ := filepath.Glob(filepath.Join(x.repo, "web", ".*.partial"))
	var files []string
	for _, dir := range folders {
		own, _ := filepath.Glob(filepath.Join(dir, "*"))
		id := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(dir), "."), ".partial")
		images, _ := filepath.Glob(filepath.Join(x.repo, "web", repo.ImagesFolder, id+".*"))
		files = append(append(files, own...), images...)
	}
	for _, path := range files {
		switch x.rand.IntN(3) {
		case 0:
			_ = os.Truncate(path, 0)
		case 1:
			_ = os.Remove(path)
		}
	}
}

// failAtStep is a run in this process in which one step in the file system fails.
func (x *torture) failAtStep(at int, args []string) (code int, text string) {
	steps := 0
	fsys := durable.FS{Before: func(string, string) error {
		if steps++; steps == at {
			return []error{syscall.ENOSPC, syscall.EIO}[at%2]
		}
		return nil
	}}
	var out, errs bytes.Buffer
	ctx, cancel := context.WithTimeout(x.t.Context(), time.Minute)
	defer cancel()
	env := cli.Env{Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }}
	return program(fsys).Run(ctx, args, env), errs.String()
}

// recheck reads all points again: none may have changed.
func (x *torture) recheck() {
	x.t.Helper()
	r, err := repo.Open(x.repo, durable.FS{})
	if err != nil {
		x.t.Fatal(err)
	}
	g, err := r.Guest("web")
	if err != nil {
		x.t.Fatal(err)
	}
	points, problems, err := g.Points()
	if err != nil || len(problems) > 0 {
		x.t.Fatal(err, problems)
	}
	for _, p := range points.Kept() {
		for name, data := range ledger.ReadPoint(x.t, x.vm.Config().QEMU, x.repo, "web", p.ID) {
			if sha256.Sum256(data) != x.sums[x.repo+string(p.ID)+"/"+name] {
				x.t.Errorf("point %s: disk %s has changed", p.ID, name)
			}
		}
	}
}

// A target that fails in QEMU, at whatever write, fails the run and nothing else.
func TestTargetFailsInQEMU(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, b *bench) {
		b.write(20)
		b.point(chain.Full)
		failed := 0
		for at := range 12 {
			b.ledger.Forget()
			b.write(20)
			proxy := qmptest.NewProxy(t, b.vm.Socket, qmptest.Hooks{Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
				for i := range cmds {
					failTarget(&cmds[i], at)
				}
				return qmptest.Verdict{}
			}})
			cmd, stderr := b.command(0, b.args(proxy.Addr())...)
			switch err := cmd.Run(); {
			case err == nil:
			case cmd.ProcessState.ExitCode() == 1:
				failed++
			default:
				t.Fatalf("%d: %v: %s", at, err, stderr)
			}
			b.after()
		}
		if failed < 6 {
			t.Errorf("only %d of 12 runs failed", failed)
		}
	})
}
