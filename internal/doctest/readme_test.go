package doctest

import (
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// repository is where the documents have theirs.
const repository = "/mnt/backup/qmchain"

var readme = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		w.addVM(120)
		w.backups(110, 2)
		web := w.plain("-qmp", "unix:/run/web.qmp,server=on,wait=off")
		w.do(`qmchain-backup --quiet run --socket /run/web.qmp --name web --repo %s`, repository)
		web.Quit()
	},
	shown: map[string][]func(*world, string){
		"qmchain": {picture},
		"Five minutes on plain QEMU": {func(w *world, text string) {
			w.plain(strings.Fields(text)...)
		}},
	},
	before: map[string]func(*world){
		"In an emergency": func(w *world) {
			w.node.QM("stop", "110")
			w.node.QM("destroy", "110")
		},
		"Five minutes on Proxmox VE": func(w *world) {
			w.do(`rm -r %s`, repository)
			w.node.QM("stop", "110")
			w.node.QM("set", "110", "--delete", "args")
			w.startVM(110)
		},
		"Five minutes on plain QEMU": func(w *world) { w.do(`rm -r %s /images`, repository) },
	},
	after: map[string]func(*world){
		"In an emergency": func(w *world) {
			w.same("/var/tmp/scsi0.raw", 110, "scsi0")
			w.same("/var/tmp/virtio1.raw", 110, "virtio1")
			w.same("/var/tmp/disk.raw", 110, "scsi0")
			w.same(w.volume(210, "scsi0"), 110, "scsi0")
			w.do(`cmp /root/fstab /root/files/etc/fstab`)
		},
		"Five minutes on Proxmox VE": func(w *world) {
			w.levels(repository, "110", "full", "inc", "inc")
		},
		"Five minutes on plain QEMU": func(w *world) {
			w.levels(repository, "web", "full", "inc")
			w.same("/var/tmp/web.raw", 0, "virtio0")
		},
	},
}

// picture compares a tree that is drawn with what the mount shows.
func picture(w *world, text string) {
	const mnt = "/mnt/points"
	w.do(`mkdir %s; qmchain-fuse mount --quiet %s %[1]s`, mnt, repository)
	found := w.do(`find %s -mindepth 1 '(' -type l -printf '%%P -> %%l\n' ')' -o -printf '%%P\n'`, mnt)
	w.do(`qmchain-fuse umount --quiet %s; rmdir %[1]s`, mnt)
	ids := w.points(repository, "110")
	found = strings.NewReplacer(ids[0], exampleID, ids[1], nextExampleID).Replace(found)
	shown := map[string]bool{}
	for line := range strings.Lines(found) {
		shown[strings.TrimSpace(line)] = true
	}

	drawn, hidden := tree(w, mnt, text)
	for name := range drawn {
		if !shown[name] {
			w.tb.Errorf("the mount has no %s, which is in the picture", name)
		}
	}
	for name := range shown {
		if !drawn[name] && !slices.ContainsFunc(hidden, func(dir string) bool { return strings.HasPrefix(name, dir) }) {
			w.tb.Errorf("the mount has %s, which is not in the picture", name)
		}
	}
}

var treeEntry = regexp.MustCompile(`^((?:[│ ] {3})*)[├└]── (\S+(?: -> \S+)?)`)

// tree reads a tree as it is drawn: the paths in it, and the folders whose contents are left out.
func tree(w *world, top, text string) (paths map[string]bool, hidden []string) {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if lines[0] != top {
		w.tb.Fatalf("the picture is of %s", lines[0])
	}
	paths = map[string]bool{}
	var path []string
	for _, line := range lines[1:] {
		m := treeEntry.FindStringSubmatch(line)
		if m == nil {
			w.tb.Fatalf("no entry: %q", line)
		}
		depth := utf8.RuneCountInString(m[1]) / 4
		path = append(path[:depth], m[2])
		if m[2] == "…" {
			hidden = append(hidden, strings.Join(path[:depth], "/")+"/")
		} else {
			paths[strings.Join(path, "/")] = true
		}
	}
	return paths, hidden
}
