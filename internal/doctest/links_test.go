package doctest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLinks: what is linked to is there, the section too, and the manual pages that are named.
func TestLinks(t *testing.T) {
	t.Parallel()
	link := regexp.MustCompile(`\]\(([^)#]*)(?:#([^)]*))?\)`)
	page := regexp.MustCompile(`\b(qmchain[a-z.-]*)\(([0-9])\)`)
	n := 0
	for _, d := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(d.text, -1) {
			if strings.HasPrefix(m[1], "https://") {
				continue
			}
			n++
			name := d.name
			if m[1] != "" {
				name = filepath.Join(filepath.Dir(d.name), m[1])
			}
			text, err := os.ReadFile(filepath.Join(root, name))
			if err != nil {
				t.Errorf("%s: %v", d.name, err)
				continue
			}
			if m[2] != "" && !(document{text: string(text)}).anchors()[m[2]] {
				t.Errorf("%s: %s has no section #%s", d.name, name, m[2])
			}
		}
		for _, m := range page.FindAllStringSubmatch(d.text, -1) {
			if _, err := os.Stat(filepath.Join(root, "packaging/man", m[1]+"."+m[2])); err != nil {
				t.Errorf("%s: %v", d.name, err)
			}
		}
	}
	if n < 20 {
		t.Errorf("%d links were found", n)
	}
}

var notInAnchors = regexp.MustCompile(`[^\p{L}\p{N} _-]`)

// anchors are the names by which the headings can be linked to.
func (d document) anchors() map[string]bool {
	anchors := map[string]bool{}
	for section := range d.sections() {
		anchors[strings.ReplaceAll(notInAnchors.ReplaceAllString(strings.ToLower(section), ""), " ", "-")] = true
	}
	return anchors
}
