package doctest

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestClaims: each claim in SECURITY.md names its tests, and they are there.
func TestClaims(t *testing.T) {
	t.Parallel()
	d, err := readDocument("SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([^`]+)`")
	function := regexp.MustCompile(`^([\w/-]+)\.((?:Test|Fuzz)\w+)$`)
	claims, inTable := 0, false
	for i, line := range strings.Split(d.text, "\n") {
		cells := strings.Split(line, " | ")
		switch {
		case line == "| claim | test |":
			inTable = true
			continue
		case !strings.HasPrefix(line, "|"):
			inTable = false
		}
		if !inTable || strings.HasPrefix(line, "|---") {
			continue
		}
		claims++
		tests := named.FindAllStringSubmatch(cells[len(cells)-1], -1)
		if len(cells) != 2 || len(tests) == 0 {
			t.Errorf("line %d: a claim without a test", i+1)
		}
		for _, test := range tests {
			m := function.FindStringSubmatch(test[1])
			if m == nil {
				if _, err := os.Stat(filepath.Join(root, test[1])); err != nil {
					t.Errorf("line %d: %v", i+1, err)
				}
				continue
			}
			if !hasTest(t, m[1], m[2]) {
				t.Errorf("line %d: %s has no %s", i+1, m[1], m[2])
			}
		}
	}
	if claims < 20 {
		t.Errorf("%d claims were found", claims)
	}
}

func hasTest(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "\nfunc "+name+"(") {
			return true
		}
	}
	return false
}

// security has a guest that wrote the header of an image with a backing file, a secret of the host's, to its raw disk; and an
// admin whose umask lets everybody read.
var security = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110, "net0: virtio=BC:24:11:50:6C:F3,bridge=vmbr0")
		w.do(`mkdir -m 700 %s`, repository)
		w.shell.run("umask 000")
		image := w.node.Storage + "/images/120/vm-120-disk-0.raw"
		// As long as a disk's: what qemu-img makes is a header, and no end.
		w.do(`echo confidential >/root/secret; truncate -s 8M /root/secret; mkdir -p $(dirname %[1]s)
			qemu-img create -q -f qcow2 -b /root/secret -F raw %[1]s 8M; truncate -s 8M %[1]s; cp %[1]s /root/forged.raw`, image)
		w.node.AddVM(120, "scsi0: local:120/vm-120-disk-0.raw,size=8M", "boot: order=scsi0")
		w.startVM(120)
		for _, vmid := range []int{110, 120} {
			w.socket(vmid)
			for range 2 {
				w.do(`umask 000; qmchain-backup --quiet run %d --repo %s`, vmid, repository)
			}
		}
	},
	before: map[string]func(*world){
		"Local users": func(w *world) {
			w.fleeceModes()
			// Saved bitmaps are among what others must not get at.
			w.plain("-qmp", "unix:/run/web.qmp,server=on,wait=off", "-no-shutdown")
			w.do(`umask 000
				qmchain-backup --quiet run --socket /run/web.qmp --name web --repo %s --bitmaps memory
				setsid qmchain-backup --quiet keep --socket /run/web.qmp --name web --quit >/root/keep.log 2>&1 &
				qmchain-backup --quiet keep --socket /run/web.qmp --name web --stop --quit
				compgen -G '/var/lib/qmchain/kept/web/*.qcow2'`, repository)
		},
	},
	after: map[string]func(*world){
		"A hostile repository, or somebody else's backups": func(w *world) { w.says("--scsi0", "import-from=", "format=qcow2") },
		"Local users": func(w *world) {
			if strings.TrimSpace(w.output) != "" {
				w.tb.Errorf("others can get at %s", w.output)
			}
			w.do(`test -n "$(find %s -name '*.qcow2' -perm 600)"; test -d /var/lib/qmchain`, repository)
			w.forgedHeader()
			w.drilled()
			if out := w.do(`timeout 2 qmchain-restore nbd 110/latest --repo %s --socket tcp:0.0.0.0:0 2>&1 || true`, repository); !strings.Contains(out, "everybody who can reach") {
				w.tb.Errorf("disks were served to the network without a warning: %s", out)
			}
		},
	},
}

// fleeceModes: nobody else can read a run's fleece images, which have no names any more while it copies.
func (w *world) fleeceModes() {
	out := w.do(`umask 000
		qmchain-backup --quiet run 110 --repo %s --level full --speed-limit 16MiB >/root/run.log 2>&1 & run=$!
		images() { find /proc/$(cat /run/qemu-server/110.pid)/fd -lname '/var/lib/qmchain/fleece/*.fleece (deleted)'; }
		while kill -0 $run 2>/dev/null && (($(images | wc -l) < 2)); do sleep 0.01; done
		images | xargs -r stat -L -c %%a
		wait $run`, repository)
	if modes := strings.Fields(out); !slices.Equal(modes, []string{"600", "600"}) {
		w.tb.Errorf("the modes of the fleece images of two disks: %q", modes)
	}
}

// forgedHeader: the raw disk is what the guest wrote, wherever it is seen.
func (w *world) forgedHeader() {
	w.do(`umask 000
		mkdir /var/tmp/restored /mnt/points
		qmchain-restore --quiet image 120/latest --repo %[1]s --output /var/tmp/restored
		cmp /root/forged.raw /var/tmp/restored/scsi0.raw
		test -z "$(find /var/tmp/restored -type f -perm /077)"
		qmchain-restore --quiet image 120/latest --repo %[1]s --format qcow2 --output /var/tmp/restored/b.qcow2
		qemu-img convert -f qcow2 -O raw /var/tmp/restored/b.qcow2 /var/tmp/restored/b.raw
		cmp /root/forged.raw /var/tmp/restored/b.raw
		qmchain-fuse --quiet mount %[1]s /mnt/points
		cmp /root/forged.raw /mnt/points/120/latest/scsi0.raw
		qmchain-fuse --quiet umount /mnt/points
		! grep -rq confidential /mnt/backup`, repository)
	if out := w.do(`qmchain-restore vm 120/latest --repo %s --vmid 220 --unique 2>&1 || echo "exit code $?"`, repository); !strings.Contains(out, "Proxmox VE would take it for one") {
		w.tb.Errorf("Proxmox VE was given the forged image: %s", out)
	}
}

// drilled: a point is started without a network, and with a filter of system calls.
func (w *world) drilled() {
	w.program("/root/qemu", `printf '%s\n' "$@" >/root/arguments; exec qemu-system-x86_64 "$@"`)
	w.do(`! qmchain-restore --quiet drill 110/latest --repo %s --qemu /root/qemu --until text --text never --timeout 2s`, repository)
	arguments := strings.Split(w.do(`cat /root/arguments`), "\n")
	has := func(option, value string) bool {
		for i := range len(arguments) - 1 {
			if arguments[i] == option && strings.HasPrefix(arguments[i+1], value) {
				return true
			}
		}
		return false
	}
	all := strings.Join(arguments, " ")
	if !has("-nic", "none") || !has("-sandbox", "on") {
		w.tb.Errorf("a drill's arguments: %s", all)
	}
	// The last two are in the VM's configuration.
	for _, not := range []string{"-netdev", "virtio-net", "id=qmchain"} {
		if strings.Contains(all, not) {
			w.tb.Errorf("a drill's arguments hold %s: %s", not, all)
		}
	}
}
