// Package standard makes what the usual tools know out of a guest's points: chains of qcow2 images whose headers name their
// backing files, single images, and images with internal snapshots. It does on request what qmprestore does with the sets of
// qmpbackup, for every set that can be read, and by what the set says of itself: never by time stamps of files.
//
// The words:
//
//   - link: one image file that a disk of a point is read through. The chain of a disk is its links, the full first.
//   - rebase: the links of a chain up to a point, each with the name of the one below in its header, and a symbolic link to
//     the last one. QEMU's tools open the point by it.
//   - commit: the full with all up to the point merged into it.
//   - snapshots: one image with an internal snapshot of each point, and the last one as its active disk.
//   - output: the folder that the result goes to. What it is made of is only read.
//   - in place: the files of the set itself are changed. Only sets of qmpbackup can be: their increments are qcow2 images, and
//     nothing but their names says what they are.
//
// Open makes the plan, a list of steps, and Run takes one step after the other. Whatever is in the way is found before the
// first.
//
// # Output
//
//	DIR/.qmchain-partial/     where everything is made, and a lock
//	DIR/.qmchain-names        from when all is made and on disk, until all has its name in DIR
//	DIR/POINT.DISK.qcow2      rebase: a link, with the plain name of the one below as its backing file (or .raw, a raw full)
//	DIR/DISK.image            rebase: the symbolic link to the last one
//	DIR/DISK.qcow2            commit, snapshots
//
// DIR is empty, or not there yet. What fails or is interrupted is undone. What was killed is begun anew by the next call; if
// all that was missing were names, it gives them.
//
// Copies share their blocks with the originals where the file system can (FICLONE), and are sparse elsewhere; they are never
// hard links, by which the originals could be written to. The links of a stream of virtnbdbackup, and a full that is an
// internal snapshot, are written anew. In an image with snapshots there is of each point what differs from the one before.
//
// # In place
//
//   - rebase writes the names into the headers, and the symbolic link beside the images (`image`, as qmprestore calls it;
//     `DISK.image` where several disks share the folder). Files keep their times, by which qmprestore orders them. Each header
//     is one write, and before and after it the chain is the same: what was cut off is done again by the next call.
//   - commit merges the increments into the full, the oldest first, compares, and only then removes each. Until the end the
//     point asked for and those after it read as before; those before it are given up from the beginning, as asked.
//   - snapshots does the same, with a snapshot of the full before the first and one after each merge; every point can be read
//     at every moment. The snapshots' names are those of qmprestore, but of UTC, and the full says so in its header: see
//     foreign.UTCSnapshots.
//
// Before a commit or snapshots change anything, SET/.qmchain-unfinished.json says what is to be done. It is removed at the
// end: while it is there, the same call goes on, and others are refused. So it is after a signal, too: what was begun in place
// is not undone. A header of an increment to come that names one that is merged is set right.
//
// Refused are: a set with an unfinished file (.partial) of qmpbackup; a disk that shrinks, files with hard links, and a full
// of which nobody knows that the increments were made on it; for snapshots, a full without a time stamp in its name or of
// version 2, and one with snapshots of qmprestore, as the zone of their times is not known. All of these can go to an output.
// Nothing keeps others from reading a set that is changed: unmount it first.
package standard
