package pvetest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"qmchain/internal/testenv"
)

// exitLimit bounds the time that QEMU has to end before it is killed.
const exitLimit = 60 * time.Second

// running tells whether the VM's QEMU is there.
func (n *Node) running(vmid string) bool {
	vm := n.vm(vmid)
	return vm != nil && vm.Alive()
}

// layout is where this node has what command lines name.
func (n *Node) layout() layout {
	return layout{run: n.Run, events: n.Events, firmware: filepath.Join(n.Dir, "halt.bin"), storage: n.Storage}
}

// showcmd prints the command line that a start would use.
func (c *call) showcmd() error {
	cf, err := c.load()
	if err != nil {
		return err
	}
	cf.apply(func(string) bool { return true })
	args, err := c.commandLine(cf)
	if err != nil {
		return err
	}
	fmt.Fprintln(c.stdout, show(append([]string{"/usr/bin/kvm"}, args...), c.flag("pretty")))
	return nil
}

func (c *call) commandLine(cf *conf) ([]string, error) {
	words, err := shellwords(c.ctx, cf.main["args"])
	if err != nil {
		return nil, err
	}
	return append(commandLine(c.vmid, cf, c.layout(), c.PVE), words...), nil
}

// start starts the VM, with what was pending.
func (c *call) start() error {
	return c.loaded(func(cf *conf) error {
		if cf.main["template"] == "1" {
			return die("you can't start a vm if it's a template")
		}
		if err := c.checkLock(cf); err != nil {
			return err
		}
		if c.running(c.vmid) {
			return die("VM %s already running", c.vmid)
		}
		return c.startLocked(cf)
	})
}

func (c *call) startLocked(cf *conf) error {
	if len(cf.pending) > 0 {
		cf.apply(func(string) bool { return true })
		if err := c.save(cf); err != nil {
			return err
		}
	}
	if err := c.hook(cf, "pre-start"); err != nil {
		return err
	}
	args, err := c.commandLine(cf)
	if err != nil {
		return err
	}
	if err := c.launch(cf, args); err != nil {
		return err
	}
	c.warn(c.hook(cf, "post-start"))
	return nil
}

// warn prints an error that changes nothing.
func (c *call) warn(err error) {
	if err != nil {
		fmt.Fprintln(c.stderr, strings.TrimSuffix(err.Error(), "\n"))
	}
}

// launch starts QEMU.
func (c *call) launch(cf *conf, args []string) error {
	if err := os.WriteFile(c.layout().firmware, haltFirmware(), 0o600); err != nil {
		return err
	}
	cfg := testenv.Config{
		QEMU: c.QEMU, Guest: c.Guest,
		CommandLine: launchable(args, c.QEMU, c.layout(), c.Guest),
		Prelaunch:   true, // qm start does not wait for the guest
	}
	for _, d := range cf.drives() {
		cfg.Disks = append(cfg.Disks, testenv.Disk{ID: d.id, Path: c.layout().volume(d.volume), Format: d.format(), Device: d.harnessDevice()})
	}
	tb := &startTB{TB: c.tb}
	var vm *testenv.VM
	err := tb.attempt(func() { vm = testenv.Start(tb, cfg) })
	if err != nil {
		return die("%v\nstart failed: QEMU exited with code 1", err)
	}
	vm.Socket = filepath.Join(c.Run, c.vmid+"-backup.qmp")
	vm.AgentSocket = filepath.Join(c.Run, c.vmid+".qga")
	c.setVM(c.vmid, vm)
	return nil
}

// harnessDevice is the kind of device, where its id does not tell.
func (d drive) harnessDevice() string {
	if !d.cdrom() {
		return ""
	}
	if d.bus() == "scsi" {
		return "scsi-cd"
	}
	return "ide-cd"
}

// startTB makes a failure to start an error; what happens later is the test's failure.
type startTB struct {
	testenv.TB
	started bool
}

type startError struct{ error }

func (s *startTB) Fatalf(format string, args ...any) {
	s.Helper()
	if s.started {
		s.TB.Fatalf(format, args...)
	}
	panic(startError{fmt.Errorf(format, args...)})
}

func (s *startTB) attempt(f func()) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case startError:
			err = r.error
		default:
			panic(r)
		}
	}()
	f()
	s.started = true
	return nil
}

// stop ends QEMU at once.
func (c *call) stop() error {
	return c.unlocked(func(cf *conf) error {
		if !c.running(c.vmid) {
			return nil
		}
		c.warn(c.hook(cf, "pre-stop"))
		return c.stopped(c.quit())
	})
}

// quit ends QEMU by its monitor.
func (c *call) quit() error {
	vm := c.vm(c.vmid)
	_ = vm.Try("quit", nil, nil) // its answer may be lost
	if c.ended(vm, exitLimit) {
		return nil
	}
	_ = syscall.Kill(vm.Pid(), syscall.SIGKILL)
	if !c.ended(vm, exitLimit) {
		return errors.New("QEMU does not end")
	}
	return nil
}

// ended waits for QEMU's end.
func (c *call) ended(vm *testenv.VM, limit time.Duration) bool {
	for deadline := time.Now().Add(limit); vm.Alive(); {
		if time.Now().After(deadline) || c.ctx.Err() != nil {
			return false
		}
		time.Sleep(5 * time.Millisecond)
	}
	return true
}

// stopped applies what was pending, when QEMU has ended.
func (c *call) stopped(err error) error {
	if err != nil {
		return err
	}
	cf, err := c.load()
	if err != nil {
		return err
	}
	if len(cf.pending) == 0 {
		return nil
	}
	cf.apply(func(string) bool { return true })
	return c.save(cf)
}

// shutdown asks the guest to power off.
func (c *call) shutdown() error {
	return c.unlocked(func(cf *conf) error {
		if !c.running(c.vmid) {
			return die("VM %s not running", c.vmid)
		}
		return c.powerDown(cf)
	})
}

// powerDown is shutdown under the VM's lock. qmeventd ends QEMU when the guest has powered off.
func (c *call) powerDown(cf *conf) error {
	limit := exitLimit
	if text := c.option("timeout"); text != "" {
		seconds, err := strconv.Atoi(text)
		if err != nil {
			return c.badParameter("timeout", "type check ('integer') failed - got '"+text+"'")
		}
		limit = time.Duration(seconds) * time.Second
	}
	c.warn(c.hook(cf, "pre-stop"))
	vm := c.vm(c.vmid)
	if err := vm.Try("system_powerdown", nil, nil); err != nil {
		return die("%v", err)
	}
	switch {
	case c.ended(vm, limit):
		return c.stopped(nil)
	case c.flag("forceStop"):
		fmt.Fprintln(c.stderr, "VM quit/powerdown failed - terminating now with SIGTERM")
		return c.stopped(c.quit())
	}
	return die("VM quit/powerdown failed - got timeout")
}

// reboot shuts the guest down and has qmeventd's clean-up start the VM again.
func (c *call) reboot() error {
	err := c.unlocked(func(cf *conf) error {
		if !c.running(c.vmid) {
			return die("VM not running")
		}
		if err := os.WriteFile(c.rebootFile(), nil, 0o600); err != nil {
			return err
		}
		if err := c.powerDown(cf); err != nil {
			return errors.Join(err, os.Remove(c.rebootFile()))
		}
		return nil
	})
	if err != nil {
		return err
	}
	// The clean-up comes by itself; PVE waits for the reboot as well.
	for deadline := time.Now().Add(exitLimit); time.Now().Before(deadline) && c.ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(c.rebootFile()); err != nil && c.running(c.vmid) {
			return nil
		}
	}
	return die("VM did not start again")
}

func (c *call) rebootFile() string { return filepath.Join(c.Run, c.vmid+".reboot") }

// reset restarts the guest within its QEMU.
func (c *call) reset() error {
	return c.unlocked(func(cf *conf) error {
		if !c.running(c.vmid) {
			return die("VM %s not running", c.vmid)
		}
		if err := c.vm(c.vmid).Try("system_reset", nil, nil); err != nil {
			return die("%v", err)
		}
		return nil
	})
}

// cleanup is what qmeventd runs when a QEMU has gone. Guest tells that the guest has powered off, or QEMU crashed: then
// no qm has cleaned up.
func (c *call) cleanup(guest bool) error {
	restart := false
	err := c.locked(func() error {
		if c.running(c.vmid) {
			return nil // started again meanwhile
		}
		cf, err := c.load()
		if err != nil {
			return err
		}
		if guest {
			if err := c.stopped(nil); err != nil {
				return err
			}
		}
		c.warn(c.hook(cf, "post-stop"))
		restart = os.Remove(c.rebootFile()) == nil
		return nil
	})
	if err == nil && restart {
		err = c.start()
	}
	return err
}
