package doctest

import (
	"os"
	"path/filepath"
	"strings"
)

// recovery is the drill of those who have nothing but the directory: there is no program of ours any more.
var recovery = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		w.backups(110, 4)
		// One that was merged is among them.
		w.do(`qmchain-backup --quiet prune --repo %s --keep-last 2`, repository)
		w.example = w.points(repository, "110")[1]
		programs, err := filepath.Glob("/usr/bin/qmchain-*")
		check(w.tb, err)
		for _, program := range programs {
			check(w.tb, os.Remove(program))
		}
	},
	shown: map[string][]func(*world, string){
		"What is there": {func(w *world, text string) {
			var path []string
			for line := range strings.Lines(text) {
				name := strings.Fields(line)[0]
				depth := (len(line) - len(strings.TrimLeft(line, " "))) / 2
				path = append(path[:depth], strings.TrimSuffix(w.real(name), "/"))
				if depth == 0 {
					path[0] = repository
				}
				if _, err := os.Stat(filepath.Join(path...)); err != nil {
					w.tb.Errorf("it is not so: %v", err)
				}
			}
		}},
	},
	before: map[string]func(*world){
		"Is it whole?": func(w *world) {
			for _, name := range []string{`"level": "full"`, `"level": "inc"`} {
				w.do(`grep -r %s %s/110/*/point.json`, quoted(name), repository)
			}
		},
	},
	after: map[string]func(*world){
		"What is there": func(w *world) { w.says(`"name": "scsi0"`, w.example+".scsi0.qcow2") },
		"Is it whole?":  func(w *world) { w.says("whole") },
		"The disks": func(w *world) {
			w.same("/var/tmp/scsi0.raw", 110, "scsi0")
			w.same("/var/tmp/scsi0.qcow2", 110, "scsi0")
		},
		"The VM": func(w *world) {
			w.same("/var/tmp/try.qcow2", 110, "scsi0")
			w.same(w.volume(310, "scsi0"), 110, "scsi0")
			w.node.QM("set", "310", "--memory", "64") // of this host
			w.node.QM("start", "310")
		},
	},
}

func quoted(s string) string { return "'" + s + "'" }
