package inside

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"qmchain/chain/image"
)

// content is what a disk, a partition or a logical volume begins with. Types are named as blkid(8) does.
type content struct {
	kind, label, uuid string
	devices           uint64 // of btrfs: how many make the file system
	why               string // why it must not be mounted, though its type can be
}

// What holds no files itself.
const (
	lvmMember  = "LVM2_member"
	raidMember = "linux_raid_member"
	luks       = "crypto_LUKS"
	bitLocker  = "BitLocker"
	swap       = "swap"
)

// fileSystem says how a type is mounted.
type fileSystem struct {
	driver string // of the kernel, as mount -t has it
	skip   string // the mount option that leaves the journal alone; empty: there is none, or it is never replayed
	always string // mount option that is needed in any case
}

// fileSystems are those that can be mounted. Their names are always told to mount(8): guessing would let the guest choose
// which of the kernel's parsers it meets.
var fileSystems = map[string]fileSystem{
	"ext2":    {driver: "ext4", always: onError},
	"ext3":    {driver: "ext4", skip: "noload", always: onError},
	"ext4":    {driver: "ext4", skip: "noload", always: onError},
	"xfs":     {driver: "xfs", skip: "norecovery", always: "nouuid"}, // two points of a guest have one UUID
	"btrfs":   {driver: "btrfs", skip: "rescue=nologreplay"},
	"ntfs":    {driver: "ntfs3"},
	"vfat":    {driver: "vfat"},
	"exfat":   {driver: "exfat"},
	"iso9660": {driver: "iso9660"},
}

// onError takes the place of what the file system itself says of errors: it can say that the kernel is to panic.
const onError = "errors=continue"

// probe tells what is in img by the marks of the formats' own specifications; kind is empty for what is not known.
func probe(img image.Image) (content, error) {
	head, err := readSome(img, 0, 128<<10)
	if err != nil {
		return content{}, err
	}
	// A member of a RAID can look like the file system of the whole, so that is asked first, as blkid(8) does.
	switch {
	case mark(head, 0, "LUKS\xba\xbe"):
		return content{kind: luks}, nil
	case labelSector(head) >= 0:
		return content{kind: lvmMember}, nil
	}
	if ok, err := isRAID(img, head); err != nil || ok {
		return content{kind: raidMember}, err
	}
	switch {
	case mark(head, 3, "-FVE-FS-"):
		return content{kind: bitLocker}, nil
	case mark(head, 0, "XFSB") && len(head) >= 120:
		return content{kind: "xfs", label: text(head[108:120]), uuid: uuid(head[32:48])}, nil
	case mark(head, btrfsSuper+0x40, "_BHRfS_M") && len(head) >= btrfsSuper+0x22b:
		b := head[btrfsSuper:]
		return content{kind: "btrfs", label: text(b[0x12b:0x22b]), uuid: uuid(b[0x20:0x30]), devices: binary.LittleEndian.Uint64(b[0x88:])}, nil
	case mark(head, extSuper+0x38, "\x53\xef") && len(head) >= extSuper+0xe8:
		return ext(head[extSuper:]), nil
	case mark(head, 3, "NTFS    ") && len(head) >= 512:
		return content{kind: "ntfs", uuid: fmt.Sprintf("%016X", binary.LittleEndian.Uint64(head[0x48:]))}, nil
	case mark(head, 3, "EXFAT   ") && len(head) >= 512:
		return content{kind: "exfat", uuid: serial(head[0x64:])}, nil
	case mark(head, 510, "\x55\xaa") && mark(head, 0x52, "FAT32   "):
		return content{kind: "vfat", label: fatLabel(head[0x47:0x52]), uuid: serial(head[0x43:])}, nil
	case mark(head, 510, "\x55\xaa") && (mark(head, 0x36, "FAT12   ") || mark(head, 0x36, "FAT16   ")):
		return content{kind: "vfat", label: fatLabel(head[0x2b:0x36]), uuid: serial(head[0x27:])}, nil
	case mark(head, 4096-10, "SWAPSPACE2") && len(head) >= 1068:
		return content{kind: swap, label: text(head[1052:1068]), uuid: uuid(head[1036:1052])}, nil
	case mark(head, 32769, "CD001"):
		return content{kind: "iso9660", label: text(head[32808:min(len(head), 32840)])}, nil
	}
	return content{}, nil
}

const (
	extSuper   = 1024
	btrfsSuper = 64 << 10
)

// ext tells the generations apart by their features, as in the kernel's fs/ext4/ext4.h.
func ext(b []byte) content {
	le := binary.LittleEndian
	const (
		hasJournal = 0x4 // compatible
		journalDev = 0x8 // incompatible
		incompat3  = 0x2 | 0x4 | 0x10
		roCompat3  = 0x1 | 0x2 | 0x4
	)
	c := content{kind: "ext2", label: text(b[0x78:0x88]), uuid: uuid(b[0x68:0x78])}
	incompat, roCompat := le.Uint32(b[0x60:]), le.Uint32(b[0x64:])
	switch {
	case incompat&journalDev != 0:
		return content{kind: "jbd"}
	case incompat&^incompat3 != 0 || roCompat&^roCompat3 != 0:
		c.kind = "ext4"
	case le.Uint32(b[0x5c:])&hasJournal != 0:
		c.kind = "ext3"
	}
	if le.Uint32(b[0x5c:])&hasJournal != 0 && le.Uint32(b[0xe4:]) != 0 {
		// A device number, which would be one of this host's: the kernel would replay what is there, and write to it.
		c.why = "its journal is on another device"
	}
	return c
}

// isRAID looks at the places where Linux' software RAID has its superblock, in its versions 1.1, 1.2, 1.0 and 0.90.
func isRAID(img image.Image, head []byte) (bool, error) {
	const magic = "\xfc\x4e\x2b\xa9"
	if mark(head, 0, magic) || mark(head, 4096, magic) {
		return true, nil
	}
	for _, off := range []int64{(img.Size() - 8<<10) &^ 4095, img.Size()&^(64<<10-1) - 64<<10} {
		if off <= 0 {
			continue
		}
		b, err := readSome(img, off, 512)
		if err != nil {
			return false, err
		}
		if mark(b, 0, magic) {
			return true, nil
		}
	}
	return false, nil
}

// readSome reads n bytes, or what there is.
func readSome(r io.ReaderAt, off, n int64) ([]byte, error) {
	b := make([]byte, n)
	got, err := r.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:got], nil
}

func mark(b []byte, off int, mark string) bool {
	return len(b) >= off+len(mark) && string(b[off:off+len(mark)]) == mark
}

// text is a label that ends with a NUL. What could not be shown safely becomes U+FFFD: it is a guest's.
func text(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return printable(strings.TrimRight(string(b), " "))
}

func fatLabel(b []byte) string {
	if s := text(b); s != "NO NAME" {
		return s
	}
	return ""
}

func uuid(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

func serial(b []byte) string {
	n := binary.LittleEndian.Uint32(b)
	return fmt.Sprintf("%04X-%04X", n>>16, n&0xffff)
}
