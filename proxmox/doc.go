// Package proxmox is the Proxmox VE side of qmchain: what stands in a VM's configuration, and what `qm` is asked to do
// about it. It looks at the files that PVE keeps, and changes things through `qm` alone, but for firewall rules, which `qm`
// knows nothing of.
//
// Words:
//
//   - A [Host] is where one PVE node has its files, sockets and programs. Nothing here is global, so a test's host can be
//     a folder.
//   - A VM has a [VMID] and a [Config]: the file /etc/pve/qemu-server/VMID.conf with its sections. The main one is what the
//     VM runs with; [PENDING] is what it will have at its next start; the others are its snapshots, and PVE's own notes.
//   - The digest is the SHA-1 of that file. A change names the digest of the configuration it was made from, and `qm`
//     refuses it if somebody else has been there first.
//   - The backup socket is a QMP socket of the VM that only backups use: `/var/run/qemu-server/VMID-backup.qmp`. QEMU makes
//     it because the VM's option args says so. The package recognises it in there ([Socket.Look]), adds it, mends it and
//     takes it away, and leaves others' arguments as they are, byte for byte.
//   - The backup lock is PVE's own `lock: backup`. With it PVE neither changes, stops, moves nor snapshots the VM. It has
//     no owner, so [BackupLock] remembers what the configuration was when it was set.
//
// A VM that is another node's is [ErrElsewhere], a container [ErrNotFound]. `qm` ends with Perl's errno, whose values say
// nothing: why it failed is found out by looking at the configuration again.
package proxmox
