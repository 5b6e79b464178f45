// Package bench measures what a backup costs the guest, what qmchain costs on top of QEMU's own work, and how fast backups
// are read, beside the programs that one would use instead. It holds benchmarks alone, with real QEMUs and a real Linux
// guest; package run calls them (`make bench`), package figures has what becomes of their figures.
//
//   - BenchmarkMount: how fast points are opened and read through the mount, beside QEMU's FUSE export, qemu-nbd with nbdfuse
//     and nbdkit, and plain files.
//   - BenchmarkFiles: one file out of a guest's file system, beside guestmount.
//   - BenchmarkRestore: what restoring a disk takes, beside qemu-img and cp, for chains of several lengths.
//   - BenchmarkVerify: what finding damage takes, beside qemu-img and sha256sum.
//   - BenchmarkBackup: how long fulls and increments take, beside QEMU's own jobs in them and cp.
//   - BenchmarkIdleIncrement: how long an increment of a guest without changes takes, and with what.
//   - BenchmarkGuestLatency: the guest's own writes while a backup goes to a slow repository, with fleecing and without.
//   - BenchmarkPeakMemory: what the program takes of the host's memory.
//   - BenchmarkMerge: what removing the oldest point of a long chain writes.
//   - BenchmarkList: what listing and planning take in a large repository, beside cat of its manifests.
//   - BenchmarkScale: what listing, planning, pruning and mounting take with 100,000 points.
//
// Who is compared takes turns within a round. Times are reported, never judged: on a busy machine they say little. Only a
// run that goes wrong fails a benchmark.
package bench
