// Package testenv runs real QEMU processes for tests.
//
// It is the other side of every test that needs a running guest: it starts
// QEMU with disks attached the way Proxmox VE and plain QEMU attach them,
// writes to those disks as the guest would, and takes the process through
// what happens to guests: quit, crash, restart, power off, reset.
//
// Words:
//
//   - A [QEMU] is one installed version: the host's own, or one of another
//     Debian release that `make setup` unpacked into the cache.
//   - A [Style] is one of the ways a disk's block graph is built: PVE 8's
//     -drive, PVE 9's throttle filter on top, or a bare -blockdev.
//   - A [VM] is a QEMU process started from a [Config]. Without
//     [Config.Guest] it has no operating system: a firmware of four bytes
//     halts the CPU, so that the guest is "running", costs no CPU time and
//     touches no disk on its own. With it, a small Linux boots that has a
//     shell and a guest agent.
//
// Requests made with [VM.IO] enter at the device's own block backend and pass
// through every filter on top of the disk, as a guest's requests do.
//
// The package has its own QMP client of a few lines, on purpose: what it says
// about a guest must not depend on the code under test.
//
// A VM dies with the test that started it, and with the test process if that
// is killed.
package testenv

// TB is what the package needs of a test. *testing.T, *testing.B and
// *rapid.T have it, and a program that is no test can bring its own.
type TB interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(f func())
}
