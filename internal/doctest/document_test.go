package doctest

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const root = "../.."

// document is a file, as far as it is run.
type document struct {
	name   string // relative to the module
	text   string
	blocks []block
}

// block is an example in a document.
type block struct {
	section  string // the heading it stands under
	language string // sh, toml, text, fstab
	text     string
	line     int // of its first line, from 1
}

// documents are all that are run, by the order of reading.
func documents(t testing.TB) []document {
	t.Helper()
	names := []string{"README.md", "SECURITY.md", "packaging/man/qmchain.7"}
	guides, err := filepath.Glob(filepath.Join(root, "packaging/doc/*.md"))
	if err != nil || len(guides) == 0 {
		t.Fatalf("no guides: %v", err)
	}
	for _, path := range guides {
		name, err := filepath.Rel(root, path)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	var docs []document
	for _, name := range names {
		d, err := readDocument(name)
		if err != nil {
			t.Fatal(err)
		}
		docs = append(docs, d)
	}
	return docs
}

func readDocument(name string) (document, error) {
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		return document{}, err
	}
	d := document{name: name, text: string(text)}
	if strings.HasSuffix(name, ".md") {
		d.blocks, err = markdownBlocks(d.text)
	} else {
		d.blocks = manualBlocks(d.text)
	}
	if err != nil {
		return document{}, fmt.Errorf("%s: %w", name, err)
	}
	return d, nil
}

// markdownBlocks are the fenced blocks. Each must say its language.
func markdownBlocks(text string) ([]block, error) {
	var blocks []block
	var open *block
	section := ""
	for i, line := range strings.Split(text, "\n") {
		fence := strings.HasPrefix(line, "```")
		switch {
		case open != nil && fence:
			blocks = append(blocks, *open)
			open = nil
		case open != nil:
			open.text += line + "\n"
		case fence:
			open = &block{section: section, language: strings.TrimPrefix(line, "```"), line: i + 2}
			switch open.language {
			case "sh", "toml", "text", "fstab":
			default:
				return nil, fmt.Errorf("line %d: a block's language must be sh, toml, text or fstab, not %q", i+1, open.language)
			}
		case strings.HasPrefix(line, "#"):
			section = strings.TrimSpace(strings.TrimLeft(line, "#"))
		case strings.Contains(line, "```"):
			return nil, fmt.Errorf("line %d: a block that does not begin at the margin", i+1)
		}
	}
	if open != nil {
		return nil, fmt.Errorf("line %d: a block without an end", open.line)
	}
	return blocks, nil
}

// manualBlocks are the parts of a manual page that are printed as they are: commands if the first line has a prompt.
func manualBlocks(text string) []block {
	plain := strings.NewReplacer(`\-`, "-", `\e`, `\`, `\&`, "")
	var blocks []block
	var open *block
	section := ""
	for i, line := range strings.Split(text, "\n") {
		switch {
		case line == ".nf":
			open = &block{section: section, language: "text", line: i + 2}
		case line == ".fi" && open != nil:
			blocks = append(blocks, *open)
			open = nil
		case open != nil && !strings.HasPrefix(line, "."):
			line = plain.Replace(line)
			command, prompt := strings.CutPrefix(line, "# ")
			if !prompt {
				command, prompt = strings.CutPrefix(line, "$ ")
			}
			if prompt && open.text == "" {
				open.language = "sh"
			}
			open.text += command + "\n"
		case strings.HasPrefix(line, ".SH "):
			section = strings.TrimPrefix(line, ".SH ")
		}
	}
	return blocks
}

// sections are a Markdown document's headings.
func (d document) sections() map[string]bool {
	sections := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^(?:#+|\.SH) (.*)$`).FindAllStringSubmatch(d.text, -1) {
		sections[m[1]] = true
	}
	return sections
}

var trailingComment = regexp.MustCompile(`(^|\s+)#\s.*$`)

// withoutComment is a command without the remark after it. No command here has a "# " that is none.
func withoutComment(line string) string {
	return strings.TrimSpace(trailingComment.ReplaceAllString(line, ""))
}
