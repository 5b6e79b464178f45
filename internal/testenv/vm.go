package testenv

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// startTimeout bounds the time from the start of QEMU to its greeting.
	startTimeout = 60 * time.Second
	// exitTimeout bounds the time that QEMU takes to end when told to.
	exitTimeout = 60 * time.Second
)

// VM is a QEMU process, or the one after it: a VM keeps its disks, identity
// and sockets when it is restarted.
//
// Methods without an error result fail the test, and so belong into the
// test's own goroutine; the Try methods may be used from any.
type VM struct {
	// Dir is the VM's own folder. It goes when the test ends.
	Dir string
	// Socket is the QMP socket for the code under test.
	Socket string
	// Spare is one more, for somebody else.
	Spare string
	// AgentSocket is the guest agent's. Nobody answers there unless a real
	// guest runs (Config.Guest).
	AgentSocket string

	tb TB

	ioMu sync.Mutex // one qemu-io command at a time: its output has no id
	mark int

	mu      sync.Mutex // guards what follows
	cfg     Config
	process *process
	monitor *monitor
	boots   int    // of Linux, since the start of the process
	runner  *Agent // of Linux, once it has booted
}

// Start starts a guest and returns when it answers. When the test ends the
// process is killed and waited for; when the test has failed, what QEMU
// printed is logged.
func Start(tb TB, cfg Config) *VM {
	tb.Helper()
	vm, err := newVM(tb, cfg)
	if err != nil {
		tb.Fatalf("testenv: %v", err)
	}
	tb.Cleanup(func() {
		if err := vm.kill(); err != nil {
			tb.Errorf("testenv: %v", err)
		}
		if tb.Failed() {
			tb.Logf("QEMU's output:\n%s", vm.Log())
			if cfg.Guest {
				tb.Logf("guest's console:\n%s", vm.Console())
			}
		}
		if err := os.RemoveAll(vm.Dir); err != nil {
			tb.Errorf("testenv: %v", err)
		}
	})
	if err := vm.start(); err != nil {
		tb.Fatalf("testenv: %v", err)
	}
	return vm
}

func newVM(tb TB, cfg Config) (*VM, error) {
	if cfg.QEMU.System == "" {
		return nil, errors.New("Config.QEMU is empty: use Host, Version or QEMUs")
	}
	// A socket's path holds 107 bytes, and a test's own temp folder has the
	// test's name in it.
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		return nil, err
	}
	cfg.Disks = slices.Clone(cfg.Disks)
	for i, d := range cfg.Disks {
		if d.Path == "" && !d.cdrom() {
			d.Path = filepath.Join(dir, d.ID+".img")
		}
		cfg.Disks[i] = d
	}
	if cfg.Name == "" {
		cfg.Name = "qmchain-test"
	}
	if cfg.UUID == "" {
		cfg.UUID = RandomUUID()
	}
	if cfg.VMGenID == "" {
		cfg.VMGenID = RandomUUID()
	}
	if cfg.Memory == 0 {
		cfg.Memory = 64
		if cfg.Guest {
			cfg.Memory = 384
		}
	}
	return &VM{
		Dir:         dir,
		Socket:      filepath.Join(dir, "backup.qmp"),
		Spare:       filepath.Join(dir, "spare.qmp"),
		AgentSocket: filepath.Join(dir, "agent.qga"),
		tb:          tb,
		cfg:         cfg,
	}, nil
}

// RandomUUID returns a new UUID in the usual form.
func RandomUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func (vm *VM) start() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	cfg := vm.cfg
	for i, d := range cfg.Disks {
		d = d.withDefaults()
		if _, err := os.Stat(d.Path); errors.Is(err, os.ErrNotExist) && !d.cdrom() && cfg.CommandLine == nil {
			if err := createDisk(cfg.QEMU, d.Path, d.Format, d.Size); err != nil {
				return fmt.Errorf("disk %s: %w", d.ID, err)
			}
		}
		cfg.Disks[i] = d.withDefaults()
	}
	f := files{
		socket: vm.Socket, spare: vm.Spare, agent: vm.AgentSocket,
		harness:  filepath.Join(vm.Dir, "harness.qmp"),
		firmware: filepath.Join(vm.Dir, "halt.bin"),
		console:  filepath.Join(vm.Dir, "console"),
		log:      vm.consoleLog(),
		runner:   vm.runnerSocket(),
	}
	if err := os.WriteFile(f.firmware, haltFirmware(), 0o600); err != nil {
		return err
	}
	if cfg.Guest {
		var err error
		if f.kernel, f.initrd, err = GuestFiles(); err != nil {
			return err
		}
	}
	args := givenCommandLine(cfg, f)
	if cfg.CommandLine == nil {
		var err error
		if args, err = commandLine(cfg, f, aioFor); err != nil {
			return err
		}
	}
	// What a killed QEMU left must not be taken for the new one's.
	for _, path := range []string{f.socket, f.spare, f.agent, f.harness, f.console, f.log, f.runner} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	p, err := startProcess(cfg.QEMU.System, args)
	if err != nil {
		return err
	}
	vm.process = p
	m, err := dialMonitor(f.harness, p.gone, startTimeout)
	if err != nil {
		err = errors.Join(err, p.signal(syscall.SIGKILL), p.wait(exitTimeout))
		return fmt.Errorf("QEMU %s did not start: %w\n%s\n%s", cfg.QEMU.Name, err, strings.Join(args, " "), p.log())
	}
	vm.monitor = m
	vm.boots, vm.runner = 0, nil
	if cfg.Guest && !cfg.Prelaunch {
		return vm.waitBoot()
	}
	return nil
}

// givenCommandLine is Config.CommandLine with what the harness needs.
func givenCommandLine(cfg Config, f files) []string {
	args := append([]string{
		"-chardev", "socket,id=harness,path=" + escape(f.harness) + ",server=on,wait=off", "-mon", "chardev=harness,mode=control",
	}, cfg.CommandLine...)
	if cfg.Guest {
		args = append(args, guestArgs(f)...)
	}
	return args
}

func (vm *VM) current() (*process, *monitor) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.process, vm.monitor
}

func (vm *VM) fatal(err error) {
	vm.tb.Helper()
	if err != nil {
		vm.tb.Fatalf("testenv: %v", err)
	}
}

// Config returns what the VM runs with, or will with the next restart.
func (vm *VM) Config() Config {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	cfg := vm.cfg
	cfg.Disks = slices.Clone(cfg.Disks)
	return cfg
}

// Disk returns the disk of that id, with its Path filled in.
func (vm *VM) Disk(id string) Disk {
	vm.tb.Helper()
	d, err := vm.disk(id)
	vm.fatal(err)
	return d
}

func (vm *VM) disk(id string) (Disk, error) {
	for _, d := range vm.Config().Disks {
		if d.ID == id {
			return d.withDefaults(), nil
		}
	}
	return Disk{}, fmt.Errorf("the guest has no disk %s", id)
}

// Execute runs a QMP command on the harness's own socket and decodes what it
// returns into result, unless that is nil.
func (vm *VM) Execute(command string, args, result any) {
	vm.tb.Helper()
	vm.fatal(vm.Try(command, args, result))
}

// Try is Execute for commands that may fail: with a *CommandError if QEMU
// refuses.
func (vm *VM) Try(command string, args, result any) error {
	_, m := vm.current()
	return m.execute(command, args, result)
}

// HMP runs a command of the human monitor and returns what it prints, errors
// included: the human monitor does not tell them apart.
func (vm *VM) HMP(line string) string {
	vm.tb.Helper()
	text, err := vm.hmp(line)
	vm.fatal(err)
	return text
}

func (vm *VM) hmp(line string) (string, error) {
	var text string
	err := vm.Try("human-monitor-command", map[string]any{"command-line": line}, &text)
	return strings.ReplaceAll(text, "\r\n", "\n"), err
}

// Status returns the run state: running, paused, prelaunch, shutdown, ...
func (vm *VM) Status() string {
	vm.tb.Helper()
	var s struct{ Status string }
	vm.Execute("query-status", nil, &s)
	return s.Status
}

// Events returns the events that the harness has received since the start of
// the process, oldest first.
func (vm *VM) Events() []Event {
	_, m := vm.current()
	return m.allEvents()
}

// WaitEvent waits for the next event of that name: the first call returns the
// first one since the start of the process, a second call the second.
func (vm *VM) WaitEvent(name string, timeout time.Duration) Event {
	vm.tb.Helper()
	_, m := vm.current()
	e, err := m.wait(name, timeout)
	vm.fatal(err)
	return e
}

// Pid is QEMU's process id.
func (vm *VM) Pid() int {
	p, _ := vm.current()
	return p.cmd.Process.Pid
}

// Alive tells whether the process is still there.
func (vm *VM) Alive() bool {
	p, _ := vm.current()
	return p.alive()
}

// Wait waits until the process has ended by itself, and returns how: nil for
// exit status 0.
func (vm *VM) Wait(timeout time.Duration) error {
	vm.tb.Helper()
	p, _ := vm.current()
	vm.fatal(p.wait(timeout))
	return p.err
}

// Log returns what QEMU has printed.
func (vm *VM) Log() string {
	p, _ := vm.current()
	if p == nil {
		return ""
	}
	return p.log()
}

// Quit ends QEMU by its monitor, as `qm stop` does, and waits for the end.
func (vm *VM) Quit() {
	vm.tb.Helper()
	vm.fatal(vm.quit())
}

func (vm *VM) quit() error {
	p, m := vm.current()
	// The answer can be lost: the process ends meanwhile.
	if err := m.execute("quit", nil, nil); err != nil && !errors.Is(err, errGone) && p.alive() {
		return err
	}
	return vm.ended()
}

// Terminate ends QEMU by SIGTERM, as a host's shutdown does, and waits.
func (vm *VM) Terminate() {
	vm.tb.Helper()
	p, _ := vm.current()
	vm.fatal(p.signal(syscall.SIGTERM))
	vm.fatal(vm.ended())
}

// Kill ends QEMU by SIGKILL, as a crash does, and waits. Its sockets stay.
func (vm *VM) Kill() {
	vm.tb.Helper()
	vm.fatal(vm.kill())
}

func (vm *VM) kill() error {
	p, _ := vm.current()
	if p == nil {
		return nil
	}
	return errors.Join(p.signal(syscall.SIGKILL), vm.ended())
}

func (vm *VM) ended() error {
	p, m := vm.current()
	if err := p.wait(exitTimeout); err != nil {
		return err
	}
	if m != nil {
		m.close()
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.runner != nil {
		_ = vm.runner.Close()
	}
	return nil
}

// Restart ends QEMU by its monitor, if it is still there, and starts it again
// with the same disks and identity.
func (vm *VM) Restart() {
	vm.tb.Helper()
	vm.Reconfigure(func(*Config) {})
}

// Reconfigure is a restart with a changed configuration.
func (vm *VM) Reconfigure(change func(*Config)) {
	vm.tb.Helper()
	if vm.Alive() {
		vm.Quit()
	}
	cfg := vm.Config()
	change(&cfg)
	vm.mu.Lock()
	vm.cfg = cfg
	vm.mu.Unlock()
	vm.fatal(vm.start())
}
