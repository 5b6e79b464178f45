package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
	"testing"

	"qmchain/internal/ui"
)

func TestExplain(t *testing.T) {
	t.Parallel()
	first, second := errors.New("first"), errors.New("second")
	causes := []Cause{{first, ui.ExitBusy, "wait"}, {second, ui.ExitNotFound, ""}}
	for _, c := range []struct {
		err  error
		code int
		hint string
	}{
		{nil, ui.ExitOK, ""},
		{errors.New("other"), ui.ExitFailed, ""},
		{fmt.Errorf("guest: %w", first), ui.ExitBusy, "wait"},
		{second, ui.ExitNotFound, ""},
		{fmt.Errorf("%w: %w", second, first), ui.ExitBusy, "wait"},
		{ui.Hint(first, "hurry"), ui.ExitBusy, "hurry"},
		{ui.Hint(second, "look"), ui.ExitNotFound, "look"},
	} {
		got := Explain(c.err, causes)
		if ui.ExitCode(got) != c.code || ui.HintOf(got) != c.hint || !errors.Is(got, c.err) {
			t.Errorf("%v: exit code %d, hint %q", c.err, ui.ExitCode(got), ui.HintOf(got))
		}
	}
}

func TestExplainSystem(t *testing.T) {
	t.Parallel()
	path := func(err error) error { return &fs.PathError{Op: "open", Path: "/a", Err: err} }
	for _, c := range []struct {
		err  error
		hint bool
	}{
		{nil, false},
		{errors.New("other"), false},
		{path(syscall.ENOENT), false},
		{path(syscall.EROFS), true},
		{ui.Exit(ui.ExitBusy, path(syscall.EACCES)), true},
		{path(syscall.EPERM), true},
		{&net.OpError{Op: "dial", Err: path(syscall.ENOENT)}, true},
		{&net.OpError{Op: "listen", Err: path(syscall.ENOENT)}, false},
	} {
		got := explainSystem(c.err)
		if (ui.HintOf(got) != "") != c.hint || ui.ExitCode(got) != ui.ExitCode(c.err) {
			t.Errorf("%v: hint %q, exit code %d", c.err, ui.HintOf(got), ui.ExitCode(got))
		}
	}
	if got := explainSystem(ui.Hint(path(syscall.EROFS), "hurry")); ui.HintOf(got) != "hurry" {
		t.Errorf("hint %q", ui.HintOf(got))
	}
}
