package bench

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
	"qmchain/qmp/qmptest"
)

var (
	backupSize     = flag.String("backup-size", "1GiB", "BenchmarkBackup: size of the disk, all of it data, that is backed up to a fast target")
	backupSlowSize = flag.String("backup-slow-size", "32MiB", "BenchmarkBackup: the same, of the disk that is backed up to a slow target")
	backupRounds   = flag.Int("backup-rounds", 3, "BenchmarkBackup: how often each backup is timed")
)

// How long a full and an increment of a tenth of the disk take, from beginning to end, beside the time in which QEMU's own
// jobs copied (job); what qmchain itself took (tool), and QEMU's answers to all else (qmp); and of a full to a fast target beside
// cp of as much data, and a sync. The fast target is a local folder,
// the slow one takes 5 MB/s. The guest does nothing.
func BenchmarkBackup(b *testing.B) {
	b.Run("target=fast", func(b *testing.B) { backups(b, b.TempDir(), bytesOf(b, *backupSize), true) })
	b.Run("target=slow", func(b *testing.B) { backups(b, newSlowMount(b).dir, bytesOf(b, *backupSlowSize), false) })
}

func backups(b *testing.B, dir string, size int64, copied bool) {
	b.Helper()
	q := testenv.Host(b)
	raw := filepath.Join(b.TempDir(), "raw")
	fill(b, raw, size)
	disk := filepath.Join(b.TempDir(), "disk.qcow2")
	testenv.Output(b, q.Img, "convert", "-f", "raw", "-O", "qcow2", raw, disk)
	vm := testenv.Start(b, testenv.Config{QEMU: q, Style: styleOf(q), Disks: []testenv.Disk{
		{ID: "scsi0", Path: disk, Format: "qcow2", Size: size, Discard: "unmap"},
	}})
	var log transcript
	proxy := qmptest.NewProxy(b, vm.Socket, log.hooks())
	r, fleece := rounds{}, b.TempDir()
	timed := func(level chain.Level) {
		log.seen = nil
		began := time.Now()
		result, err := backup.Run(b.Context(), config(proxy.Addr(), dir, fleece, level))
		if err != nil {
			b.Fatal(err)
		}
		if got := result.Point.Level(); got != level {
			b.Fatalf("level %s, not %s: %s", got, level, result.Point.Disks[0].Reason)
		}
		parts := log.parts(began, time.Now())
		r.add("ours-"+string(level), parts["total"].Seconds())
		r.add("job-"+string(level), parts["copy"].Seconds())
		r.add(string(level)+"-qmp", parts["qmp"].Seconds())
		r.add(string(level)+"-tool", parts["tool"].Seconds())
	}
	cp := func() {
		dropCache(b, raw) // QEMU reads the guest's disk past the cache as well
		to := filepath.Join(b.TempDir(), "copy")
		began := time.Now()
		run(b, "cp", raw, to)
		run(b, "sync", to)
		r.add("cp-full", time.Since(began).Seconds())
		if err := os.Remove(to); err != nil {
			b.Fatal(err)
		}
	}
	run(b, "sync", raw)
	for b.Loop() {
		for round := range *backupRounds {
			if copied && round%2 == 0 {
				cp()
			}
			timed(chain.Full)
			for off := int64(0); off < size; off += 10 << 20 {
				vm.IO("scsi0", fmt.Sprintf("write -P %d %d 1M", 1+round, off))
			}
			timed(chain.Inc)
			if copied && round%2 == 1 {
				cp()
			}
		}
	}
	record(b, r.beside("full", "s", "job"), r.beside("inc", "s", "job"))
	if copied {
		record(b, r.beside("full", "s", "cp"))
	}
	for _, level := range []string{"full", "inc"} {
		record(b, r.alone(level+"-qmp", "s"), r.alone(level+"-tool", "s"))
	}
	b.Logf("%v; load %s", r, load())
}
