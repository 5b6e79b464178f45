// Package clitest holds programs' command lines to what all of them have in common. It is for tests.
package clitest

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strings"

	"qmchain/cmd/internal/cli"
)

// TB is what the package needs of a test.
type TB interface {
	Helper()
	Context() context.Context
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
}

// command is what a program says of one of its commands with --describe, or of itself.
type command struct {
	Name        string
	Help        string
	Flags, Args []value
	Examples    []cli.Example
	Commands    []command
}

type value struct {
	Name, Help string
	Config     bool // it can stand in the configuration file
}

// settings are the flags that can stand in the configuration file, by section: what holds for every night and every restore
// alike. A flag that says what is to be done just now is tagged conf:"no" instead: in the file --dry-run would keep a timer from
// ever removing anything, and --force have every restore go over what is there.
var settings = map[string][]string{
	"backup": {
		"aio", "bitmaps", "cbw-timeout", "cluster-size", "compress", "direct", "disk", "disk-jobs", "exclude", "exclude-disk", "fleece-dir",
		"fleece-limit", "freeze-fs", "freeze-timeout", "jobs", "keep-dir", "level", "limit", "lock-wait", "mail-to", "mail-when",
		"metrics-file", "name", "new-chain", "no-fleece", "no-freeze", "pause", "repo", "report", "speed-limit", "threshold",
	},
	"check":   {"exclude", "max-age", "repo"},
	"fuse":    {"allow-other", "journal", "metrics-file", "options", "repo", "timeout"},
	"hook":    {"keep", "post-start-backup", "post-stop-backup", "pre-stop-backup", "pre-stop-limit", "vzdump-wait"},
	"prune":   {"keep-all", "keep-daily", "keep-hourly", "keep-last", "keep-monthly", "keep-weekly", "keep-yearly", "lock-wait", "rate-limit", "repo"},
	"restore": {"accel", "compress", "cpu", "cpus", "deep", "firmware", "format", "jobs", "machine", "max-age", "memory", "qemu", "repo", "staging", "storage", "text", "timeout", "until", "verify"},
}

// Check sees that every command has examples, that they can be typed as they are, that help texts are sentences, and that the
// configuration file takes settings alone.
func Check(tb TB, p cli.Program) {
	tb.Helper()
	var described, stderr bytes.Buffer
	p.Run(tb.Context(), []string{"--describe"}, cli.Env{Stdout: &described, Stderr: &stderr, Getenv: func(string) string { return "" }})
	var program struct {
		command
		Config map[string][]string
	}
	if err := json.Unmarshal(described.Bytes(), &program); err != nil {
		tb.Fatalf("%s --describe: %v: %s", p.Name, err, stderr.String())
	}
	for _, c := range append([]command{{Help: program.Help, Flags: program.Flags, Examples: program.Examples}}, program.Commands...) {
		where := strings.TrimSpace(p.Name + " " + c.Name)
		if len(c.Examples) == 0 {
			tb.Errorf("%s has no example", where)
		}
		for _, e := range c.Examples {
			words := words(e.Line)
			if len(words) == 0 || c.Name != "" && words[0] != c.Name {
				tb.Errorf("%s: an example of something else: %s", where, e.Line)
				continue
			}
			if err := p.Parses(words); err != nil {
				tb.Errorf("%s %s: %v", p.Name, e.Line, err)
			}
			if e.For == "" || strings.HasSuffix(e.For, ".") {
				tb.Errorf("%s: %s: what it is for: %q", where, e.Line, e.For)
			}
		}
		if !strings.HasSuffix(c.Help, ".") {
			tb.Errorf("%s: no sentence: %q", where, c.Help)
		}
		for section, commands := range program.Config {
			for _, f := range c.Flags {
				if f.Config && slices.Contains(commands, c.Name) && !slices.Contains(settings[section], f.Name) {
					tb.Errorf("%s: --%s can stand in [%s] of the configuration file: is it a setting?", where, f.Name, section)
				}
			}
		}
		for _, v := range append(c.Flags, c.Args...) {
			if !strings.HasSuffix(v.Help, ".") {
				tb.Errorf("%s: %s: no sentence: %q", where, v.Name, v.Help)
			}
		}
	}
}

// words are those of a command line up to what a shell makes of the rest: a pipe, a file.
func words(line string) (words []string) {
	var word strings.Builder
	quote := rune(0)
	for _, r := range line + " " {
		switch {
		case quote == 0 && (r == '\'' || r == '"'):
			quote = r
		case r == quote:
			quote = 0
		case r == ' ' && quote == 0:
			switch w := word.String(); w {
			case "":
			case "|", ">", "<", "&&":
				return words
			default:
				words = append(words, w)
			}
			word.Reset()
		default:
			word.WriteRune(r)
		}
	}
	return words
}
