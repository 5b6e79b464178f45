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
	// writeRate is the guest's own load, in writes per second. Nearly each of its writes hits a cluster that was not copied yet: 100 clusters a second are
	// 6.5 MB/s, which the repository can't take and a fleece image can.
	writeRate = 100
)

// window is what the guest's writer tells of its writes in one window.
type window struct {
	Writes int     `json:"writes"`
	P50    float64 `json:"p50_ms"`
	P99    float64 `json:"p99_ms"`
	Max    float64 `json:"max_ms"`
}

// The time that a guest's own writes take while a full backup goes to a repository of 5 MB/s, with fleecing and without,
// and when there is none. Each metric is the median over the rounds.
//
// What is wanted: with fleecing at most twice what it is without a backup, or 10 ms more; and a tenth of what it is without
// fleecing. On a disk that the arms before have left with much to write, the figures are that disk's; with TMPDIR on a tmpfs
// it does not count.
func BenchmarkGuestLatency(b *testing.B) {
	q := testenv.Host(b)
	if *latencyQEMU != "" {
		q = testenv.Version(b, *latencyQEMU)
	}
	// Twice what can be copied in a window, so that no backup ends within it.
	size := int64(2*lineRate*latencyWindow.Seconds()) &^ (1<<20 - 1)
	g := newLatencyGuest(b, q, size)
	arms := []string{"none", "fleece", "direct"}
	p99 := map[string][]float64{}
	p50 := map[string][]float64{}
	var toNone, toFleece []float64
	for b.Loop() {
		for round := range *latencyRounds {
			got := map[string]window{}
			for _, arm := range arms {
				before := g.repo.sent(b)
				w := g.measure(b, arm)
				got[arm] = w
				p50[arm], p99[arm] = append(p50[arm], w.P50), append(p99[arm], w.P99)
				b.Logf("round %d: %-6s %d writes: p50 %.1f ms, p99 %.1f ms, max %.1f ms; %.1f MB to the repository; load %s",
					round, arm, w.Writes, w.P50, w.P99, w.Max, float64(g.repo.sent(b)-before)/1e6, load())
			}
			toNone = append(toNone, got["fleece"].P99/got["none"].P99)
			toFleece = append(toFleece, got["direct"].P99/got["fleece"].P99)
		}
	}
	for _, arm := range arms {
		b.ReportMetric(median(p50[arm]), arm+"-p50-ms")
		b.ReportMetric(median(p99[arm]), arm+"-p99-ms")
	}
	b.ReportMetric(median(toNone), "fleece/none")
	b.ReportMetric(median(toFleece), "direct/fleece")
	b.ReportMetric(0, "ns/op") // as long as the windows are
}

// latencyGuest is a Linux guest with a disk full of data, and a slow repository.
type latencyGuest struct {
	vm     *testenv.VM
	repo   *slowMount
	fleece string
}

func newLatencyGuest(b *testing.B, q testenv.QEMU, size int64) *latencyGuest {
	b.Helper()
	g := &latencyGuest{fleece: b.TempDir(), repo: newSlowMount(b)}
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

// measure has the guest write for one window, during which a backup of that arm is begun, and then cut short.
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
		cfg := config(g.vm.Socket, g.repo.dir, g.fleece, chain.Full)
		if arm == "direct" {
			cfg.Fleecing = backup.Fleecing{Off: true}
		}
		_, err := backup.Run(ctx, cfg)
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
