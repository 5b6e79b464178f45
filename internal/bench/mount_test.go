package bench

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var (
	mountDir     = flag.String("mount-dir", "", "BenchmarkMount: folder for the chain, on a disk; empty: a temporary one")
	mountSize    = flag.String("mount-size", "1GiB", "BenchmarkMount: size of the disk, all of it data")
	mountLengths = flag.String("mount-lengths", "1,200,365", "BenchmarkMount: numbers of points in the chain")
	mountRounds  = flag.Int("mount-rounds", 3, "BenchmarkMount: how often each way is timed")
	mountWindow  = flag.Duration("mount-window", 500*time.Millisecond, "BenchmarkMount: how long each reading at random takes")
	mountFiles   = flag.Int("mount-files", 50000, "BenchmarkMount: files in the file system that is packed with tar")
)

// Reading a point through the mount, of chains of several lengths, each increment of which changes a hundredth of the disk.
// The ways to read take turns:
//
//   - ours, qmchain-fuse;
//   - daemon, qemu-storage-daemon's FUSE export of the same chain;
//   - raw, a raw file;
//   - backing, the chain's own image files, one after the other or at random in all of them.
//
// Readers and servers are processes of their own. What is read is sequential, in pieces of 1 MiB, or 4 KiB at random, by one
// reader (qd1) or by 16 at a time (qd16). Before each turn the kernel forgets what it has of the mounts' own files. Each
// metric is the median over the rounds; NAME-x-OTHER is how many times as fast as OTHER ours was in the same round, and
// cpu-x-OTHER how many times as much of the processors' time it took for a byte, with the reader's: other load on the
// machine changes that less.
//
// What is wanted:
//
//   - warm (the image files are in the page cache): of 200 points, seq-x-daemon 10, qd1-x-daemon 12, qd16-x-daemon 30; of 1
//     point, seq-x-daemon 3.5 and qd1-x-daemon 1.5; seq-x-raw 0.35; again-x-pages, a second reading with all in the mount's
//     own page cache, 0.8 of a file that the page cache has in single pages. Linux has no file of FUSE otherwise, while
//     ext4 and xfs get folios of many pages by reading ahead, which are read up to twice as fast: again-x-raw.
//   - cold (nothing is): seq-x-backing 0.95, qd16-x-backing 0.5.
//   - flat, the longest chain beside its first point: seq-x-one and qd16-x-one 0.8, or cpu-x-one 1.1.
//   - open: first-byte-ms, from the server's start to the first byte of the last point, 100; point-MB, the memory for each open
//     point.
//   - huge, a disk of 1 TiB with 200,000 clusters here and there, all of which were read: resident-MB 64.
//   - compressed fulls: seq-x-daemon 1.5 of zstd, 0.8 of zlib.
//   - tar, of a file system with 50,000 files in a disk that is mounted by a loop device: tar-x-raw, how many times as long as
//     from a raw file, 1.5. For root alone.
func BenchmarkMount(b *testing.B) {
	m := &mountBench{dir: cmp.Or(*mountDir, b.TempDir()), program: filepath.Join(b.TempDir(), "qmchain-fuse")}
	build(b, m.program, "qmchain/cmd/qmchain-fuse")
	lengths := lengthsOf(b, *mountLengths)
	longest := slices.Max(lengths)
	m.raw = filepath.Join(m.folder(b, "raw-"), "raw")
	fill(b, m.raw, bytesOf(b, *mountSize))
	m.chain = newMountChain(b, m.folder(b, "chain-"))
	m.chain.full(m.raw, "")
	began := time.Now()
	m.chain.lengthen(longest)
	b.Logf("a chain of %d points, made in %s", longest, time.Since(began).Round(time.Second))
	for _, n := range lengths {
		b.Run("warm/points="+strconv.Itoa(n), func(b *testing.B) { m.warm(b, n-1) })
		b.Run("cold/points="+strconv.Itoa(n), func(b *testing.B) { m.cold(b, n-1) })
	}
	if longest > 1 {
		b.Run("flat/points="+strconv.Itoa(longest), func(b *testing.B) { m.flat(b, longest-1) })
	}
	b.Run("open/points="+strconv.Itoa(longest), m.open)
	b.Run("huge", m.huge)
	for _, compression := range []string{"zlib", "zstd"} {
		b.Run("compressed="+compression, func(b *testing.B) { m.compressed(b, compression) })
	}
	if os.Geteuid() == 0 {
		b.Run("tar", m.tar)
	}
}

func lengthsOf(b *testing.B, text string) (lengths []int) {
	b.Helper()
	for part := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(part)
		if err != nil || n < 1 {
			b.Fatalf("number of points: %q", part)
		}
		lengths = append(lengths, n)
	}
	return lengths
}

// mountBench is what the benchmarks of the mount share.
type mountBench struct {
	dir, program string
	raw          string // a file as large as the disk
	chain        *mountChain
}

// folder makes one that lasts as long as the benchmark.
func (m *mountBench) folder(b *testing.B, pattern string) string {
	b.Helper()
	dir, err := os.MkdirTemp(m.dir, pattern)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// way is a way to read.
type way struct {
	name    string
	files   []string
	server  *server  // nil: none
	backing []string // what the kernel must forget before each turn; nil: nothing
	keep    bool     // the kernel may keep what it has of files
}

// speed is what one turn gave.
type speed struct {
	rate float64 // bytes per second
	cpu  float64 // seconds for a byte, of reader and server
}

// trial is a number of rounds in which ways took turns: speeds by way and round.
type trial map[string][]speed

// try has the ways take turns to do a job. Which one is first changes from round to round.
func try(b *testing.B, j job, ways ...way) trial {
	b.Helper()
	t := trial{}
	j.For = *mountWindow
	for round := range *mountRounds {
		for i := range ways {
			w := ways[(i+round)%len(ways)]
			j.Files, j.Keep, j.Seed = w.files, w.keep, uint64(round)
			dropCache(b, w.backing...)
			before := w.cpu()
			d := j.read(b)
			t[w.name] = append(t[w.name], speed{float64(d.Bytes) / d.Seconds, (w.cpu() - before + d.CPU) / float64(d.Bytes)})
		}
	}
	return t
}

func (w way) cpu() float64 {
	if w.server == nil {
		return 0
	}
	return w.server.cpu()
}

// rate is the median of a way's rates.
func (t trial) rate(way string) float64 {
	var values []float64
	for _, s := range t[way] {
		values = append(values, s.rate)
	}
	return median(values)
}

// x is how many times as fast as another way the first one was, and how much of the processors' time it took beside it.
func (t trial) x(way, other string) (rate, cpu float64) {
	var rates, cpus []float64
	for i := range t[way] {
		rates = append(rates, t[way][i].rate/t[other][i].rate)
		cpus = append(cpus, t[way][i].cpu/t[other][i].cpu)
	}
	return median(rates), median(cpus)
}

// report reports ours beside others.
func (t trial) report(b *testing.B, what string, others ...string) {
	b.Helper()
	if strings.HasPrefix(what, "qd") {
		b.ReportMetric(t.rate("ours")/small, what+"-IOPS")
	} else {
		b.ReportMetric(t.rate("ours")/1e6, what+"-MB/s")
	}
	for _, other := range others {
		rate, _ := t.x("ours", other)
		b.ReportMetric(rate, what+"-x-"+other)
	}
	var parts []string
	for name, speeds := range t {
		for _, s := range speeds {
			parts = append(parts, fmt.Sprintf("%s %.0f MB/s %.2f s/GB", name, s.rate/1e6, s.cpu*1e9))
		}
	}
	slices.Sort(parts)
	b.Logf("%s: %s; load %s", what, strings.Join(parts, ", "), load())
}

const small, large = 4 << 10, 1 << 20

var (
	sequential = job{Workers: 1, Block: large}
	oneAtATime = job{Workers: 1, Block: small, Random: true}
	many       = job{Workers: 16, Block: small, Random: true}
)

// once runs f as a benchmark that is measured by what it reports.
func once(b *testing.B, f func()) {
	for b.Loop() {
		f()
	}
	b.ReportMetric(0, "ns/op")
}

// ours is a mount of the chain in which the disk of point n is open.
func (m *mountBench) ours(b *testing.B, n int) (*server, string) {
	b.Helper()
	s := serveMount(b, m.program, m.chain.dir())
	file := s.disk(string(m.chain.points[n].ID))
	held := hold(b, file)
	b.Cleanup(func() { _ = held.Close() })
	return s, file
}

// pages is a copy of the raw file that was written page by page, and so is in the page cache.
func (m *mountBench) pages(b *testing.B) string {
	b.Helper()
	from, err := os.Open(m.raw)
	if err != nil {
		b.Fatal(err)
	}
	defer from.Close()
	to, err := os.Create(filepath.Join(m.folder(b, "pages-"), "pages"))
	if err != nil {
		b.Fatal(err)
	}
	// Without the readers and writers of os.File, which would have the kernel copy in larger pieces.
	_, err = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, os.Getpagesize()))
	if err := errors.Join(err, to.Close()); err != nil {
		b.Fatal(err)
	}
	return to.Name()
}

func (m *mountBench) warm(b *testing.B, n int) {
	mount, file := m.ours(b, n)
	daemon := serveDaemon(b, m.chain.image(n))
	same(b, file, daemon.mount)
	ours, theirs := way{name: "ours", files: []string{file}, server: mount}, way{name: "daemon", files: []string{daemon.mount}, server: daemon}
	raw := way{name: "raw", files: []string{m.raw}, keep: true}
	job{Workers: 1, Block: large, Files: raw.files, Keep: true}.read(b) // it is in the cache now, too
	once(b, func() {
		try(b, sequential, raw, theirs, ours).report(b, "seq", "daemon", "raw")
		try(b, oneAtATime, theirs, ours).report(b, "qd1", "daemon")
		try(b, many, theirs, ours).report(b, "qd16", "daemon")
		ours.keep = true
		job{Workers: 1, Block: large, Files: ours.files}.read(b)
		pages := way{name: "pages", files: []string{m.pages(b)}, keep: true}
		try(b, sequential, raw, pages, ours).report(b, "again", "raw", "pages")
	})
}

func (m *mountBench) cold(b *testing.B, n int) {
	mount, file := m.ours(b, n)
	images := m.chain.images(n)
	ours := way{name: "ours", files: []string{file}, server: mount, backing: images}
	backing := way{name: "backing", files: images, backing: images}
	once(b, func() {
		try(b, sequential, backing, ours).report(b, "seq", "backing")
		try(b, oneAtATime, backing, ours).report(b, "qd1", "backing")
		try(b, many, backing, ours).report(b, "qd16", "backing")
	})
}

func (m *mountBench) flat(b *testing.B, n int) {
	mount, file := m.ours(b, n)
	first := mount.disk(string(m.chain.points[0].ID))
	held := hold(b, first)
	defer held.Close()
	ours, one := way{name: "ours", files: []string{file}, server: mount}, way{name: "one", files: []string{first}, server: mount}
	job{Workers: 1, Block: large, Files: []string{file, first}}.read(b) // all images are in the cache now
	once(b, func() {
		t := try(b, sequential, one, ours)
		t.report(b, "seq", "one")
		_, cpu := t.x("ours", "one")
		b.ReportMetric(cpu, "cpu-x-one")
		try(b, many, one, ours).report(b, "qd16", "one")
	})
}

func (m *mountBench) open(b *testing.B) {
	var took, first, memory []float64
	last := string(m.chain.points[len(m.chain.points)-1].ID)
	for b.Loop() {
		for range *mountRounds {
			began := time.Now()
			s := serveMount(b, m.program, m.chain.dir())
			ready := time.Now()
			held := hold(b, s.disk(last))
			took, first = append(took, milliseconds(time.Since(began))), append(first, milliseconds(time.Since(ready)))

			// Points that are open at once share what their chains do.
			before := s.resident()
			points := m.chain.points[:len(m.chain.points)-1]
			points = points[max(0, len(points)-100):]
			for _, p := range points {
				held := hold(b, s.disk(string(p.ID)))
				defer held.Close()
			}
			if len(points) > 0 {
				memory = append(memory, float64(s.resident()-before)/1e6/float64(len(points)))
			}
			_ = held.Close()
		}
	}
	b.ReportMetric(median(took), "first-byte-ms")
	b.ReportMetric(median(first), "of-which-opened-ms")
	if len(memory) > 0 {
		b.ReportMetric(median(memory), "point-MB")
	}
	b.ReportMetric(0, "ns/op")
}

func (m *mountBench) huge(b *testing.B) {
	set := m.folder(b, "huge-")
	pattern := hugeSet(b, set)
	var took, memory []float64
	for b.Loop() {
		began := time.Now()
		s := serveMount(b, m.program, set)
		found, err := filepath.Glob(filepath.Join(s.mount, pattern))
		if err != nil || len(found) != 1 {
			b.Fatalf("%v in the mount, %v", found, err)
		}
		held := hold(b, found[0])
		took = append(took, milliseconds(time.Since(began)))
		// So many reads that they come to every part of the map.
		job{Files: found, Workers: 16, Block: small, Random: true, For: 4 * *mountWindow, Seed: 1}.read(b)
		memory = append(memory, float64(s.resident())/1e6)
		_ = held.Close()
	}
	b.ReportMetric(median(took), "first-byte-ms")
	b.ReportMetric(median(memory), "resident-MB")
	b.ReportMetric(0, "ns/op")
}

func (m *mountBench) compressed(b *testing.B, compression string) {
	dir := m.folder(b, "compressed-")
	raw := filepath.Join(dir, "raw")
	words(b, raw, 256<<20)
	c := newMountChain(b, m.folder(b, "repository-"))
	c.full(raw, compression)
	mount := serveMount(b, m.program, c.dir())
	file := mount.disk(string(c.points[0].ID))
	daemon := serveDaemon(b, c.image(0))
	same(b, file, raw)
	once(b, func() {
		ours, theirs := way{name: "ours", files: []string{file}, server: mount}, way{name: "daemon", files: []string{daemon.mount}, server: daemon}
		try(b, sequential, theirs, ours).report(b, "seq", "daemon")
		try(b, oneAtATime, theirs, ours).report(b, "qd1", "daemon")
		try(b, many, theirs, ours).report(b, "qd16", "daemon")
	})
}

// same makes sure that two files have the same content, and brings them into the cache.
func same(b *testing.B, one, other string) {
	b.Helper()
	if out, err := exec.CommandContext(b.Context(), "cmp", one, other).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
}

func (m *mountBench) tar(b *testing.B) {
	dir := m.folder(b, "tar-")
	tree, raw := filepath.Join(dir, "tree"), filepath.Join(dir, "raw")
	for i := range *mountFiles {
		folder := filepath.Join(tree, fmt.Sprint(i/500))
		if i%500 == 0 {
			if err := os.MkdirAll(folder, 0o700); err != nil {
				b.Fatal(err)
			}
		}
		text := strings.Repeat(fmt.Sprintf("this is file %d\n", i), 1+i%700)
		if err := os.WriteFile(filepath.Join(folder, fmt.Sprint(i)), []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	run(b, "mkfs.ext4", "-q", "-d", tree, raw, "1G")
	c := newMountChain(b, m.folder(b, "repository-"))
	c.full(raw, "")
	c.rewrite(20, raw)
	mount := serveMount(b, m.program, c.dir())
	ways := []struct {
		name, file string
		backing    []string
	}{
		{"raw", raw, []string{raw}},
		{"ours", mount.disk(string(c.points[len(c.points)-1].ID)), c.images(len(c.points) - 1)},
	}
	x := map[string][]float64{}
	for b.Loop() {
		for _, temperature := range []string{"warm", "cold"} {
			for round := range *mountRounds {
				took := map[string]float64{}
				for i := range ways {
					w := ways[(i+round)%len(ways)]
					if temperature == "cold" {
						dropCache(b, w.backing...)
					}
					took[w.name] = pack(b, w.file)
				}
				x[temperature] = append(x[temperature], took["ours"]/took["raw"])
				b.Logf("%s: ours %.2f s, raw %.2f s; load %s", temperature, took["ours"], took["raw"], load())
			}
		}
	}
	for temperature, values := range x {
		b.ReportMetric(median(values), temperature+"-tar-x-raw")
	}
	b.ReportMetric(0, "ns/op")
}

// pack mounts the file system in a file and returns how long tar takes to read it, in seconds.
func pack(b *testing.B, file string) float64 {
	b.Helper()
	mnt := b.TempDir()
	dropCache(b, file)
	run(b, "mount", "-t", "ext4", "-o", "ro,noload,loop", file, mnt)
	defer run(b, "umount", mnt)
	began := time.Now()
	// To a pipe: tar does not read what goes to /dev/null.
	run(b, "sh", "-c", `tar -C "$1" -cf - . | cat >/dev/null`, "sh", mnt)
	return time.Since(began).Seconds()
}

func run(b *testing.B, name string, args ...string) {
	b.Helper()
	if out, err := exec.CommandContext(b.Context(), name, args...).CombinedOutput(); err != nil {
		b.Fatalf("%s: %v: %s", name, err, out)
	}
}
