package proxmox

import (
	"fmt"
	"strings"
)

// Word is one argument of an args option.
type Word struct {
	Text       string // without quotes and backslashes, as QEMU gets it
	Start, End int    // where it stands in the option's value, in bytes
}

// QuoteError is an args option that PVE can't split into words: it then starts the VM without *any* of its args, and
// says nothing.
type QuoteError struct {
	Args   string
	Offset int // of the quote that is never closed, or of the backslash at the end
}

func (e *QuoteError) Error() string {
	what := "the quote"
	if e.Args[e.Offset] == '\\' {
		what = "the backslash"
	}
	return fmt.Sprintf("unbalanced quotes: %s at position %d is never closed; PVE drops all args: %s", what, e.Offset+1, e.marked())
}

// marked shows the place within a line's length of its surroundings.
func (e *QuoteError) marked() string {
	const around = 30
	from, to := max(0, e.Offset-around), min(len(e.Args), e.Offset+around)
	before, after := "", ""
	if from > 0 {
		before = "…"
	}
	if to < len(e.Args) {
		after = "…"
	}
	return before + e.Args[from:e.Offset] + " >>>" + e.Args[e.Offset:to] + after
}

// Shellwords splits the value of an args option exactly as PVE does, with Perl's Text::ParseWords::shellwords. That is
// not the shell's way: a backslash within single quotes stays, but the quote after it does not end the word; within
// double quotes it escapes any character. The error is a *QuoteError.
func Shellwords(args string) ([]Word, error) {
	var words []Word
	for i := 0; i < len(args); {
		if space(args[i]) {
			i++
			continue
		}
		w := Word{Start: i}
		var text strings.Builder
		for i < len(args) && !space(args[i]) {
			switch c := args[i]; c {
			case '"', '\'':
				end := closing(args, i)
				if end < 0 {
					return nil, &QuoteError{args, i}
				}
				quoted := args[i+1 : end]
				if c == '"' {
					quoted = unescape(quoted)
				}
				text.WriteString(quoted)
				i = end + 1
			case '\\':
				if i+1 == len(args) {
					return nil, &QuoteError{args, i}
				}
				text.WriteByte(args[i+1])
				i += 2
			default:
				text.WriteByte(c)
				i++
			}
		}
		w.Text, w.End = text.String(), i
		words = append(words, w)
	}
	return words, nil
}

// space is what \s matches in a Perl string of bytes.
func space(c byte) bool { return c == ' ' || '\t' <= c && c <= '\r' }

// closing is where the quote that begins at start ends, or -1.
func closing(s string, start int) int {
	for i := start + 1; i < len(s); i++ {
		switch s[i] {
		case s[start]:
			return i
		case '\\':
			i++
		}
	}
	return -1
}

// unescape takes away backslashes, of which each stands for the character after it.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' {
			i++ // closing has seen to it that one follows
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// quoteWord writes a word so that Shellwords reads it.
func quoteWord(text string) string {
	plain := text != ""
	for i := range len(text) {
		c := text[i]
		plain = plain && !space(c) && !strings.ContainsRune(`"'\`, rune(c))
	}
	if plain {
		return text
	}
	// Backslashes mean the same in all versions of Perl only within double quotes.
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text) + `"`
}
