package testenv

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed" // guest.sh decides which guest it is
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// bootTimeout bounds the boot of Linux on an emulated CPU, which takes about
// five seconds on an idle machine.
const bootTimeout = 3 * time.Minute

// guestReady is the line that the guest prints when its agents run.
const guestReady = "qmchain-guest-ready"

//go:embed guest.sh
var guestScript []byte

// GuestFiles returns the kernel and the initrd that `make setup` made with
// this version of guest.sh.
func GuestFiles() (kernel, initrd string, err error) {
	cache, err := CacheDir()
	if err != nil {
		return "", "", err
	}
	dir := filepath.Join(cache, fmt.Sprintf("guest-%.6x", sha256.Sum256(guestScript)))
	if _, err := os.Stat(dir); err != nil {
		return "", "", fmt.Errorf("no Linux guest: %w; run `make setup`", err)
	}
	return filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd"), nil
}

// Agent connects to the guest agent at the VM's AgentSocket, and disconnects
// when the test ends. The tool under test can't reach it meanwhile.
func (vm *VM) Agent(ctx context.Context) *Agent {
	vm.tb.Helper()
	a, err := DialAgent(ctx, vm.AgentSocket)
	vm.fatal(err)
	vm.tb.Cleanup(func() { _ = a.Close() })
	return a
}

// Run runs a shell command as root in the guest and returns its stdout. It
// fails the test when the command fails. It goes through a second agent, so
// that it works while the first is frozen or in use.
//
// The disks are /dev/disk/ID, such as /dev/disk/scsi0.
func (vm *VM) Run(ctx context.Context, shell string) (stdout string) {
	vm.tb.Helper()
	out, err := vm.TryRun(ctx, shell)
	vm.fatal(err)
	return out
}

// TryRun is Run for commands that may fail. It can be used from any goroutine.
func (vm *VM) TryRun(ctx context.Context, shell string) (stdout string, err error) {
	vm.mu.Lock()
	runner := vm.runner
	vm.mu.Unlock()
	if runner == nil {
		return "", errors.New("no Linux guest has booted")
	}
	out, err := runner.Exec(ctx, "/bin/sh", "-c", shell)
	if err != nil {
		return out, fmt.Errorf("in the guest: %s: %w", shell, err)
	}
	return out, nil
}

// Console returns what the guest printed on its serial console since the
// start of the process.
func (vm *VM) Console() string {
	text, err := os.ReadFile(vm.consoleLog())
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func (vm *VM) consoleLog() string { return filepath.Join(vm.Dir, "console.log") }

// WaitBoot waits until Linux has booted once more: after `cont` for a guest
// that was started with Prelaunch, or after a reset. Start and Restart have
// done it otherwise.
func (vm *VM) WaitBoot() {
	vm.tb.Helper()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.fatal(vm.waitBoot())
}

func (vm *VM) waitBoot() error {
	deadline := time.Now().Add(bootTimeout)
	for {
		text, err := os.ReadFile(vm.consoleLog())
		if err != nil {
			return err
		}
		if bytes.Count(text, []byte(guestReady)) > vm.boots {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the guest did not boot within %v", bootTimeout)
		}
		select {
		case <-vm.process.gone:
			return fmt.Errorf("boot of the guest: %w", errGone)
		case <-time.After(20 * time.Millisecond):
		}
	}
	vm.boots++
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	if vm.runner != nil {
		return vm.runner.resync(ctx)
	}
	var err error
	vm.runner, err = DialAgent(ctx, vm.runnerSocket())
	return err
}

func (vm *VM) runnerSocket() string { return filepath.Join(vm.Dir, "runner.qga") }
