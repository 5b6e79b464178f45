// Package verify finds out which disks of which points are still what they were when they were stored.
//
// The words:
//
//   - image: the file of a disk in a point. A disk is read through its own image and those that it was made on.
//   - fault: what is wrong with one file. A disk with a faulty file among those that it is read through is damaged; the
//     disks below and beside are not.
//   - finding: a fault, or something else that is worth telling, with all disks that it concerns.
//
// Of every image that the disks asked for are read through, once however many they are:
//
//  1. Lineage: its point's manifest can be read and its seal fits; the image that it was made on is there, by id and uuid.
//  2. Header: it is the image that its manifest speaks of, of the right size, with the right backing file's name.
//  3. Check sums: their file is the one that the manifest seals, and all bytes of the image have them.
//  4. qemu-img check: its tables do not contradict one another. Clusters that are leaked are told, but no damage.
//
// Deep also reads the disks themselves, as a restore would. That finds what was wrong already when the image was made.
//
// Foreign sets are verified as far as they can be: qmpbackup has no check sums.
//
// Others may make, remove and merge points meanwhile. Nothing is locked for longer than a moment; what is found wrong is
// looked at again if the points are others by then, and what is missing once in any case, after a second: a share may just
// be mounted again. An image that is just being merged has no check sums, and disks that are read through it can't be
// verified until that is done: that is told, and is no damage.
package verify
