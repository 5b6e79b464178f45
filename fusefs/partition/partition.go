// Package partition finds the partitions of a disk, so that each can be shown as a file of its own.
//
// The words:
//
//   - table: what divides a disk into partitions: an MBR (the first sector of the disk, four primary partitions) or a GPT
//     (a header behind the first sector, an array of entries, and a backup of both at the end of the disk).
//   - extended partition: one of the four, that holds others, the logical ones. Each has a table sector of its own with a
//     link to the next one, so they form a chain. It is no partition that is shown.
//   - sector: the unit of all addresses in a table. Which size it has is a matter of the guest's device, 512 or 4096 bytes
//     for most, and the table does not say.
//   - inner partition: one of a table that is inside a partition, as where a guest's own guest has it for a disk.
//
// # What is shown
//
// What Linux shows: /dev/sda5 is Partition.Number 5, and lies where it does there. The rules are those of its kernel
// (block/partitions), and so is the limit of 255. It differs in these:
//
//   - A GPT whose header is damaged is read from its backup. The kernel does this only if booted with the option gpt, libblkid
//     always.
//   - A boot sector of a FAT, exFAT, NTFS or BitLocker volume is no table, even if its bytes would pass for one; libblkid
//     has that rule for some of them.
//   - The kernel gives an extended partition the first KiB for a boot loader, which is of no use here: it is left out.
//   - A chain of logical partitions that comes back to where it was ends there. The kernel goes around up to its limit.
//   - The kernel takes no entries of a GPT but those of 128 bytes. They may be larger.
//
// Partitions that overlap are all shown. One that ends behind the disk is cut off there in an MBR, and left out in a GPT.
//
// # The size of sectors
//
// A GPT has its header at the second sector, and says so: it tells the size by where it is. An MBR does not tell. It is
// read with 512 bytes, unless two things hold for another size: all partitions would still be within the disk, and more
// of them would begin with something that is known, such as a file system. So an MBR that was made for larger sectors is
// taken for one of 512 bytes as long as nothing is in its partitions.
//
// # Inner partitions
//
// Linux shows none on its own (kpartx and partx do). Here they are named by two numbers, part1-part2, the first being the
// outer partition's, which is shown as well. It goes no deeper. As a partition is far more often a file system than a disk,
// an MBR counts there only if it has partitions, all of them are within the outer one, and that does not begin with
// something that is known; and a GPT only by its header, not by its backup. No more than 255 inner partitions are shown of
// a disk.
//
// # Trust
//
// The disk is a guest's, who can write there what he likes. Everything is checked against the size of the disk, and reading
// ends when more was read than sane tables need (a few MiB). Usually it takes less than ten small reads, and one for each
// partition.
//
// Of libraries, go-diskfs was looked at (v1.9.4): it knows no logical partitions, has to be told the size of sectors, takes
// boot sectors for tables, does not compare with the size of the disk, and one sector with a large number of entries and
// a right check sum makes it ask for so much memory that the process ends.
package partition

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

var (
	// ErrNone means that the disk has no partition table: a file system, a volume of LVM or nothing is directly on it.
	ErrNone = errors.New("no partition table")
	// ErrDamaged means that there is a table, but that it can't be trusted, or not in all it says.
	ErrDamaged = errors.New("damaged partition table")
)

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrDamaged}, args...)...)
}

// Partition is one partition of a disk.
type Partition struct {
	Number int // 1 to 255, the one that Linux gives: logical ones from 5 on
	Outer  int // number of the partition that this one is inside of; 0 if it is the disk's own

	Offset int64 // bytes from the start of the disk
	Size   int64 // bytes, at least one sector; within the disk

	// Type says what the partition is for: a GUID in small letters, such as 0fc63daf-8483-4772-8e79-3d69d8477de4, or of an
	// MBR its type, such as 0x83.
	Type string
	// UUID is the partition's own, as in Linux' /dev/disk/by-partuuid: a GUID, or of an MBR the disk's signature and the
	// number, such as 1b2c3d4e-05. It is empty if that MBR has no signature.
	UUID string
	// Label is the name in a GPT. It can hold any character but NUL, slashes and control characters too: it is for people,
	// not for file names.
	Label string
}

// Name returns a name that no other partition of the disk has: part5, or part1-part5 for an inner one.
func (p Partition) Name() string {
	if p.Outer != 0 {
		return fmt.Sprintf("part%d-part%d", p.Outer, p.Number)
	}
	return fmt.Sprintf("part%d", p.Number)
}

// IsName tells whether Name could return that.
func IsName(name string) bool {
	outer, inner, nested := strings.Cut(name, "-")
	return isNumbered(outer) && (!nested || isNumbered(inner))
}

func isNumbered(s string) bool {
	digits, ok := strings.CutPrefix(s, "part")
	n, err := strconv.Atoi(digits)
	return ok && err == nil && n >= 1 && n <= limit && strconv.Itoa(n) == digits
}

// limit is the highest number of a partition: Linux' DISK_MAX_PARTS is 256, and 0 the disk.
const limit = 255

// sectorSizes are those that QEMU gives to devices and Linux can use (at most a page).
var sectorSizes = []int64{512, 1024, 2048, 4096}

// Find returns the partitions of a disk of size bytes, by their numbers, each followed by its inner ones.
//
// The error tells why there are none, or why some may be missing or not be what the guest had: the partitions that are
// returned with it can be shown all the same. It wraps ErrNone or ErrDamaged; any other is the context's, or the reader's
// and the next attempt may have more luck.
func Find(ctx context.Context, disk io.ReaderAt, size int64) ([]Partition, error) {
	whole := area{from: &reader{ctx: ctx, disk: disk, left: budget}, size: size}
	own, wrong := whole.table(false)
	var all []Partition
	var wrongInside error // the first; there could be hundreds
	room := limit
	for _, p := range own {
		inner, err := whole.inside(p)
		if len(inner) > room {
			inner, err = inner[:room], damaged("more than %d inner partitions", limit)
		}
		room -= len(inner)
		all = append(append(all, p), inner...)
		if err != nil && wrongInside == nil {
			wrongInside = fmt.Errorf("%s: %w", p.Name(), err)
		}
	}
	return all, errors.Join(wrong, wrongInside)
}

// area is the disk, or a partition that is looked into as if it were one.
type area struct {
	from      *reader
	off, size int64
}

// read returns n bytes of the area. The caller has seen to it that they are within.
func (a area) read(off, n int64) ([]byte, error) {
	return a.from.read(a.off+off, n)
}

// table returns the partitions of the area's own table, by their numbers. Offsets are the area's. The error is Find's.
func (a area) table(inner bool) ([]Partition, error) {
	if a.size < bootSize {
		return nil, ErrNone
	}
	boot, err := a.read(0, bootSize)
	if err != nil {
		return nil, err
	}
	m, ok := parseMBR(boot)
	if !ok {
		return nil, ErrNone
	}
	if m.protective() {
		return a.gpt(inner)
	}
	return a.mbr(m, boot, inner)
}

// inside returns the inner partitions of a partition of the area.
func (a area) inside(p Partition) ([]Partition, error) {
	if p.Offset == 0 {
		return nil, nil // it begins with the table that it is in
	}
	parts, err := area{from: a.from, off: p.Offset, size: p.Size}.table(true)
	for i := range parts {
		parts[i].Outer = p.Number
		parts[i].Offset += p.Offset
	}
	// There need not be a table, and the remains of one are no fault.
	if len(parts) == 0 && !errors.Is(err, errBudget) && (errors.Is(err, ErrNone) || errors.Is(err, ErrDamaged)) {
		err = nil
	}
	return parts, err
}
