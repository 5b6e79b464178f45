package fusefs

import (
	"os"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// file returns the file that a disk is, if it is one raw file, as in some foreign sets: the kernel can read that at its own
// speed. On a share it could not be opened anew when the share has gone and come back, so there it is nil.
func (o *openDisk) file() *os.File {
	img, ok := o.now.Load().Image.(image.Filer)
	if !ok {
		return nil
	}
	f, err := img.File()
	if f == nil || err != nil {
		return nil // a read will tell what is wrong
	}
	if !isLocal(f) {
		_ = f.Close()
		return nil
	}
	return f
}

// isLocal tells whether a file is on a file system of this host, as far as those are known.
func isLocal(f *os.File) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false
	}
	const zfs = 0x2fc12fc1
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, zfs:
		return true
	}
	return false
}
