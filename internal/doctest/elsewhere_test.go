package doctest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// place is where a command is run that a sandbox can't run: a script, with the command in it as it is written, or as text.
type place struct{ script, text string }

var elsewhere = map[string]place{
	"systemctl start qmchain-keep@110.service": {"packaging/test/units.sh", ""},
	"make setup":                        {"Makefile", "test: setup"},
	"make demo":                         {"Makefile", "$(MAKE) --no-print-directory demo"}, // of make test
	"make deb":                          {"packaging/test/run.sh", ""},
	"apt install ./qmchain_*_amd64.deb": {"packaging/test/install.sh", ""},
	"cp dist/qmchain_*_amd64.deb /mnt/backup/":                                                   {"packaging/test/install.sh", ""},
	"apt install ./dist/qmchain_*_amd64.deb":                                                     {"packaging/test/install.sh", ""},
	"systemctl enable --now qmchain-backup-all.timer qmchain-prune.timer":                        {"packaging/test/units.sh", ""},
	"systemctl enable --now qmchain-verify.timer qmchain-check.timer":                            {"packaging/test/units.sh", ""},
	"mkdir -p /etc/systemd/system/qmchain-.service.d":                                            {"packaging/test/units.sh", ""},
	"cp /usr/share/doc/qmchain/examples/on-failure.conf /etc/systemd/system/qmchain-.service.d/": {"packaging/test/units.sh", ""},
	"cp /usr/share/doc/qmchain/examples/backup-failed@.service /etc/systemd/system/":             {"packaging/test/units.sh", ""},
	"systemctl daemon-reload":                                                                    {"packaging/test/units.sh", ""},
}

// TestElsewhere: what is not run here is run there, as it is written.
func TestElsewhere(t *testing.T) {
	t.Parallel()
	used := map[string]bool{}
	for _, d := range documents(t) {
		for _, b := range d.blocks {
			if b.language != "sh" {
				continue
			}
			for _, c := range b.commands() {
				used[withoutComment(c)] = true
			}
		}
	}
	for command, at := range elsewhere {
		if !used[command] {
			t.Errorf("%q is in no document", command)
		}
		wanted := at.text
		if wanted == "" {
			wanted = command
		}
		text, err := os.ReadFile(filepath.Join(root, at.script))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			found = found || !strings.HasPrefix(line, "#") && strings.Contains(line, wanted)
		}
		if !found {
			t.Errorf("%s does not run %q", at.script, wanted)
		}
	}
}
