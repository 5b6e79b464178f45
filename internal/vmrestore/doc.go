// Package vmrestore makes a Proxmox VE VM of a point: from the configuration that was saved in it, and with its disks
// copied in by `qm`, which knows all of PVE's storages.
//
// Words:
//
//   - A Point is what is restored: a configuration, firewall rules, and disks as files that qm can read, whoever serves those.
//   - A Plan is what the VM will be, and the steps to it. Making it is a pure function; Run takes the steps.
//   - A note says what of the VM is not as it was, and why. Some were to be expected; those that mean a loss are told apart.
//
// A new VM is made first and small, with PVE's `lock: create`, under which PVE lets nobody touch it; then its disks come,
// one `qm set` with import-from each, and last what only holds once they are there. It has a vmgenid that is new, as after
// every restore; and by that the VM is known as ours: if something fails, it is destroyed if it still has it, and nothing else
// ever is.
//
// A VM that is there already, and is to be replaced, stays whole until all that takes time is done: the disks are first copied
// in beside its own, as unused ones, and then one `qm set` exchanges them. (qmrestore destroys the old disks first.) That takes the
// space for both. Old disks go only where a restored one has taken their place; others stay as unused volumes, as with PVE.
//
// A live restore is PVE's own: `qm create --live-restore` starts the VM on the files that disks come from and moves the
// data while it runs. It is one command, which ends when the data is there; what the guest has written until then is lost
// if that fails.
//
// PVE finds out the format of a file that it imports by itself. A raw disk that begins as another format does would be
// taken for that; see Disguise.
package vmrestore
