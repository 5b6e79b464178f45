// Package hooks is what is done when Proxmox VE starts and stops a VM, or backs one up with vzdump, and asks a script of ours.
//
// Words:
//
//   - A hook script of a VM (its option hookscript) is called by PVE with the VMID and a phase: pre-start, post-start, pre-stop,
//     post-stop. The one of vzdump (its option script) is called with phases of its own.
//   - A snippet is a file on a storage that PVE takes as a hook script. Ours is a few lines of shell that call qmchain-hook and,
//     after it, the script that the VM had before, if it had one: a VM can have only one.
//   - A unit is a service of systemd's that does what can't be done within a phase.
//
// What a phase may do is little. PVE calls the hook script of a VM with the VM's lock file locked, and has no time limit: so
// nothing here calls `qm set`, which would wait for that lock, and every step is bounded. A phase of ours never fails, whatever is
// wrong: it warns, in the log of PVE's task. The snippet sees to the rest: it goes on to the other script even if qmchain is not
// there any more, and ends with that script's exit code, so that a pre-start of theirs that fails keeps the VM from starting as it
// did before.
//
//	pre-start    a stale backup socket goes; a VM that starts without a backup socket is worth a warning; the keeper is started
//	post-start   the socket is asked whether it answers; a backup, as a unit
//	pre-stop     a last increment, as a unit, and awaited, but not for long; where a VM is stopped that runs (`qm stop`), its
//	             bitmaps in memory are saved: its guest is paused from there on. So are those of a
//	             VM that vzdump has started for its backup
//	post-stop    a stale backup socket goes; a backup of the stopped VM, as a unit
//
// The keeper is started before QEMU, not after: it has to merge bitmaps back before the guest's first write, and waits for the
// socket by itself. Backups are left out while PVE has locked the VM for something of its own (a vzdump of a stopped VM starts it,
// paused), where it comes from another node, and, those of a stopped VM, when it is about to be started again, or may be at any
// moment, as HA manages it: a backup locks it.
//
// # Together with vzdump
//
// A run of a VM takes PVE's own lock first, as vzdump does, so that one of the two refuses: `lock: backup` is there when vzdump
// calls its script. What is not held off by that has no such lock: a run by --socket, and the last increment of a VM that vzdump
// stops. The first is waited for, for some time, when vzdump begins with the VM; the second is not made when the VM is locked. In
// the end vzdump goes on in any case, since two backups of one VM at a time cost time and no data. So a run that is under way when
// vzdump comes to its VM makes vzdump refuse that VM, by PVE's own rules and before any script is called: let them begin at
// different times.
package hooks
