package ui

import (
	"fmt"
	"io"
	"log/syslog"
	"os"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Background lets go of the terminal, for a process that goes on in the background: the three standard streams become
// /dev/null, so that nobody who reads them to their end waits for this process. The log goes to the log file alone, and
// without one to the system's log, as name.
func (u *UI) Background(name string) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	u.screen.swap(io.Discard)
	u.terminal = nil
	stderr := null
	if u.logFile != nil {
		stderr = u.logFile // what the Go runtime says when the program crashes
	} else if s, err := newSyslog("", "", name); err == nil {
		u.Log.AddHook(s)
	} // else there is nowhere to write to
	for fd, f := range []*os.File{null, null, stderr} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("let go of the standard streams: %w", err)
		}
	}
	return nil
}

// syslogHook writes to the system's log, which adds time and name.
type syslogHook struct {
	w      *syslog.Writer
	format logrus.Formatter
}

// newSyslog finds the system's log where network is empty.
func newSyslog(network, addr, name string) (*syslogHook, error) {
	w, err := syslog.Dial(network, addr, syslog.LOG_DAEMON|syslog.LOG_INFO, name)
	if err != nil {
		return nil, err
	}
	return &syslogHook{w, plainFormat(false)}, nil
}

func (s *syslogHook) Levels() []logrus.Level { return logrus.AllLevels }

func (s *syslogHook) Fire(e *logrus.Entry) error {
	text, err := s.format.Format(e)
	if err != nil {
		return err
	}
	switch e.Level {
	case logrus.DebugLevel, logrus.TraceLevel:
		return s.w.Debug(string(text))
	case logrus.InfoLevel:
		return s.w.Info(string(text))
	case logrus.WarnLevel:
		return s.w.Warning(string(text))
	default:
		return s.w.Err(string(text))
	}
}
