package cli

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/cmd/internal/conf"
	"qmchain/internal/ui"
)

// TestMain is also the process that looks something up.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 || os.Args[1] != lookCommand {
		os.Exit(m.Run())
	}
	fmt.Println(strings.Join(os.Args[2:], "+"))
	if slices.Contains(os.Args, "hang") {
		time.Sleep(time.Hour)
	}
}

// What is found in time is passed on as a whole, and nothing else.
func TestSupervise(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	if code := supervise([]string{"take", ""}, &out, time.Minute); code != ui.ExitOK || out.String() != "take+\n" {
		t.Errorf("exit code %d: %q", code, out.String())
	}
	out.Reset()
	const limit = 200 * time.Millisecond
	began := time.Now()
	code := supervise([]string{"hang"}, &out, limit)
	if took := time.Since(began); code != ui.ExitOK || out.Len() > 0 || took < limit || took > 50*limit {
		t.Errorf("exit code %d: %q after %s", code, out.String(), took)
	}
}

func TestLook(t *testing.T) {
	t.Parallel()
	var g struct {
		Common
		Take struct {
			Repo  string   `required:"" env:"QMCHAIN_REPO" placeholder:"DIR" help:"Where. It is a folder."`
			Level string   `enum:"full,inc" default:"inc" help:"How."`
			Log   string   `short:"l" placeholder:"FILE" help:"Where to say so."`
			All   bool     `short:"a" negatable:"" help:"All."`
			Disk  []string `placeholder:"D" help:"Which."`
			Mail  string   `placeholder:"ADDR" complete:"none" help:"To whom."`
			Guest []string `arg:"" optional:"" help:"Which."`
		} `cmd:"" help:"Take it. Now."`
		Put struct {
			Guest string `arg:"" help:"Which."`
			Path  string `arg:"" help:"Where to."`
		} `cmd:"" help:"Put it."`
		Hidden struct{} `cmd:"" hidden:"" help:"Not told."`
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte("repo = \"~/configured\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := Program{Name: "sample", Grammar: &g, Common: &g.Common, Explain: func(err error) error { return err }, Complete: Sources{
		"guest": func(l *Line) []Offer {
			return []Offer{{"web", "a\nserver"}, {"mail", ""}, {"at/", ""}, {"$(id)", ""}, {"w b", ""}, {"w;\x1b", ""}, {"/repo", l.Repo() + "\x1b[2J"}}
		},
		"d": func(l *Line) []Offer {
			return []Offer{{"of-" + strings.Join(l.Args, "+"), ""}, {"log-" + l.Flag("log"), ""}}
		},
	}}
	for _, c := range []struct{ line, want string }{
		{"", "take - Take it; put - Put it"},
		{"t", "take - Take it"},
		{"-q t", "take - Take it"},
		{"x", ""},
		{"none w", ""},
		{"take --le", "--level - How"},
		{"take --re", "--repo - Where"},
		{"take --repo x --re", ""}, // once is enough
		{"take --disk x --di", "--disk - Which"},
		{"take --no", "--no-all"},
		{"take --level ", "full; inc"},
		{"take --level=", "--level=full; --level=inc"},
		{"take --level=f", "--level=full"},
		{"take --nothing=f", ""},
		{"take --all=f", ""},
		{"take --repo ", ":dir"},
		{"take --repo=/m", ":dir"},
		{"take -l ", ":file"},
		{"take -al ", ":file"},
		{"take --mail ", ""},
		{"take w", "web - a server"},
		{"take web m", "mail"},
		{"take -a web m", "mail"},
		{"take -lfile m", "mail"},
		{"take -- m", "mail"},
		{"take -- --le", ""},
		{"take a", "at/; :nospace"},
		{"take $", ""}, // which a shell would take for more than a name
		{"take /", "/repo - /environment [2J"},
		{"take --repo ~/given /", "/repo - /home/given [2J"},
		{`take --repo='/a\b' /`, `/repo - /a\b [2J`},
		{`take --repo "/a\"b" /`, `/repo - /a"b [2J`},
		{`take --repo /a\$b /`, `/repo - /a$b [2J`},
		{"take 110 111 --disk ", "of-110+111; log-"},
		{"take -l x 110 --disk=of", "--disk=of-110"},
		{"take -lx 110 --disk l", "log-x"},
		{"put w", "web - a server"},
		{"put web ", ":file"},
		{"put web /tmp ", ""},
	} {
		getenv := func(name string) string {
			return map[string]string{"QMCHAIN_REPO": "/environment", "HOME": "/home"}[name]
		}
		var out, errs bytes.Buffer
		args := append([]string{lookCommand}, strings.Split(c.line, " ")...)
		code := p.Run(t.Context(), args, Env{&out, &errs, getenv, config})
		got := strings.NewReplacer("\n", "; ", "\t", " - ").Replace(strings.TrimSuffix(out.String(), "\n"))
		if got != c.want || code != ui.ExitOK || errs.Len() > 0 {
			t.Errorf("%q: %q, want %q; exit code %d, %s", c.line, got, c.want, code, errs.String())
		}
	}
}

func TestLineRepo(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte("repo = \"~/configured\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := conf.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	l := &Line{flags: map[string]string{}, getenv: func(name string) string { return map[string]string{"HOME": "/root"}[name] }, config: file}
	if got := l.Repo(); got != "/root/configured" {
		t.Errorf("configured: %q", got)
	}
	l.config = nil
	if got := l.Repo(); got != "" {
		t.Errorf("none: %q", got)
	}
}
