package image_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/qcow2"
)

var (
	updateSeeds = flag.Bool("update-seeds", false, "make testdata/seeds again with qemu-img")
	mutations   = flag.Int("mutations", 20, "mutations of each seed that are compared with qemu-img")
)

const seedDir = "testdata/seeds"

// makeSeeds makes small images that have all that the format offers.
func makeSeeds(t *testing.T) {
	make1 := func(name, options string, size int64, commands ...string) string {
		path := filepath.Join(seedDir, name+".qcow2")
		imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
		imagetest.QemuIO(t, "qcow2", path, commands...)
		return path
	}
	writes := []string{
		"write -P 1 100 1000", "write -P 2 20000 600", "write -P 3 65024 512",
		"write -z 512 512", "write -z -u 20480 512", "discard 33000 512",
	}
	make1("v3", "cluster_size=512", 65536, writes...)
	make1("v2", "cluster_size=512,compat=0.10", 65536, writes...)
	make1("sparse", "cluster_size=512", 10<<20, "write -P 1 5M 100")
	make1("zlib", "cluster_size=512", 65536, append([]string{"write -c -P 1 0 1024", "write -c -P 2 30720 512"}, writes[1:]...)...)
	make1("zstd", "cluster_size=1k,compression_type=zstd", 65536, append([]string{"write -c -P 1 0 2048", "write -c -P 2 32768 1024"}, writes[1:]...)...)
	path := make1("extended", "cluster_size=16k,extended_l2=on", 65536, "write -P 1 512 1000", "write -z 4096 1024")
	// The last cluster needn't be there whole.
	if err := os.Truncate(path, 5*16384+2048); err != nil {
		t.Fatal(err)
	}
	path = make1("snapshots", "cluster_size=512", 65536, writes[:2]...)
	imagetest.QemuImg(t, "snapshot", "-c", "one", path)
	imagetest.QemuIO(t, "qcow2", path, writes[2:]...)
	imagetest.QemuImg(t, "snapshot", "-c", "two", path)
	path = make1("bitmap", "cluster_size=1k", 65536, writes...)
	imagetest.QemuImg(t, "bitmap", "--add", "-f", "qcow2", path, "b")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := qcow2.SetIdentity(f, []byte("identity")); err != nil {
		t.Fatal(err)
	}
}

func readSeeds(t testing.TB) map[string][]byte {
	t.Helper()
	list, err := filepath.Glob(seedDir + "/*.qcow2")
	if err != nil || len(list) < 8 {
		t.Fatal(list, err)
	}
	seeds := map[string][]byte{}
	for _, path := range list {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		seeds[filepath.Base(path)] = b
	}
	return seeds
}

// The seeds are good images, and the fuzz target doesn't take them for broken.
func TestSeeds(t *testing.T) {
	if *updateSeeds {
		makeSeeds(t)
	}
	for name := range readSeeds(t) {
		path := filepath.Join(seedDir, name)
		imagetest.QemuImg(t, "check", "-q", "-f", "qcow2", path)
		img := open(t, image.NewPool(image.PoolOptions{}), layerOf(path, image.Qcow2))
		imagetest.Equal(t, img, imagetest.Content(t, "qcow2", path))
	}
}

// FuzzReader reads arbitrary bytes as an image: never a panic, a hang, or memory
// out of proportion.
func FuzzReader(f *testing.F) {
	for _, b := range readSeeds(f) {
		f.Add(b)
	}
	path := filepath.Join(f.TempDir(), "disk")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		explore(t, path)
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("it took %s", d)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 256<<20 {
			t.Errorf("%d bytes allocated", n)
		}
	})
}

// explore opens a file as a disk, over itself, and with each of its snapshots, and
// reads here and there.
func explore(t *testing.T, path string) {
	pool := image.NewPool(image.PoolOptions{MaxFiles: 2, MaxMeta: 1 << 20, MaxClusters: 1 << 20})
	l := layerOf(path, image.Qcow2)
	var snapshots []string
	l.Check = func(h *qcow2.Header) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		list, _ := qcow2.ReadSnapshots(f, st.Size(), h)
		for _, s := range list[:min(len(list), 3)] {
			snapshots = append(snapshots, s.ID, s.Name)
		}
		return nil
	}
	sample(t, pool, l)
	l.Check = nil
	sample(t, pool, l, l)
	for _, s := range snapshots {
		if s != "" {
			l.Snapshot = s
			sample(t, pool, l)
		}
	}
}

// sample reads parts of an image, which may be broken: errors are fine, wrong
// lengths are not.
func sample(t *testing.T, pool *image.Pool, layers ...image.Layer) {
	img, err := pool.Open(-1, layers...)
	if err != nil {
		return
	}
	defer img.Close()
	size := img.Size()
	buf := make([]byte, 8<<10)
	readAt := func(off int64) {
		if off < 0 {
			return
		}
		n, err := img.ReadAt(buf, off)
		if n < 0 || n > len(buf) || n < len(buf) && err == nil || errors.Is(err, io.EOF) && off+int64(n) != max(off, size) {
			t.Errorf("read at %d of %d: %d, %v", off, size, n, err)
		}
	}
	for _, off := range []int64{0, size / 2, size - int64(len(buf))/2, size} {
		readAt(off)
	}
	off, reads := int64(0), 0
	for range 50 {
		list, err := img.Extents(off, 1<<62)
		if err != nil {
			break
		}
		for _, e := range list {
			if e.Off != off || e.Len <= 0 || e.End() > size {
				t.Fatalf("extent %+v at %d of %d", e, off, size)
			}
			if reads++; !e.Zero && reads < 100 {
				readAt(off - 100)
			}
			off = e.End()
		}
		if off == size {
			break
		}
	}
}

// Images with a few changed bytes are read as qemu-img reads them, or not at all.
func TestMutations(t *testing.T) {
	t.Parallel()
	for name, seed := range readSeeds(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(uint64(len(seed)), 8))
			path := filepath.Join(t.TempDir(), "disk")
			for range *mutations {
				b := mutate(rnd, seed)
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
				compare(t, path, b)
			}
		})
	}
}

// mutate changes some bytes of an image, near others that are not zero: these are
// its tables more often than its data.
func mutate(rnd *rand.Rand, seed []byte) []byte {
	b := bytes.Clone(seed)
	for range 1 + rnd.IntN(3) {
		i := rnd.IntN(len(b))
		for tries := 0; b[i] == 0 && tries < 1000; tries++ {
			i = rnd.IntN(len(b))
		}
		i = min(max(i-i%8+rnd.IntN(16)-4, 0), len(b)-1)
		switch rnd.IntN(3) {
		case 0:
			b[i] ^= 1 << rnd.IntN(8)
		case 1:
			b[i] = byte(rnd.Uint32())
		case 2: // an offset that leads to another cluster
			b[i] += byte(2 * (rnd.IntN(5) - 2))
		}
	}
	return b
}

func compare(t *testing.T, path string, b []byte) {
	t.Helper()
	img, err := image.NewPool(image.PoolOptions{}).Open(-1, layerOf(path, image.Qcow2))
	if err != nil {
		return
	}
	defer img.Close()
	if img.Size() > 200<<20 {
		return // qemu-img would write it
	}
	ours := make([]byte, img.Size())
	if _, err := img.ReadAt(ours, 0); err != nil {
		return
	}
	raw := filepath.Join(t.TempDir(), "raw")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw).CombinedOutput(); err != nil {
		// What only QEMU looks at, and doesn't need for reading.
		for _, other := range []string{"backing file", "bitmap", "napshot", "efcount", "eference count", "crypt", "CRYPTO"} {
			if strings.Contains(string(out), other) {
				return
			}
		}
		t.Errorf("qemu-img refuses what we read: %s", out)
		keep(t, b)
		return
	}
	theirs, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(ours, theirs) {
		t.Error("we read something else than qemu-img")
		keep(t, b)
	}
}

// keep leaves a failing image behind, if the test runs with -artifacts.
func keep(t *testing.T, b []byte) {
	t.Helper()
	path := filepath.Join(t.ArtifactDir(), "mutation.qcow2")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Logf("kept as %s", path)
}
