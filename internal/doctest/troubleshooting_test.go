package doctest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var troubleshooting = scenario{
	start: func(w *world) {
		w.proxmox()
		w.addVM(110)
		w.backups(110, 1)
	},
}

// TestErrorTexts: what the guide quotes is what the programs say.
func TestErrorTexts(t *testing.T) {
	t.Parallel()
	d, err := readDocument("packaging/doc/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for _, text := range sources(t) {
		said.WriteString(text)
	}
	all := said.String()
	quoted := regexp.MustCompile("`([^`]+)`")
	n := 0
	for i, line := range strings.Split(d.text, "\n") {
		reason := strings.HasPrefix(line, "- `") && strings.Contains(line, "`: ")
		if !reason && !strings.HasPrefix(line, "### ") || strings.Contains(line, "Could not apply snapshot") {
			continue // the last is Proxmox VE's
		}
		texts := quoted.FindAllStringSubmatch(line, -1)
		if reason {
			texts = texts[:1]
		}
		if len(texts) == 0 {
			t.Errorf("line %d: no text", i+1)
		}
		for _, text := range texts {
			for _, part := range strings.Split(text[1], "…") {
				if part = strings.TrimSpace(part); len(part) < 3 {
					continue
				}
				n++
				if !strings.Contains(all, part) {
					t.Errorf("line %d: nothing says %q", i+1, part)
				}
			}
		}
	}
	if n < 30 {
		t.Errorf("%d texts were found", n)
	}
}

// sources are the module's Go files other than tests, and the scripts that are installed, by name.
func sources(t testing.TB) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, dir := range []string{"backup", "chain", "cmd", "fusefs", "hooks", "internal", "packaging/snippets", "proxmox", "qmp"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, entry os.DirEntry, err error) error {
			if err != nil || entry.IsDir() || strings.HasSuffix(path, "_test.go") || filepath.Ext(path) != ".go" && dir != "packaging/snippets" {
				return err
			}
			text, err := os.ReadFile(path)
			texts[path] = string(text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(texts) < 100 {
		t.Fatalf("%d source files only", len(texts))
	}
	return texts
}
