// Package inside shows the files in the disks of a point: the file systems that a guest has on them.
//
// The words:
//
//   - volume: where a file system can be: a disk, a partition of it, or a logical volume of LVM.
//   - appliance: a small virtual machine that libguestfs starts. It mounts a volume and hands its files out.
//   - replay: what a file system does at its first mount after a crash. Its journal holds changes that are not yet
//     where they belong, as in each backup of a guest that was not frozen.
//
// # Who reads what a guest has written
//
// A guest can write to its disks what it likes, and the kernel's file systems are not made to withstand that: a mount of a
// guest's disk can be an attack on the host. So the appliance is the usual way. The host's kernel sees no more than a FUSE
// file system then. The other way, on request only, is the host's own kernel and a loop device; it is fast, and needs
// nothing installed.
//
// The volumes are found here, in Go: partitions by package partition, and LVM by its own metadata. A logical volume of the
// kinds linear and striped is put together from its extents like a partition. Neither the appliance nor the host is
// shown more than the one volume that is asked for: the host's LVM never meets a guest's physical volume, and volume groups
// of one name, or the same one of two points, are no problem. What only LVM itself can make (thin, cached, RAID), and a
// file system or RAID of several devices, is left to the appliance that gets all of the disks, and looks for the guest's
// fstab: inspection.
//
// The type of a file system is always named. It is found by the marks at its beginning.
//
// # Nothing is written, nothing is left
//
// The disks are read-only throughout. For the replay there is something to write on that is thrown away: in the appliance
// an overlay of libguestfs', with a loop device a file without a name. Without the replay the file system is shown as
// the crash left it.
//
// The appliance gets the disks from an NBD server on a unix socket, in a folder with its other files. The loop device gets
// its volume from a FUSE file system of one file, which is mounted nowhere: it has no path, and ends with the process that
// serves it. That is a process of its own: the kernel's file systems read in ways that no signal ends, and one that waits for
// itself would be there until the host is restarted. The loop device goes with its last user. So does the mount for one reading (View.Root); the
// appliance's is in a mount namespace of its own where that is allowed, which is for root.
package inside
