package partition

import (
	"encoding/binary"
	"math/bits"
)

// signs are marks at the beginning of what a partition can hold. The list need not be complete: what is missing leaves
// the size of an MBR's sectors unknown more often, and a table inside a partition less doubted.
var signs = []struct {
	off  int64
	text string
}{
	{0, "XFSB"},
	{0, "LUKS\xba\xbe"},
	{3, "ReFS\x00\x00\x00\x00"},
	{32, "NXSB"},               // APFS
	{512, "LABELONE"},          // LVM
	{1024, "\x10\x20\xf5\xf2"}, // F2FS
	{1024, "H+\x00\x04"},       // HFS+
	{1080, "\x53\xef"},         // ext2, ext3, ext4
	{page - 10, "SWAPSPACE2"},  // of a CPU with such pages
	{64<<10 + 64, "_BHRfS_M"},  // btrfs
}

// known tells whether something that can be in a partition begins at an offset.
func (a area) known(off int64) (bool, error) {
	head, err := a.read(off, min(page, a.size-off))
	if err != nil {
		return false, err
	}
	if len(head) >= bootSize && isVolume(head) {
		return true, nil
	}
	for _, s := range signs {
		n := int64(len(s.text))
		if off+s.off+n > a.size {
			continue
		}
		var mark []byte
		if s.off+n <= int64(len(head)) {
			mark = head[s.off:][:n]
		} else if mark, err = a.read(off+s.off, n); err != nil {
			return false, err
		}
		if string(mark) == s.text {
			return true, nil
		}
	}
	return false, nil
}

// isVolume tells whether a sector is the boot sector of a file system whose first sector ends as that of an MBR does.
func isVolume(boot []byte) bool {
	switch string(boot[3:11]) {
	case "NTFS    ", "EXFAT   ", "-FVE-FS-": // the last is BitLocker's
		return true
	}
	return isFAT(boot)
}

// isFAT goes by Microsoft's specification (fatgen103), which knows no mark for FAT: it is the values that tell.
func isFAT(boot []byte) bool {
	le := binary.LittleEndian
	size, cluster := le.Uint16(boot[11:]), boot[13]
	reserved, fats := int64(le.Uint16(boot[14:])), int64(boot[16])
	total, fat := int64(le.Uint16(boot[19:])), int64(le.Uint16(boot[22:]))
	media := boot[21]
	if total == 0 {
		total = int64(le.Uint32(boot[32:]))
	}
	if fat == 0 {
		fat = int64(le.Uint32(boot[36:]))
	}
	return (boot[0] == 0xeb || boot[0] == 0xe9) && // a jump over them
		size >= 512 && size <= 4096 && bits.OnesCount16(size) == 1 &&
		bits.OnesCount8(cluster) == 1 &&
		reserved > 0 && fats > 0 && fat > 0 && reserved+fats*fat < total &&
		(media == 0xf0 || media >= 0xf8)
}
