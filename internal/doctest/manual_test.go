package doctest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var manual = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
	},
	shown: map[string][]func(*world, string){
		"FIRST STEPS ON PROXMOX VE": {func(w *world, text string) {
			check(w.tb, os.MkdirAll("/etc/qmchain", 0o755))
			check(w.tb, os.WriteFile("/etc/qmchain/config.toml", []byte(text), 0o600))
		}},
		"OTHER QEMU GUESTS": {func(w *world, text string) { w.plain(strings.Fields(text)...) }},
		"UNITS":             {packaged("wait-for-the-share.conf")},
	},
	before: map[string]func(*world){
		"IN AN EMERGENCY": func(w *world) {
			w.example = w.points(repository, "110")[0]
			w.node.QM("stop", "110")
			w.node.QM("destroy", "110")
		},
	},
	after: map[string]func(*world){
		"FIRST STEPS ON PROXMOX VE": func(w *world) { w.levels(repository, "110", "full", "inc") },
		"OTHER QEMU GUESTS":         func(w *world) { w.levels(repository, "web", "full") },
		"IN AN EMERGENCY": func(w *world) {
			w.same(w.volume(110, "scsi0"), 110, "scsi0")
			w.same("/var/tmp/scsi0.raw", 110, "scsi0")
			w.same("/var/tmp/disk.raw", 110, "scsi0")
		},
	},
}

// packaged makes sure that what is shown is what an example of the package says.
func packaged(name string) func(*world, string) {
	return func(w *world, text string) {
		example, err := os.ReadFile(filepath.Join(root, "packaging/examples", name))
		check(w.tb, err)
		if !strings.Contains(string(example), text) {
			w.tb.Errorf("the example of the package is another one: %s", example)
		}
	}
}

// TestGuidesAreListed: whoever begins to read finds every guide.
func TestGuidesAreListed(t *testing.T) {
	t.Parallel()
	for _, from := range []string{"README.md", "packaging/man/qmchain.7"} {
		d, err := readDocument(from)
		if err != nil {
			t.Fatal(err)
		}
		for _, guide := range documents(t) {
			if name := filepath.Base(guide.name); strings.HasSuffix(name, ".md") && name != from && !strings.Contains(d.text, name) {
				t.Errorf("%s does not tell of %s", from, name)
			}
		}
	}
}
