// Package foreign reads the backups of other programs, qmpbackup and
// virtnbdbackup, as if they were a guest's points. It changes nothing.
//
// The words:
//
//   - set: the directory that such a program wrote its backups to. It holds those
//     of one guest.
//   - run: one backup, of one or several disks. A run is a point. Its id has the
//     run's own time, from a file's name or from what is in it; the rest of the id,
//     and the point's uuid, are hashes of names in the set. So they stay the same
//     when the set is copied.
//   - refused: a disk of a point that can't be trusted to be what it says. It is
//     listed, as a problem too, but it can't be opened, and nor can what was made on
//     top of it.
//   - warning: a disk that can be read, but of which nobody can say that it is what
//     the guest had. What was made on top of it has the same warning.
//
// What was made on top of what is told by names and by what is in the files alone.
// Time stamps of files decide nothing: copying changes them. (One of them can
// cause a warning.) Nothing outside of the directory is read, whatever links and
// paths are in it, and its files are taken for the work of somebody who means ill.
//
// # qmpbackup
//
//	TARGET/uuid                          36 characters
//	TARGET/DISK.config                   `qemu-img info` of the guest's image, at the last run
//	TARGET/DISK/LEVEL-EPOCH-DISK         LEVEL is FULL, INC or COPY; EPOCH seconds, the same for all disks of a run
//	TARGET/LEVEL-EPOCH-DISK              with --no-subdir
//	.../DISK, .../FULL-DISK, COPY-DISK   with --no-timestamp: a full or copy, and links to it
//	TARGET/YYYY-MM/...                   with --monthly: a target of its own in each month
//
// Increments name no parent. An INC belongs to the INC or FULL before it, by
// EPOCH, in the same folder and of exactly the same DISK; without an EPOCH a full
// is the first, but a later run may have replaced it: see ErrOrder. A COPY stands
// alone. Where `qmprestore rebase` has written names of backing files they must
// agree, and are not followed. What `qmprestore snapshotrebase` has merged are
// internal snapshots of the FULL, called by times of an unknown zone; of UTC where the
// header says that it was package standard. Raw increments are refused: zeroes that
// the guest wrote can't be told from what it did not write.
//
// # virtnbdbackup
//
//	DIR/DEV.full.data, DEV.copy.data, DEV.inc.CHECKPOINT.data, DEV.diff.EPOCH.data
//	DIR/....data.chksum                  Adler-32 of the file, by version 2.x
//	DIR/vmconfig.*.xml                   the domain's configuration
//	DIR/DOMAIN.cpt, checkpoints/         may be ahead of the data, so not relied on
//
// The files are streams: see package virtnbd. What a stream is, only its name
// tells; what it was made on is the full or inc of the checkpoint that it names as
// its parent. Version 2.x leaves out what the guest has zeroed: see ErrZeroes.
package foreign
