package doctest

import (
	"encoding/json"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"qmchain/internal/testenv"
)

// program is what a program says of its own command line (--describe).
type program struct {
	Name     string `json:"name"`
	Flags    []flag `json:"flags"`
	Commands []struct {
		Name  string `json:"name"`
		Flags []flag `json:"flags"`
	} `json:"commands"`
}

type flag struct {
	Name string `json:"name"`
}

// othersFlags are those in the documents that are other programs'.
var othersFlags = []string{
	"--target", "--include-raw", "--no-timestamp", "--monthly", "--exclude", "--include", "--quiesce", "--no-sparse-detection",
}

var (
	inlineCode = regexp.MustCompile("`([^`\n]+)`")
	fenced     = regexp.MustCompile("(?ms)^```.*?^```$")
)

// flags makes sure that the commands and flags that are named in running text are there.
func flags(t *testing.T, docs []document, programs string) {
	t.Helper()
	known := map[string][]string{} // of "PROGRAM COMMAND", and of "" for all
	paths, err := filepath.Glob(filepath.Join(programs, "qmchain-*"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("%q, %v", paths, err)
	}
	for _, path := range paths {
		var p program
		if err := json.Unmarshal([]byte(testenv.Output(t, path, "--describe")), &p); err != nil {
			t.Fatal(err)
		}
		add := func(command string, flags []flag) {
			for _, f := range flags {
				known[command] = append(known[command], "--"+f.Name)
				known[""] = append(known[""], "--"+f.Name)
			}
		}
		add(p.Name, p.Flags)
		for _, c := range p.Commands {
			add(p.Name+" "+c.Name, slices.Concat(p.Flags, c.Flags))
		}
	}
	n := 0
	for _, d := range docs {
		for _, m := range inlineCode.FindAllStringSubmatch(fenced.ReplaceAllString(d.text, ""), -1) {
			words := strings.Fields(m[1])
			command := ""
			if strings.HasPrefix(words[0], "qmchain-") && !strings.Contains(words[0], ".") {
				if command = strings.Join(words[:min(2, len(words))], " "); len(words) > 1 && known[command] == nil {
					t.Errorf("%s: `%s`: there is no such command", d.name, m[1])
					continue
				}
			} else if !strings.HasPrefix(words[0], "--") {
				continue
			}
			for _, word := range words {
				name, _, _ := strings.Cut(word, "=")
				if !strings.HasPrefix(name, "--") || command == "" && slices.Contains(othersFlags, name) {
					continue
				}
				n++
				if !slices.Contains(known[command], name) {
					t.Errorf("%s: `%s`: there is no %s", d.name, m[1], name)
				}
			}
		}
	}
	if n < 50 {
		t.Errorf("%d flags were found", n)
	}
}
