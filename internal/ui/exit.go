package ui

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// The exit codes of all programs.
const (
	ExitOK          = 0   // done as asked
	ExitFailed      = 1   // failed, or what was looked at is not as it should be
	ExitNotFound    = 2   // what was asked for does not exist
	ExitBusy        = 3   // busy or locked
	ExitPartly      = 4   // done, but not quite what was asked
	ExitDamaged     = 5   // verification found damage
	ExitNeedsDoctor = 6   // `qmchain-backup doctor` is needed
	ExitSomeFailed  = 7   // of several guests at least one failed
	ExitUsage       = 80  // the command line is wrong
	ExitInterrupted = 130 // interrupted; all undone
)

// ExitCodes is the table for the programs' help texts, a line each.
func ExitCodes() string {
	var b strings.Builder
	for _, c := range []struct {
		code int
		text string
	}{
		{ExitOK, "done as asked"},
		{ExitFailed, "failed, or found not good; undone, or the error tells what was done"},
		{ExitNotFound, "what was asked for does not exist"},
		{ExitBusy, "busy or locked"},
		{ExitPartly, "done, but not quite what was asked (an unplanned full, a skipped disk)"},
		{ExitDamaged, "verification found damage"},
		{ExitNeedsDoctor, "needs `qmchain-backup doctor`"},
		{ExitSomeFailed, "of several guests at least one failed"},
		{ExitUsage, "the command line is wrong"},
		{ExitInterrupted, "interrupted; all undone"},
	} {
		fmt.Fprintf(&b, "%5d  %s\n", c.code, c.text)
	}
	return b.String()
}

// exitError gives an error an exit code. It has no method ExitCode on purpose: os/exec's errors have one, and the code
// of a child that failed is not the program's.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// Exit gives err the exit code that it ends the program with. The outermost code counts. A nil error stays nil.
func Exit(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code, err}
}

// ExitCode is the exit code for err: that of Exit, else ExitInterrupted for a cancelled context, else ExitFailed.
func ExitCode(err error) int {
	var e *exitError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &e):
		return e.code
	case errors.Is(err, context.Canceled):
		return ExitInterrupted
	}
	return ExitFailed
}

// errReported is what Reported wraps.
var errReported = errors.New("reported already")

// Reported is an error with that exit code that another process has told the user of already.
func Reported(code int) error { return Exit(code, errReported) }

type hintError struct {
	hint string
	err  error
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// Hint gives err a hint: one line that says what to do next. The outermost hint counts. A nil error stays nil.
func Hint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hintError{hint, err}
}

// HintOf is the hint of err, or "".
func HintOf(err error) string {
	var e *hintError
	if errors.As(err, &e) {
		return e.hint
	}
	return ""
}
