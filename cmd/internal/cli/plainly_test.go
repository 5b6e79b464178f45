package cli

import (
	"bytes"
	"context"
	"io/fs"
	"strings"
	"syscall"
	"testing"
	"time"

	"qmchain/internal/ui"
)

type plainGrammar struct {
	Common
	Take plainTake `cmd:"" help:"Take one."`
	Drop struct{}  `cmd:"" help:"Drop one."`
}

type plainTake struct {
	Note  string        `short:"m" placeholder:"TEXT" help:"A note. Default: none."`
	Jobs  int           `default:"3" placeholder:"N" help:"How many at a time."`
	Wait  time.Duration `default:"10s" placeholder:"TIME" help:"How long to wait."`
	Age   time.Duration `positive:"" default:"26h" placeholder:"TIME" help:"How old. Default: a day and a bit."`
	Dir   string        `placeholder:"DIR" env:"PLAIN_DIR" help:"Where."`
	All   bool          `help:"All."`
	Guest string        `arg:"" help:"Which."`
}

func (*plainTake) Run(context.Context) error { return nil }

func plainRun(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var g plainGrammar
	var out, errs bytes.Buffer
	p := Program{Name: "sample", Description: "Does things.", Grammar: &g, Common: &g.Common, Explain: func(err error) error { return err }}
	code = p.Run(t.Context(), args, Env{&out, &errs, func(string) string { return "" }, ""})
	return code, out.String(), errs.String()
}

func TestWrongCommandLines(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"take a --note":        "--note needs a value\n",
		"take a -m":            "--note needs a value\n",
		"take a --note --all":  `--note needs a value, and "--all" looks like a flag: --note=--all takes it for the value`,
		"take a --note -foo":   `--note needs a value, and "-foo" looks like a flag: --note=-foo takes it for the value`,
		"take a --jobs -1":     `--jobs: "-1" is less than nothing` + "\n",
		"take a --jobs x":      `--jobs: "x" is no whole number` + "\n",
		"take a --jobs=":       `--jobs: "" is no whole number` + "\n",
		"take a --all=perhaps": `--all: "perhaps" is neither true nor false` + "\n",
		"take a -x":            "unknown flag -x\n",
		"take a --noet x":      `unknown flag --noet, did you mean "--note"?`,
		"take a --wait 1":      `--wait: "1" has no unit: is it 1s, 1m, 1h or 1d?`,
		"take a --wait 1y":     `--wait: "1y" is no time, as 90s, 10m, 26h, 1h30m, 7d and 2w are`,
		"take a --wait -1s":    `--wait: "-1s" is less than nothing`,
		"take a --wait=-1s":    `--wait: "-1s" is less than nothing`,
		"take a --wait":        "--wait needs a value\n",
		"take a --age 0s":      `--age: "0s" must be more than 0`,
		"take":                 "guest is missing\n",
		"":                     `a command is missing: one of "take"`,
	} {
		code, _, stderr := plainRun(t, strings.Fields(line)...)
		if code != ui.ExitUsage || !strings.Contains(stderr, "error: "+want) || !strings.Contains(stderr, "\nhint: ") {
			t.Errorf("%s: exit code %d, %q; want %q", line, code, stderr, want)
		}
	}
	for _, line := range []string{"take a --wait 0", "take a --wait 1d12h", "take a --age 2w", "take a --note=-foo"} {
		if code, _, stderr := plainRun(t, strings.Fields(line)...); code != ui.ExitOK {
			t.Errorf("%s: exit code %d, %q", line, code, stderr)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"help":           "Exit codes:",
		"help --all":     "Exit codes:",
		"help take":      "How many at a time. (default 3)",
		"help take more": "Usage: sample take",
		"take --help":    "How long to wait. (default 10s)",
		"take -h":        "How old. Default: a day and a bit.\n",
		"help drop":      "Drop one.",
	} {
		code, stdout, stderr := plainRun(t, strings.Fields(line)...)
		if code != ui.ExitOK || !strings.Contains(stdout, want) || stderr != "" {
			t.Errorf("%s: exit code %d, %q, %s", line, code, stderr, stdout)
		}
	}
	if code, _, stderr := plainRun(t, "help", "tak"); code != ui.ExitUsage || !strings.Contains(stderr, `did you mean "take"`) {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

// full is a standard output that takes nothing.
type full struct{ err error }

func (f full) Write([]byte) (int, error) { return 0, f.err }

// Who reads help may have seen enough; that it was not shown at all is an error.
func TestHelpIsCutOff(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]int{syscall.EPIPE: ui.ExitOK, syscall.ENOSPC: ui.ExitFailed} {
		for _, arg := range []string{"--help", "--version", "--describe"} {
			var g plainGrammar
			var errs bytes.Buffer
			p := Program{Name: "sample", Grammar: &g, Common: &g.Common, Explain: func(err error) error { return err }}
			env := Env{full{&fs.PathError{Op: "write", Path: "/dev/stdout", Err: err}}, &errs, func(string) string { return "" }, ""}
			if code := p.Run(t.Context(), []string{arg}, env); code != want || (code == ui.ExitOK) != (errs.String() == "") {
				t.Errorf("%s, %v: exit code %d, %q", arg, err, code, errs.String())
			}
		}
	}
}
