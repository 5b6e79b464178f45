package partition

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// places are offsets and sizes, in KiB.
func places(parts []Partition) string {
	var b strings.Builder
	for _, p := range parts {
		fmt.Fprintf(&b, "%s %d+%d\n", p.Name(), p.Offset/kib, p.Size/kib)
	}
	return b.String()
}

// Headers that are right in themselves, but can't be true.
func TestHostileGPT(t *testing.T) {
	t.Parallel()
	const size = 4 * mib
	spans := []span{{2048, 4095}, {}, {5000, 5001}}
	for name, c := range map[string]struct {
		change func(*rawHeader)
		n      int
	}{
		"as it should be":            {func(*rawHeader) {}, 2},
		"no entries":                 {func(h *rawHeader) { h.count = 0 }, 0},
		"2^32 entries":               {func(h *rawHeader) { h.count = 1<<32 - 1 }, 0},
		"2^32 entries of 2^32 bytes": {func(h *rawHeader) { h.count, h.entrySize = 1<<32-1, 1<<32-1 }, 0},
		"entries of no bytes":        {func(h *rawHeader) { h.entrySize = 0 }, 0},
		"entries of 64 bytes":        {func(h *rawHeader) { h.entrySize = 64 }, 0},
		"entries of 192 bytes":       {func(h *rawHeader) { h.entrySize = 192 }, 0},
		"entries behind the disk":    {func(h *rawHeader) { h.array = uint64(size / 512) }, 0},
		"entries far behind it":      {func(h *rawHeader) { h.array = 1<<64 - 1 }, 0},
		"entries at 2^55":            {func(h *rawHeader) { h.array = 1 << 55 }, 0},
		"entries across the end":     {func(h *rawHeader) { h.array, h.count = uint64(size/512-1), 128 }, 0},
		"a header of no bytes":       {func(h *rawHeader) { h.size = 0 }, 0},
		"a header of 2^32 bytes":     {func(h *rawHeader) { h.size = 1<<32 - 1 }, 0},
		"a header of a sector":       {func(h *rawHeader) { h.size = 512 }, 2},
		"a header of another place":  {func(h *rawHeader) { h.self = 2 }, 0},
		"a larger disk":              {func(h *rawHeader) { h.last = uint64(size / 512) }, 0},
		"a last sector of 2^64":      {func(h *rawHeader) { h.last = 1<<64 - 1 }, 0},
		"a last before the first":    {func(h *rawHeader) { h.first, h.last = 100, 99 }, 0},
		"another sum":                {func(h *rawHeader) { h.arraySum++ }, 0},
	} {
		d := newDrive(size)
		d.putGPT(0, size, 512, 128, c.change, spans...)
		parts, err := Find(t.Context(), d, size)
		if len(parts) != c.n || (c.n > 0) != (err == nil) || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v, %v", name, parts, err)
		}
		if d.bytes > 64*kib {
			t.Errorf("%s: %d bytes were read", name, d.bytes)
		}
	}
}

// Entries are as large as the header says, and those that can't be are left out.
func TestEntries(t *testing.T) {
	t.Parallel()
	const size = 4 * mib
	for _, bytes := range []int{128, 256, 4096} {
		d := newDrive(size)
		d.putGPT(0, size, 512, bytes, nil,
			span{2048, 4095}, span{4096, 4095}, span{5000, 4000}, span{3000, 8191}, span{3000, 8192}, span{8192, 8192},
			span{1 << 63, 1<<64 - 1}, span{1, 1 << 55}, span{0, 8191}, span{1<<64 - 1, 1<<64 - 1}, span{2048, 2048})
		parts, err := Find(t.Context(), d, size)
		if got := places(parts); got != "part1 1024+1024\npart4 1500+2596\npart9 0+4096\npart11 1024+0\n" {
			t.Errorf("entries of %d bytes:\n%s", bytes, got)
		}
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "partition 2 ") {
			t.Errorf("entries of %d bytes: %v", bytes, err)
		}
	}
}

// A label is what is before the first NUL, and need not be text.
func TestLabel(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":                                     "",
		"a\x00b\x00":                           "ab",
		"a\x00\x00\x00b\x00":                   "a",
		"/\x00.\x00.\x00\n\x00":                "/..\n",
		"\x00\xd8a\x00":                        "\ufffda",
		"\x3d\xd8\x00\xde":                     "😀",
		strings.Repeat("\x00\xdc", 36):         strings.Repeat("\ufffd", 36),
		strings.Repeat("x\x00", 36) + "y\x00z": strings.Repeat("x", 36) + "y",
	} {
		if got := label([]byte(in)); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// Chains of logical partitions that sfdisk makes none of.
func TestChains(t *testing.T) {
	t.Parallel()
	const size, ext = 64 * mib, 2048
	all := entry{kind: 5, start: ext, sectors: size/512 - ext}
	data := func(start, sectors int64) entry { return entry{kind: 0x83, start: start, sectors: sectors} }
	next := func(start int64) entry { return entry{kind: 5, start: start, sectors: 1} }
	chain := func(n int, each func(i int) []entry) map[int64][]entry {
		links := map[int64][]entry{}
		for i := range n {
			links[ext+int64(i)*10] = append(each(i), next(int64(i+1)*10))
		}
		links[ext+int64(n)*10] = nil // without the mark
		return links
	}
	for name, c := range map[string]struct {
		links map[int64][]entry
		n     int
		fault string
	}{
		"one link that is its own next": {map[int64][]entry{ext: {data(2, 8), next(0)}}, 1, "loop"},
		"two that are each other's": {map[int64][]entry{
			ext: {data(2, 8), next(10)}, ext + 10: {data(2, 8), next(0)},
		}, 2, "loop"},
		"back to the second": {map[int64][]entry{
			ext: {next(10)}, ext + 10: {data(2, 8), next(20)}, ext + 20: {next(10)},
		}, 1, "loop"},
		"behind the disk":  {map[int64][]entry{ext: {data(2, 8), next(1<<32 - 1)}}, 1, "leaves"},
		"no more links":    {map[int64][]entry{ext: {data(2, 8), next(10)}, ext + 10: nil}, 1, "broken"},
		"no first link":    {map[int64][]entry{ext: nil}, 0, ""},
		"60":               {chain(60, func(int) []entry { return []entry{data(1, 8)} }), 60, "broken"},
		"251, the most":    {chain(250, func(int) []entry { return []entry{data(1, 8)} }), 250, "broken"},
		"300":              {chain(300, func(int) []entry { return []entry{data(1, 8)} }), 251, "more than 255"},
		"empty ones":       {chain(300, func(int) []entry { return nil }), 0, "100 links without one"},
		"two of each":      {chain(10, func(int) []entry { return []entry{data(1, 4), data(5, 4)} }), 20, "broken"},
		"garbage in third": {map[int64][]entry{ext: {data(2, 8), {}, data(2, 1<<31), data(1<<31, 8)}}, 1, ""},
		"partitions behind the disk": {map[int64][]entry{
			ext: {data(1<<31, 8), data(2, 1<<32-1)},
		}, 1, "partition 5 begins behind"},
	} {
		d := newDrive(size)
		d.put(0, bootSector(1, all))
		for at, link := range c.links {
			if link != nil {
				d.put(at*512, bootSector(0, link...))
			}
		}
		parts, err := Find(t.Context(), d, size)
		if len(parts) != c.n {
			t.Errorf("%s: %d partitions, want %d", name, len(parts), c.n)
		}
		if (c.fault == "") != (err == nil) || err != nil && (!errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.fault)) {
			t.Errorf("%s: %v", name, err)
		}
		if d.reads > 600 {
			t.Errorf("%s: %d reads", name, d.reads)
		}
	}
}

// The four entries can each be an extended partition, and share what is inside: the kernel shows it as often.
func TestSharedChain(t *testing.T) {
	t.Parallel()
	d := newDrive(mib)
	e := entry{kind: 0x85, start: 100, sectors: 100}
	d.put(0, bootSector(1, e, e, entry{kind: 0x83, start: 300, sectors: 2}, e))
	d.put(51200, bootSector(0, entry{kind: 0x83, start: 2, sectors: 2}))
	parts, err := Find(t.Context(), d, mib)
	if got := places(parts); err != nil || got != "part3 150+1\npart5 51+1\npart6 51+1\npart7 51+1\n" {
		t.Errorf("%v\n%s", err, got)
	}
}

// An MBR that was made for larger sectors can't be told from one of 512 bytes as long as nothing is in the partitions.
// What decides is at how many places something is known.
func TestSectorSize(t *testing.T) {
	t.Parallel()
	const size = 64 * mib
	xfs, luks := []byte("XFSB"), []byte("LUKS\xba\xbe")
	swap := append(make([]byte, 4086), "SWAPSPACE2"...)
	for name, c := range map[string]struct {
		pieces map[int64][]byte
		want   string
	}{
		"nothing":        {nil, "part1 128+1024\npart2 2048+1024\n"},
		"512":            {map[int64][]byte{128 * kib: xfs}, "part1 128+1024\npart2 2048+1024\n"},
		"4096":           {map[int64][]byte{mib: luks}, "part1 1024+8192\npart2 16384+8192\n"},
		"4096, second":   {map[int64][]byte{16 * mib: swap}, "part1 1024+8192\npart2 16384+8192\n"},
		"one of each":    {map[int64][]byte{128 * kib: xfs, 16 * mib: luks}, "part1 128+1024\npart2 2048+1024\n"},
		"more with 4096": {map[int64][]byte{128 * kib: xfs, mib: xfs, 16 * mib: luks}, "part1 1024+8192\npart2 16384+8192\n"},
		"2048":           {map[int64][]byte{8 * mib: xfs}, "part1 512+4096\npart2 8192+4096\n"},
	} {
		d := newDrive(size)
		d.put(0, bootSector(1, entry{kind: 0x83, start: 256, sectors: 2048}, entry{kind: 0x83, start: 4096, sectors: 2048}))
		for off, piece := range c.pieces {
			d.put(off, piece)
		}
		parts, err := Find(t.Context(), d, size)
		if got := places(parts); err != nil || got != c.want {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
}

// Boot sectors whose code happens to look like a table. The entries are those of a FreeDOS boot sector, whose last bytes
// are the name of a file.
func TestBootSectors(t *testing.T) {
	t.Parallel()
	volume := func(name string, change func([]byte)) []byte {
		b := bootSector(0)
		copy(b, "\xeb\x58\x90"+name)
		copy(b[494:], "\x00\x00\x00KERNEL  SYS\x00\x00")
		change(b)
		return b
	}
	bpb := func(b []byte) {
		copy(b[11:], "\x00\x02\x04\x01\x00\x02\x00\x02\x00\x50\xf8\x20\x00")
	}
	for name, c := range map[string]struct {
		boot  []byte
		table bool
	}{
		"NTFS":                    {volume("NTFS    ", func([]byte) {}), false},
		"exFAT":                   {volume("EXFAT   ", func([]byte) {}), false},
		"BitLocker":               {volume("-FVE-FS-", func([]byte) {}), false},
		"FAT":                     {volume("FRDOS5.1", bpb), false},
		"no FAT: sectors of 0":    {volume("FRDOS5.1", func(b []byte) { bpb(b); b[12] = 0 }), true},
		"no FAT: media 0":         {volume("FRDOS5.1", func(b []byte) { bpb(b); b[21] = 0 }), true},
		"no FAT: larger than all": {volume("FRDOS5.1", func(b []byte) { bpb(b); b[23] = 0x50 }), true},
		"boot indicators":         {volume("ANOTHER ", func(b []byte) { b[462] = 0x79 }), false},
	} {
		d := newDrive(64 * mib)
		d.put(0, c.boot)
		_, err := Find(t.Context(), d, d.size)
		if errors.Is(err, ErrNone) == c.table {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// However much a disk asks for, little is read of it.
func TestBudget(t *testing.T) {
	t.Parallel()
	const size = 512 * mib
	// In each partition a GPT whose array is as large as can be.
	d := newDrive(size)
	var spans []span
	for i := range uint64(255) {
		spans = append(spans, span{2048 + i*4096, 2048 + i*4096 + 4095})
	}
	d.putGPT(0, size, 512, 128, nil, spans...)
	many := make([]span, 8192)
	many[0] = span{2100, 2200}
	for _, s := range spans {
		d.putGPT(int64(s.first)*512, 2*mib, 512, 128, nil, many...)
	}
	parts, err := Find(t.Context(), d, size)
	if !errors.Is(err, ErrDamaged) || len(parts) < 255 || len(own(parts)) != 255 || d.bytes > budget {
		t.Errorf("%d partitions, %v, %d bytes read", len(parts), err, d.bytes)
	}

	// In each 255 partitions.
	d = newDrive(size)
	d.putGPT(0, size, 512, 128, nil, spans...)
	for _, s := range spans {
		d.putGPT(int64(s.first)*512, 2*mib, 512, 128, nil, slices.Repeat([]span{{2100, 2200}}, 255)...)
	}
	parts, err = Find(t.Context(), d, size)
	if !errors.Is(err, ErrDamaged) || len(parts) != 2*255 || len(own(parts)) != 255 || d.bytes > budget {
		t.Errorf("%d partitions, %v, %d bytes read", len(parts), err, d.bytes)
	}

	// In each a chain that never ends.
	d = newDrive(size)
	d.putGPT(0, size, 512, 128, nil, spans...)
	for _, s := range spans {
		at := int64(s.first) * 512
		d.put(at, bootSector(1, entry{kind: 5, start: 1, sectors: 4000}))
		for i := range int64(90) {
			d.put(at+512+512*i, bootSector(0, entry{kind: 5, start: i + 1, sectors: 10}))
		}
	}
	parts, err = Find(t.Context(), d, size)
	if !errors.Is(err, ErrDamaged) || len(parts) != 255 || d.reads > budget/page {
		t.Errorf("%d partitions, %v, %d reads", len(parts), err, d.reads)
	}
}

// A usual disk takes few reads.
func TestReads(t *testing.T) {
	t.Parallel()
	const size = 64 * mib
	for name, c := range map[string]struct {
		make func(*drive)
		most int
	}{
		"empty": {func(*drive) {}, 1},
		"GPT":   {func(d *drive) { d.putGPT(0, size, 512, 128, nil, span{2048, 4095}, span{8192, 9999}) }, 5},
		"MBR":   {func(d *drive) { d.put(0, bootSector(1, entry{kind: 7, start: 2048, sectors: 120000})) }, 2},
		"FAT": {func(d *drive) {
			d.put(0, bootSector(0))
			d.put(0, []byte("\xeb\x58\x90MSWIN4.1\x00\x02\x04\x01\x00\x02\x00\x02\x00\x50\xf8\x20\x00"))
		}, 1},
	} {
		d := newDrive(size)
		c.make(d)
		if _, err := Find(t.Context(), d, size); err != nil && !errors.Is(err, ErrNone) || d.reads > c.most || d.bytes > 128*kib {
			t.Errorf("%s: %v, %d reads, %d bytes", name, err, d.reads, d.bytes)
		}
	}
}

// Disks that are too small for anything.
func TestSmall(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{-1, 0, 1, 511, 512, 513, 1023, 1024, 1536, 4096, 8191} {
		for name, boot := range map[string][]byte{
			"GPT": protective(),
			"MBR": bootSector(1, entry{kind: 0x83, start: 0, sectors: 100}, entry{kind: 5, start: 0, sectors: 100}),
		} {
			d := newDrive(size)
			d.put(0, boot)
			parts, err := Find(t.Context(), d, size)
			if size < 512 && !errors.Is(err, ErrNone) || size >= 512 && !errors.Is(err, ErrDamaged) {
				t.Errorf("%s, %d bytes: %v, %v", name, size, parts, err)
			}
			check(t, parts, size)
		}
	}
}

// faulty is a disk of which reading fails from one offset on.
type faulty struct {
	*drive
	from int64
	err  error
}

func (f faulty) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		n, _ := f.drive.ReadAt(p[:max(0, f.from-off)], off)
		return n, f.err
	}
	return f.drive.ReadAt(p, off)
}

func TestReadErrors(t *testing.T) {
	t.Parallel()
	const size = 64 * mib
	broken := errors.New("broken")
	d := newDrive(size)
	d.putGPT(0, size, 512, 128, nil, span{2048, 4095}, span{8192, 9999})
	for from, n := range map[int64]int{0: 0, 511: 0, 512: 0, 1024: 0, 1200: 0, 4096: 2, mib: 2, 4 * mib: 2} {
		parts, err := Find(t.Context(), faulty{d, from, broken}, size)
		if len(parts) != n || !errors.Is(err, broken) || errors.Is(err, ErrNone) || errors.Is(err, ErrDamaged) {
			t.Errorf("from %d: %v, %v", from, parts, err)
		}
	}
	// A reader that ends before it should.
	if parts, err := Find(t.Context(), faulty{d, 1200, io.EOF}, size); len(parts) != 0 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v, %v", parts, err)
	}
	// What is found of a chain before reading fails is shown.
	d = newDrive(size)
	d.put(0, bootSector(1, entry{kind: 0x83, start: 64, sectors: 64}, entry{kind: 5, start: 2048, sectors: 120000}))
	d.put(mib, bootSector(0, entry{kind: 0x83, start: 2, sectors: 2}, entry{kind: 5, start: 2048, sectors: 64}))
	if parts, err := Find(t.Context(), faulty{d, 2 * mib, broken}, size); len(parts) != 2 || !errors.Is(err, broken) {
		t.Errorf("%v, %v", parts, err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if parts, err := Find(ctx, d, size); parts != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("%v, %v", parts, err)
	}
}

// check says what holds for any disk.
func check(t *testing.T, parts []Partition, size int64) {
	t.Helper()
	names := map[string]bool{}
	for i, p := range parts {
		if p.Number < 1 || p.Number > limit || p.Outer < 0 || p.Offset < 0 || p.Size < 512 || p.Size > size-p.Offset || p.Type == "" {
			t.Errorf("%+v on a disk of %d bytes", p, size)
		}
		if names[p.Name()] {
			t.Errorf("%s twice", p.Name())
		}
		names[p.Name()] = true
		if p.Outer != 0 && (i == 0 || parts[i-1].Outer == 0 && parts[i-1].Number != p.Outer || parts[i-1].Outer != 0 && parts[i-1].Outer != p.Outer) {
			t.Errorf("%s is in the wrong place", p.Name())
		}
	}
	if len(parts) > 2*limit {
		t.Errorf("%d partitions", len(parts))
	}
}

// A disk is made by a script, of records of 24 bytes each: what to put, to which sector, and content. The upper half of
// the first byte is the size of sectors, and whether inner is to be added to the number. So a change of one byte often
// makes a difference, and check sums are right.
func FuzzFind(f *testing.F) {
	record := func(kind, at byte, content ...byte) []byte {
		return append([]byte{kind, at}, append(content, make([]byte, 22-len(content))...)...)
	}
	// Entries: boot, kind, start, sectors.
	mbr := record(0, 0, 0x80, 0x83, 1, 9, 0, 5, 20, 99)
	f.Add(slices.Concat(mbr, record(0, 20, 0, 0x83, 1, 1, 0, 5, 3, 9), record(0, 23, 0, 0x83, 1, 1, 0, 5, 0, 9)), uint32(200), byte(0))
	guard := record(0, 0, 0, 0xee, 1, 255)
	// Spans, then size, own sector, first, last, array, count and size of entries.
	f.Add(slices.Concat(guard, record(1, 1, 20, 40, 50, 60, 0, 0, 92, 1, 3, 120, 2, 3, 0)), uint32(200), byte(0))
	f.Add(slices.Concat(guard, record(0x31, 1, 20, 40, 50, 60, 0, 0, 92, 1, 3, 120, 2, 3, 1)), uint32(3000), byte(0))
	f.Add(slices.Concat(guard, record(1, 199, 20, 40, 50, 60, 0, 0, 92, 199, 3, 120, 180, 3, 0)), uint32(200), byte(0))
	f.Add(slices.Concat(mbr, record(0x40, 0, 0, 0x83, 2, 2)), uint32(1000), byte(1))
	f.Add(slices.Concat(mbr, record(2, 0, []byte("\x00\x00NTFS    ")...)), uint32(200), byte(1))
	f.Fuzz(func(t *testing.T, script []byte, sectors uint32, inner byte) {
		size := int64(sectors) * 512
		d := newDrive(size)
		for ; len(script) >= 24; script = script[24:] {
			sector := sectorSizes[script[0]>>4%4]
			at := int64(script[1])
			if script[0]>>6 != 0 {
				at += int64(inner)
			}
			le := binary.LittleEndian
			// Values that are otherwise hard to hit.
			wide := func(b byte) uint64 {
				switch b {
				case 255:
					return 1<<64 - 1
				case 254:
					return 1 << 55
				case 253:
					return 1<<32 - 1
				}
				return uint64(b)
			}
			b := script[2:24]
			switch script[0] % 4 {
			case 0:
				var entries []entry
				for ; len(b) >= 4 && len(entries) < 4; b = b[4:] {
					entries = append(entries, entry{boot: b[0], kind: b[1], start: int64(wide(b[2])), sectors: int64(wide(b[3]))})
				}
				d.put(at*sector, bootSector(uint32(script[1]), entries...))
			case 1:
				h := rawHeader{
					size: uint32(wide(b[6])), self: wide(b[7]), first: wide(b[8]), last: wide(b[9]), array: wide(b[10]),
					count: uint32(wide(b[11])), entrySize: 128 << b[12],
				}
				array := make([]byte, min(uint64(h.count)*uint64(h.entrySize), 64<<10))
				for i := range 3 {
					if at := i * int(h.entrySize); at+128 <= len(array) {
						copy(array[at:], entryArray(128, span{wide(b[2*i]), wide(b[2*i+1])}))
					}
				}
				h.arraySum = crc32.ChecksumIEEE(array)
				if h.array < 1<<20 {
					d.put(int64(h.array)*sector, array)
				}
				d.put(at*sector, h.bytes(sector))
			case 2:
				d.put(at*sector+int64(b[0]), b[1:])
			case 3:
				d.put(at*sector+int64(le.Uint16(b))%8192, b[2:])
			}
		}
		parts, err := Find(t.Context(), d, size)
		check(t, parts, size)
		if d.reads > budget/page || d.bytes > budget {
			t.Errorf("%d reads of %d bytes", d.reads, d.bytes)
		}
		if errors.Is(err, ErrNone) && parts != nil || err != nil && !errors.Is(err, ErrNone) && !errors.Is(err, ErrDamaged) {
			t.Errorf("%v, %v", parts, err)
		}
		again, _ := Find(t.Context(), d, size)
		if diff := cmp.Diff(parts, again); diff != "" {
			t.Error(diff)
		}
	})
}

// IsName knows all names, and nothing else.
func TestIsName(t *testing.T) {
	for outer := range limit + 1 {
		for _, number := range []int{1, 9, 10, limit} {
			if p := (Partition{Number: number, Outer: outer}); !IsName(p.Name()) {
				t.Errorf("%s is no name", p.Name())
			}
		}
	}
	for _, name := range []string{"", "part", "part0", "part01", "part256", "part-1", "part+1", "part1-", "part1-part", "part1-part2-part3", "part1part2", "Part1", "part1 "} {
		if IsName(name) {
			t.Errorf("%q is a name", name)
		}
	}
}
