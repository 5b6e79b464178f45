// Package fusefs shows a repository as a read-only file system: every disk of every point as one raw image.
//
// What there is to see is worked out in package tree. Here are the three things around it: the catalog looks at the
// repository and keeps what it saw for as long as that holds; the nodes answer the kernel; the mount is made, watched and
// taken away.
//
// Points never change once they are there, so the kernel may keep what it has read of a disk. Which points there are does
// change: lists are never older than a second, and a name that is not found is looked for again before that is said.
package fusefs
