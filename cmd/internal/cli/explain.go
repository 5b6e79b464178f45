package cli

import (
	"errors"

	"qmchain/internal/ui"
)

// Cause is something that errors can wrap, and what it means for the user.
type Cause struct {
	Is   error
	Code int    // the program's exit code
	Hint string // what to do next; "" where the error says it, or where nothing can be told
}

// Explain gives an error the exit code and the hint of the first of causes that it wraps. A hint that it has already stays:
// who gave it knew more.
func Explain(err error, causes []Cause) error {
	for _, c := range causes {
		if !errors.Is(err, c.Is) {
			continue
		}
		if c.Hint != "" && ui.HintOf(err) == "" {
			err = ui.Hint(err, c.Hint)
		}
		return ui.Exit(c.Code, err)
	}
	return err
}
