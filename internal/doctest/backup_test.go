package doctest

import (
	"os"
	"path/filepath"
	"strings"
)

var backup = scenario{
	start: func(w *world) {
		w.proxmox()
		w.node.AddPool("web", 110)
		w.addVM(110, "tags: prod")
		w.addVM(120)
		w.backups(110, 1)
	},
	before: map[string]func(*world){
		"Snapshots and rollback": func(w *world) {
			// Tracked in the image, then a snapshot.
			w.do(`qmchain-backup --quiet run 110 --repo %s --bitmaps persistent`, repository)
			w.node.QM("snapshot", "110", "before")
			if code, _, _ := w.node.TryQM("rollback", "110", "before"); code == 0 {
				w.tb.Errorf("a rollback with bitmaps in the images goes well: the text is no longer true")
			}
		},
		"Increments over a restart": func(w *world) {
			w.plain("-qmp", "unix:/run/web-backup.qmp,server=on,wait=off", "-no-shutdown")
			w.program("/usr/local/bin/systemd-run", `while case $1 in -*) ;; *) false ;; esac; do shift; done; setsid "$@" >/root/keep.log 2>&1 &`)
			w.do(`qmchain-backup --quiet run --socket /run/web-backup.qmp --name web --repo %s --bitmaps memory`, repository)
		},
		"Keep some, remove the rest": func(w *world) {
			w.do(`rm /etc/qmchain/config.toml; qmchain-backup --quiet run 110 --repo %s || [ $? = 4 ]`, repository)
			w.do(`qmchain-backup --quiet run 110 --repo %s`, repository)
			points := w.points(repository, "110")
			w.example = points[len(points)-3]
		},
	},
	after: map[string]func(*world){
		"A run": func(w *world) {
			w.levels(repository, "110", "full", "inc", "full")
		},
		"Many VMs": func(w *world) {
			report, err := os.ReadFile("/root/report.txt")
			check(w.tb, err)
			if !strings.Contains(string(report), "110") || strings.Contains(string(report), "120") {
				w.tb.Errorf("the report: %s", report)
			}
		},
		"Increments over a restart": func(w *world) {
			if kept, _ := filepath.Glob("/var/lib/qmchain/kept/*"); len(kept) == 0 { // a valid pattern
				w.tb.Errorf("nothing is kept")
			}
		},
		"Keep some, remove the rest": func(w *world) {
			if points := w.points(repository, "110"); len(points) != 4 {
				w.tb.Errorf("points %q are left", points)
			}
			w.do(`qmchain-restore verify --repo %s`, repository)
		},
	},
}
