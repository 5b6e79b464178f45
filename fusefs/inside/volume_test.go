package inside

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// What is found on a disk is what blkid(8) says.
func TestProbe(t *testing.T) {
	t.Parallel()
	for kind, m := range makers {
		path := makeFile(t, m.size)
		m.make(t, path, tree(t))
		v := find(t, disk(t, "scsi0", path))
		if len(v) != 1 {
			t.Fatalf("%s: %v", kind, v)
		}
		values := map[string]string{}
		for line := range strings.Lines(run(t, "blkid", "-p", "-o", "export", path)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			values[name] = strings.ReplaceAll(value, `\ `, " ")
		}
		want := Volume{Disk: "scsi0", Size: m.size, Type: values["TYPE"], Label: values["LABEL"], UUID: values["UUID"], Why: v[0].Why}
		if kind == "ntfs" {
			want.Label = "" // it is in a file
		}
		got := v[0]
		got.img, got.in = nil, nil
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(Volume{})); diff != "" || got.Type != kind {
			t.Errorf("%s: %s", kind, diff)
		}
		if (v[0].Why == "") != (kind != "swap") {
			t.Errorf("%s: %s", kind, v[0].Why)
		}
	}
	v := find(t, disk(t, "scsi0", makeFile(t, 1<<20)), disk(t, "scsi1", makeFile(t, 512)))
	if len(v) != 2 || v[0].Type != "" || v[0].Why == "" {
		t.Errorf("empty: %v", v)
	}
}

// What a guest's ext4 says of the kernel's own devices, and of what it is to do about errors, does not count.
func TestProbeHostileExt4(t *testing.T) {
	t.Parallel()
	path := makeFile(t, 8<<20)
	run(t, "mkfs.ext4", "-q", "-F", path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if v := find(t, disk(t, "scsi0", path)); v[0].Why != "" {
		t.Errorf("as made: %s", v[0].Why)
	}
	if _, err := f.WriteAt([]byte{0x00, 0x07}, extSuper+0xe4); err != nil { // loop0
		t.Fatal(err)
	}
	if v := find(t, disk(t, "scsi0", path)); !strings.Contains(v[0].Why, "journal") {
		t.Errorf("with a journal on a device: %q", v[0].Why)
	}
}

// partitioned makes a disk with a GPT, and returns where its partitions begin.
func partitioned(t testing.TB, mib ...int) (path string, offsets []int64) {
	t.Helper()
	sum := 2
	script := "label: gpt\n"
	at := int64(1)
	for _, m := range mib {
		script += fmt.Sprintf("start=%dMiB, size=%dMiB\n", at, m)
		offsets = append(offsets, at<<20)
		at += int64(m)
		sum += m
	}
	path = makeFile(t, int64(sum)<<20)
	cmd := exec.CommandContext(t.Context(), "sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", path)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
	return path, offsets
}

// put copies a file into another at an offset.
func put(t testing.TB, to string, off int64, from string) {
	t.Helper()
	run(t, "dd", "if="+from, "of="+to, "conv=notrunc,sparse", "bs=1M", "oflag=seek_bytes", "seek="+strconv.FormatInt(off, 10), "status=none")
}

func TestPartitions(t *testing.T) {
	t.Parallel()
	path, at := partitioned(t, 8, 16, 4)
	fat, ext := makeFile(t, 8<<20), makeFile(t, 16<<20)
	makers["vfat"].make(t, fat, tree(t))
	makers["ext4"].make(t, ext, tree(t))
	put(t, path, at[0], fat)
	put(t, path, at[1], ext)
	v := find(t, disk(t, "scsi0", path))
	var got []string
	for _, v := range v {
		got = append(got, fmt.Sprint(v, " ", v.Type, " ", v.Size>>20, " ", v.Label))
	}
	if diff := cmp.Diff([]string{"scsi0-part1 vfat 8 MY LABEL", "scsi0-part2 ext4 16 my label", "scsi0-part3  4 "}, got); diff != "" {
		t.Error(diff)
	}
	for _, part := range []string{"2", "part2"} {
		chosen, err := Choose(v, Want{Part: part})
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := io.Copy(&b, io.NewSectionReader(chosen.img, 0, chosen.Size)); err != nil {
			t.Fatal(err)
		}
		if want, err := os.ReadFile(ext); err != nil || !bytes.Equal(b.Bytes(), want) {
			t.Errorf("partition 2 reads differently: %v", err)
		}
	}
}

func TestChoose(t *testing.T) {
	t.Parallel()
	on := func(disk string) []string { return []string{disk} }
	volumes := []Volume{
		{Disk: "scsi0", Part: "part1", Type: "vfat", in: on("scsi0")},
		{Disk: "scsi0", Part: "part2", Type: "ext4", in: on("scsi0")},
		{Disk: "scsi0", Part: "part2-part1", Type: "swap", Why: "it is swap", in: on("scsi0")},
		{Disk: "scsi1", Type: "xfs", in: on("scsi1")},
		{Disk: "scsi2", Part: "part1", Type: lvmMember, Why: "it is a physical volume", in: on("scsi2")},
		{LV: "vg0/root", Type: "ext4", in: on("scsi2")},
		{LV: "vg0/thin", Why: "thin", lvm: true, in: on("scsi2")},
		{LV: "vg1/root", Type: "ext4", in: on("scsi3")},
		{LV: "vg1/root", Type: "ext4", in: on("scsi4")},
	}
	for _, test := range []struct {
		want Want
		got  string
		err  error
	}{
		{Want{}, "", ErrAmbiguous},
		{Want{Disk: "scsi1"}, "scsi1", nil},
		{Want{Disk: "scsi0"}, "", ErrAmbiguous},
		{Want{Disk: "scsi0", Part: "2"}, "scsi0-part2", nil},
		{Want{Part: "2"}, "scsi0-part2", nil},
		{Want{Part: "1"}, "", ErrAmbiguous},
		{Want{Part: "2-1"}, "", ErrNoFiles},
		{Want{Disk: "scsi0", Part: "3"}, "", ErrNotFound},
		{Want{Disk: "scsi2", Part: "1"}, "", ErrNoFiles},
		{Want{Disk: "scsi2"}, "vg0/root", nil},
		{Want{LV: "vg0/root"}, "vg0/root", nil},
		{Want{LV: "vg0/thin"}, "vg0/thin", nil},
		{Want{LV: "vg1/root"}, "", ErrAmbiguous},
		{Want{LV: "vg1/root", Disk: "scsi4"}, "vg1/root", nil},
		{Want{LV: "vg0/roo"}, "", ErrNotFound},
		{Want{Disk: "scsi9"}, "", ErrNoFiles},
	} {
		got, err := Choose(volumes, test.want)
		if !errors.Is(err, test.err) || err == nil && got.String() != test.got {
			t.Errorf("%s: %s, %v", test.want, got, err)
		}
		if err != nil && (!strings.Contains(err.Error(), "--disk scsi0 --part 2-1") || !strings.Contains(err.Error(), "--lv vg0/root")) {
			t.Errorf("%s: the error does not list what there is: %v", test.want, err)
		}
	}
	_, err := Choose([]Volume{{Disk: "scsi0", Why: "it is encrypted", Type: luks}}, Want{})
	if !errors.Is(err, ErrNoFiles) || !strings.Contains(err.Error(), "encrypted") {
		t.Errorf("none: %v", err)
	}
}

// lvm runs LVM on loop devices of the test, and on nothing else.
type lvmTool struct {
	t     testing.TB
	loops []string
	dir   string
}

func newLVM(t testing.TB, loops ...string) *lvmTool { return &lvmTool{t, loops, t.TempDir()} }

func (l *lvmTool) run(command string, args ...string) string {
	l.t.Helper()
	config := fmt.Sprintf(`global{activation=0 event_activation=0 locking_dir=%q} backup{backup=0 archive=0} devices{use_devicesfile=0 scan_lvs=0} activation{udev_sync=0 udev_rules=0 monitoring=0}`, l.dir)
	cmd := exec.CommandContext(l.t.Context(), "lvm", append([]string{command, "--devices", strings.Join(l.loops, ","), "--config", config}, args...)...)
	cmd.Env = append(os.Environ(), "LVM_SYSTEM_DIR="+l.dir, "LVM_SUPPRESS_FD_WARNINGS=1")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		l.t.Fatalf("lvm %s: %v\n%s", command, err, said.String())
	}
	return string(out)
}

// loopOn puts a loop device on a range of a file, until the test ends.
func loopOn(t testing.TB, path string, off, size int64) string {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(control)
	for {
		n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		name := "/dev/loop" + strconv.Itoa(n)
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		config := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Offset: uint64(off), Sizelimit: uint64(size), Flags: unix.LO_FLAGS_AUTOCLEAR}}
		if err = unix.IoctlLoopConfigure(fd, &config); err == nil {
			t.Cleanup(func() { _ = unix.Close(fd) })
			return name
		}
		_ = unix.Close(fd)
		if err != unix.EBUSY {
			t.Fatal(err)
		}
	}
}

// Volumes of several segments on several disks, and striped ones, read as LVM itself says that they lie.
func TestLVM(t *testing.T) {
	t.Parallel()
	whole := makeFile(t, 48<<20)
	parts, at := partitioned(t, 4, 48)
	where := map[string]struct {
		path string
		off  int64
	}{}
	var loops []string
	for _, pv := range []struct {
		path string
		off  int64
	}{{whole, 0}, {parts, at[1]}} {
		name := loopOn(t, pv.path, pv.off, 48<<20)
		where[name] = pv
		loops = append(loops, name)
	}
	l := newLVM(t, loops...)
	l.run("pvcreate", append([]string{"-q"}, loops...)...)
	l.run("vgcreate", append([]string{"-s", "1M", "vg-0"}, loops...)...)
	l.run("lvcreate", "-an", "-Zn", "-Wn", "-l", "30", "-n", "root", "vg-0")
	l.run("lvcreate", "-an", "-Zn", "-Wn", "-i2", "-I64k", "-l", "20", "-n", "striped", "vg-0")
	l.run("lvextend", "-l", "+25", "vg-0/root")

	// Random content for each segment, put where LVM says.
	random := rand.NewChaCha8([32]byte{1})
	want := map[string][]byte{}
	segments := l.run("lvs", "--segments", "--noheadings", "--units", "b", "--nosuffix", "-o", "lv_name,seg_size,stripe_size,devices", "--separator", " ", "vg-0")
	for line := range strings.Lines(segments) {
		f := strings.Fields(line)
		size, _ := strconv.Atoi(f[1])
		stripe, _ := strconv.Atoi(f[2])
		data := make([]byte, size)
		_, _ = random.Read(data)
		want[f[0]] = append(want[f[0]], data...)
		devices := strings.Split(f[3], ",")
		if stripe == 0 {
			stripe = size
		}
		for i := 0; i*stripe < size; i++ {
			name, extent, _ := strings.Cut(strings.TrimSuffix(devices[i%len(devices)], ")"), "(")
			n, err := strconv.ParseInt(extent, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			file, err := os.OpenFile(where[name].path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			const begin = 1 << 20 // of the extents: pvcreate's default
			off := where[name].off + begin + n<<20 + int64(i/len(devices)*stripe)
			if _, err := file.WriteAt(data[i*stripe:][:stripe], off); err != nil {
				t.Fatal(err)
			}
			_ = file.Close()
		}
	}
	if len(want["root"]) != 55<<20 || len(want["striped"]) != 20<<20 || strings.Count(segments, "root") < 2 {
		t.Fatalf("LVM has made something else:\n%s", segments)
	}
	for _, name := range loops {
		run(t, "blockdev", "--flushbufs", name)
	}

	one, two := disk(t, "scsi0", whole), disk(t, "scsi1", parts)
	v := find(t, one, two)
	for name, content := range want {
		i := slices.IndexFunc(v, func(v Volume) bool { return v.LV == "vg-0/"+name })
		if i < 0 {
			t.Fatalf("%s is not among %v", name, v)
		}
		img := v[i].img
		if img == nil || img.Size() != int64(len(content)) {
			t.Fatalf("%s: %+v", name, v[i])
		}
		got := make([]byte, len(content))
		if n, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s reads differently: %d, %v", name, n, err)
		}
		for range 200 {
			off := rand.Int64N(img.Size())
			b := make([]byte, rand.IntN(300<<10))
			n, err := img.ReadAt(b, off)
			if !bytes.Equal(b[:n], content[off:][:n]) || n < len(b) && (!errors.Is(err, io.EOF) || off+int64(n) != img.Size()) {
				t.Fatalf("%s: %d at %d: %d, %v", name, len(b), off, n, err)
			}
		}
		next := int64(0)
		for e, err := range image.Walk(img, 0, img.Size()) {
			if err != nil || e.Off != next || e.Len <= 0 {
				t.Fatalf("%s: extent %+v at %d, %v", name, e, next, err)
			}
			next = e.End()
		}
		if next != img.Size() {
			t.Errorf("%s: extents end at %d", name, next)
		}
	}

	// A part of it is missing.
	for _, v := range find(t, one) {
		if v.LV != "" && (v.Why == "" || v.img != nil) {
			t.Errorf("with half of the group: %+v", v)
		}
	}
	// The same twice.
	for _, v := range find(t, one, two, disk(t, "scsi7", whole)) {
		if v.LV != "" && !strings.Contains(v.Why, "2 times") {
			t.Errorf("with a disk twice: %+v", v)
		}
	}
	// Damage in the copy of the text that counts.
	b, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	for i := bytes.LastIndex(b[:1<<20], []byte("vg-0 {")); i >= 0; i = bytes.LastIndex(b[:i], []byte("vg-0 {")) {
		b[i] ^= 1
	}
	damaged := filepath.Join(t.TempDir(), "damaged")
	if err := os.WriteFile(damaged, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var problems []error
	if _, err := Find(t.Context(), []Disk{disk(t, "scsi0", damaged)}, func(err error) { problems = append(problems, err) }); err != nil || len(problems) != 1 || !errors.Is(problems[0], errLVM) {
		t.Errorf("damaged: %v, %v", problems, err)
	}
}

const thinGroup = `
vg0 { # a comment
id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
seqno = 3
extent_size = 8192
physical_volumes { pv0 { id = "bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb" pe_start = 2048 tags = [] } }
logical_volumes {
pool { status = ["READ", "WRITE", "VISIBLE"] segment_count = 1 segment1 { start_extent = 0 extent_count = 2 type = "thin-pool" zero_new_blocks = 1 } }
pool_tmeta { status = ["READ", "WRITE"] segment_count = 1 segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } }
"a" { }
}}`

func TestParseGroup(t *testing.T) {
	t.Parallel()
	thin := strings.Replace(thinGroup, "\"a\" { }\n", "", 1)
	g, err := parseGroup(thin)
	if err != nil || g.name != "vg0" || g.seqno != 3 || len(g.lvs) != 1 || g.lvs[0].why == "" {
		t.Errorf("%+v, %v", g, err)
	}
	for _, text := range []string{
		"", "vg0", "vg0 {", "vg0 { }", "vg0 = 1", "}", thinGroup, "vg0 { extent_size = [", `vg0 { extent_size = "8`, "vg0 { extent_size = -1 }",
		strings.Replace(thin, "vg0", "vg:0", 1), strings.Replace(thin, "pool {", "-pool {", 1), strings.Repeat("a {", 1000), "vg0 { extent_size = 8192 physical_volumes { pv0 { pe_start = -5 } } }",
	} {
		if g, err := parseGroup(text); !errors.Is(err, errLVM) {
			t.Errorf("%.40q: %+v, %v", text, g, err)
		}
	}
}

// Whatever is in a guest's metadata, what is mapped of it lies on the disks.
func FuzzGroup(f *testing.F) {
	f.Add(thinGroup)
	f.Add(strings.NewReplacer(`type = "thin-pool" zero_new_blocks = 1`, `type = "striped" stripe_count = 1 stripes = ["pv0", 0]`, "\"a\" { }\n", "").Replace(thinGroup))
	f.Add(strings.NewReplacer(`type = "thin-pool" zero_new_blocks = 1`, `type = "striped" stripe_size = 128 stripe_count = 2 stripes = ["pv0", 0, "pv0", 1]`, "\"a\" { }\n", "").Replace(thinGroup))
	f.Fuzz(func(t *testing.T, text string) {
		g, err := parseGroup(text)
		if err != nil {
			return
		}
		const size = 64 << 20
		found := map[string][]physical{}
		for _, e := range g.pvs {
			found[e.uuid] = []physical{{e.uuid, bounded{t, size}}}
		}
		for _, lv := range g.lvs {
			img, err := g.image(lv, found)
			if err != nil {
				continue
			}
			if img.Size() <= 0 {
				t.Fatalf("size %d", img.Size())
			}
			for _, off := range []int64{0, img.Size() / 2, img.Size() - 1} {
				n := int(min(img.Size()-off, 256<<10)) // over the borders of stripes and segments
				if got, err := img.ReadAt(make([]byte, n), off); got != n || err != nil {
					t.Errorf("read of %d at %d of %d: %d, %v", n, off, img.Size(), got, err)
				}
				list, err := img.Extents(off, img.Size())
				if err != nil || len(list) == 0 {
					t.Fatalf("extents from %d on: %v, %v", off, list, err)
				}
				for _, e := range list {
					if e.Off != off || e.Len <= 0 || e.Len > img.Size()-off {
						t.Fatalf("extent %+v at %d of %d", e, off, img.Size())
					}
					off += e.Len
				}
			}
		}
	})
}

// bounded is a disk that is read within its bounds.
type bounded struct {
	t    *testing.T
	size int64
}

func (b bounded) Size() int64  { return b.size }
func (b bounded) Close() error { return nil }
func (b bounded) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > b.size-int64(len(p)) {
		b.t.Fatalf("read of %d at %d", len(p), off)
	}
	return len(p), nil
}

func (b bounded) Extents(off, length int64) ([]image.Extent, error) {
	return []image.Extent{{Off: off, Len: min(length, b.size-off)}}, nil
}

// Whatever a disk begins with, finding out what it is ends in a volume or an error.
func FuzzFind(f *testing.F) {
	f.Add([]byte("LABELONE"), 0)
	f.Add([]byte("LABELONE"+strings.Repeat("\x00", 16)+"LVM2 001"), 512)
	f.Add([]byte("_BHRfS_M"), btrfsSuper+0x40)
	f.Add([]byte("\x53\xef"), extSuper+0x38)
	f.Add([]byte("FAT32   "+strings.Repeat("\x00", 420)+"\x55\xaa"), 0x52)
	f.Add([]byte("XFSB"), 0)
	f.Add([]byte("SWAPSPACE2"), 4096-10)
	f.Add([]byte("CD001"), 32769)
	f.Add([]byte("\xfc\x4e\x2b\xa9"), 4096)
	f.Add([]byte("NTFS    "), 3)
	f.Add([]byte("\x80\x00\x00\x00\x83\x00\x00\x00\x01\x00\x00\x00\x40"+strings.Repeat("\x00", 51)+"\x55\xaa"), 446)
	f.Fuzz(func(t *testing.T, b []byte, off int) {
		if off < 0 || off > 96<<10 || len(b) > 16<<10 {
			return
		}
		content := make([]byte, 128<<10)
		copy(content[off:], b)
		img := inMemory{bytes.NewReader(content)}
		volumes, err := Find(t.Context(), []Disk{{"scsi0", img}}, func(error) {})
		if err != nil || len(volumes) == 0 {
			t.Errorf("%v, %v", volumes, err)
		}
		for _, v := range volumes {
			if v.Size <= 0 || v.Size > img.Size() && v.LV == "" {
				t.Errorf("%s has %d bytes", v, v.Size)
			}
			if shown := v.String() + v.Type + v.Label + v.UUID; shown != printable(shown) {
				t.Errorf("%q would be shown", shown)
			}
		}
		if _, _, err := readPV(img); err != nil && !errors.Is(err, errLVM) {
			t.Error(err)
		}
	})
}

// inMemory is a disk in memory.
type inMemory struct{ *bytes.Reader }

func (m inMemory) Close() error { return nil }
func (m inMemory) Extents(off, length int64) ([]image.Extent, error) {
	return []image.Extent{{Off: off, Len: min(length, m.Size()-off)}}, nil
}
