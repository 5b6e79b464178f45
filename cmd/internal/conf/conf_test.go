package conf

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"qmchain/internal/ui"
)

type grammar struct {
	Verbose bool
	Run     struct {
		Repo     string `env:"QMCHAIN_TEST_REPO"`
		Jobs     int    `default:"1"`
		Compress string `enum:"zstd,none" default:"none"`
		Wait     time.Duration
		Exclude  []string
		Level    string
		All      bool `conf:"no"`
		Within   bool `hidden:""`
		Direct   bool
	} `cmd:""`
	Prune struct {
		Repo     string
		KeepLast int
	} `cmd:""`
}

var scope = Scope{"backup": {"run"}, "prune": {"prune"}}

// parse reads a command line with a file of that text in effect.
func parse(t *testing.T, text, guest string, args ...string) (*grammar, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Find(path, "")
	if err != nil {
		return nil, err
	}
	r := f.Resolver(scope, guest)
	var g grammar
	parser, err := kong.New(&g, kong.Resolvers(r), kong.Exit(func(int) { t.Error("exit") }))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = parser.Parse(args); err != nil {
		err = r.Explain(err)
	}
	return &g, err
}

const example = `
repo = "/mnt/a"
verbose = true

[backup]
jobs = 2
wait = "5s"
exclude = [120, "121,5"]
compress = "zstd"
level = "inc"

[guest.110]
compress = "none"
direct = true

[guest.web]
repo = "/mnt/web"

[prune]
keep-last = 3

[hook]
anything = "is for another program"
`

func TestValues(t *testing.T) {
	g, err := parse(t, example, "110", "run", "--level", "full")
	if err != nil {
		t.Fatal(err)
	}
	r := g.Run
	if !g.Verbose || r.Repo != "/mnt/a" || r.Jobs != 2 || r.Compress != "none" || r.Wait != 5*time.Second || r.Level != "full" || !r.Direct ||
		strings.Join(r.Exclude, "|") != "120|121,5" {
		t.Errorf("%+v", g)
	}
	if g, err = parse(t, example, "web", "run"); err != nil || g.Run.Repo != "/mnt/web" || g.Run.Compress != "zstd" || g.Run.Level != "inc" {
		t.Errorf("%+v, %v", g, err)
	}
	if g, err = parse(t, example, "110", "prune"); err != nil || g.Prune.Repo != "/mnt/a" || g.Prune.KeepLast != 3 {
		t.Errorf("%+v, %v", g, err)
	}
	t.Setenv("QMCHAIN_TEST_REPO", "/mnt/env")
	if g, err = parse(t, example, "web", "run"); err != nil || g.Run.Repo != "/mnt/env" {
		t.Errorf("the environment: %+v, %v", g, err)
	}
	if g, err = parse(t, example, "web", "run", "--repo", "/mnt/flag"); err != nil || g.Run.Repo != "/mnt/flag" {
		t.Errorf("the command line: %+v, %v", g, err)
	}
}

func TestMistakes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ text, want string }{
		{"repo = ", "config.toml:1:"},
		{"[backup]\njobs = 1\njobs = 2", "config.toml:3:"},
		{"jobs = 1", "config.toml: jobs: before the first section"},
		{"[bakup]\njobs = 1", "no program has a section [bakup]"},
		{"[backup]\njob = 1", "[backup]: job: there is no flag --job"},
		{"[backup]\nkeep-last = 1", "[backup]: keep-last: there is no flag"},
		{"[backup]\nall = true", "--all is for the command line only"},
		{"[backup]\nwithin = true", "[backup]: within: there is no flag"},
		{"[guest.110]\njob = 1", "[guest.110]: job: there is no flag"},
		{"[guest]\njobs = 1", "guest.jobs: guests have sections of their own"},
		{"[prune]\njobs = 1", "[prune]: jobs: there is no flag"},
		{"[backup]\njobs = \"two\"", "config.toml: [backup]: jobs: "},
		{"[backup]\nwait = 5", "config.toml: [backup]: wait: "},
		{"[backup]\ncompress = \"lzma\"", "config.toml: [backup]: compress: "},
		{"[guest.110]\ncompress = \"lzma\"", "config.toml: [guest.110]: compress: "},
		{"[backup]\nwait = 2026-11-20", "wait: its value is neither"},
		{"[backup.run]\njobs = 1", "[backup]: run: there is no flag"},
		{"[backup]\nexclude = [[1]]", "a list in a list"},
	} {
		if _, err := parse(t, test.text, "110", "run"); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v, want %q", test.text, err, test.want)
		}
	}
}

// What is misspelt is met with what may have been meant.
func TestHints(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"[bakup]\njobs = 1":            "did you mean backup?",
		"rpeo = \"/mnt\"":              "did you mean repo?",
		"[backup]\ncompres = \"zstd\"": "did you mean compress?",
		"[guest.110]\njob = 1":         "did you mean jobs?",
		"[backup]\nal = true":          "`man qmchain.toml` tells what can stand there", // all has no place in it
	} {
		if _, err := parse(t, text, "110", "run"); ui.HintOf(err) != want {
			t.Errorf("%q: %v: %q, want %q", text, err, ui.HintOf(err), want)
		}
	}
}

func TestFind(t *testing.T) {
	t.Parallel()
	none := filepath.Join(t.TempDir(), "none")
	if f, err := Find("", none); f != nil || err != nil {
		t.Errorf("no file: %v, %v", f, err)
	}
	if f, err := Find("", ""); f != nil || err != nil {
		t.Errorf("no place: %v, %v", f, err)
	}
	if _, err := Find(none, ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is named and not there: %v", err)
	}
	if _, err := Find(t.TempDir(), ""); err == nil {
		t.Error("a folder was read")
	}
}
