// Package fusefs shows a set of backups as a read-only file system: every disk of every point as one raw image. A set is
// a qmchain repository, or what qmpbackup or virtnbdbackup has written: see package source.
//
// What there is to see is worked out in package tree. Here are the three things around it: the catalog looks at the set
// and keeps what it saw for as long as that holds; the nodes answer the kernel; the mount is made, watched and taken away.
//
//   - home (home.go): the set's directory, which can go away and come back, as a share does.
//   - catalog (catalog.go): guests, points and their files.
//   - disks (disks.go): images that are open, shared by all who read them.
//   - tables (tables.go): partition tables, read when they are asked for.
//   - stats (stats.go): counters, which are the content of the file .stats in the root.
//
// Points never change once they are there, so the kernel may keep what it has read of a disk. Which points there are does
// change: lists are never older than a second, and a name that is not found is looked for again before that is said.
//
// Partitions are files beside their disk (package partition). To find them a disk must be opened and read, so that is done
// when a point's folder is listed or such a name is asked for, and never for a list of points. A listing waits for it for three
// seconds at most; a disk that can't be read then, or whose table is damaged, is listed without its partitions or with those
// that are certain.
//
// Extended attributes, user.qmchain.*, say of guests, points, disks and partitions what the manifest does; package tree has
// the list.
//
// While the set is out of reach, as when its share does not answer or is unmounted, all requests are I/O errors: never is an
// empty list shown, and nothing is said to be missing. When it is back, all is as before. A disk that is open is opened anew
// then, by the names of its images, and only if they are those of the same point.
//
// What is damaged or not to be trusted is told to the log once. A point whose manifest can't be read is not shown. A disk
// that is refused, or is read through an image that is missing or damaged, is shown, and opening it is an I/O error.
// A disk that is only warned of, as it may not be what the guest had, or verify has found it damaged, is shown and can be read;
// its attribute user.qmchain.warning says why, and so does the log when one with damage is opened. Log entries have the fields guest, point and disk where they are about one.
package fusefs
