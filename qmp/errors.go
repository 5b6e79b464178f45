package qmp

import (
	"errors"
	"fmt"
)

var (
	// ErrDisconnected is wrapped by every error that comes from a connection that is not there: not made
	// yet, closed by us, closed by QEMU (which also means: QEMU is gone), or given up because what came was
	// not QMP. Whether a command that was under way has been executed is not known.
	ErrDisconnected = errors.New("not connected to QEMU")

	// ErrBusy means that the socket took the connection but nothing greeted in time. A QMP socket serves
	// one client at a time, so most likely another client holds it.
	ErrBusy = errors.New("no QMP greeting in time (does another client hold the socket?)")

	// ErrNotQMP means that what answers does not speak QMP: another protocol's greeting, or malformed JSON.
	ErrNotQMP = errors.New("what answers is not QMP")
)

// Error classes (QapiErrorClass in QEMU's qapi/error.json).
const (
	ClassGeneric         = "GenericError"
	ClassCommandNotFound = "CommandNotFound"
	ClassDeviceNotFound  = "DeviceNotFound"
)

// Error is an error that QEMU replied to a command.
type Error struct {
	Command string // name of the command
	Class   string // one of QapiErrorClass; nearly always ClassGeneric
	Desc    string // QEMU's text, for people
}

func (e *Error) Error() string {
	if e.Class == ClassGeneric {
		return e.Command + ": " + e.Desc
	}
	return fmt.Sprintf("%s: %s (%s)", e.Command, e.Desc, e.Class)
}
