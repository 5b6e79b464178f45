package cli

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"syscall"

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

// explainSystem gives an error of the system's that has no hint yet the next step.
func explainSystem(err error) error {
	var dial *net.OpError
	hint := ""
	switch {
	case err == nil || ui.HintOf(err) != "":
	case errors.As(err, &dial) && dial.Op == "dial" && errors.Is(err, fs.ErrNotExist):
		hint = "is the guest running, and does its QEMU make that socket?"
	case errors.Is(err, syscall.EROFS):
		hint = "that file system is mounted read-only, perhaps after an error: `findmnt` and `dmesg` tell"
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		hint = "run it as root, or as the user that this belongs to"
	case errors.Is(err, fs.ErrPermission):
		hint = "even root is refused: a share that takes root for nobody (root_squash), perhaps"
	}
	if hint == "" {
		return err
	}
	return ui.Hint(err, hint)
}
