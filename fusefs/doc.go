// Package fusefs shows a set of backups as a read-only file system: every disk of every point as one raw image. A set is
// a qmchain repository, or what qmpbackup or virtnbdbackup has written: see package source.
//
// What there is to see is worked out in package tree. Here are the three things around it: the catalog looks at the set
// and keeps what it saw for as long as that holds; the nodes answer the kernel; the mount is made, watched and taken away.
//
// Points never change once they are there, so the kernel may keep what it has read of a disk. Which points there are does
// change: lists are never older than a second, and a name that is not found is looked for again before that is said.
//
// What is damaged or not to be trusted is told to the log once. A point whose manifest can't be read is not shown. A disk
// that is refused, or is read through an image that is missing or damaged, is shown, and opening it is an I/O error.
// A disk that is only warned of, as it may not be what the guest had, is shown and can be read.
package fusefs
