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
// # Over a restart
//
// Bitmaps in memory, those of raw disks and of disks with internal snapshots, end with the QEMU process. A Keeper carries them
// over that. When the guest has powered off, and QEMU (with -no-shutdown) is still there, it copies them into sidecar images in
// a local folder and writes down what proves that a disk was not written to since; see volume. When QEMU is there again it
// merges them back. The order is what makes it safe:
//
//	saving      the run state is one in which vCPUs don't run
//	            stop: in any state QEMU then awaits all requests under way and flushes. The event SHUTDOWN comes before that
//	            volumes are read; bitmaps are copied; volumes are read again, and must be the same
//	            the record is written, sealed, and tells of sidecars that are on disk
//	merging     the record is claimed by a rename: whatever happens from here on, it is not used again
//	            volumes are read; those that are the same are the same disks, whatever their names are now
//	            a fresh bitmap begins to record on each disk
//	            QEMU's counters say that nothing was written through it before that
//	            one transaction makes the tracking bitmap, from the fresh one and the sidecar's
//
// The last step is why a half is never taken for the whole: until then no bitmap has a name that a run would believe. The
// guest's write at the start is no danger: it comes before the fresh bitmap, and the counters tell, or after it, and is
// recorded. Counters are not set back by a reset of the guest. QEMU opens and closes images without writing to them, as long as
// there is nothing to be stored there (seen on 7.2 and 10.0): persistent bitmaps of another repository on the same disk, or
// lazy refcounts, end the proof.
//
// Whatever is not proven is refused, and the next run takes a full with the reason: the guest had another vmgenid; a volume was
// written to, replaced or taken away; a QEMU that was killed, or ended by quit or SIGTERM while the guest ran, which leaves no
// time to save (Keeper.Stop does that: a guest that is paused and about to be ended writes no more).
//
// # Undo and recovery
//
// Undoing a failed run and recovering what a killed one left are the same code: look at the guest, take away whatever is
// ours, in the order that is safe for the guest. See recover.go. Everything of ours in a guest has a name that begins
// with "qmchain-" (nodes, jobs, objects) or "qmchain:" (bitmaps).
package backup
