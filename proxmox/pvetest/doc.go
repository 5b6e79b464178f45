// Package pvetest is a Proxmox VE node for tests: a folder with the files of one, and a program `qm` that behaves as the
// real one does, down to its texts, exit codes, locks and pending changes, and that starts real QEMU with the arguments
// of PVE's command lines.
//
// Words:
//
//   - A [Node] is one node. Its folder holds etc/pve, run/qemu-server, var/lib/vz (the storage `local`) and bin/qm.
//   - `qm` itself is a few lines of Perl that hand their arguments to the test that made the node, and print what comes
//     back. All it does is done here, one file to a subject: configurations (conf.go), changes of them (set.go), running
//     (process.go), PVE's command line (commandline.go) and what of it this host's QEMU can take (launch.go), hook scripts
//     (hook.go), copies (clone.go), volumes (volume.go) and what becomes of them (restore.go), live imports (live.go),
//     qmeventd (events.go).
//   - A failure is a text for standard error and an exit code, as Perl's die ends a program.
//
// What stands for PVE's behaviour was seen with the real qm; its recorded outputs are in proxmox/testdata/pve, and a test
// compares. Imports into several drives, live ones, and what PVE makes of a file that it imports, were read from its sources
// (qemu-server 9). Nothing here uses package proxmox, which is tested with it; words of args are split by Perl itself.
//
// A VM that `qm start` has started is a [testenv.VM], which dies with the test.
package pvetest
