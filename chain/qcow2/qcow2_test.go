package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain/image/imagetest"
	"qmchain/chain/qcow2"
)

// create makes an image with qemu-img and returns its path.
func create(t testing.TB, options string, size int64, more ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	args := append([]string{"create", "-q", "-f", "qcow2", "-o", options}, more...)
	imagetest.QemuImg(t, append(args, path, fmt.Sprint(size))...)
	return path
}

func load(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func openBytes(b []byte) (*qcow2.Image, error) {
	return qcow2.Open(bytes.NewReader(b), int64(len(b)), qcow2.Options{})
}

func TestHeader(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		options string
		size    int64
		version int
		cluster int64
		check   func(*qcow2.Header) bool
	}{
		{"cluster_size=512", 1 << 20, 3, 512, func(h *qcow2.Header) bool { return h.Incompatible == 0 && h.RefcountBits == 16 }},
		{"cluster_size=64k,compat=0.10", 100001, 2, 64 << 10, func(h *qcow2.Header) bool { return h.Incompatible == 0 }},
		{"cluster_size=2M,refcount_bits=64", 1 << 40, 3, 2 << 20, func(h *qcow2.Header) bool { return h.RefcountBits == 64 }},
		{"compression_type=zstd", 1 << 30, 3, 64 << 10, func(h *qcow2.Header) bool {
			return h.Compression == qcow2.Zstd && h.Incompatible == qcow2.CompressionType
		}},
		{"extended_l2=on,lazy_refcounts=on", 1 << 30, 3, 64 << 10, func(h *qcow2.Header) bool {
			return h.Incompatible == qcow2.ExtendedL2 && h.Compatible == 1
		}},
		{"cluster_size=512", 0, 3, 512, func(h *qcow2.Header) bool { return true }},
	} {
		b := load(t, create(t, c.options, c.size))
		m, err := openBytes(b)
		if err != nil {
			t.Errorf("%s: %v", c.options, err)
			continue
		}
		h := m.Header()
		size := (c.size + 511) &^ 511 // qemu-img create rounds up
		if h.Version != c.version || h.ClusterSize() != c.cluster || h.VirtualSize != size || h.BackingFile != "" || !c.check(h) {
			t.Errorf("%s: %+v", c.options, h)
		}
		if h.Identity() != nil {
			t.Errorf("%s: an identity", c.options)
		}
	}

	// A size that is no multiple of a sector can't come from QEMU, which cuts it.
	path := create(t, "cluster_size=512", 4096)
	b := load(t, path)
	binary.BigEndian.PutUint64(b[24:], 3000)
	m, err := openBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if want := int64(len(imagetest.Content(t, "qcow2", path))); m.Size() != want {
		t.Errorf("size %d, qemu-img reads %d", m.Size(), want)
	}
}

func TestBackingFile(t *testing.T) {
	t.Parallel()
	name := "../" + strings.Repeat("x", 1000) + "/base.qcow2"
	for _, options := range []string{"cluster_size=4k", "cluster_size=2M", "compat=0.10"} {
		h := mustOpen(t, load(t, create(t, options, 1<<20, "-u", "-b", name, "-F", "qcow2"))).Header()
		if h.BackingFile != name || h.BackingFormat != "qcow2" {
			t.Errorf("%s: backing file %q, format %q", options, h.BackingFile, h.BackingFormat)
		}
	}
}

func mustOpen(t testing.TB, b []byte) *qcow2.Image {
	t.Helper()
	m, err := openBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// What can't be read is refused, by name, and its header can be read all the same.
func TestUnsupported(t *testing.T) {
	t.Parallel()
	secret := []string{"--object", "secret,id=s,data=12345678"}
	for _, c := range []struct {
		name, options, want string
		more                []string
	}{
		{"aes", "encrypt.format=aes,encrypt.key-secret=s", "encrypted", secret},
		{"data file", "data_file=" + filepath.Join(t.TempDir(), "data"), "external data file", nil},
		{"luks", "cluster_size=64k", "encrypted", nil},
		{"unknown feature", "cluster_size=64k", `bit 63 ("next big thing")`, nil},
	} {
		path := create(t, c.options, 1<<20, c.more...)
		b := load(t, path)
		switch c.name {
		case "luks": // made by qemu-img it takes seconds
			binary.BigEndian.PutUint32(b[32:], 2)
		case "unknown feature":
			b = withFeature(b, 63, "next big thing")
		}
		_, err := openBytes(b)
		if !errors.Is(err, qcow2.ErrUnsupported) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		if _, err := qcow2.ReadHeader(bytes.NewReader(b), int64(len(b))); err != nil {
			t.Errorf("%s: header: %v", c.name, err)
		}
	}
}

// withFeature sets an incompatible feature bit and names it in the feature table.
func withFeature(b []byte, bit int, name string) []byte {
	b = bytes.Clone(b)
	binary.BigEndian.PutUint64(b[72:], 1<<bit)
	i := bytes.Index(b, []byte{0x68, 0x03, 0xf8, 0x57}) + 8
	entry := make([]byte, 48)
	entry[1] = byte(bit)
	copy(entry[2:], name)
	copy(b[i:], entry)
	return b
}

// Changes to headers that make an image unreadable: for us as for QEMU, which is
// asked in each case, but for those that only we refuse.
func TestHeaderMutations(t *testing.T) {
	t.Parallel()
	path := create(t, "cluster_size=512", 1<<20, "-u", "-b", "base", "-F", "raw")
	good := load(t, path)
	u32, u64 := binary.BigEndian.PutUint32, binary.BigEndian.PutUint64
	for _, c := range []struct {
		name    string
		mutate  func(b []byte) []byte
		want    error
		oursToo bool // QEMU opens it for reading
	}{
		{"magic", func(b []byte) []byte { b[0] = 'q'; return b }, qcow2.ErrNotQcow2, false},
		{"empty", func(b []byte) []byte { return nil }, qcow2.ErrNotQcow2, false},
		{"71 bytes", func(b []byte) []byte { return b[:71] }, qcow2.ErrNotQcow2, false},
		{"cut in the header", func(b []byte) []byte { return b[:200] }, qcow2.ErrCorrupt, true},
		{"version 1", func(b []byte) []byte { u32(b[4:], 1); return b }, qcow2.ErrUnsupported, false},
		{"version 4", func(b []byte) []byte { u32(b[4:], 4); return b }, qcow2.ErrUnsupported, false},
		{"clusters of 256", func(b []byte) []byte { u32(b[20:], 8); return b }, qcow2.ErrCorrupt, false},
		{"clusters of 4M", func(b []byte) []byte { u32(b[20:], 22); return b }, qcow2.ErrCorrupt, false},
		{"clusters of 2^40", func(b []byte) []byte { u32(b[20:], 40); return b }, qcow2.ErrCorrupt, false},
		{"huge size", func(b []byte) []byte { u64(b[24:], 1<<62); return b }, qcow2.ErrCorrupt, false},
		{"negative size", func(b []byte) []byte { u64(b[24:], 1<<64-512); return b }, qcow2.ErrCorrupt, false},
		{"L1 too small", func(b []byte) []byte { u32(b[36:], 31); return b }, qcow2.ErrCorrupt, false},
		{"L1 too large", func(b []byte) []byte { u32(b[36:], 4<<20+1); return b }, qcow2.ErrCorrupt, false},
		{"L1 unaligned", func(b []byte) []byte { u64(b[40:], 1024+8); return b }, qcow2.ErrCorrupt, false},
		{"L1 outside", func(b []byte) []byte { u64(b[40:], 1<<30); return b }, qcow2.ErrCorrupt, true},
		{"L1 far outside", func(b []byte) []byte { u64(b[40:], 1<<63); return b }, qcow2.ErrCorrupt, false},
		{"L1 at the end", func(b []byte) []byte { return b[:len(b)-8] }, qcow2.ErrCorrupt, true},
		{"no refcounts", func(b []byte) []byte { u32(b[56:], 0); return b }, qcow2.ErrCorrupt, false},
		{"refcounts unaligned", func(b []byte) []byte { u64(b[48:], 513); return b }, qcow2.ErrCorrupt, false},
		{"refcounts too large", func(b []byte) []byte { u32(b[56:], 1<<20); return b }, qcow2.ErrCorrupt, false},
		{"refcount order", func(b []byte) []byte { u32(b[96:], 7); return b }, qcow2.ErrCorrupt, false},
		{"snapshots", func(b []byte) []byte { u32(b[60:], 65537); return b }, qcow2.ErrCorrupt, false},
		{"snapshots unaligned", func(b []byte) []byte { u32(b[60:], 1); u64(b[64:], 7); return b }, qcow2.ErrCorrupt, false},
		{"short header", func(b []byte) []byte { u32(b[100:], 96); return b }, qcow2.ErrCorrupt, false},
		{"long header", func(b []byte) []byte { u32(b[100:], 520); return b }, qcow2.ErrCorrupt, false},
		{"backing name behind the cluster", func(b []byte) []byte { u64(b[8:], 513); return b }, qcow2.ErrCorrupt, false},
		{"backing name over its end", func(b []byte) []byte { u64(b[8:], 510); return b }, qcow2.ErrCorrupt, false},
		{"backing name in the header", func(b []byte) []byte { u64(b[8:], 80); return b }, qcow2.ErrCorrupt, true},
		{"long backing name", func(b []byte) []byte { u32(b[16:], 1024); return b }, qcow2.ErrCorrupt, false},
		{"long extension", func(b []byte) []byte { u32(b[116:], 1000); return b }, qcow2.ErrCorrupt, false},
		{"endless extension", func(b []byte) []byte { u32(b[116:], 1<<32-1); return b }, qcow2.ErrCorrupt, false},
		{"corrupt bit", func(b []byte) []byte { u64(b[72:], qcow2.Corrupt); return b }, qcow2.ErrCorrupt, true},
		{"compression type", func(b []byte) []byte { b[104] = 1; return b }, qcow2.ErrCorrupt, false},
		{"unknown compression type", func(b []byte) []byte { b[104] = 9; u64(b[72:], 8); return b }, qcow2.ErrUnsupported, false},
		{"compression bit", func(b []byte) []byte { u64(b[72:], qcow2.CompressionType); return b }, qcow2.ErrCorrupt, false},
		{"subclusters of 16 bytes", func(b []byte) []byte { u64(b[72:], qcow2.ExtendedL2); return b }, qcow2.ErrCorrupt, false},
		{"dirty", func(b []byte) []byte { u64(b[72:], qcow2.Dirty); return b }, nil, false},
		{"unknown compatible bits", func(b []byte) []byte { u64(b[80:], 1<<60); u64(b[88:], 1<<60); return b }, nil, false},
	} {
		b := c.mutate(bytes.Clone(good))
		_, err := openBytes(b)
		if !errors.Is(err, c.want) || (c.want == nil) != (err == nil) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if opens, out := qemuOpens(t, path); opens != (c.want == nil || c.oursToo) {
			t.Errorf("%s: qemu-img: %s", c.name, out)
		}
	}
}

// qemuOpens asks qemu-img whether it opens an image for reading.
func qemuOpens(t testing.TB, path string) (bool, string) {
	out, err := command(t, "qemu-img", "info", "-f", "qcow2", path)
	return err == nil, out
}

// Map follows QEMU where the tables are right, and calls Invalid what is not.
func TestTableMutations(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		options string
		entry   func(l1, l2 uint64, end int64) (uint64, uint64) // of cluster 0
		bitmap  uint64                                          // for extended entries
		kind    qcow2.Kind
		why     string
	}{
		{"as it is", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 }, 0, qcow2.Data, ""},
		{"L1 flag lost", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1 &^ (1 << 63), l2 }, 0, qcow2.Data, ""},
		{"L1 zero", "cluster_size=512", func(_, l2 uint64, _ int64) (uint64, uint64) { return 0, l2 }, 0, qcow2.Unallocated, ""},
		{"L1 unaligned", "cluster_size=4k", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1 + 512, l2 }, 0, qcow2.Invalid, "L1 entry.*not aligned"},
		{"L1 outside", "cluster_size=512", func(_, l2 uint64, end int64) (uint64, uint64) { return uint64(end+511) &^ 511, l2 }, 0, qcow2.Invalid, "L1 entry.*outside"},
		{"L1 far outside", "cluster_size=512", func(_, l2 uint64, _ int64) (uint64, uint64) { return 0x00fffffffffffe00, l2 }, 0, qcow2.Invalid, "L1 entry.*outside"},
		{"L1 reserved low", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1 | 1, l2 }, 0, qcow2.Invalid, "L1 entry.*reserved"},
		{"L1 reserved high", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1 | 1<<60, l2 }, 0, qcow2.Invalid, "L1 entry.*reserved"},
		{"L2 zero", "cluster_size=512", func(l1, _ uint64, _ int64) (uint64, uint64) { return l1, 0 }, 0, qcow2.Unallocated, ""},
		{"L2 zero flag", "cluster_size=512", func(l1, _ uint64, _ int64) (uint64, uint64) { return l1, 1 }, 0, qcow2.Zero, ""},
		{"L2 zero flag, allocated", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 | 1 }, 0, qcow2.Zero, ""},
		{"L2 zero flag, version 2", "compat=0.10", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 | 1 }, 0, qcow2.Invalid, "zero flag"},
		{"L2 unaligned", "cluster_size=4k", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 + 512 }, 0, qcow2.Invalid, "L2 entry.*not aligned"},
		{"L2 at the end", "cluster_size=512", func(l1, _ uint64, end int64) (uint64, uint64) { return l1, uint64(end-1) &^ 511 }, 0, qcow2.Data, ""},
		{"L2 outside", "cluster_size=512", func(l1, _ uint64, end int64) (uint64, uint64) { return l1, uint64(end+511) &^ 511 }, 0, qcow2.Invalid, "L2 entry.*outside"},
		{"L2 reserved low", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 | 2 }, 0, qcow2.Invalid, "L2 entry.*reserved"},
		{"L2 reserved high", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 | 1<<61 }, 0, qcow2.Invalid, "L2 entry.*reserved"},
		{"compressed", "cluster_size=512", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, 1<<62 | 512 }, 0, qcow2.Compressed, ""},
		{"compressed outside", "cluster_size=512", func(l1, l2 uint64, end int64) (uint64, uint64) { return l1, 1<<62 | uint64(end) }, 0, qcow2.Invalid, "outside"},
		{"compressed far outside", "cluster_size=2M", func(l1, l2 uint64, end int64) (uint64, uint64) { return l1, 1<<62 - 1 | 1<<62 }, 0, qcow2.Invalid, "outside"},
		{"extended", "extended_l2=on", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 }, 1<<32 - 1, qcow2.Data, ""},
		{"extended zero", "extended_l2=on", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, 0 }, 1 << 32, qcow2.Zero, ""},
		{"extended unallocated", "extended_l2=on", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 }, 1 << 33, qcow2.Unallocated, ""},
		{"extended both", "extended_l2=on", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 }, 1<<32 | 1, qcow2.Invalid, "subclusters"},
		{"extended without a place", "extended_l2=on", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, 0 }, 1, qcow2.Invalid, "subclusters"},
		{"extended zero flag", "extended_l2=on", func(l1, l2 uint64, _ int64) (uint64, uint64) { return l1, l2 | 1 }, 1, qcow2.Invalid, "reserved"},
	} {
		path := create(t, c.options, 8<<20)
		imagetest.QemuIO(t, "qcow2", path, "write -P 7 0 2097152")
		b := load(t, path)
		be := binary.BigEndian
		l1 := be.Uint64(b[40:])
		l2 := be.Uint64(b[l1:]) & 0x00fffffffffffe00
		e1, e2 := c.entry(be.Uint64(b[l1:]), be.Uint64(b[l2:]), int64(len(b)))
		be.PutUint64(b[l2:], e2)
		if c.bitmap != 0 {
			be.PutUint64(b[l2+8:], c.bitmap)
		}
		be.PutUint64(b[l1:], e1)
		m := mustOpen(t, b)
		runs, err := m.Map(0, m.Size(), nil)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if runs[0].Kind != c.kind {
			t.Errorf("%s: %+v", c.name, runs[0])
		}
		if err := runs[0].Err(); (err != nil) != (c.why != "") || err != nil && (!errors.Is(err, qcow2.ErrCorrupt) || !matches(c.why, err)) {
			t.Errorf("%s: %v", c.name, err)
		}
		checkRuns(t, m, runs, 0, m.Size())
	}
}

// checkRuns checks that runs cover a range without gaps.
func checkRuns(t testing.TB, m *qcow2.Image, runs []qcow2.Run, off, end int64) {
	t.Helper()
	for _, r := range runs {
		if r.Off != off || r.Len <= 0 {
			t.Fatalf("run %+v where one from %d on is due", r, off)
		}
		off += r.Len
	}
	if off != min(end, m.Size()) {
		t.Fatalf("runs end at %d, want %d", off, min(end, m.Size()))
	}
}

// Any part of the map is the same as that part of the whole map.
func TestMapParts(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"cluster_size=512", "cluster_size=4k", "cluster_size=64k,extended_l2=on"} {
		const size = 3<<20 + 512
		w := imagetest.NewWriter(t, 5)
		path := create(t, options, size)
		var commands []string
		for i := range 30 {
			off := w.Rand().Int64N(size - 70000)
			if i%5 == 0 {
				commands = append(commands, fmt.Sprintf("write -z %d 65536", off&^0xffff))
				continue
			}
			c, _ := w.Write(t, "", off, 1+w.Rand().Int64N(70000))
			commands = append(commands, c)
		}
		imagetest.QemuIO(t, "qcow2", path, commands...)
		m := mustOpen(t, load(t, path))
		all, err := m.Map(0, 1<<62, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkRuns(t, m, all, 0, size)
		for range 300 {
			off := w.Rand().Int64N(size)
			length := w.Rand().Int64N(1 << (1 + w.Rand().IntN(22)))
			part, err := m.Map(off, length, []qcow2.Run{{Off: -1}})
			if err != nil {
				t.Fatal(err)
			}
			if part[0].Off != -1 {
				t.Fatal("Map changed what was in dst")
			}
			part = part[1:]
			checkRuns(t, m, part, off, min(off+length, size))
			for _, r := range part {
				for _, a := range all {
					if a.Off+a.Len <= r.Off || a.Off >= r.Off+r.Len {
						continue
					}
					want := a.Host
					if a.Kind == qcow2.Data {
						want += r.Off - a.Off
					}
					if a.Kind != r.Kind || want != r.Host || a.Off > r.Off || a.Off+a.Len < r.Off+r.Len {
						t.Fatalf("part %+v of the run %+v", r, a)
					}
				}
			}
		}
	}
}

func TestNext(t *testing.T) {
	t.Parallel()
	path := create(t, "cluster_size=512", 64<<20) // a table maps 32 KiB
	imagetest.QemuIO(t, "qcow2", path, "write 10M 1", "write 40M 1")
	m := mustOpen(t, load(t, path))
	for _, c := range [][2]int64{
		{0, 10 << 20},
		{1, 10 << 20},
		{10<<20 - 1, 10 << 20},
		{10<<20 + 5, 10<<20 + 5},
		{10<<20 + 32<<10, 40 << 20},
		{40<<20 + 32<<10, 64 << 20},
		{64 << 20, 64 << 20},
		{1 << 40, 64 << 20},
	} {
		if got := m.Next(c[0]); got != c[1] {
			t.Errorf("Next(%d) = %d, want %d", c[0], got, c[1])
		}
	}
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"cluster_size=512", "compat=0.10"} {
		path := create(t, options, 1<<20)
		imagetest.QemuIO(t, "qcow2", path, "write -P 1 0 100000")
		imagetest.QemuImg(t, "snapshot", "-c", "first", path)
		imagetest.QemuIO(t, "qcow2", path, "write -P 2 50000 100000")
		imagetest.QemuImg(t, "snapshot", "-c", "1", path) // its name is the first one's id
		imagetest.QemuIO(t, "qcow2", path, "write -P 3 70000 1")
		b := load(t, path)
		h := mustOpen(t, b).Header()
		list, err := qcow2.ReadSnapshots(bytes.NewReader(b), int64(len(b)), h)
		if err != nil || len(list) != 2 || list[0].Name != "first" || list[1].ID != "2" || list[1].VirtualSize != 1<<20 {
			t.Fatalf("%s: snapshots %+v, %v", options, list, err)
		}
		for name, want := range map[string]byte{"first": 1, "1": 1, "2": 2} {
			m, err := qcow2.Open(bytes.NewReader(b), int64(len(b)), qcow2.Options{Snapshot: name})
			if err != nil {
				t.Fatal(err)
			}
			runs, err := m.Map(60000, 1, nil)
			if err != nil || len(runs) != 1 || runs[0].Kind != qcow2.Data {
				t.Fatalf("%s: %+v, %v", name, runs, err)
			}
			if got := b[runs[0].Host]; got != want {
				t.Errorf("%s: snapshot %q holds %d, want %d", options, name, got, want)
			}
		}
		if _, err := qcow2.Open(bytes.NewReader(b), int64(len(b)), qcow2.Options{Snapshot: "none"}); err == nil {
			t.Error("opened a snapshot that isn't there")
		}
		// A broken table doesn't matter to who doesn't need it.
		binary.BigEndian.PutUint64(b[64:], 1<<40)
		if _, err := openBytes(b); err != nil {
			t.Error(err)
		}
		if _, err := qcow2.Open(bytes.NewReader(b), int64(len(b)), qcow2.Options{Snapshot: "1"}); !errors.Is(err, qcow2.ErrCorrupt) {
			t.Errorf("broken snapshot table: %v", err)
		}
	}
}

// A file that fails is no corrupt image.
func TestReadErrors(t *testing.T) {
	t.Parallel()
	path := create(t, "cluster_size=512", 1<<20)
	imagetest.QemuIO(t, "qcow2", path, "write -P 1 0 1M")
	b := load(t, path)
	broken := errors.New("broken disk")
	for after := 0; ; after++ {
		r := &failingReader{r: bytes.NewReader(b), after: after, err: broken}
		m, err := qcow2.Open(r, int64(len(b)), qcow2.Options{})
		if err == nil {
			_, err = m.Map(0, 1<<20, nil)
		}
		if err == nil {
			if after < 4 {
				t.Errorf("only %d reads", after)
			}
			break
		}
		if !errors.Is(err, broken) || errors.Is(err, qcow2.ErrCorrupt) || errors.Is(err, qcow2.ErrNotQcow2) {
			t.Errorf("read %d: %v", after, err)
		}
	}
}

type failingReader struct {
	r     io.ReaderAt
	after int
	err   error
}

func (f *failingReader) ReadAt(p []byte, off int64) (int, error) {
	if f.after--; f.after < 0 {
		return 0, f.err
	}
	return f.r.ReadAt(p, off)
}
