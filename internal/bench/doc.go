// Package bench measures what a backup costs the guest, and what qmchain costs on top of QEMU's own work. It holds
// benchmarks alone, run by `make bench`, with real QEMUs and a real Linux guest:
//
//   - BenchmarkGuestLatency: the guest's own writes while a backup goes to a slow repository, with fleecing and without.
//   - BenchmarkIdleIncrement: how long an increment of a guest without changes takes, and with what.
//   - BenchmarkPeakMemory: what the program takes of the host's memory.
//   - BenchmarkRestore: what restoring a disk takes, beside qemu-img and cp, for chains of several lengths.
//   - BenchmarkMount: how fast points are read through the mount, beside QEMU's own FUSE export and plain files.
//
// Times are reported, never judged: on a busy machine they say little. Only a run that goes wrong fails a benchmark.
package bench
