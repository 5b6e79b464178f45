package ui

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// ErrNoTerminal is returned where something is to be drawn again and again, and standard output is no terminal that could.
var ErrNoTerminal = errors.New("standard output is no terminal")

// Page is a terminal's whole screen, on which one text takes the place of the one before. What was on the screen is back when it
// is closed.
type Page struct{ u *UI }

// Page takes the screen. The error is ErrNoTerminal, or that of writing.
func (u *UI) Page() (*Page, error) {
	if u.Width() == 0 || u.getenv("TERM") == "dumb" {
		return nil, ErrNoTerminal
	}
	// The screen for full-screen programs, which scrolls nothing away, without the cursor.
	if _, err := io.WriteString(u.stdout, "\x1b[?1049h\x1b[?25l"); err != nil {
		return nil, fmt.Errorf("standard output: %w", err)
	}
	return &Page{u}, nil
}

// Draw shows a heading and what fits of the lines below it: the last of them, as the newest.
func (p *Page) Draw(heading, text string) error {
	columns, rows := p.u.size(p.u.stdout)
	lines := strings.Split(strings.TrimRight(printable(text), "\n"), "\n")
	if room := max(1, rows-2); len(lines) > room {
		left := len(lines) - room + 1
		lines = append([]string{fmt.Sprintf("(%d more lines)", left)}, lines[left:]...)
	}
	var b strings.Builder
	b.WriteString("\x1b[H") // to the first line
	for i, line := range append([]string{printable(heading), ""}, lines...) {
		if i > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString(Cut(line, columns) + "\x1b[K") // and nothing to the right of it
	}
	b.WriteString("\x1b[J") // nor below
	if _, err := io.WriteString(p.u.stdout, b.String()); err != nil {
		return fmt.Errorf("standard output: %w", err)
	}
	return nil
}

// Close gives the screen back.
func (p *Page) Close() {
	_, _ = io.WriteString(p.u.stdout, "\x1b[?25h\x1b[?1049l") // who has closed the terminal sees it no more
}

// Cut makes a line of at most so many columns of one that may be longer; 0 leaves it as it is.
func Cut(line string, columns int) string {
	if columns <= 0 || utf8.RuneCountInString(line) <= columns {
		return line
	}
	runes := []rune(line)
	return strings.TrimRight(string(runes[:columns-1]), " ") + "+"
}
