package doctest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"qmchain/internal/testenv"
)

// TestLinks: what is linked to is there, the section too, and the manual pages that are named.
func TestLinks(t *testing.T) {
	t.Parallel()
	page := regexp.MustCompile(`\b(qmchain[a-z.-]*)\(([0-9])\)`)
	n := 0
	for _, page := range []string{"ARCHITECTURE.md", "BENCHMARKS.md", "CONTRIBUTING.md"} {
		n += links(t, root, page)
	}
	for _, d := range documents(t) {
		n += links(t, root, d.name)
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

// TestInstalledLinks: nor does a link lead nowhere in the folder that the package has for documents.
func TestInstalledLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	testenv.Output(t, filepath.Join(root, "packaging/docs.sh"), dir)
	pages, err := filepath.Glob(filepath.Join(dir, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, page := range pages {
		n += links(t, dir, filepath.Base(page))
	}
	if len(pages) < 10 || n < 20 {
		t.Errorf("%d links were found in %d pages", n, len(pages))
	}
}

var link = regexp.MustCompile(`\]\(([^)#]*)(?:#([^)]*))?\)`)

// links makes sure that a page's links lead to something, and says how many there are. Links to the web don't count.
func links(t *testing.T, dir, page string) (n int) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, page))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range link.FindAllStringSubmatch(string(text), -1) {
		if strings.HasPrefix(m[1], "https://") {
			continue
		}
		n++
		to := page
		if m[1] != "" {
			to = filepath.Join(filepath.Dir(page), m[1])
		}
		text, err := os.ReadFile(filepath.Join(dir, to))
		if err != nil {
			t.Errorf("%s: %v", page, err)
			continue
		}
		if m[2] != "" && !(document{text: string(text)}).anchors()[m[2]] {
			t.Errorf("%s: %s has no section #%s", page, to, m[2])
		}
	}
	return n
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
