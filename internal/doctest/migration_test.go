package doctest

import (
	"strings"

	"qmchain/chain/foreign/foreigntest"
)

var migration = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		// As qmpbackup's documentation has it.
		w.node.QM("set", "110", "--args",
			"-chardev 'socket,id=qmp-backup,path=/var/run/qemu-server/110-backup.qmp,server=on,wait=off' -mon 'chardev=qmp-backup,mode=control'")
		for folder, set := range map[string]string{"web": "qmpbackup/a-default", "domain": "virtnbdbackup/v1-chain"} {
			w.do(`cp -a %s/%s /mnt/backup/%s`, foreigntest.Unpack(w.tb, set), set, folder)
		}
	},
	after: map[string]func(*world){
		"From qmpbackup": func(w *world) {
			w.levels(repository, "web-old", "full", "inc", "inc", "inc")
			w.levels(repository, "110", "full")
			if config := w.node.Config(110); strings.Count(config, "110-backup.qmp") != 1 {
				w.tb.Errorf("not one socket: %s", config)
			}
		},
	},
}
