package pvetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// call is one run of qm.
type call struct {
	*Node
	ctx            context.Context
	stdout, stderr io.Writer
	name           string
	vmid           string
	more           []string // arguments that are no options, but the VMID
	options        []option // in the order of the command line
}

type option struct{ name, value string }

// failure ends qm: a text on standard error, and an exit code. PVE's codes are what errno happens to be.
type failure struct {
	code int
	text string
}

func (f *failure) Error() string { return f.text }

// die is the usual failure.
func die(format string, args ...any) error { return &failure{255, fmt.Sprintf(format, args...)} }

// command is a command of qm. Flags are its options without a value; they may have one.
type command struct {
	run   func(*call) error
	noVM  bool // it has no VMID
	flags []string
}

// commands are those of qm that are known here.
func commands() map[string]command {
	return map[string]command{
		"config":       {run: (*call).config, flags: []string{"current"}},
		"pending":      {run: (*call).pending},
		"set":          {run: (*call).set, flags: []string{"skiplock", "force"}},
		"unlock":       {run: (*call).unlock},
		"list":         {run: (*call).list, noVM: true, flags: []string{"full"}},
		"status":       {run: (*call).status, flags: []string{"verbose"}},
		"showcmd":      {run: (*call).showcmd, flags: []string{"pretty"}},
		"start":        {run: (*call).start, flags: []string{"skiplock"}},
		"stop":         {run: (*call).stop, flags: []string{"skiplock", "keepActive", "overrule-shutdown"}},
		"shutdown":     {run: (*call).shutdown, flags: []string{"skiplock", "keepActive", "forceStop"}},
		"reboot":       {run: (*call).reboot},
		"reset":        {run: (*call).reset, flags: []string{"skiplock"}},
		"clone":        {run: (*call).clone, flags: []string{"full"}},
		"template":     {run: (*call).template},
		"create":       {run: (*call).create, flags: []string{"start", "live-restore"}},
		"resize":       {run: (*call).resize, flags: []string{"skiplock"}},
		"snapshot":     {run: (*call).snapshot, flags: []string{"vmstate"}},
		"rollback":     {run: (*call).rollback, flags: []string{"start"}},
		"guest cmd":    {run: (*call).guestCmd},
		"disk import":  {run: (*call).importDisk},
		"importdisk":   {run: (*call).importDisk},
		"delsnapshot":  {run: (*call).delSnapshot, flags: []string{"force"}},
		"listsnapshot": {run: (*call).listSnapshot},
		"destroy":      {run: (*call).destroy, flags: []string{"skiplock", "purge", "destroy-unreferenced-disks"}},
	}
}

// qm runs a command and returns its exit code.
func (n *Node) qm(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &call{Node: n, ctx: ctx, stdout: stdout, stderr: stderr}
	err := c.parse(args)
	if err == nil {
		err = n.fault(strings.Join(args, " "))
	}
	if err == nil {
		err = commands()[c.name].run(c)
	}
	if err == nil {
		return 0
	}
	text := strings.TrimSuffix(err.Error(), "\n")
	fmt.Fprintln(stderr, text)
	var f *failure
	if errors.As(err, &f) {
		return f.code
	}
	return 255
}

var validVMID = regexp.MustCompile(`^[1-9]\d{2,8}$`)

func (c *call) parse(args []string) error {
	if len(args) == 0 {
		return &failure{255, "ERROR: no command specified"}
	}
	c.name = args[0]
	if len(args) > 1 && (c.name == "guest" || c.name == "disk") {
		c.name += " " + args[1]
		args = args[1:]
	}
	cmd, ok := commands()[c.name]
	if !ok {
		return &failure{255, fmt.Sprintf("ERROR: unknown command 'qm %s'", c.name)}
	}
	for args = args[1:]; len(args) > 0; args = args[1:] {
		name, isOption := strings.CutPrefix(args[0], "-")
		if !isOption || name == "" {
			c.more = append(c.more, args[0])
			continue
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(name, "-"), "=")
		flag := slices.Contains(cmd.flags, name)
		switch {
		case hasValue:
		case flag && (len(args) == 1 || args[1] != "0" && args[1] != "1"):
			value = "1"
		case len(args) == 1:
			return &failure{255, fmt.Sprintf("Option %s requires an argument\n400 unable to parse option\nqm %s", name, c.usage())}
		default:
			args = args[1:]
			value = args[0]
		}
		if strings.Contains(value, "\n") && name != "description" {
			return c.badParameter(name, "property contains a line feed")
		}
		c.options = append(c.options, option{name, value})
	}
	if cmd.noVM {
		return nil
	}
	if len(c.more) == 0 {
		return &failure{255, "400 not enough arguments\nqm " + c.usage()}
	}
	c.vmid, c.more = c.more[0], c.more[1:]
	if !validVMID.MatchString(c.vmid) {
		return c.badParameter("vmid", "invalid format - value does not look like a valid VM ID")
	}
	return nil
}

func (c *call) usage() string { return c.name + " <vmid> [OPTIONS]" }

func (c *call) badParameter(name, what string) error {
	return &failure{2, fmt.Sprintf("400 Parameter verification failed.\n%s: %s\nqm %s", name, what, c.usage())}
}

// flag tells whether an option without a value is set.
func (c *call) flag(name string) bool { return c.option(name) == "1" }

// option is an option's value, or "".
func (c *call) option(name string) string {
	for _, o := range c.options {
		if o.name == name {
			return o.value
		}
	}
	return ""
}

// load reads the VM's configuration.
func (c *call) load() (*conf, error) {
	text, err := os.ReadFile(c.configPath(c.vmid))
	if errors.Is(err, os.ErrNotExist) {
		code := 2 // ENOENT, as long as errno is still that of the open
		if c.name == "start" {
			code = 255
		}
		return nil, &failure{code, fmt.Sprintf("Configuration file 'nodes/%s/qemu-server/%s.conf' does not exist", c.Name, c.vmid)}
	}
	if err != nil {
		return nil, err
	}
	return parseConf(string(text)), nil
}

func (c *call) save(cf *conf) error { return writeFile(c.configPath(c.vmid), cf.String()) }

// checkLock refuses what PVE refuses for a locked VM.
func (c *call) checkLock(cf *conf) error {
	if lock := cf.main["lock"]; lock != "" && !c.flag("skiplock") {
		return die("VM is locked (%s)", lock)
	}
	return nil
}

// unlocked runs f under the VM's lock file, with its configuration, if that is not locked.
func (c *call) unlocked(f func(*conf) error) error {
	return c.loaded(func(cf *conf) error {
		if err := c.checkLock(cf); err != nil {
			return err
		}
		return f(cf)
	})
}

// loaded runs f under the VM's lock file, with its configuration.
func (c *call) loaded(f func(*conf) error) error {
	return c.locked(func() error {
		cf, err := c.load()
		if err != nil {
			return err
		}
		return f(cf)
	})
}

// locked runs f under the VM's lock file, which hook scripts run under as well.
func (c *call) locked(f func() error) error {
	path := filepath.Join(c.Dir, "run/lock", "lock-"+c.vmid+".conf")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	for deadline := time.Now().Add(c.LockTimeout); ; {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if time.Now().After(deadline) {
			return &failure{4, fmt.Sprintf("can't lock file '/var/lock/qemu-server/lock-%s.conf' - got timeout", c.vmid)} // EINTR
		}
		select {
		case <-c.ctx.Done():
			return c.ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	// A hook script, or QEMU, can have the descriptor too while it is being started.
	defer func() { _ = unix.Flock(int(file.Fd()), unix.LOCK_UN) }()
	return f()
}
