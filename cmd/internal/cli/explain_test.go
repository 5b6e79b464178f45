package cli

import (
	"errors"
	"fmt"
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
