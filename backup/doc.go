// Package backup takes points of running QEMU guests over QMP.
//
// # The sequence
//
// Each disk has two bitmaps during a run. OLD has recorded since the disk's tracking parent; NEW is added before anything
// else and records from now on. Nothing touches OLD until the new point is on disk, so a run that fails at any step costs
// nothing: the next one is an increment again.
//
//	NEW bitmaps                     one transaction
//	filter on top                   where the guest's disk has no throttle filter: blockdev-add, qom-set
//	copy-before-write, below it     blockdev-add: fleecing, on-cbw-error=break-snapshot
//	the switch                      one blockdev-reopen puts all top filters onto their copy-before-write filters:
//	                                that is the instant of the point, the same for all disks
//	snapshot-access                 what the disk was at that instant
//	copy                            blockdev-backup from there into the image; an increment copies what OLD has marked
//	tear-down                       the same in reverse
//	commit                          sync, manifest, rename
//	OLD bitmaps go                  one transaction
//
// The guest is never stopped for it. blockdev-reopen drains all the disks, changes all of them and lets them go on, so
// no request falls between two disks; and since vCPUs run on, nobody's "stop" or "cont" can come between. Proxmox VE 9
// has throttle filters on its disks already; they are used as they are.
//
// What the guest overwrites while its disk is copied is first saved into a fleece image on fast local storage, so that a
// slow or full target never slows or fails the guest's own writes. A full fleece breaks the snapshot, and thereby the
// backup, not the guest.
//
// # Undo and recovery
//
// Undoing a failed run and recovering what a killed one left are the same code: look at the guest, take away whatever is
// ours, in the order that is safe for the guest. See recover.go. Everything of ours in a guest has a name that begins
// with "qmchain-" (nodes, jobs, objects) or "qmchain:" (bitmaps).
package backup
