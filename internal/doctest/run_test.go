package doctest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"qmchain/internal/testenv"
)

// scenario is what the reader of a document has.
type scenario struct {
	// start makes the machine.
	start func(*world)
	// before is what happens before a section, after what must be true when its commands have run.
	before, after map[string]func(*world)
	// shown compares what a section's blocks of text show, in their order.
	shown map[string][]func(w *world, text string)
	// codes are the exit codes of commands that are not 0.
	codes map[string]int
}

// scenarios are those of all documents that have examples.
var scenarios = map[string]scenario{
	"README.md":                        readme,
	"SECURITY.md":                      security,
	"packaging/doc/backup.md":          backup,
	"packaging/doc/clusters.md":        clusters,
	"packaging/doc/migration.md":       migration,
	"packaging/doc/monitoring.md":      monitoring,
	"packaging/doc/offsite.md":         offsite,
	"packaging/doc/recovery.md":        recovery,
	"packaging/doc/repository.md":      repositories,
	"packaging/doc/restore.md":         restore,
	"packaging/doc/troubleshooting.md": troubleshooting,
	"packaging/man/qmchain.7":          manual,
}

// TestDocuments runs every command of every document.
func TestDocuments(t *testing.T) {
	t.Parallel()
	docs := documents(t)
	programs := t.TempDir()
	// They are built here: the result of this test is not one to keep when they have changed, so it looks at all of the code.
	sources(t)
	testenv.Output(t, filepath.Join(root, "internal/testenv/go.sh"), "build", "-o", programs+"/", "qmchain/cmd/...")
	for name := range scenarios {
		if _, err := readDocument(name); err != nil {
			t.Errorf("a scenario without its document: %v", err)
		}
	}
	flags(t, docs, programs)
	for _, d := range docs {
		t.Run(filepath.Base(d.name), func(t *testing.T) {
			t.Parallel()
			s, known := scenarios[d.name]
			if !known {
				if len(d.blocks) > 0 {
					t.Fatalf("%s has examples, and no scenario runs them", d.name)
				}
				return
			}
			s.check(t, d)
			sandbox(t, d.name, programs)
		})
	}
}

// check finds what a scenario says of what is not in its document any more.
func (s scenario) check(t *testing.T, d document) {
	t.Helper()
	sections := map[string]bool{}
	texts := map[string]int{}
	commands := map[string]bool{}
	for _, b := range d.blocks {
		sections[b.section] = true
		switch b.language {
		case "text":
			texts[b.section]++
		case "sh":
			for _, c := range b.commands() {
				commands[withoutComment(c)] = true
			}
		}
	}
	for _, of := range []map[string]func(*world){s.before, s.after} {
		for section := range of {
			if !sections[section] {
				t.Errorf("%s has no section %q with examples", d.name, section)
			}
		}
	}
	for section, n := range texts {
		if n != len(s.shown[section]) {
			t.Errorf("%s, %q: %d blocks of text, and %d are compared with anything", d.name, section, n, len(s.shown[section]))
		}
	}
	for section := range s.shown {
		if texts[section] == 0 {
			t.Errorf("%s has no text in a section %q", d.name, section)
		}
	}
	for command := range s.codes {
		if !commands[command] {
			t.Errorf("%s has no command %q", d.name, command)
		}
	}
}

// run runs a document from top to bottom.
func run(tb testing.TB, d document, s scenario) {
	w := newWorld(tb)
	if s.start != nil {
		s.start(w)
	}
	texts := map[string]int{}
	section := ""
	finish := func() {
		if f := s.after[section]; f != nil {
			f(w)
		}
	}
	for _, b := range d.blocks {
		if b.section != section {
			finish()
			section = b.section
			if f := s.before[section]; f != nil {
				f(w)
			}
		}
		switch b.language {
		case "sh":
			for _, command := range b.commands() {
				w.command(d.name, section, command, s.codes)
			}
		case "toml":
			w.settings(d.name, b)
		case "text":
			s.shown[section][texts[section]](w, b.text)
			texts[section]++
		case "fstab":
			w.appendFile("/etc/fstab", b.text)
		}
	}
	finish()
}

// command runs one, as it stands there but for the names of points.
func (w *world) command(name, section, command string, codes map[string]int) {
	bare := withoutComment(command)
	if bare == "" {
		return
	}
	if _, known := elsewhere[bare]; known {
		return // see TestElsewhere
	}
	began := time.Now()
	code, output := w.shell.run(w.real(command))
	w.tb.Logf("%s, %s (%v, exit code %d):\n$ %s\n%s", name, section, time.Since(began).Round(time.Millisecond), code, command, output)
	if code != codes[bare] {
		w.tb.Fatalf("%s: exit code %d, want %d", bare, code, codes[bare])
	}
	w.output = output
}

// The points that the documents have for any. The second is only seen, in the picture of the mount.
const (
	exampleID     = "20261117T020000Z-3f9c"
	nextExampleID = "20261118T020000Z-77b0"
)

var anyID = regexp.MustCompile(`\d{8}T\d{6}Z-[0-9a-f]{4}`)

// real puts the name of a point that is there, of the guest of which the scenario says so, in the place of the example's.
func (w *world) real(command string) string {
	for _, id := range anyID.FindAllString(command, -1) {
		if id != exampleID {
			w.tb.Fatalf("%s: examples have the point %s", command, exampleID)
		}
		if w.example == "" {
			w.tb.Fatalf("%s: no point is there to stand for it", command)
		}
	}
	return strings.ReplaceAll(command, exampleID, w.example)
}

// settings writes the file that the first line names.
func (w *world) settings(name string, b block) {
	first, _, _ := strings.Cut(b.text, "\n")
	path := strings.TrimPrefix(first, "# ")
	if !filepath.IsAbs(path) {
		w.tb.Fatalf("%s, line %d: the first line must name the file", name, b.line)
	}
	check(w.tb, os.MkdirAll(filepath.Dir(path), 0o755))
	check(w.tb, os.WriteFile(path, []byte(b.text), 0o600))
}

func (w *world) appendFile(path, text string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	check(w.tb, err)
	_, err = f.WriteString(text)
	check(w.tb, err)
	check(w.tb, f.Close())
}

// commands are the commands of a block: lines, and those that go on over several.
func (b block) commands() []string {
	var commands []string
	command := ""
	for line := range strings.Lines(b.text) {
		command += line
		if strings.HasSuffix(command, "\\\n") || exec.Command("bash", "-n", "-c", command).Run() != nil {
			continue
		}
		commands = append(commands, strings.TrimSuffix(command, "\n"))
		command = ""
	}
	if command != "" {
		commands = append(commands, command) // bash will say what is wrong with it
	}
	return commands
}
