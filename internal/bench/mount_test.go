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
	mountText    = flag.String("mount-text", "256MiB", "BenchmarkMount: size of the disks that are compressed")
	mountFiles   = flag.Int("mount-files", 50000, "BenchmarkMount: files in the file system that is packed with tar")
)

// Reading a point through the mount, of chains of several lengths, each increment of which changes a hundredth of the disk.
// The ways to read take turns:
//
//   - ours, qmchain-fuse;
//   - daemon, qemu-storage-daemon's FUSE export of the same chain;
//   - nbdfuse, a file that nbdfuse makes of qemu-nbd's export; nbdkit, the same with nbdkit's proxy between the two;
//   - raw, a raw file;
//   - backing, the chain's own image files, one after the other or at random in all of them, through the page cache as well.
//
// Readers and servers are processes of their own. What is read is sequential, in pieces of 1 MiB, or 4 KiB at random, by one
// reader (qd1) or by 16 at a time (qd16). Before each turn the kernel forgets what it has of the mounts' own files. Each
// metric is the median over the rounds; NAME-x-OTHER is how many times as good as OTHER ours was in the same round: as fast,
// or, of cpu, with as little of the processors' time for a byte, the reader's included: other load on the machine changes
// that less. What is wanted stands in package figures.
//
//   - warm: the image files are in the page cache; cold: nothing is. again is a second reading, with all in the mount's own
//     page cache; pages is a file that the page cache has in single pages. Linux has no file of FUSE otherwise, while ext4
//     and xfs get folios of many pages by reading ahead, which are read up to twice as fast.
//   - flat: the longest chain beside its first point.
//   - open: from the servers' start to the first byte of the last point, their memory, and the list of all extents with data.
//   - huge: a disk of 1 TiB with 200,000 clusters here and there, all of which were read.
//   - compressed: fulls with zlib and zstd.
//   - tar: of a file system with many files in a disk that is mounted by a loop device; warm is as above. For root alone.
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
		b.Run("open/points="+strconv.Itoa(n), func(b *testing.B) { m.open(b, n-1) })
	}
	if longest > 1 {
		b.Run("flat/points="+strconv.Itoa(longest), func(b *testing.B) { m.flat(b, longest-1) })
	}
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

// viaServer is a way to read what a server has.
func viaServer(name string, s *server) way {
	return way{name: name, files: []string{s.mount}, server: s}
}

func (m *mountBench) warm(b *testing.B, n int) {
	mount, file := m.ours(b, n)
	daemon, nbdfuse, nbdkit := serveDaemon(b, m.chain.image(n)), serveNBD(b, m.chain.image(n), false), serveNBD(b, m.chain.image(n), true)
	for _, s := range []*server{daemon, nbdfuse, nbdkit} {
		same(b, file, s.mount)
	}
	ours := way{name: "ours", files: []string{file}, server: mount}
	peers := []way{viaServer("daemon", daemon), viaServer("nbdfuse", nbdfuse), viaServer("nbdkit", nbdkit)}
	raw := way{name: "raw", files: []string{m.raw}, keep: true}
	job{Workers: 1, Block: large, Files: raw.files, Keep: true}.read(b) // it is in the cache now, too
	once(b, func() {
		try(b, sequential, append(peers, raw, ours)...).report(b, "seq", "daemon", "nbdfuse", "nbdkit", "raw")
		try(b, oneAtATime, append(peers, ours)...).report(b, "qd1", "daemon", "nbdfuse", "nbdkit")
		try(b, many, append(peers, ours)...).report(b, "qd16", "daemon", "nbdfuse", "nbdkit")
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
	daemon := viaServer("daemon", serveDaemon(b, m.chain.image(n)))
	daemon.backing = images
	backing := way{name: "backing", files: images, backing: images}
	once(b, func() {
		try(b, sequential, backing, daemon, ours).report(b, "seq", "backing", "daemon")
		try(b, oneAtATime, backing, daemon, ours).report(b, "qd1", "backing", "daemon")
		try(b, many, backing, daemon, ours).report(b, "qd16", "backing", "daemon")
	})
}

func (m *mountBench) flat(b *testing.B, n int) {
	mount, file := m.ours(b, n)
	first := mount.disk(string(m.chain.points[0].ID))
	held := hold(b, first)
	defer held.Close()
	ours, one := way{name: "ours", files: []string{file}, server: mount}, way{name: "one", files: []string{first}, server: mount}
	once(b, func() {
		coldOurs, coldOne := ours, one
		coldOurs.backing, coldOne.backing = m.chain.images(n), m.chain.images(0)
		try(b, sequential, coldOne, coldOurs).report(b, "seq-cold", "one")
		job{Workers: 1, Block: large, Files: []string{file, first}}.read(b) // all images are in the cache now
		t := try(b, sequential, one, ours)
		t.report(b, "seq", "one")
		t.reportCPU(b, "one")
		try(b, many, one, ours).report(b, "qd16", "one")
	})
}

func (m *mountBench) compressed(b *testing.B, compression string) {
	dir := m.folder(b, "compressed-")
	raw := filepath.Join(dir, "raw")
	words(b, raw, int(bytesOf(b, *mountText)))
	c := newMountChain(b, m.folder(b, "repository-"))
	c.full(raw, compression)
	mount := serveMount(b, m.program, c.dir())
	file := mount.disk(string(c.points[0].ID))
	daemon, nbdfuse := viaServer("daemon", serveDaemon(b, c.image(0))), viaServer("nbdfuse", serveNBD(b, c.image(0), false))
	same(b, file, raw)
	once(b, func() {
		ours := way{name: "ours", files: []string{file}, server: mount}
		try(b, sequential, daemon, nbdfuse, ours).report(b, "seq", "daemon", "nbdfuse")
		try(b, oneAtATime, daemon, nbdfuse, ours).report(b, "qd1", "daemon", "nbdfuse")
		try(b, many, daemon, nbdfuse, ours).report(b, "qd16", "daemon", "nbdfuse")
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
	run(b, "sync", raw) // what is not on the disk yet can't be dropped from the cache
	c := newMountChain(b, m.folder(b, "repository-"))
	c.full(raw, "")
	c.rewrite(20, raw)
	last := len(c.points) - 1
	images := c.images(last)
	ways := []struct {
		name, file string
		backing    []string
	}{
		{"raw", raw, []string{raw}},
		{"daemon", serveDaemon(b, c.image(last)).mount, images},
		{"ours", serveMount(b, m.program, c.dir()).disk(string(c.points[last].ID)), images},
	}
	job{Workers: 1, Block: large, Files: append(images, raw), Keep: true}.read(b) // they are in the cache now
	r := rounds{}
	once(b, func() {
		for _, temperature := range []string{"warm", "cold"} {
			for round := range *mountRounds {
				for i := range ways {
					w := ways[(i+round)%len(ways)]
					if temperature == "cold" {
						dropCache(b, w.backing...)
					}
					if w.name != "raw" {
						dropCache(b, w.file)
					}
					r.add(w.name+"-tar-"+temperature, pack(b, w.file))
				}
			}
		}
	})
	for _, peer := range []string{"raw", "daemon"} {
		record(b, r.beside("tar-warm", "s", peer), r.beside("tar-cold", "s", peer))
	}
	b.Logf("%v; load %s", r, load())
}

// pack mounts the file system in a file and returns how long tar takes to read it, in seconds.
func pack(b *testing.B, file string) float64 {
	b.Helper()
	mnt := b.TempDir()
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
