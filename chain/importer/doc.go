// Package importer takes backups of other programs into a repository, as points of a guest that everything else can be done
// with: they are listed, mounted, restored, sent and removed like those that runs of our own make.
//
// The words:
//
//   - set: the directory with the other program's backups. It is only read. See package foreign.
//   - imported point: a point of ours that reads as one of the set's does, byte for byte. It has got that one's id and uuid,
//     which do not change with time; so a second import goes on where the first one was cut off.
//   - skipped: a disk, or a point, that the set has but that is refused: it can't be trusted. It is not imported, and what is
//     newer does not need it, as increments are made anew.
//
// Whatever a disk's levels are in the set, here its first image is a full and each later one an increment on the one
// before, of the clusters in which the two points differ. (One that has shrunk begins anew.) So several fulls, copies and
// snapshots inside of files become one chain.
//
// Which clusters differ is found by reading both points, ours and the set's. Where both go back to the same files in the
// set, only what the other files hold is read. Every byte comes from the point as a whole, never from one of its files, so
// a set's ways to store things play no part in what is written.
//
// Images are written by qemu-nbd, a cluster as a whole at a time, so that nothing is ever filled up from below.
package importer
