package proxmox

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"qmchain/internal/child"
)

// setLimit bounds calls of qm that only change a configuration. They wait up to 10 s for the VM's lock, and a busy host
// takes seconds to load Perl.
const setLimit = 2 * time.Minute

// QM runs qm and returns its standard output. It is killed after limit, or when ctx ends; what it had begun then is
// unknown. That qm failed says little by itself: its exit codes are Perl's errno, and its words change with its version.
func (h Host) QM(ctx context.Context, limit time.Duration, args ...string) (string, error) {
	program, err := h.program()
	if err != nil {
		return "", err
	}
	out, err := child.Run(ctx, limit, program, args...)
	if err != nil {
		return "", fmt.Errorf("qm %s: %w", strings.Join(args[:min(2, len(args))], " "), err)
	}
	return string(out), nil
}

// program finds qm where Debian's package has it, as hooks run without a PATH.
func (h Host) program() (string, error) {
	const packaged = "/usr/sbin/qm"
	if h.Program != "" {
		return h.Program, nil
	}
	if _, err := os.Stat(packaged); err == nil {
		return packaged, nil
	}
	path, err := exec.LookPath("qm")
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoHost, err)
	}
	return path, nil
}

// Set changes options of a VM: it runs `qm set VMID CHANGE...`, for the configuration that was read as c and no other.
// Options that a running VM can't change become pending. Its errors are ErrLocked, ErrChanged, ErrBusy, ErrNotFound and
// ErrElsewhere, or what qm said.
func (h Host) Set(ctx context.Context, c *Config, changes ...string) error {
	args := append([]string{"set", c.VMID.String(), "--digest", c.Digest}, changes...)
	_, err := h.QM(ctx, setLimit, args...)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return h.explain(c.VMID, c.Digest, err)
}

// explain finds out why qm refused a change of a configuration with that digest.
func (h Host) explain(vmid VMID, digest string, err error) error {
	now, readErr := h.Config(vmid)
	switch {
	case readErr != nil:
		return fmt.Errorf("%w (%w)", readErr, err)
	case now.Lock() != "":
		return now.lockedError()
	case now.Digest != digest:
		return fmt.Errorf("VM %s: its configuration was %w", vmid, ErrChanged)
	case strings.Contains(err.Error(), "got timeout"):
		// The words are qm's, and its only sign that something else works on this VM.
		return fmt.Errorf("VM %s is %w: %w", vmid, ErrBusy, err)
	}
	return fmt.Errorf("VM %s: %w", vmid, err)
}

func (c *Config) lockedError() error {
	return fmt.Errorf("VM %s is %w (%s)", c.VMID, ErrLocked, c.Lock())
}
