package bench

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
	"qmchain/qmp/qmptest"
)

// How long an increment of a guest with two disks takes to which nobody has written, and where the time goes. Besides the
// whole (total-ms) it reports the medians of
//
//	qmp-ms     QEMU's answers to commands, but for those while it copies
//	copy-ms    from the start of the first job to the end of the last
//	tool-ms    all the rest, which is qmchain's own; of that:
//	images-ms    making the images of the point and the fleece images, with qemu-img
//	commit-ms    bringing the point to disk and into the repository
//
// What is wanted: tool-ms below 150.
func BenchmarkIdleIncrement(b *testing.B) {
	for _, q := range testenv.QEMUs(b) {
		b.Run("qemu="+q.Name, func(b *testing.B) {
			const size = 64 << 20
			vm := testenv.Start(b, testenv.Config{QEMU: q, Style: styleOf(q), Disks: []testenv.Disk{
				{ID: "scsi0", Size: size, Discard: "unmap"},
				{ID: "virtio1", Size: size, Discard: "unmap"},
			}})
			var log transcript
			proxy := qmptest.NewProxy(b, vm.Socket, log.hooks())
			dir, fleece := b.TempDir(), b.TempDir()
			run := func(level chain.Level) {
				result, err := backup.Run(b.Context(), config(proxy.Addr(), dir, fleece, backup.Auto))
				if err != nil {
					b.Fatal(err)
				}
				if got := result.Point.Level(); got != level {
					b.Fatalf("level %s, not %s: %s", got, level, result.Point.Disks[0].Reason)
				}
			}
			run(chain.Full)

			r := rounds{}
			for b.Loop() {
				log.seen = nil
				began := time.Now()
				run(chain.Inc)
				for name, took := range log.parts(began, time.Now()) {
					r.add(name, milliseconds(took))
				}
			}
			for _, name := range []string{"total", "qmp", "copy", "tool", "images", "commit"} {
				record(b, r.alone(name, "ms"))
			}
			total := slices.Sorted(slices.Values(r["total"]))
			b.Logf("%d runs of %d commands: %.0f to %.0f ms; load %s", len(total), len(log.seen), total[0], total[len(total)-1], load())
			for _, line := range log.costliest(8) {
				b.Log(line)
			}
		})
	}
}

// transcript is what went over a guest's QMP socket.
type transcript struct{ seen []exchange }

type exchange struct {
	name, args     string
	sent, answered time.Time
}

// hooks record commands, which come one at a time: with Split also those that came in one write.
func (t *transcript) hooks() qmptest.Hooks {
	return qmptest.Hooks{
		Split: true,
		Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
			t.seen = append(t.seen, exchange{name: cmds[0].Name, args: string(cmds[0].Args), sent: time.Now()})
			return qmptest.Verdict{}
		},
		After: func(int, qmptest.CommandSeen, json.RawMessage) { t.seen[len(t.seen)-1].answered = time.Now() },
	}
}

func (e exchange) startsJob() bool {
	return e.name == "transaction" && strings.Contains(e.args, `"blockdev-backup"`)
}

// opensImage tells of images that were made right before.
func (e exchange) opensImage() bool {
	return e.name == "blockdev-add" && strings.Contains(e.args, `"driver":"qcow2"`)
}

// parts splits the time of a run. What qmchain does shows in the gaps between an answer and the next command.
func (t *transcript) parts(began, ended time.Time) map[string]time.Duration {
	first := slices.IndexFunc(t.seen, exchange.startsJob)
	last := len(t.seen) - 1
	for last > first && t.seen[last].name != "job-dismiss" {
		last--
	}
	p := map[string]time.Duration{"total": ended.Sub(began)}
	p["copy"] = t.seen[last].answered.Sub(t.seen[first].sent)
	p["qmp"], p["images"], p["commit"] = 0, 0, 0
	at := began
	for i, e := range t.seen {
		gap := e.sent.Sub(at)
		at = e.answered
		if i >= first && i <= last {
			continue
		}
		p["qmp"] += e.answered.Sub(e.sent)
		switch {
		case e.opensImage():
			p["images"] += gap
		case i > last:
			p["commit"] = max(p["commit"], gap) // after the tear-down it is the only one that takes time
		}
	}
	p["tool"] = p["total"] - p["qmp"] - p["copy"]
	return p
}

// costliest tells of the n kinds of commands that took the most of the last run.
func (t *transcript) costliest(n int) (lines []string) {
	type kind struct {
		name  string
		count int
		took  time.Duration
	}
	kinds := map[string]kind{}
	for _, e := range t.seen {
		k := kinds[e.name]
		kinds[e.name] = kind{e.name, k.count + 1, k.took + e.answered.Sub(e.sent)}
	}
	sorted := slices.SortedFunc(maps.Values(kinds), func(a, b kind) int { return cmp.Compare(b.took, a.took) })
	for _, k := range sorted[:min(n, len(sorted))] {
		lines = append(lines, fmt.Sprintf("%6.1f ms in %d of %s", milliseconds(k.took), k.count, k.name))
	}
	return lines
}

// The peak of the resident memory of qmchain-backup, as a process of its own, during an increment of a small disk and of
// a huge one. What is wanted: below 50 MB, whatever the disk's size.
func BenchmarkPeakMemory(b *testing.B) {
	program := filepath.Join(b.TempDir(), "qmchain-backup")
	build(b, program, "qmchain/cmd/qmchain-backup")
	for _, q := range testenv.QEMUs(b) {
		b.Run("qemu="+q.Name, func(b *testing.B) {
			vm := testenv.Start(b, testenv.Config{QEMU: q, Style: styleOf(q), Disks: []testenv.Disk{
				{ID: "scsi0", Size: 1 << 30, Discard: "unmap"},
			}})
			dir, fleece := b.TempDir(), b.TempDir()
			run := func(b *testing.B, level chain.Level) int64 {
				b.Helper()
				return peak(b, program, "run", "--socket", vm.Socket, "--name", "web", "--repo", dir, "--fleece-dir", fleece, "--level", string(level))
			}
			first := run(b, chain.Full)
			b.Logf("full of 1 GiB: %s", humanize.Bytes(uint64(first)))
			for _, size := range []int64{1 << 30, 4 << 40} {
				b.Run("size="+strings.ReplaceAll(humanize.IBytes(uint64(size)), " ", ""), func(b *testing.B) {
					// A disk that grows goes on with increments: no need to make a full of terabytes.
					vm.Execute("block_resize", map[string]any{"node-name": topNode(b, vm), "size": size}, nil)
					r := rounds{}
					for b.Loop() {
						vm.IO("scsi0", fmt.Sprintf("write -P 0x5a %d 1M", size-1<<20))
						r.add("peak", float64(run(b, chain.Inc))/1e6)
					}
					record(b, r.alone("peak", "MB"))
				})
			}
		})
	}
}

// topNode is the node that the guest's only disk uses.
func topNode(b *testing.B, vm *testenv.VM) string {
	b.Helper()
	var devices []struct {
		Inserted struct {
			Node string `json:"node-name"`
		}
	}
	vm.Execute("query-block", nil, &devices)
	if len(devices) != 1 {
		b.Fatalf("not one disk: %v", devices)
	}
	return devices[0].Inserted.Node
}

// peak runs a program and returns the most resident memory that it had, in bytes. The kernel's account of an ended child
// will not do: it counts the memory of the parent before the exec.
func peak(b *testing.B, program string, args ...string) (most int64) {
	b.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(b.Context(), program, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if err != nil || most == 0 {
				b.Fatalf("%s: %v, %d bytes: %s", program, err, most, out.String())
			}
			return most
		case <-tick.C:
			most = max(most, highWater(cmd.Process.Pid))
		}
	}
}

// highWater is the peak of a process so far, in bytes; 0 when it has ended.
func highWater(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	return 0
}
