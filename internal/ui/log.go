package ui

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unicode"

	"github.com/sirupsen/logrus"
)

// hintKey is the field in which the last log line carries its hint.
const hintKey = "hint"

// screen is standard error. While progress bars are drawn there, it is they who know where a log line can go.
type screen struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// swap sets a new destination and returns the one before.
func (s *screen) swap(w io.Writer) io.Writer {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.w
	s.w = w
	return old
}

// sink is one destination of the log.
type sink struct {
	mu     sync.Mutex
	w      io.Writer
	level  logrus.Level
	format logrus.Formatter
}

var _ logrus.Hook = (*sink)(nil)

func (s *sink) Levels() []logrus.Level { return logrus.AllLevels[:s.level+1] }

func (s *sink) Fire(e *logrus.Entry) error {
	text, err := s.format.Format(e)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err = s.w.Write(text)
	return err
}

type noFormat struct{}

func (noFormat) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// plainFormat is key=value, for files, pipes and the journal.
func plainFormat(timestamp bool) logrus.Formatter {
	return &logrus.TextFormatter{
		DisableColors:    true,
		DisableTimestamp: !timestamp,
		QuoteEmptyFields: true,
		TimestampFormat:  "2006-01-02T15:04:05.000Z07:00",
	}
}

// journalFormat is for the journal, which adds the time, and takes a line's level from its beginning: sd-daemon(3). Without that
// all is of one level, and `journalctl -p err` finds nothing.
type journalFormat struct{ plain logrus.Formatter }

func (j journalFormat) Format(e *logrus.Entry) ([]byte, error) {
	text, err := j.plain.Format(e)
	if err != nil {
		return nil, err
	}
	return []byte(atLevel(e.Level, string(text))), nil
}

// atLevel is a text of one or more lines for the journal.
func atLevel(level logrus.Level, text string) string {
	prefix := "<3>" // LOG_ERR of syslog(3)
	switch level {
	case logrus.WarnLevel:
		prefix = "<4>"
	case logrus.InfoLevel:
		prefix = "<6>"
	case logrus.DebugLevel, logrus.TraceLevel:
		prefix = "<7>"
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(prefix + line)
	}
	return b.String()
}

// textFormat is for people at a terminal.
type textFormat struct{ colour bool }

func (t textFormat) Format(e *logrus.Entry) ([]byte, error) {
	var b bytes.Buffer
	label, colour := "", ""
	switch e.Level {
	case logrus.DebugLevel, logrus.TraceLevel:
		label, colour = "debug", "36" // cyan
	case logrus.WarnLevel:
		label, colour = "warning", "33" // yellow
	case logrus.ErrorLevel, logrus.FatalLevel, logrus.PanicLevel:
		label, colour = "error", "31" // red
	}
	if label != "" {
		t.label(&b, label, colour)
	}
	b.WriteString(printable(e.Message))
	keys := make([]string, 0, len(e.Data))
	for k := range e.Data {
		if k != hintKey {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		value := fmt.Sprint(e.Data[k])
		if value == "" || strings.ContainsFunc(value, func(r rune) bool { return r == ' ' || r == '"' || !unicode.IsPrint(r) }) {
			value = strconv.Quote(value)
		}
		fmt.Fprintf(&b, "  %s=%s", k, value)
	}
	b.WriteByte('\n')
	if hint, ok := e.Data[hintKey].(string); ok {
		t.label(&b, "hint", "32") // green
		b.WriteString(printable(hint))
		b.WriteByte('\n')
	}
	return b.Bytes(), nil
}

func (t textFormat) label(b *bytes.Buffer, text, colour string) {
	if t.colour {
		fmt.Fprintf(b, "\x1b[%sm%s:\x1b[0m ", colour, text)
		return
	}
	b.WriteString(text + ": ")
}

// printable takes the power over the terminal from a text that may hold what a guest or a damaged file said.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// writesToJournal reports whether w is the stream that systemd says leads to the journal: stream is $JOURNAL_STREAM,
// "DEVICE:INODE" (systemd.exec(5)). The variable alone tells nothing: it is inherited where the stream is not.
func writesToJournal(w io.Writer, stream string) bool {
	f, ok := w.(*os.File)
	if !ok || stream == "" {
		return false
	}
	info, err := f.Stat()
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}
