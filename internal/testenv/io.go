package testenv

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// IO runs a qemu-io command, such as
//
//	write -P 0x5a 64k 64k
//	write -z -u 0 1M
//	discard 1M 64k
//	read -P 0x5a 64k 64k
//	flush
//
// on the block backend of the disk's device: above every filter, where the
// guest's own requests enter. It returns what qemu-io printed, and fails the
// test when the request fails or when data that was read is not what -P says.
//
// As in a guest, only a flush makes sure that a write survives Kill. Unlike a
// guest's, these requests are not held back while the guest is stopped. The
// option -q is refused: it hides the outcome.
func (vm *VM) IO(disk, command string) string {
	vm.tb.Helper()
	out, err := vm.TryIO(disk, command)
	vm.fatal(err)
	return out
}

// TryIO is IO for requests that may fail. It can be used from any goroutine;
// requests run one at a time.
func (vm *VM) TryIO(disk, command string) (string, error) {
	d, err := vm.disk(disk)
	if err != nil {
		return "", err
	}
	out, err := vm.qemuIO("-d "+d.qom(), command)
	if err != nil {
		return out, fmt.Errorf("disk %s: %s: %w", disk, command, err)
	}
	return out, nil
}

// NodeIO is IO on a block node instead of a disk's device: what others above
// that node do is not asked for.
func (vm *VM) NodeIO(node, command string) string {
	vm.tb.Helper()
	out, err := vm.qemuIO(node, command)
	if err != nil {
		vm.tb.Fatalf("testenv: node %s: %s: %v", node, command, err)
	}
	return out
}

func (vm *VM) qemuIO(target, command string) (string, error) {
	if strings.ContainsAny(command, "\"\n\\") {
		return "", errors.New("quotes and line feeds are not supported")
	}
	vm.ioMu.Lock()
	defer vm.ioMu.Unlock()
	// The output goes to QEMU's own stdout, not to the monitor. A command that
	// does not exist makes qemu-io print its name there: that is the end mark.
	vm.mark++
	mark := fmt.Sprintf("end-of-io-%d", vm.mark)
	p, _ := vm.current()
	from := p.outputLen()
	for _, c := range []string{command, mark} {
		text, err := vm.hmp(fmt.Sprintf(`qemu-io %s "%s"`, target, c))
		if err != nil {
			return "", err
		}
		if text = strings.TrimSpace(text); text != "" {
			return "", errors.New(text)
		}
	}
	out, err := p.take(from, mark, commandTimeout)
	if err != nil {
		return out, err
	}
	return out, ioOutcome(command, out)
}

var (
	ioVerb    = regexp.MustCompile(`^(write|writev|read|readv|discard)(\s|$)`)
	ioSuccess = regexp.MustCompile(`(?m)^(?:wrote|read|discard) (\d+)/(\d+) bytes`)
	ioFailure = regexp.MustCompile(`(?m)failed|not found|[Ii]nvalid|[Bb]ad |unknown|must be|non-numeric|argument`)
)

// ioOutcome tells from its output whether a command was done.
func ioOutcome(command, out string) error {
	text := strings.TrimSpace(out)
	if ioFailure.MatchString(text) {
		return errors.New(text)
	}
	if ioVerb.MatchString(command) {
		m := ioSuccess.FindStringSubmatch(text)
		if m == nil || m[1] != m[2] {
			return fmt.Errorf("not done: %q", text)
		}
	}
	return nil
}
