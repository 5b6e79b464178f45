package partition

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/internal/testenv"
)

// The tables in these tests are made by sfdisk. What is in them is said by libblkid, through partx, and by the kernel of
// a Linux guest that has the same files for disks.

// sample is a disk.
type sample struct {
	name   string
	file   string
	sector int64
	n      int   // partitions that are the disk's own; -1 if only Linux knows
	err    error // what Find's error has to wrap; nil for none

	// Where Find is to differ from them: they are not asked.
	notBlkid, notKernel bool
}

func run(t *testing.T, stdin, program string, args ...string) string {
	t.Helper()
	out, err := try(t, stdin, program, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func try(t *testing.T, stdin, program string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s %q: %w: %s", program, args, err, stderr.String())
	}
	return stdout.String(), err
}

// newFile makes a file of zeroes.
func newFile(t *testing.T, size int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
		t.Fatal(err)
	}
	return file
}

// sfdisk writes a table to a file, as if it was a disk with sectors of that size.
func sfdisk(t *testing.T, file string, sector int64, script string, options ...string) {
	t.Helper()
	if sector != 512 {
		dev := strings.TrimSpace(run(t, "", "losetup", "--find", "--show", "--sector-size", fmt.Sprint(sector), file))
		defer run(t, "", "losetup", "--detach", dev)
		file = dev
	}
	options = append([]string{"--quiet", "--no-reread", "--no-tell-kernel", "--wipe=never"}, options...)
	run(t, script, "sfdisk", append(options, file)...)
}

// patch changes bytes of a file.
func patch(t *testing.T, file string, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

// damage turns the bits of one byte.
func damage(t *testing.T, file string, off int64) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	patch(t, file, off, []byte{^b[0]})
}

func resize(t *testing.T, file string, size int64) {
	t.Helper()
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
}

const (
	gptScript = "label: gpt\n" +
		"1 : size=2M, type=U, name=\"EFI\"\n" +
		"3 : size=3M, name=\"grüße: 日本 / 😀\"\n" +
		"7 : size=1M, type=L, attrs=\"LegacyBIOSBootable\"\n"
	mbrScript = "label: dos\nlabel-id: 0x1b2c3d4e\n" +
		"2 : start=8M, size=2M, bootable\n" +
		"1 : start=2M, size=4M, type=7\n" +
		"4 : start=1M, size=1M, type=c\n"
)

// long has as many logical partitions as sfdisk can make.
func long() string {
	var b strings.Builder
	b.WriteString("label: dos\n1 : size=1M\n2 : size=120M, type=f\n4 : size=1M, type=82\n")
	for i := 5; i <= 60; i++ {
		fmt.Fprintf(&b, "%d : size=%dK\n", i, 8+i)
	}
	return b.String()
}

// samples makes disks with tables, and some without.
func samples(t *testing.T) []sample {
	t.Helper()
	var all []sample
	add := func(s sample, size int64, script string) string {
		if s.sector == 0 {
			s.sector = 512
		}
		s.file = newFile(t, size)
		if script != "" {
			sfdisk(t, s.file, s.sector, script)
		}
		all = append(all, s)
		return s.file
	}

	for _, sector := range sectorSizes {
		add(sample{name: fmt.Sprint("GPT, sectors of ", sector), sector: sector, n: 3}, 20*mib, gptScript)
	}
	add(sample{name: "GPT without partitions"}, 20*mib, "label: gpt\n")
	add(sample{name: "GPT of 16 entries", n: 2}, 20*mib, "label: gpt\ntable-length: 16\n2 : size=1M\n16 : size=1M\n")
	// 300 is a number that neither the kernel nor Find goes up to.
	add(sample{name: "GPT of 300 entries", n: 2, notBlkid: true}, 20*mib,
		"label: gpt\ntable-length: 300\n255 : size=1M\n256 : size=1M\n300 : size=1M\n1 : size=1M\n")
	file := add(sample{name: "GPT, disk grown", n: 3}, 20*mib, gptScript)
	resize(t, file, 30*mib)
	file = add(sample{name: "GPT, disk shrunk", err: ErrDamaged}, 20*mib, gptScript)
	resize(t, file, 19*mib)
	file = add(sample{name: "GPT, backup damaged", n: 3}, 20*mib, gptScript)
	patch(t, file, 20*mib-512, make([]byte, 512))
	for _, sector := range sectorSizes {
		file = add(sample{name: fmt.Sprint("GPT, header damaged, sectors of ", sector), sector: sector, n: 3, err: ErrDamaged, notKernel: true}, 20*mib, gptScript)
		damage(t, file, sector+60)
	}
	file = add(sample{name: "GPT, header gone", n: 3, err: ErrDamaged, notKernel: true}, 20*mib, gptScript)
	patch(t, file, 512, make([]byte, 512))
	file = add(sample{name: "GPT, entries damaged", n: 3, err: ErrDamaged, notKernel: true}, 20*mib, gptScript)
	damage(t, file, 1024+128*50)
	file = add(sample{name: "GPT, both damaged", err: ErrDamaged}, 20*mib, gptScript)
	damage(t, file, 512+60)
	damage(t, file, 20*mib-512+60)
	file = add(sample{name: "GPT, MBR gone", err: ErrNone}, 20*mib, gptScript)
	patch(t, file, 0, make([]byte, 512))
	file = add(sample{name: "GPT and a hybrid MBR", n: 3}, 20*mib, gptScript)
	patch(t, file, 0, bootSector(7, entry{boot: 0x80, kind: 0x83, start: 4096, sectors: 512}, entry{kind: 0xee, start: 1, sectors: 33}))
	file = add(sample{name: "GPT that an MBR has replaced", n: 3}, 20*mib, gptScript)
	sfdisk(t, file, 512, mbrScript)

	add(sample{name: "MBR", n: 3}, 20*mib, mbrScript)
	add(sample{name: "MBR without partitions"}, 20*mib, "label: dos\n")
	file = add(sample{name: "MBR without a signature", n: 3}, 20*mib, mbrScript)
	patch(t, file, 440, make([]byte, 4))
	add(sample{name: "MBR, 56 logical partitions", n: 58}, 140*mib, long())
	file = add(sample{name: "MBR, some of them deleted", n: 54}, 140*mib, long())
	for _, number := range []string{"60", "31", "30", "5"} {
		run(t, "", "sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--delete", file, number)
	}
	add(sample{name: "MBR, extended partition with nothing inside", n: 1}, 20*mib, "label: dos\n1 : size=4M, type=5\n2 : size=1M\n")
	file = add(sample{name: "MBR, disk shrunk", n: 2, err: ErrDamaged, notBlkid: true}, 20*mib, mbrScript)
	resize(t, file, 5*mib)
	file = add(sample{name: "MBR, chain cut off with the disk", n: 15, err: ErrDamaged, notBlkid: true}, 140*mib, long())
	resize(t, file, 30*mib)
	// With something inside, an MBR tells its size of sectors.
	file = add(sample{name: "MBR, sectors of 4096", sector: 4096, n: 4}, 80*mib,
		"label: dos\n1 : size=8M\n2 : size=32M, type=5\n3: size=4M\n5 : size=8M\n6 : size=8M\n")
	run(t, "", "mkfs.ext4", "-q", "-E", fmt.Sprintf("offset=%d", mib), file, "8M")

	// What has the mark of an MBR, and is none.
	add(sample{name: "nothing", err: ErrNone}, mib, "")
	floppy := add(sample{name: "FAT", err: ErrNone}, 0, "")
	folder := t.TempDir()
	fat := func(file, options string) {
		run(t, "", testenv.Host(t).Img, "convert", "-O", "raw", "--image-opts", "driver=vvfat,dir="+folder+options, file)
	}
	fat(floppy, ",floppy=on,fat-type=12")
	fat(add(sample{name: "MBR, FAT inside", n: 1}, 0, ""), ",fat-type=16")
	// As mkfs.fat --mbr makes it, for Windows.
	file = add(sample{name: "FAT with a table for show", err: ErrNone, notKernel: true}, 0, "")
	fat(file, ",floppy=on,fat-type=12")
	patch(t, file, 440, bootSector(7, entry{boot: 0x80, kind: 1, start: 0, sectors: 2880})[440:])
	// A table over what once was FAT is the table that the kernel knows.
	file = add(sample{name: "MBR that has replaced FAT", n: 2, notBlkid: true}, 0, "")
	fat(file, ",floppy=on,fat-type=12")
	patch(t, file, 440, bootSector(7, entry{kind: 0x83, start: 63, sectors: 1000}, entry{kind: 0x83, start: 1063, sectors: 1000})[440:])
	for program, size := range map[string]int64{"mkfs.ext4": 20 * mib, "mkfs.xfs": 400 * mib, "mkfs.btrfs": 200 * mib, "mkswap": 20 * mib} {
		file = add(sample{name: program, err: ErrNone}, size, "")
		options := map[string][]string{"mkfs.ext4": {"-q", "-F"}, "mkfs.xfs": {"-q"}, "mkfs.btrfs": {"-q"}}
		command := append([]string{program}, append(options[program], file)...)
		if program == "mkfs.btrfs" && os.Geteuid() == 0 {
			// It looks at the sources of all mounts, and fails if one is on a FUSE mount of another test whose server has just gone.
			noMounts := `mount -t tmpfs none /proc && mkdir /proc/self && : >/proc/self/mounts && exec "$0" "$@"`
			command = append([]string{"unshare", "--mount", "sh", "-c", noMounts}, command...)
		}
		run(t, "", command[0], command[1:]...)
	}
	// LVM's own programs need not be there: its mark is in the second sector, and the first is free.
	file = add(sample{name: "LVM", err: ErrNone}, 20*mib, "")
	patch(t, file, 512, []byte("LABELONE\x01\x00\x00\x00\x00\x00\x00\x00"))
	return all
}

// find is Find on a file.
func find(t *testing.T, file string) ([]Partition, error) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Find(t.Context(), f, info.Size())
}

// own are the partitions that are not inside another.
func own(parts []Partition) []Partition {
	return slices.DeleteFunc(slices.Clone(parts), func(p Partition) bool { return p.Outer != 0 })
}

// A table inside a partition is shown as libblkid finds it when it is given that partition alone.
func TestInner(t *testing.T) {
	t.Parallel()
	file := newFile(t, 200*mib)
	sfdisk(t, file, 512, "label: gpt\n"+strings.Repeat("size=22M\n", 8))
	inside := map[int]string{ // contents of the partitions
		1: newFile(t, 22*mib),
		2: newFile(t, 22*mib),
		3: newFile(t, 22*mib),
		4: newFile(t, 22*mib),
		5: newFile(t, 22*mib),
		6: newFile(t, 22*mib),
	}
	sfdisk(t, inside[1], 512, gptScript)
	sfdisk(t, inside[2], 4096, gptScript)
	sfdisk(t, inside[3], 512, mbrScript)
	sfdisk(t, inside[4], 512, "label: dos\n1 : size=12M, type=5\n5 : size=2M\n6 : size=3M\n")
	run(t, "", "mkfs.ext4", "-q", "-F", inside[5])
	run(t, "", "mkswap", inside[6])
	var want []Partition
	for i, p := range blkid(t, file, 512) {
		want = append(want, p)
		if i+1 > len(inside) {
			continue
		}
		content, err := os.ReadFile(inside[i+1])
		if err != nil {
			t.Fatal(err)
		}
		patch(t, file, p.Offset, content)
		for _, in := range blkid(t, inside[i+1], []int64{512, 4096, 512, 512, 512, 512}[i]) {
			in.Outer, in.Offset = p.Number, p.Offset+in.Offset
			want = append(want, in)
		}
	}
	if n := 8 + 3 + 3 + 3 + 2; len(want) != n {
		t.Errorf("%d partitions, want %d", len(want), n)
	}
	parts, err := find(t, file)
	if diff := cmp.Diff(want, parts); diff != "" || err != nil {
		t.Errorf("%v, (-libblkid +Find)\n%s", err, diff)
	}
	names := map[string]bool{}
	for _, p := range parts {
		names[p.Name()] = true
	}
	if len(names) != len(parts) || !names["part3"] || !names["part2-part7"] || !names["part4-part6"] {
		t.Errorf("names %v", names)
	}

	// What a partition held before is no table of it: a GPT of which the backup is left, an MBR under a file system.
	patch(t, file, parts[0].Offset+512, make([]byte, 512))
	boot, err := os.ReadFile(inside[3])
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range parts {
		if p.Outer == 0 && (p.Number == 5 || p.Number == 6) {
			patch(t, file, p.Offset, boot[:512])
		}
	}
	want = slices.DeleteFunc(want, func(p Partition) bool { return p.Outer == 1 })
	parts, err = find(t, file)
	if diff := cmp.Diff(want, parts); diff != "" || err != nil {
		t.Errorf("%v, (-want +got)\n%s", err, diff)
	}
}

func TestLinux(t *testing.T) {
	t.Parallel()
	disks := samples(t)
	for _, s := range disks {
		parts, err := find(t, s.file)
		if s.err == nil && err != nil || !errors.Is(err, s.err) {
			t.Errorf("%s: error %v, want %v", s.name, err, s.err)
		}
		if len(own(parts)) != s.n || len(parts) != s.n {
			t.Errorf("%s: %d partitions, want %d: %v", s.name, len(parts), s.n, parts)
		}
		if s.notBlkid {
			continue
		}
		if diff := cmp.Diff(blkid(t, s.file, s.sector), own(parts)); diff != "" {
			t.Errorf("%s: (-libblkid +Find)\n%s", s.name, diff)
		}
	}
	askKernel(t, slices.Concat(disks, random(t)))
}

var field = regexp.MustCompile(`([A-Z]+)="([^"]*)"`)

// blkid returns what libblkid finds, but for extended partitions.
func blkid(t *testing.T, file string, sector int64) []Partition {
	t.Helper()
	out, err := try(t, "", "partx", "--sector-size", fmt.Sprint(sector), "--pairs", "--output", "NR,START,SECTORS,TYPE,UUID,NAME", "-", file)
	if err != nil && !strings.Contains(err.Error(), "failed to read partition table") {
		t.Fatal(err)
	}
	var parts []Partition
	for line := range strings.Lines(out) {
		values := map[string]string{}
		for _, m := range field.FindAllStringSubmatch(line, -1) {
			values[m[1]] = m[2]
		}
		if slices.Contains([]string{"0x5", "0xf", "0x85"}, values["TYPE"]) {
			continue
		}
		kind := values["TYPE"]
		if n, err := strconv.ParseUint(kind, 0, 8); err == nil {
			kind = fmt.Sprintf("0x%02x", n)
		}
		parts = append(parts, Partition{
			Number: int(number(t, values["NR"])),
			Offset: 512 * number(t, values["START"]),
			Size:   512 * number(t, values["SECTORS"]),
			Type:   kind,
			UUID:   values["UUID"],
			Label:  unescape(values["NAME"]),
		})
	}
	return parts
}

func number(t *testing.T, s string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

var escaped = regexp.MustCompile(`\\x[0-9a-f]{2}`)

// unescape undoes what util-linux does to characters that are not plain ASCII.
func unescape(s string) string {
	return escaped.ReplaceAllStringFunc(s, func(e string) string {
		n, _ := strconv.ParseUint(e[2:], 16, 8)
		return string([]byte{byte(n)})
	})
}

// attribute is a line of the guest: 0:0:0:17/block/sdr/sdr5/start:2048
var attribute = regexp.MustCompile(`^[0-9]+:[0-9]+:[0-9]+:([0-9]+)/block/[a-z]+/([a-z]+[0-9]+)/([a-z]+):([0-9]+)$`)

// askKernel boots a guest with all the disks.
func askKernel(t *testing.T, disks []sample) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	// One more, for the guest to format.
	formatted := newFile(t, 64*mib)
	cfg := testenv.Config{QEMU: testenv.Host(t), Guest: true, Disks: []testenv.Disk{{ID: "virtio0", Path: formatted, Format: "raw"}}}
	cfg.Args = append(cfg.Args, "-device", "virtio-scsi-pci,id=tables")
	for i, s := range disks {
		cfg.Args = append(cfg.Args,
			"-blockdev", fmt.Sprintf("driver=raw,node-name=t%d,read-only=on,file.driver=file,file.filename=%s", i, s.file),
			"-device", fmt.Sprintf("scsi-hd,bus=tables.0,lun=%d,drive=t%d,serial=t%d,logical_block_size=%[4]d,physical_block_size=%[4]d", i, i, i, s.sector))
	}
	vm := testenv.Start(t, cfg)
	// This is said of a disk when its table has been read.
	vm.Run(ctx, fmt.Sprintf("until [ $(dmesg | grep -c 'Attached SCSI disk') = %d ]; do sleep 0.2; done", len(disks)))
	out := vm.Run(ctx, "cd /sys/bus/scsi/devices && grep -H . */block/*/*/partition */block/*/*/start */block/*/*/size")
	// By number of the disk, which is the LUN, and name of the partition.
	known := make([]map[string]Partition, len(disks))
	for line := range strings.Lines(out) {
		m := attribute.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			t.Fatalf("the guest says %q", line)
		}
		disk, name, value := number(t, m[1]), m[2], number(t, m[4])
		if known[disk] == nil {
			known[disk] = map[string]Partition{}
		}
		p := known[disk][name]
		switch m[3] {
		case "partition":
			p.Number = int(value)
		case "start":
			p.Offset = 512 * value
		case "size":
			p.Size = 512 * value
		}
		known[disk][name] = p
	}
	compared := 0
	for i, s := range disks {
		found, _ := find(t, s.file)
		found = own(found)
		for i := range found {
			found[i].Type, found[i].UUID, found[i].Label = "", "", ""
		}
		kernel := slices.SortedFunc(maps.Values(known[i]), func(p, q Partition) int { return p.Number - q.Number })
		kernel = slices.DeleteFunc(kernel, func(p Partition) bool { return isExtended(t, s.file, p.Number) })
		diff := cmp.Diff(kernel, found)
		switch {
		case s.notKernel && diff == "":
			t.Errorf("%s: the kernel does not differ", s.name)
		case !s.notKernel && diff != "":
			t.Errorf("%s: (-kernel +Find)\n%s", s.name, diff)
		}
		compared += len(kernel)
	}
	t.Logf("%d disks, %d partitions", len(disks), compared)

	vm.Run(ctx, "mkdosfs /dev/disk/virtio0 && sync")
	if parts, err := find(t, formatted); !errors.Is(err, ErrNone) {
		t.Errorf("FAT32: %v, %v", parts, err)
	}
	if out := vm.Run(ctx, "blockdev --rereadpt /dev/vda; ls -d /sys/block/vda/vda*; true"); out != "" {
		t.Errorf("FAT32: the kernel finds %s", out)
	}
}

// isExtended tells whether one of the four of an MBR is.
func isExtended(t *testing.T, file string, number int) bool {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 512)
	if _, err := io.ReadFull(f, b); err != nil {
		t.Fatal(err)
	}
	mbr := !slices.Contains([]byte{b[450], b[466], b[482], b[498]}, 0xee)
	return mbr && number <= 4 && slices.Contains([]byte{0x05, 0x0f, 0x85}, b[450+16*(number-1)])
}

// random makes disks with tables of random content, as far as the kernel and Find are to agree: without chains that loop,
// and without partitions that end before they begin.
func random(t *testing.T) []sample {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	kinds := []byte{0x83, 0x83, 0x07, 0x00, 0x82, 0x8e, 0x05, 0x0f, 0x85}
	var all []sample
	for i := range 60 {
		size := mib + r.Int64N(mib/512)*512
		sectors := size / 512
		some := func(limit int64, kinds ...byte) entry {
			e := entry{kind: kinds[r.IntN(len(kinds))], start: r.Int64N(limit), sectors: r.Int64N(limit / 2)}
			if r.IntN(6) == 0 {
				e.sectors = 0
			}
			if r.IntN(10) == 0 {
				e.boot = 0x80
			}
			if r.IntN(100) == 0 {
				e.boot = 1
			}
			if r.IntN(30) == 0 {
				e.sectors = 1<<32 - 1
			}
			return e
		}
		file := newFile(t, size)
		entries := make([]entry, 4)
		for i := range entries {
			entries[i] = some(sectors*9/8, kinds...)
		}
		patch(t, file, 0, bootSector(r.Uint32(), entries...))
		// Links that overwrite one another's or the MBR would be no test of anything.
		used := map[int64]bool{0: true}
		for _, e := range entries {
			for at, links := e.start, r.IntN(12); e.extended() && at < sectors && !used[at] && links > 0; links-- {
				used[at] = true
				link := []entry{some(sectors/8, kinds[:5]...), some(sectors/8, kinds[:5]...), some(sectors/8, kinds[:5]...), some(sectors/8, kinds[:5]...)}
				next := at + 1 + r.Int64N(sectors/16)
				if r.IntN(8) > 0 {
					link[r.IntN(4)] = entry{kind: 0x05, start: next - e.start, sectors: 1 + r.Int64N(sectors/8)}
				}
				patch(t, file, at*512, bootSector(0, link...))
				at = next
			}
		}
		all = append(all, sample{name: fmt.Sprintf("random MBR %d %+v", i, entries), file: file, sector: 512})
	}
	for i := range 20 {
		sector := sectorSizes[r.IntN(len(sectorSizes))]
		sectors := mib / sector
		var spans []span
		for range 1 + r.IntN(40) {
			first := uint64(r.Int64N(sectors * 9 / 8))
			spans = append(spans, span{first, first - 1 + uint64(r.Int64N(sectors/2))})
		}
		d := newDrive(mib)
		d.putGPT(0, mib, sector, 128, nil, spans...)
		file := newFile(t, mib)
		for i, content := range d.pages {
			patch(t, file, i*page, content[:])
		}
		all = append(all, sample{name: fmt.Sprintf("random GPT %d", i), file: file, sector: sector})
	}
	return all
}
