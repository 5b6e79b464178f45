// Package ui is how every qmchain program speaks to the one who runs it.
//
// Standard output carries the result alone, as text or as JSON. Everything else goes to standard error: the log, the
// progress, and the error that ends a run with its hint, one line that says what to do next. On a terminal that is text
// for people, coloured where NO_COLOR does not forbid it. Elsewhere every log line is key=value, with the time; for
// the journal, which has its own, with the level. A log file gets the same lines, and more of them than a quiet standard error.
//
// The exit codes of all programs stand here in one table. An error carries its code (Exit) and its hint (Hint) up to
// the program's main, the only place that ends the process.
package ui

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/sirupsen/logrus"
	"golang.org/x/term"
)

// Options are the flags that all programs share.
type Options struct {
	Quiet   bool   // only errors on standard error, and no progress
	Verbose bool   // debug messages too; with Quiet, only in the log file
	LogFile string // also write the log there; empty: don't
}

// UI is one program's way to its user. Its methods may be called from any goroutine.
type UI struct {
	// Log is the program's log.
	Log *logrus.Logger

	stdout   io.Writer
	getenv   func(string) string
	screen   *screen
	terminal *os.File // standard error, if it is a terminal
	quiet    bool
	logFile  *os.File
}

// New sets up the log. Getenv is os.Getenv or what a test puts in its place; NO_COLOR, TERM, COLUMNS, JOURNAL_STREAM and the
// locale are asked for. Close must be called in the end.
func New(stdout, stderr io.Writer, getenv func(string) string, opts Options) (*UI, error) {
	u := &UI{stdout: stdout, getenv: getenv, screen: &screen{w: stderr}, quiet: opts.Quiet}
	if f, ok := stderr.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		u.terminal = f
	}

	level := logrus.InfoLevel
	if opts.Verbose {
		level = logrus.DebugLevel
	}
	screenLevel := level
	if opts.Quiet {
		screenLevel = logrus.ErrorLevel
	}
	format := plainFormat(true)
	switch {
	case writesToJournal(stderr, getenv("JOURNAL_STREAM")):
		format = journalFormat{plainFormat(false)}
	case u.terminal != nil:
		format = textFormat{colour: getenv("NO_COLOR") == "" && getenv("TERM") != "dumb"}
	}

	u.Log = logrus.New()
	// Every destination has its own level and format, so each is a hook and the logger's own output is none.
	u.Log.SetOutput(io.Discard)
	u.Log.SetFormatter(noFormat{})
	u.Log.SetLevel(screenLevel)
	u.Log.AddHook(&sink{w: u.screen, level: screenLevel, format: format})
	if opts.LogFile != "" {
		f, err := os.OpenFile(opts.LogFile, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("log file: %w", err)
		}
		u.logFile = f
		u.addSink(f, level, plainFormat(true))
	}
	return u, nil
}

// addSink makes the log go to w too.
func (u *UI) addSink(w io.Writer, level logrus.Level, format logrus.Formatter) {
	u.Log.SetLevel(max(u.Log.GetLevel(), level))
	u.Log.AddHook(&sink{w: w, level: level, format: format})
}

// Close closes the log file. The log still reaches standard error afterwards.
func (u *UI) Close() error {
	if u.logFile == nil {
		return nil
	}
	return u.logFile.Close()
}

// Finish logs the error that ends a run, with its hint, and returns the program's exit code; nil is success.
func (u *UI) Finish(err error) int {
	if err == nil {
		return ExitOK
	}
	if !errors.Is(err, errReported) {
		u.Error(err)
	}
	return ExitCode(err)
}

// Error logs an error with its hint: one that ends the run, or after which it goes on. One with the code ExitPartly is a warning,
// as what was asked for is done; but who is not shown warnings is to know the reason for such a code all the same.
func (u *UI) Error(err error) {
	level := logrus.ErrorLevel
	if ExitCode(err) == ExitPartly && !u.quiet {
		level = logrus.WarnLevel
	}
	entry := logrus.NewEntry(u.Log)
	if hint := HintOf(err); hint != "" {
		entry = entry.WithField(hintKey, hint)
	}
	entry.Log(level, err)
}

// ReportError does what Finish does where there is no UI yet: when its own set-up failed, or the command line was
// wrong.
func ReportError(stderr io.Writer, getenv func(string) string, err error) int {
	if err == nil {
		return ExitOK
	}
	text := "error: " + printable(err.Error()) + "\n"
	if hint := HintOf(err); hint != "" {
		text += "hint: " + printable(hint) + "\n"
	}
	if writesToJournal(stderr, getenv("JOURNAL_STREAM")) {
		text = atLevel(logrus.ErrorLevel, text)
	}
	_, _ = io.WriteString(stderr, text)
	return ExitCode(err)
}
