package bench

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/testenv"
)

var mergePoints = flag.Int("merge-points", 365, "BenchmarkMerge: number of points in the chain")

// What it takes to remove the oldest point of a long chain, a full under increments, so that the next one becomes the full.
// It needs root, for a file system of its own. It reports
//
//	remove-s        seconds, from start to end of qmchain-backup remove
//	written-MB      what the file system's disk was sent meanwhile; written-x-full: how many times as much the full holds
//	increment-MB    what the image of the next point holds
//
// What is wanted: written-MB not above increment-MB, but for tables, sums and manifests.
func BenchmarkMerge(b *testing.B) {
	program := filepath.Join(b.TempDir(), "qmchain-backup")
	build(b, program, "qmchain/cmd/qmchain-backup")
	place, sent := loopFileSystem(b)
	dir := filepath.Join(place, "repository")
	if err := os.Mkdir(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	guest := restoreChain(b, dir, *mergePoints)
	r := rounds{}
	for b.Loop() {
		points, problems, err := guest.Guest.Points()
		if err != nil || len(problems) > 0 {
			b.Fatal(err, problems)
		}
		oldest, next := points[0], points[1]
		r.add("full-written", float64(oldest.Disks[0].Bytes)/1e6)
		r.add("increment", float64(next.Disks[0].Bytes)/1e6)
		before := sent()
		cmd := exec.Command(program, "remove", "--repo", dir, guest.Name+"/"+string(oldest.ID))
		began := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		r.add("remove", time.Since(began).Seconds())
		r.add("ours-written", float64(sent()-before)/1e6)
		if err := guest.CheckSums(b.Context(), oldestOf(b, guest.Guest), "scsi0"); err != nil {
			b.Fatal(err)
		}
	}
	record(b, r.alone("remove", "s"), r.beside("written", "MB", "full"), r.alone("increment", "MB"))
}

// oldestOf is the oldest point of a guest.
func oldestOf(b *testing.B, g *repo.Guest) *chain.Manifest {
	b.Helper()
	points, _, err := g.Points()
	if err != nil {
		b.Fatal(err)
	}
	return points[0]
}

// loopFileSystem mounts a file system with a disk of its own until the benchmark ends. sent is how many bytes that disk was
// sent, after a sync.
func loopFileSystem(b *testing.B) (dir string, sent func() int64) {
	b.Helper()
	file := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	if err := os.Truncate(file, 16<<30); err != nil {
		b.Fatal(err)
	}
	testenv.Output(b, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", file)
	device := strings.TrimSpace(testenv.Output(b, "losetup", "--find", "--show", file))
	b.Cleanup(func() { _ = exec.Command("losetup", "--detach", device).Run() })
	dir = b.TempDir()
	testenv.Output(b, "mount", device, dir)
	b.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			b.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir, func() int64 {
		testenv.Output(b, "sync", "--file-system", dir)
		text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "stat"))
		if err != nil {
			b.Fatal(err)
		}
		const writeSectors = 6 // Documentation/block/stat.rst
		sectors, err := strconv.ParseInt(strings.Fields(string(text))[writeSectors], 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		return sectors * 512
	}
}
