package ui

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
)

// Result writes a command's result to standard output: v as one JSON document, or what text writes. Columns that text
// separates by tabs are lined up.
func (u *UI) Result(asJSON bool, v any, text func(w io.Writer) error) error {
	if asJSON {
		enc := json.NewEncoder(u.stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		if err := enc.Encode(v); err != nil {
			return fmt.Errorf("standard output: %w", err)
		}
		return nil
	}
	tw := tabwriter.NewWriter(plain{u.stdout}, 0, 0, 2, ' ', 0)
	if err := text(tw); err != nil {
		return err
	}
	if err := tw.Flush(); err != nil {
		return fmt.Errorf("standard output: %w", err)
	}
	return nil
}

// Event writes one event of a stream to standard output: JSON in one line.
func (u *UI) Event(v any) error {
	enc := json.NewEncoder(u.stdout)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("standard output: %w", err)
	}
	return nil
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

// Note writes a text for people to standard error as it is, without the log's dress: a table. Not where the user asked for quiet.
func (u *UI) Note(text string) {
	if !u.quiet {
		_, _ = io.WriteString(u.screen, printable(text)) // as with the log, nobody need listen
	}
}
