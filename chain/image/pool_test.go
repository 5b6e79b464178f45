package image_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/qcow2"
)

// openFiles counts this process's open files in a folder.
func openFiles(t testing.TB, dir string) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range list {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(target, dir+"/") {
			n++
		}
	}
	return n
}

// Many layers, few files: all reads are right and the bound holds at any time.
func TestMaxFiles(t *testing.T) {
	t.Parallel()
	layers, want := buildChain(t, 9, 256<<10, 400, 20)
	dir := filepath.Dir(layers[0].Path)
	for _, maxFiles := range []int{1, 16} {
		pool := image.NewPool(image.PoolOptions{MaxFiles: maxFiles})
		img := open(t, pool, layers...)
		done := make(chan struct{})
		var watch, readers sync.WaitGroup
		most := 0
		watch.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					most = max(most, openFiles(t, dir))
				}
			}
		})
		for i := range uint64(8) {
			rnd := rand.New(rand.NewPCG(i, 1))
			readers.Go(func() {
				buf := make([]byte, 20000)
				for range 10 {
					off := rnd.IntN(len(want) - len(buf))
					if _, err := img.ReadAt(buf, int64(off)); err != nil || string(buf) != string(want[off:off+len(buf)]) {
						t.Errorf("read at %d: wrong, %v", off, err)
						return
					}
				}
			})
		}
		readers.Wait()
		imagetest.Equal(t, img, want)
		close(done)
		watch.Wait()
		// A folder in /proc is no snapshot: files that the eight readers close and
		// open while it is listed count twice.
		if most > maxFiles+8 {
			t.Errorf("%d files open, %d allowed", most, maxFiles)
		}
		if n := openFiles(t, dir); n > maxFiles {
			t.Errorf("%d files open, %d allowed", n, maxFiles)
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
		if n := openFiles(t, dir); n != 0 {
			t.Errorf("%d files open after Close", n)
		}
	}
}

// A chain of thousands of layers is no deeper than one of a few.
func TestDeepChain(t *testing.T) {
	t.Parallel()
	layers, want := buildChain(t, 9, 64<<10, 2000, 2)
	pool := image.NewPool(image.PoolOptions{})
	imagetest.Equal(t, open(t, pool, layers...), want)
	imagetest.Equal(t, open(t, pool, layers...), want)
}

func TestOpenErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base := filepath.Join(dir, "base.qcow2")
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", base, "1M")
	st, err := os.Stat(base)
	if err != nil {
		t.Fatal(err)
	}
	link, fifo, junk := filepath.Join(dir, "link"), filepath.Join(dir, "fifo"), filepath.Join(dir, "junk")
	if err := errors.Join(os.Symlink(base, link), syscall.Mkfifo(fifo, 0o600), os.WriteFile(junk, make([]byte, 1000), 0o600)); err != nil {
		t.Fatal(err)
	}
	mine := errors.New("not the disk that I want")
	good := image.Layer{Path: base, Name: "the base", Format: image.Qcow2, Bytes: st.Size()}
	with := func(change func(*image.Layer)) []image.Layer {
		l := good
		change(&l)
		return []image.Layer{good, l}
	}
	pool := image.NewPool(image.PoolOptions{})
	for _, c := range []struct {
		name   string
		size   int64
		layers []image.Layer
		want   error
	}{
		{"no layers", 1 << 20, nil, nil},
		{"smaller", 1<<20 - 512, []image.Layer{good}, image.ErrChanged},
		{"larger", 1<<20 + 512, []image.Layer{good}, image.ErrChanged},
		{"no file", 1 << 20, with(func(l *image.Layer) { l.Path += "x" }), fs.ErrNotExist},
		{"folder", 1 << 20, with(func(l *image.Layer) { l.Path = dir }), image.ErrNotRegular},
		{"symbolic link", 1 << 20, with(func(l *image.Layer) { l.Path = link }), image.ErrNotRegular},
		{"FIFO", 1 << 20, with(func(l *image.Layer) { l.Path = fifo }), image.ErrNotRegular},
		{"device", 1 << 20, with(func(l *image.Layer) { l.Path = "/dev/zero" }), image.ErrNotRegular},
		{"cut off", 1 << 20, with(func(l *image.Layer) { l.Bytes++ }), image.ErrChanged},
		{"grown", 1 << 20, with(func(l *image.Layer) { l.Bytes-- }), image.ErrChanged},
		{"no qcow2", 1 << 20, with(func(l *image.Layer) { l.Path, l.Bytes = junk, -1 }), qcow2.ErrNotQcow2},
		{"no format", 1 << 20, with(func(l *image.Layer) { l.Format = 0 }), nil},
		{"no snapshot", 1 << 20, with(func(l *image.Layer) { l.Snapshot = "x" }), nil},
		{"check", 1 << 20, with(func(l *image.Layer) { l.Check = func(*qcow2.Header) error { return mine } }), mine},
	} {
		img, err := pool.Open(c.size, c.layers...)
		if err == nil {
			_ = img.Close()
			t.Errorf("%s: opened", c.name)
			continue
		}
		if c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		if len(c.layers) > 0 && !strings.HasPrefix(err.Error(), "the base: ") {
			t.Errorf("%s: doesn't name the layer: %v", c.name, err)
		}
	}
	if n := openFiles(t, dir); n != 0 {
		t.Errorf("%d files left open", n)
	}
	img, err := pool.Open(1<<20, good)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}

// The check sees the header of the very file, for each image again.
func TestCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", base, "1M")
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	var seen []string
	check := func(h *qcow2.Header) error {
		seen = append(seen, h.BackingFile)
		return nil
	}
	layers := qcow2Layers(base, top)
	layers[0].Check, layers[1].Check = check, check
	pool := image.NewPool(image.PoolOptions{})
	open(t, pool, layers...)
	open(t, pool, layers...)
	if want := fmt.Sprint([]string{"", base, "", base}); fmt.Sprint(seen) != want {
		t.Errorf("checked %v, want %v", seen, want)
	}
}

// A file that is replaced, changed or gone is noticed when it is opened again,
// and doesn't get into images that are opened later.
func TestChanged(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(t *testing.T, path string){
		"replaced": func(t *testing.T, path string) {
			other := path + ".new"
			imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", other, "1M")
			imagetest.QemuIO(t, "qcow2", other, "write -P 7 0 1M")
			if err := os.Rename(other, path); err != nil {
				t.Fatal(err)
			}
		},
		"written to": func(t *testing.T, path string) {
			imagetest.QemuIO(t, "qcow2", path, "write -P 7 0 1M")
			// A write in the same tick of the clock would not be seen.
			if err := os.Chtimes(path, time.Time{}, time.Now().Add(time.Second)); err != nil {
				t.Fatal(err)
			}
		},
		"header": func(t *testing.T, path string) {
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			imagetest.QemuIO(t, "qcow2", path, "write -P 7 0 1M")
			imagetest.QemuImg(t, "rebase", "-u", "-f", "qcow2", "-b", "", path)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := qcow2.SetIdentity(f, []byte("another")); err != nil {
				t.Fatal(err)
			}
			if err := f.Truncate(st.Size()); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(path, st.ModTime(), st.ModTime()); err != nil {
				t.Fatal(err)
			}
		},
		"gone": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
		"FIFO": func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path, other := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "other.qcow2")
			imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
			imagetest.QemuIO(t, "qcow2", path, "write -P 5 0 1M")
			imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", other, "1M")
			pool := image.NewPool(image.PoolOptions{MaxFiles: 1})
			img := open(t, pool, layerOf(path, image.Qcow2))
			buf := make([]byte, 1)
			if _, err := img.ReadAt(buf, 0); err != nil || buf[0] != 5 {
				t.Fatal(buf, err)
			}
			change(t, path)
			open(t, pool, layerOf(other, image.Qcow2)) // takes the only place for files
			_, err := img.ReadAt(buf, 0)
			switch name {
			case "gone":
				if !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("read: %v", err)
				}
			case "FIFO":
				if !errors.Is(err, image.ErrNotRegular) {
					t.Errorf("read: %v", err)
				}
			default:
				if !errors.Is(err, image.ErrChanged) {
					t.Errorf("read: %v", err)
				}
			}
			if name == "replaced" || name == "written to" {
				again := open(t, pool, layerOf(path, image.Qcow2))
				if _, err := again.ReadAt(buf, 0); err != nil || buf[0] != 7 {
					t.Errorf("opened again: %d, %v", buf[0], err)
				}
			}
		})
	}
}

// A layer that is known to be written to below the others is read on when its file was closed and is opened again, whatever
// its size, time and header are now; but only the same file.
func TestChanging(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base, top, other := filepath.Join(dir, "base"), filepath.Join(dir, "top"), filepath.Join(dir, "other")
	for _, path := range []string{base, top, other} {
		imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	}
	imagetest.QemuIO(t, "qcow2", base, "write -P 5 0 64k")
	imagetest.QemuIO(t, "qcow2", top, "write -P 6 64k 64k")
	pool := image.NewPool(image.PoolOptions{MaxFiles: 1})
	below := layerOf(base, image.Qcow2)
	below.Changing, below.Bytes = true, -1
	img := open(t, pool, below, layerOf(top, image.Qcow2))
	read := func() error {
		for off, want := range map[int64]byte{0: 5, 64 << 10: 6} {
			open(t, pool, layerOf(other, image.Qcow2)) // takes the only place for files
			buf := make([]byte, 1)
			if _, err := img.ReadAt(buf, off); err != nil {
				return err
			}
			if buf[0] != want {
				t.Errorf("%d at %d", buf[0], off)
			}
		}
		return nil
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	imagetest.QemuIO(t, "qcow2", base, "write -P 7 64k 64k")
	imagetest.QemuImg(t, "rebase", "-u", "-f", "qcow2", "-b", other, "-F", "qcow2", base)
	if err := read(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Rename(base, base+".old"), os.Rename(top, base)); err != nil {
		t.Fatal(err)
	}
	if err := read(); !errors.Is(err, image.ErrChanged) && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another file: %v", err)
	}
}

// A file that is cut off while it is open gives an error, never zeroes.
func TestCutOff(t *testing.T) {
	t.Parallel()
	for _, format := range []image.Format{image.Raw, image.Qcow2} {
		path := filepath.Join(t.TempDir(), "disk")
		imagetest.QemuImg(t, "create", "-q", "-f", format.String(), path, "1M")
		imagetest.QemuIO(t, format.String(), path, "write -P 5 0 1M")
		img := open(t, image.NewPool(image.PoolOptions{}), layerOf(path, format))
		buf := make([]byte, 4096)
		if _, err := img.ReadAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, st.Size()-4096); err != nil {
			t.Fatal(err)
		}
		n, err := img.ReadAt(buf, 1<<20-4096)
		if !errors.Is(err, image.ErrChanged) || errors.Is(err, io.EOF) || n != 0 {
			t.Errorf("%s: %d, %v", format, n, err)
		}
	}
}

// A part of the last cluster may be missing from the file and reads as zeroes.
// More than that is damage, for qemu-img check too.
func TestTail(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	whole := filepath.Join(dir, "disk.qcow2")
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", whole, "1M")
	imagetest.QemuIO(t, "qcow2", whole, "write -P 5 0 1M")
	b, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	const cluster = 64 << 10
	for _, less := range []int{1, 512, 1000, cluster - 1, cluster, cluster + 1} {
		path := filepath.Join(dir, fmt.Sprint(less))
		if err := os.WriteFile(path, b[:len(b)-less], 0o600); err != nil {
			t.Fatal(err)
		}
		img := open(t, image.NewPool(image.PoolOptions{}), layerOf(path, image.Qcow2))
		if less >= cluster {
			if _, err := img.ReadAt(make([]byte, 1), 1<<20-1); !errors.Is(err, qcow2.ErrCorrupt) {
				t.Errorf("%d bytes less: %v", less, err)
			}
			continue
		}
		imagetest.QemuImg(t, "check", "-q", "-f", "qcow2", path)
		imagetest.Run(t, opener(layerOf(path, image.Qcow2)), imagetest.Content(t, "qcow2", path))
	}
}

// Corrupt entries spoil only what they map; what a layer above hides doesn't matter.
func TestCorruptCluster(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, top := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "top.qcow2")
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	imagetest.QemuIO(t, "qcow2", path, "write -P 5 0 1M")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const l2 = 4 << 16 // header, refcount table and block, L1
	b[l2+3*8+6] ^= 2   // cluster 3 is not aligned any more
	b[l2+5*8] = 0x40   // cluster 5 is compressed, by nobody
	b[l2+5*8+2] = 0    //
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	pool := image.NewPool(image.PoolOptions{})
	img := open(t, pool, layerOf(path, image.Qcow2))
	const cluster = 64 << 10
	buf := make([]byte, 1<<20)
	for _, c := range []struct{ off, length, n int }{
		{0, 3 * cluster, 3 * cluster},
		{4 * cluster, cluster, cluster},
		{6 * cluster, 10 * cluster, 10 * cluster},
		{0, 1 << 20, 3 * cluster},
		{3*cluster + 10, 1, 0},
		{4*cluster + 10, 2 * cluster, cluster - 10},
		{5 * cluster, cluster, 0},
		{5*cluster + 1, 10, 0},
	} {
		n, err := img.ReadAt(buf[:c.length], int64(c.off))
		if n != c.n || (err == nil) != (c.n == c.length) || err != nil && (!errors.Is(err, qcow2.ErrCorrupt) || !strings.HasPrefix(err.Error(), "disk.qcow2: ")) {
			t.Errorf("read of %d at %d: %d, %v", c.length, c.off, n, err)
		}
		if strings.Trim(string(buf[:n]), "\x05") != "" {
			t.Errorf("read of %d at %d: wrong bytes", c.length, c.off)
		}
	}
	list, err := img.Extents(0, 1<<20)
	if err != nil || len(list) != 1 || list[0].Zero {
		t.Errorf("extents %v, %v", list, err)
	}
	imagetest.Build(t, top, 16, 1<<20, []int64{3, 5}, func(int) []byte { return []byte(strings.Repeat("\x05", cluster)) })
	img = open(t, pool, layerOf(path, image.Qcow2), layerOf(top, image.Qcow2))
	if b := read(t, img); strings.Trim(string(b), "\x05") != "" {
		t.Error("wrong bytes with the corrupt clusters hidden")
	}
}

// Snapshots inside an image are disks of their own.
func TestSnapshot(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	pool := image.NewPool(image.PoolOptions{})
	w := imagetest.NewWriter(t, 6)
	for i := range 3 {
		c, _ := w.Write(t, "", int64(i)*100000, 300000)
		imagetest.QemuIO(t, "qcow2", path, c)
		imagetest.QemuImg(t, "snapshot", "-c", fmt.Sprint("snap", i), path)
	}
	imagetest.QemuIO(t, "qcow2", path, "write -P 1 0 1M")
	for i := range 3 {
		raw := filepath.Join(t.TempDir(), "raw")
		name := fmt.Sprint("snap", i)
		imagetest.QemuImg(t, "convert", "-f", "qcow2", "-l", "snapshot.name="+name, "-O", "raw", path, raw)
		want, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		l := layerOf(path, image.Qcow2)
		l.Snapshot = name
		imagetest.Equal(t, open(t, pool, l), want)
	}
	imagetest.Equal(t, open(t, pool, layerOf(path, image.Qcow2)), imagetest.Content(t, "qcow2", path))
}

// A huge disk with its data far apart: extents find it without looking at all else.
func TestHugeDisk(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "huge.qcow2")
	const size = 1 << 50
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, fmt.Sprint(size))
	imagetest.QemuIO(t, "qcow2", path, fmt.Sprintf("write -P 1 %d 1000", size/3), fmt.Sprintf("write -P 2 %d 512", size-512))
	img := open(t, image.NewPool(image.PoolOptions{}), layerOf(path, image.Qcow2))
	start := time.Now()
	var data []image.Extent
	for e, err := range image.Walk(img, 0, size) {
		if err != nil {
			t.Fatal(err)
		}
		if !e.Zero {
			data = append(data, e)
		}
	}
	if len(data) != 2 || data[0].Off > size/3 || data[0].End() < size/3+1000 || data[1].End() != size {
		t.Errorf("data %+v", data)
	}
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("it took %s", d)
	}
	buf := make([]byte, 100)
	if n, err := img.ReadAt(buf, size-50); n != 50 || !errors.Is(err, io.EOF) || buf[0] != 2 {
		t.Errorf("read at the end: %d, %v", n, err)
	}
}

// An open 1 TiB disk with 200,000 clusters here and there costs little memory, with
// all of its map read. (Not parallel: it measures the heap.)
func TestMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "large.qcow2")
	const size, clusters = 1 << 40, 200_000
	rnd := rand.New(rand.NewPCG(1, 1))
	seen := map[int64]bool{}
	var guest []int64
	for len(guest) < clusters {
		if g := rnd.Int64N(size >> 16); !seen[g] {
			seen[g] = true
			guest = append(guest, g)
		}
	}
	imagetest.Build(t, path, 16, size, guest, func(i int) []byte { return nil })
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	img := open(t, image.NewPool(image.PoolOptions{}), layerOf(path, image.Qcow2))
	var data int64
	for e, err := range image.Walk(img, 0, size) {
		if err != nil {
			t.Fatal(err)
		}
		if !e.Zero {
			data += e.Len
		}
	}
	if data != clusters<<16 {
		t.Errorf("%d bytes of data, want %d", data, clusters<<16)
	}
	used := heap() - before
	t.Logf("%.1f MB", float64(used)/1e6)
	if used > 64_000_000 {
		t.Errorf("%d bytes for one open disk", used)
	}
	runtime.KeepAlive(seen)
	runtime.KeepAlive(guest)
	if _, err := img.ReadAt(make([]byte, 10), 0); err != nil {
		t.Error(err)
	}
}

// With caches that hold next to nothing all is still right.
func TestTinyCaches(t *testing.T) {
	t.Parallel()
	layers, want := buildChain(t, 9, 1<<20, 10, 100)
	path := filepath.Join(t.TempDir(), "compressed.qcow2")
	raw := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		t.Fatal(err)
	}
	imagetest.QemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
	for _, list := range [][]image.Layer{layers, {layerOf(path, image.Qcow2)}} {
		pool := image.NewPool(image.PoolOptions{MaxFiles: 1, MaxMeta: 1, MaxClusters: 1})
		imagetest.Run(t, func() (image.Image, error) { return pool.Open(1<<20, list...) }, want)
	}
}

// Reads of what is resolved allocate nothing.
func TestAllocations(t *testing.T) {
	layers, _ := buildChain(t, 12, 1<<20, 20, 20)
	img := open(t, image.NewPool(image.PoolOptions{}), layers...)
	small, large := make([]byte, 4096), make([]byte, 1<<20)
	rnd := rand.New(rand.NewPCG(1, 1))
	for name, f := range map[string]func() error{
		"small": func() error { _, err := img.ReadAt(small, rnd.Int64N(1<<20-4096)); return err },
		"large": func() error { _, err := img.ReadAt(large, 0); return err },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
		if n := testing.AllocsPerRun(100, func() { _ = f() }); n != 0 {
			t.Errorf("%s read: %v allocations", name, n)
		}
	}
}
