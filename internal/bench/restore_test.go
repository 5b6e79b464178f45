package bench

import (
	"cmp"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
)

var (
	restoreDir     = flag.String("restore-dir", "", "BenchmarkRestore: folder for the chain and what is restored; empty: a temporary one")
	restoreData    = flag.String("restore-data", "2600MiB", "BenchmarkRestore: data on the disk of 4 GiB")
	restoreChange  = flag.String("restore-change", "10MiB", "BenchmarkRestore: how much of it each increment changes")
	restoreLengths = flag.String("restore-lengths", "1,30,200,365", "BenchmarkRestore: numbers of points in the chain")
	restoreRounds  = flag.Int("restore-rounds", 3, "BenchmarkRestore: how often each way is timed")
)

// What restoring a disk to a raw file takes, after one full and many increments, by three ways that take turns, all with
// the backup in the page cache and each into a new file:
//
//   - qmchain-restore image, which syncs what it has written;
//   - qemu-img convert of the same chain, and a sync;
//   - cp of the restored file, and a sync: what copying alone takes.
//
// It reports the medians of
//
//	image-s                 seconds that ours took; image-x-qemu, image-x-cp: how many times as long the others did
//	nosync-x-qemu, -x-cp    the same without their syncs, but with ours
//	image-cpu-x-qemu, -cp   how many times as much of the processors' time they took, which other load changes less
//	per-GiB-s               seconds for a GiB of data: flat, whatever the chain's length
//	peak-MB                 the most memory that ours took
//
// What is wanted stands in package figures. With -restore-dir on a tmpfs the disk does not count.
func BenchmarkRestore(b *testing.B) {
	dir := cmp.Or(*restoreDir, b.TempDir())
	program := filepath.Join(b.TempDir(), "qmchain-restore")
	build(b, program, "qmchain/cmd/qmchain-restore")
	lengths := restoreLengthsOf(b)
	repository, err := os.MkdirTemp(dir, "repository-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(repository) })
	guest := restoreChain(b, repository, slices.Max(lengths))
	for _, length := range lengths {
		b.Run("points="+strconv.Itoa(length), func(b *testing.B) {
			r := &restoring{b: b, dir: dir, program: program, guest: guest, id: guest.Points[length-1].ID}
			r.warm()
			for b.Loop() {
				for i := range *restoreRounds {
					r.round(i)
				}
			}
			r.report()
			_ = os.Remove(r.file("kept"))
		})
	}
}

func restoreLengthsOf(b *testing.B) (lengths []int) {
	b.Helper()
	for text := range strings.SplitSeq(*restoreLengths, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			b.Fatalf("-restore-lengths: %q", text)
		}
		lengths = append(lengths, n)
	}
	return lengths
}

func bytesOf(b *testing.B, text string) int64 {
	b.Helper()
	n, err := humanize.ParseBytes(text)
	if err != nil {
		b.Fatal(err)
	}
	return int64(n)
}

// restoreChain makes a chain of that many points.
func restoreChain(b *testing.B, dir string, length int) *repotest.Guest {
	b.Helper()
	const size, cluster = 4 << 30, 64 << 10
	rnd := rand.New(rand.NewPCG(1, 1))
	raw := filepath.Join(dir, "..", filepath.Base(dir)+".raw")
	f, err := os.Create(raw)
	if err != nil {
		b.Fatal(err)
	}
	defer os.Remove(raw)
	defer f.Close()
	// Data and holes of some MiB each, as on a file system that has been in use for a while.
	noise := rand.NewChaCha8([32]byte{1})
	data := bytesOf(b, *restoreData)
	const piece = 8 << 20
	for i := range int64(size / piece) {
		if rnd.Int64N(size) >= data {
			continue
		}
		if _, err := f.Seek(i*piece, io.SeekStart); err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyN(f, noise, piece); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	guest := repotest.NewGuest(b, repotest.New(b, dir), "web", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	guest.Add(repotest.Disk{Name: "scsi0", Image: raw})
	for i := range length - 1 {
		var writes []repotest.Write
		for range bytesOf(b, *restoreChange) / cluster {
			writes = append(writes, repotest.Write{Off: rnd.Int64N(size/cluster) * cluster, Len: cluster, Fill: byte(1 + i%255)})
		}
		guest.Add(repotest.Disk{Name: "scsi0", Write: writes})
	}
	b.Logf("a chain of %d points, made in %s", length, time.Since(began).Round(time.Second))
	return guest
}

// restoring times the ways to restore one point.
type restoring struct {
	b            *testing.B
	dir, program string
	guest        *repotest.Guest
	id           chain.ID

	data   int64 // bytes
	rounds rounds
}

func (r *restoring) file(name string) string { return filepath.Join(r.dir, "restored-"+name+".raw") }

func (r *restoring) ours(out string) {
	peak := peak(r.b, r.program, "-q", "image", "--repo", r.guest.Repo.Dir, "web/"+string(r.id), "--output", out)
	r.rounds.add("peak", float64(peak)/1e6)
}

func (r *restoring) qemu(out string) {
	r.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", r.guest.ImagePath(r.id, "scsi0"), out)
}

func (r *restoring) cp(out string) { r.run("cp", r.file("kept"), out) }

func (r *restoring) run(name string, args ...string) {
	r.b.Helper()
	if out, err := exec.CommandContext(r.b.Context(), name, args...).CombinedOutput(); err != nil {
		r.b.Fatalf("%s: %v: %s", name, err, out)
	}
}

// warm brings everything into the page cache, and makes sure that both restore the same.
func (r *restoring) warm() {
	r.rounds = rounds{}
	other := r.file("other")
	r.qemu(other)
	r.ours(r.file("kept"))
	r.run("cmp", r.file("kept"), other)
	r.run("sync", r.dir)
	info, err := os.Stat(r.file("kept"))
	if err != nil {
		r.b.Fatal(err)
	}
	r.data = info.Sys().(*syscall.Stat_t).Blocks * 512
	_ = os.Remove(other)
}

// round times each way once. Which one is first changes from round to round.
func (r *restoring) round(n int) {
	ways := []struct {
		name string
		f    func(out string)
	}{{"ours", r.ours}, {"qemu", r.qemu}, {"cp", r.cp}}
	for i := range ways {
		way := ways[(i+n)%len(ways)]
		out := r.file(way.name)
		began, used := time.Now(), childrenCPU(r.b)
		way.f(out)
		r.rounds.add(way.name+"-nosync", time.Since(began).Seconds())
		r.run("sync", out)
		r.rounds.add(way.name+"-image", time.Since(began).Seconds())
		r.rounds.add(way.name+"-image-cpu", childrenCPU(r.b)-used)
		if err := os.Remove(out); err != nil {
			r.b.Fatal(err)
		}
	}
}

// childrenCPU is what all children that have ended took of the processors, in seconds.
func childrenCPU(b *testing.B) float64 {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &usage); err != nil {
		b.Fatal(err)
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}

func (r *restoring) report() {
	for _, s := range r.rounds["ours-nosync"] { // ours syncs by itself
		r.rounds.add("per-GiB", s/(float64(r.data)/(1<<30)))
	}
	r.rounds["ours-image"] = r.rounds["ours-nosync"]
	for _, other := range []string{"qemu", "cp"} {
		record(r.b, r.rounds.beside("image", "s", other), r.rounds.beside("nosync", "s", other), r.rounds.beside("image-cpu", "s", other))
	}
	record(r.b, r.rounds.alone("per-GiB", "s"), r.rounds.alone("peak", "MB"))
	r.b.Logf("%s of data; ours %.2f s; load %s", humanize.IBytes(uint64(r.data)), r.rounds["ours-image"], load())
}
