package ui

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"unicode/utf8"

	"golang.org/x/term"
)

// Result writes a command's result to standard output: v as one JSON document, or what text writes. Columns that text
// separates by tabs are lined up.
func (u *UI) Result(asJSON bool, v any, text func(w io.Writer) error) error {
	if asJSON {
		return Shown(buffered(u.stdout, func(w io.Writer) error { return document(w, v) }))
	}
	return Shown(buffered(u.stdout, func(w io.Writer) error { return table(w, u.Width(), text) }))
}

// Done is Result for a command that has changed something. Where the result can't be written the error has the code ExitPartly:
// what was asked for is done.
func (u *UI) Done(asJSON bool, v any, text func(w io.Writer) error) error {
	if err := u.Result(asJSON, v, text); err != nil {
		return Exit(ExitPartly, fmt.Errorf("all is done, but can't be told: %w", err))
	}
	return nil
}

// Shown is the error of writing to standard output. That who reads it has ended is none, as with `list | head`: he has seen what
// he wanted, and how it went is for the exit code to say.
func Shown(err error) error {
	if err == nil || errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return fmt.Errorf("standard output: %w", err)
}

// table lines up columns. On a terminal, which has a width, the last of them goes on below itself where it is too wide: whole
// words, with all that they say.
func table(w io.Writer, width int, text func(w io.Writer) error) error {
	out := plain{w}
	if width == 0 {
		tw := tabwriter.NewWriter(out, 0, 0, columnGap, ' ', 0)
		return cmp.Or(text(tw), tw.Flush())
	}
	var source, lined bytes.Buffer
	if err := text(&source); err != nil {
		return err
	}
	tw := tabwriter.NewWriter(&lined, 0, 0, columnGap, ' ', 0)
	for line := range strings.Lines(source.String()) {
		if i := strings.LastIndexByte(line, '\t'); i >= 0 {
			line = line[:i+1] + lastColumn + line[i+1:]
		}
		if _, err := io.WriteString(tw, line); err != nil {
			return err
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(lined.String()) {
		if before, last, isTable := strings.Cut(line, lastColumn); isTable {
			line = hang(before, last, width)
		}
		if _, err := io.WriteString(out, line); err != nil {
			return err
		}
	}
	return nil
}

// columnGap is how many spaces are between columns, and lastColumn marks where the last one begins while they are lined up.
const (
	columnGap  = 2
	lastColumn = "\x1f"
)

// hang breaks the last column of a line into lines, each below the other. In a column that is narrower than minHang, what is
// left of the terminal goes for it from hangIndent on.
func hang(before, last string, width int) string {
	at := utf8.RuneCountInString(before)
	if at+utf8.RuneCountInString(strings.TrimRight(last, "\n")) <= width {
		return strings.TrimRight(before+last, " \n") + "\n"
	}
	var b strings.Builder
	b.WriteString(strings.TrimRight(before, " "))
	column := at
	if width-at < minHang {
		at, column = hangIndent, width
	} else {
		b.WriteString(strings.Repeat(" ", at-utf8.RuneCountInString(b.String())))
	}
	for i, word := range strings.Fields(last) {
		n := utf8.RuneCountInString(word)
		switch {
		case i > 0 && column+1+n <= width:
			b.WriteByte(' ')
			column++
		case i > 0 || column+n > width:
			b.WriteString("\n" + strings.Repeat(" ", at))
			column = at
		}
		b.WriteString(word)
		column += n
	}
	return b.String() + "\n"
}

const minHang, hangIndent = 16, 4

// Width is that of the terminal that standard output is, in columns; 0 is no terminal.
func (u *UI) Width() int {
	columns, _ := u.size(u.stdout)
	return columns
}

// size is that of the terminal that a stream leads to; 0 and 0 are no terminal.
func (u *UI) size(stream io.Writer) (columns, lines int) {
	f, ok := stream.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, 0
	}
	columns, lines, err := term.GetSize(int(f.Fd()))
	if err != nil || columns <= 0 || lines <= 0 {
		columns, lines = 80, 24 // a terminal that doesn't know, as a serial console
	}
	if n, err := strconv.Atoi(u.getenv("COLUMNS")); err == nil && n > 0 {
		columns = n
	}
	return columns, lines
}

// Unicode tells whether who reads the output can be expected to see more than ASCII: what the locale says.
func (u *UI) Unicode() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale := strings.ToLower(u.getenv(name)); locale != "" {
			return strings.Contains(locale, "utf-8") || strings.Contains(locale, "utf8")
		}
	}
	return false
}

// Event writes one event of a stream to standard output: JSON in one line.
func (u *UI) Event(v any) error {
	enc := json.NewEncoder(u.stdout)
	enc.SetEscapeHTML(false)
	return Shown(enc.Encode(v))
}

// plain passes text on without what would have power over a terminal: notes and names can come from a guest or from
// somebody else's backups.
type plain struct{ w io.Writer }

func (p plain) Write(b []byte) (int, error) {
	// tabwriter writes whole cells: no character is cut in two.
	if _, err := io.WriteString(p.w, printable(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Note writes a text for people to standard error as results are written, without the log's dress. Not where the user asked for
// quiet.
func (u *UI) Note(text func(w io.Writer) error) {
	if u.quiet {
		return
	}
	width := 0
	if u.terminal != nil {
		width, _ = u.size(u.terminal)
	}
	_ = table(u.screen, width, text) // as with the log, nobody need listen
}
