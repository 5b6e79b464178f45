package cli

import (
	"regexp"
	"strings"
)

// kong's messages speak of tokens and of Go's types. These are what a user is told in their place.
var plainWords = []struct {
	kongs *regexp.Regexp
	ours  string
}{
	{regexp.MustCompile(`(-\S+): expected \S+ value but got "EOL" \(<EOL>\)$`), `$1 needs a value`},
	{regexp.MustCompile(`(-\S+): expected (?:int|time) value but got ("-[^"]*") .*$`), `$1: $2 is less than nothing`},
	{regexp.MustCompile(`(-\S+): expected \S+ value but got "(-[^"]*)" .*$`), `$1 needs a value, and "$2" looks like a flag: $1=$2 takes it for the value`},
	{regexp.MustCompile(`expected a valid \d+ bit u?int but got (".*")$`), `$1 is no whole number`},
	{regexp.MustCompile(`bool value must be .* but got (".*")$`), `$1 is neither true nor false`},
	{regexp.MustCompile(`(unknown flag -[^-]), did you mean .*$`), `$1`}, // any letter is close to any other
	{regexp.MustCompile(`^\[?<([a-z-]+)>(?: \.\.\.)?\]?: `), `$1: `},
	{regexp.MustCompile(`^expected one of (.*)$`), `a command is missing: one of $1`},
	{regexp.MustCompile(`^expected "<([a-z-]+)>[^"]*"( .*)?$`), `$1 is missing`},
}

// plainly is an error of kong's in plain words. It wraps kong's.
func plainly(err error) error {
	text := err.Error()
	for _, w := range plainWords {
		text = w.kongs.ReplaceAllString(text, w.ours)
	}
	if text == err.Error() {
		return err
	}
	return plainError{text, err}
}

type plainError struct {
	text string
	err  error
}

func (e plainError) Error() string { return e.text }
func (e plainError) Unwrap() error { return e.err }

// asked makes the flag of the word help, which other programs have as a command: `help`, or `help COMMAND`.
func asked(args []string) []string {
	switch {
	case len(args) == 0 || args[0] != "help":
		return args
	case len(args) == 1 || strings.HasPrefix(args[1], "-"):
		return []string{"--help"}
	}
	return []string{args[1], "--help"}
}
