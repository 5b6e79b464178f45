package doctest

import (
	"os"
	"slices"
	"strings"
	"time"
)

var repositories = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		w.socket(110)
	},
	shown: map[string][]func(*world, string){
		"What it needs of a file system": {packaged("wait-for-the-share.conf")},
	},
}

var offsite = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		w.backups(110, 2)
		w.plain("-qmp", "unix:/run/web.qmp,server=on,wait=off")
		w.do(`qmchain-backup --quiet run --socket /run/web.qmp --name web --repo %s`, repository)
		// The other hosts are this one.
		w.program("/usr/local/bin/ssh", `shift; exec sh -c "$*"`)
		w.do(`mkdir -p /srv/pulled /srv/copy`)
		// As long as it copies, nobody prunes.
		w.program("/usr/local/bin/restic", `set -e
			[ "$1" = backup ]
			for guest in 110 web; do
				qmchain-backup --quiet prune "$guest" --repo "$2" --keep-all --lock-wait 0s && false || echo $? >>/root/prunes
			done
			cp -a "$2" /srv/restic`)
	},
	before: map[string]func(*world){
		"Tools for files: rsync, restic, borg, rclone": func(w *world) {
			// A backup runs as long as files are copied.
			w.node.VM(110).IO("virtio1", "write -P 77 0 7M")
			w.do(`setsid qmchain-backup --quiet run 110 --repo %s --level full --speed-limit 8MiB >/root/run.log 2>&1 &`, repository)
			w.do(`for i in $(seq 500); do compgen -G '%s/110/.*.partial' && compgen -G '%[1]s/110/images/*' && exit 0; sleep 0.01; done; exit 1`, repository)
		},
	},
	after: map[string]func(*world){
		"Send and receive": func(w *world) {
			for _, dir := range []string{"/srv/qmchain", "/srv/pulled"} {
				w.levels(dir, "110", "full", "inc")
				w.do(`qmchain-restore image 110/latest --repo %s --disk scsi0 --output /var/tmp/sent.raw --force`, dir)
				w.same("/var/tmp/sent.raw", 110, "scsi0")
			}
		},
		"Tools for files: rsync, restic, borg, rclone": func(w *world) {
			if left := w.do(`ls -A %s/110`, repository); !strings.Contains(left, ".partial") {
				w.tb.Errorf("the backup was over before the copy was, so that nothing is shown: %s", left)
			}
			for _, dir := range []string{"/srv/copy", "/srv/restic"} {
				w.levels(dir, "110", "full", "inc")
				w.levels(dir, "web", "full")
			}
			if codes := strings.Fields(w.do(`cat /root/prunes`)); !slices.Equal(codes, []string{"3", "3"}) {
				w.tb.Errorf("the exit codes of prune while a copy was made: %q, not 3", codes)
			}
			w.do(`qmchain-backup --quiet prune --repo %s --keep-all --lock-wait 0s >/dev/null; test -z "$(find %[1]s -mindepth 1 -perm /077)"`, repository)
			w.do(`while compgen -G '%s/110/.*.partial'; do sleep 0.05; done; qmchain-restore verify --quiet --repo %[1]s`, repository)
			// Nor does the copy keep the guest's next backup from going on.
			w.do(`qmchain-backup --quiet run 110 --repo %s`, repository)
			w.levels(repository, "110", "full", "inc", "full", "inc")
		},
	},
}

var clusters = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		w.backups(110, 1)
		// A VM that is on another node by now, one whose VMID was another VM's, and one of a node that is lost.
		w.addVM(111)
		w.backups(111, 1)
		w.node.QM("stop", "111")
		w.node.MoveAway(111, "pve2")
		w.addVM(112)
		w.backups(112, 1)
		w.node.QM("stop", "112")
		w.node.QM("destroy", "112")
		w.addVM(112)
		w.socket(112)
		w.addVM(113)
		w.backups(113, 1)
		w.node.QM("stop", "113")
		w.node.QM("destroy", "113")
	},
	after: map[string]func(*world){
		"Scheduling": func(w *world) {
			w.levels(repository, "110", "full", "inc")
			w.levels(repository, "111", "full")
		},
		"A VM that moves":            func(w *world) { w.says("pve2") },
		"Reused VMIDs, two clusters": func(w *world) { w.levels(repository, "cluster2-112", "full") },
		"If a node is lost":          func(w *world) { w.same(w.volume(113, "scsi0"), 113, "scsi0") },
	},
	codes: map[string]int{
		"qmchain-backup run --all": 7, // 112 is another VM
		"qmchain-backup run 111":   2,
		"qmchain-backup run 112":   1,
	},
}

var monitoring = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		// Its disk says what a guest says that has started: mov si,text; lodsb; out dx,al; until the end.
		w.node.QM("stop", "110")
		w.do(`{ printf '\xfa\x31\xc0\x8e\xd8\xbe\x15\x7c\xfc\xac\x84\xc0\x74\x06\xba\xf8\x03\xee\xeb\xf5\xf4web login: \0'
			head -c 477 /dev/zero; printf '\x55\xaa'; } >/root/boot
			[[ $(od -An -tx1 -j510 -N2 /root/boot) == ' 55 aa' ]]
			truncate -s 32M /root/boot
			qemu-img convert -f raw -O qcow2 /root/boot %s`, w.volume(110, "scsi0"))
		w.remember(110, "scsi0")
		w.backups(110, 2)
		w.do(`mkdir -p /var/lib/prometheus/node-exporter`)
	},
	shown: map[string][]func(*world, string){
		"Who is told": {packaged("on-failure.conf"), packaged("backup-failed@.service")},
	},
	after: map[string]func(*world){
		"Is there a backup?": func(w *world) {
			w.says("qmchain_")
			time.Sleep(1100 * time.Millisecond)
			if out := w.do(`qmchain-backup check --repo %s --max-age 1s && echo young || echo old: $?`, repository); !strings.Contains(out, "old: 1") {
				w.tb.Errorf("an old backup is none for check: %s", out)
			}
		},
		"Does it start?": func(w *world) {
			w.do(`test "$(head -c 4 /root/110.png | tail -c 3)" = PNG`)
			if _, err := os.Stat("/etc/pve/qemu-server/9110.conf"); err == nil {
				w.tb.Errorf("VM 9110 is still there")
			}
		},
	},
}
