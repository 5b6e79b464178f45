package doctest

import "path/filepath"

var restore = scenario{
	start: func(w *world) {
		w.proxmox()
		w.node.AddStorage("lvmthin", "fast")
		w.addVM(110)
		w.backups(110, 2)
		// What the package puts there.
		w.do(`ln -sf /usr/bin/qmchain-fuse /usr/sbin/mount.fuse.qmchain`)
		w.do(`rm -f /etc/fstab`)
	},
	after: map[string]func(*world){
		"A Proxmox VE VM": func(w *world) {
			for _, vmid := range []int{110, 210, 211} {
				w.same(w.volume(vmid, "scsi0"), 110, "scsi0")
			}
			w.same(w.node.VolumePath("fast:vm-210-disk-0"), 110, "scsi0")
		},
		"Disks": func(w *world) {
			w.same("/var/tmp/scsi0.raw", 110, "scsi0")
			w.same("/var/tmp/a.qcow2", 110, "scsi0")
		},
		"Files": func(w *world) {
			w.do(`diff -r /root/www /root/files/srv/www`)
		},
		"Ordinary qcow2 files of other shapes": func(w *world) {
			for _, dir := range []string{"chain", "one", "snapshots"} {
				// The newest image is the guest's.
				images, err := filepath.Glob("/var/tmp/" + dir + "/*scsi0*.qcow2")
				check(w.tb, err)
				if len(images) == 0 {
					w.tb.Fatalf("%s", w.do("find /var/tmp/%s", dir))
				}
				w.same(images[len(images)-1], 110, "scsi0")
			}
		},
	},
}
