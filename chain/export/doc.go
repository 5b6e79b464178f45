// Package export writes a disk image to where a machine can use it: a raw file, a qcow2 file, or a block device.
//
// The words:
//
//   - output: the file or the device that is to hold the disk.
//   - plan: what is to be written where. Look makes it, and changes nothing.
//   - writer: a plan that is being carried out, up to its Commit.
//   - staging file: .NAME.qmchain-partial in the folder of an output NAME, which is renamed to NAME at the commit.
//   - head: the first MiB of a device, where all that tells what is on it has its beginning: partition tables, file
//     systems, volume groups. It is wiped first and written last, at the commit.
//
// So an output never looks finished before it is: not when the program is killed, nor when the power goes. What was
// interrupted is begun anew, by the same call: it removes the staging file that a dead writer has left (a living one holds
// a lock on it), and finds a device empty, as the head is. There is no going on from where the last run was: what of its
// writes has reached the disk nobody knows, and to read it all again and compare takes as long as to write it.
//
// Files are sparse: what the image knows to be zeroes and what merely holds zeroes become holes. On a device they are
// zeroed, and given back to what lies below it where that is able to.
//
// Reading and writing go through the page cache, in pieces of 256 KiB, and every 64 MiB that are done are sent on their
// way to the disk at once. Direct I/O and a single sync at the end were both slower.
package export
