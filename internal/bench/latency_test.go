package bench

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
)

var (
	latencyQEMU   = flag.String("latency-qemu", "", "QEMU of BenchmarkGuestLatency, such as 10.0; the host's by default")
	latencyRounds = flag.Int("latency-rounds", 5, "rounds of BenchmarkGuestLatency")
	latencyWindow = flag.Duration("latency-window", 5*time.Second, "how long each arm of BenchmarkGuestLatency is measured in each round")
)

const (
	// lineRate is what the repository takes, in bytes per second.
	lineRate = 5_000_000
	// writeRate is the guest's own load, in writes per second. Most of its writes hit a cluster that was not copied yet: 100 clusters a second are
	// 6.5 MB/s, which the repository can't take and a fleece image can.
	writeRate = 100
)

// latencyPause is between two arms.
const latencyPause = 500 * time.Millisecond

// window is what the guest's writer tells of its writes in one window.
type window struct {
	Writes int     `json:"writes"`
	P50    float64 `json:"p50_ms"`
	P95    float64 `json:"p95_ms"`
	P99    float64 `json:"p99_ms"`
	Max    float64 `json:"max_ms"`
}

// The time that a guest's own writes take while a full backup goes to a repository of 5 MB/s (target=slow) or to a local
// folder (target=fast; one full after the other), with fleecing, without it (direct), and when there is no backup (none).
// Each metric is the median over the rounds; p99-x-none is how many times as long as with fleecing the slowest of a hundred
// writes took without a backup.
//
// What is wanted stands in package figures. On a disk that the arms before have left with much to write, the figures are that
// disk's; with TMPDIR on a tmpfs it does not count. A p99 is of the few slowest writes, so p95 varies less.
func BenchmarkGuestLatency(b *testing.B) {
	q := testenv.Host(b)
	if *latencyQEMU != "" {
		q = testenv.Version(b, *latencyQEMU)
	}
	// Four times what can be copied in a window: no backup to the slow target ends within it, and most of the disk is not copied.
	size := int64(4*lineRate*latencyWindow.Seconds()) &^ (1<<20 - 1)
	g := newLatencyGuest(b, q, size)
	slow := newSlowMount(b)
	for _, target := range []struct{ name, dir string }{{"slow", slow.dir}, {"fast", b.TempDir()}} {
		b.Run("target="+target.name, func(b *testing.B) {
			g.repo, g.again = target.dir, target.name == "fast"
			r := rounds{}
			arms := []string{"none", "ours", "direct"}
			for b.Loop() {
				for round := range *latencyRounds {
					for i := range arms {
						arm := arms[(i+round)%len(arms)]
						// What the arm before has left to be written to the disk, and its load, are not this one's.
						unix.Sync()
						time.Sleep(latencyPause)
						before := slow.sent(b)
						w := g.measure(b, arm)
						r.add(arm+"-p50", w.P50)
						r.add(arm+"-p95", w.P95)
						r.add(arm+"-p99", w.P99)
						b.Logf("round %d: %-6s %d writes: p50 %.1f ms, p95 %.1f ms, p99 %.1f ms, max %.1f ms; %.1f MB to the slow repository; load %s",
							round, arm, w.Writes, w.P50, w.P95, w.P99, w.Max, float64(slow.sent(b)-before)/1e6, load())
					}
				}
			}
			for _, metric := range []string{"p50", "p95", "p99"} {
				record(b, r.beside(metric, "ms", "none"), r.beside(metric, "ms", "direct"))
			}
		})
	}
}

// latencyGuest is a Linux guest with a disk full of data.
type latencyGuest struct {
	vm     *testenv.VM
	fleece string
	repo   string // where its backups go
	again  bool   // when one is done another one begins
}

func newLatencyGuest(b *testing.B, q testenv.QEMU, size int64) *latencyGuest {
	b.Helper()
	g := &latencyGuest{fleece: b.TempDir()}
	dir := b.TempDir()
	writer := filepath.Join(dir, "writer")
	build(b, writer, "./testdata/writer")
	info, err := os.Stat(writer)
	if err != nil {
		b.Fatal(err)
	}
	programSize := (info.Size() + 511) &^ 511
	if err := os.Truncate(writer, programSize); err != nil {
		b.Fatal(err)
	}
	raw, disk := filepath.Join(dir, "raw"), filepath.Join(dir, "disk.qcow2")
	fill(b, raw, size)
	testenv.Output(b, q.Img, "convert", "-f", "raw", "-O", "qcow2", raw, disk)
	if err := os.Remove(raw); err != nil {
		b.Fatal(err)
	}
	g.vm = testenv.Start(b, testenv.Config{
		QEMU: q, Style: styleOf(q), Guest: true,
		Disks: []testenv.Disk{
			{ID: "scsi0", Path: disk, Format: "qcow2", Size: size, Discard: "unmap"},
			{ID: "virtio1", Path: writer, Format: "raw", Size: programSize, ReadOnly: true},
		},
	})
	g.vm.Run(b.Context(), "cat /dev/disk/virtio1 >/tmp/writer && chmod +x /tmp/writer")
	return g
}

// fill makes a file of random data: what is zero takes no time to copy.
func fill(b *testing.B, path string, size int64) {
	b.Helper()
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{}), size); err != nil {
		b.Fatal(err)
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
}

// measure has the guest write for one window, during which backups of that arm are made, the last of which is cut short.
func (g *latencyGuest) measure(b *testing.B, arm string) window {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), *latencyWindow)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		if arm == "none" {
			<-ctx.Done()
			ended <- ctx.Err()
			return
		}
		cfg := config(g.vm.Socket, g.repo, g.fleece, chain.Full)
		if arm == "direct" {
			cfg.Fleecing = backup.Fleecing{Off: true}
		}
		_, err := backup.Run(ctx, cfg)
		for err == nil && g.again {
			_, err = backup.Run(ctx, cfg)
		}
		ended <- err
	}()
	out, err := g.vm.TryRun(b.Context(), fmt.Sprintf("/tmp/writer /dev/disk/scsi0 %s %d", *latencyWindow, writeRate))
	if err != nil {
		b.Fatal(err)
	}
	switch err := <-ended; {
	case err == nil:
		b.Fatalf("%s: the backup was done before the window's end", arm)
	case !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, backup.ErrUndo):
		b.Fatalf("%s: %v", arm, err)
	}
	var w window
	if err := json.Unmarshal([]byte(out), &w); err != nil {
		b.Fatalf("%q: %v", out, err)
	}
	return w
}

// load is the host's load average, over the last minute.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err.Error()
	}
	one, _, _ := strings.Cut(string(text), " ")
	return one
}
