package proxmox

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Change is what was done, or would be, about a VM's backup socket.
type Change struct {
	VMID          VMID
	Name          string
	Running       bool
	Before, After string   // the args option of the next start; "" if there is none
	Faults        []string // what was wrong with the socket that was there
	Done          bool     // After is written, or was there already
	// Restart: QEMU runs with other sockets than After says, so the change waits for a stop and a start. A reboot of the
	// guest's own does not do.
	Restart bool
}

// Changed tells whether the option was to be changed.
func (c Change) Changed() bool { return c.Before != c.After }

// attempts bounds how often a change is made anew because somebody else came first.
const attempts = 5

// AddSocket sees to it that the VM's args have exactly one backup socket, of this VM. With dry, it only tells what it would
// do. Other arguments stay; what others change meanwhile is not lost. Its errors are those of Set and of Socket.Add.
func (h Host) AddSocket(ctx context.Context, vmid VMID, dry bool) (Change, error) {
	return h.change(ctx, vmid, dry, Socket.Add, func(f Finding) bool { return f.Right })
}

// RemoveSocket takes our backup sockets out of the VM's args. It is as AddSocket otherwise.
func (h Host) RemoveSocket(ctx context.Context, vmid VMID, dry bool) (Change, error) {
	return h.change(ctx, vmid, dry, Socket.Remove, func(f Finding) bool { return !f.Present })
}

func (h Host) change(ctx context.Context, vmid VMID, dry bool, edit func(Socket, string) (string, error), asWished func(Finding) bool) (Change, error) {
	for n := 1; ; n++ {
		c, change, err := h.planChange(vmid, edit, asWished)
		if err != nil {
			return change, err
		}
		if !change.Changed() {
			change.Done = true
			return change, nil
		}
		// Where it would be refused, a dry run says so as well.
		if c.Lock() != "" {
			return change, c.lockedError()
		}
		if dry {
			return change, nil
		}
		err = h.setArgs(ctx, c, change.After)
		if errors.Is(err, ErrChanged) && n < attempts {
			continue
		}
		change.Done = err == nil
		return change, err
	}
}

// planChange reads the configuration and says what is to be done.
func (h Host) planChange(vmid VMID, edit func(Socket, string) (string, error), asWished func(Finding) bool) (*Config, Change, error) {
	change := Change{VMID: vmid}
	c, err := h.Config(vmid)
	if err != nil {
		return nil, change, err
	}
	process, err := h.Process(vmid)
	if err != nil {
		return nil, change, err
	}
	socket := h.Socket(vmid)
	change.Name, change.Before, change.Running = c.Name(), c.nextArgs(), process != nil
	if change.After, err = edit(socket, change.Before); err != nil {
		return nil, change, fmt.Errorf("VM %s: args: %w", vmid, err)
	}
	found, err := socket.Look(change.Before)
	if err != nil {
		return nil, change, err
	}
	change.Faults = found.Faults
	change.Restart = process != nil && !asWished(socket.LookProcess(process))
	return c, change, nil
}

// nextArgs are the args of the next start. PVE can have the option with nothing in it.
func (c *Config) nextArgs() string {
	args, _ := c.Next("args")
	return strings.Trim(args, whitespace)
}

// setArgs writes the option and looks whether it is there.
func (h Host) setArgs(ctx context.Context, c *Config, args string) error {
	changes := []string{"--args", args}
	if args == "" {
		changes = []string{"--delete", "args"}
	}
	if err := h.Set(ctx, c, changes...); err != nil {
		return err
	}
	after, err := h.Config(c.VMID)
	if err != nil {
		return err
	}
	if after.nextArgs() != args {
		return fmt.Errorf("VM %s: args are not what was asked of qm: %q", c.VMID, after.nextArgs())
	}
	return nil
}

// Check is what can be said of a VM's backup socket.
type Check struct {
	VMID       VMID
	Name       string
	Running    bool
	Template   bool
	Lock       string
	Args       string // now
	Next       string // after the next start
	Configured bool   // it will be right after the next start
	Pending    bool   // args are other ones after the next start
	Active     bool   // the running QEMU was started with it
	Answer     Answer // who answers; "" if nobody was asked
	Unreadable bool   // args of the next start have unbalanced quotes: PVE drops all of them
	Faults     []string
}

// Ready tells whether the VM can be backed up through the socket, now if it runs, else once it does.
func (c Check) Ready() bool {
	if c.Running {
		return c.Active && (c.Answer == AnswerYes || c.Answer == AnswerBusy)
	}
	return c.Configured
}

// CheckSocket looks at a VM's backup socket: in the configuration, on the command line of its QEMU, and by asking who
// answers. An args option that PVE can't read is a fault, no error.
func (h Host) CheckSocket(ctx context.Context, vmid VMID) (Check, error) {
	check := Check{VMID: vmid}
	c, err := h.Config(vmid)
	if err != nil {
		return check, err
	}
	process, err := h.Process(vmid)
	if err != nil {
		return check, err
	}
	socket := h.Socket(vmid)
	check.Name, check.Template, check.Lock, check.Running = c.Name(), c.Template(), c.Lock(), process != nil
	check.Args, check.Next = strings.Trim(c.Options["args"], whitespace), c.nextArgs()
	check.Pending = check.Args != check.Next
	found, err := socket.Look(check.Next)
	if err != nil {
		check.Unreadable = true
		found.Faults = append(found.Faults, err.Error())
	}
	check.Configured, check.Faults = found.Right, found.Faults
	if process == nil {
		return check, nil
	}
	check.Active = socket.LookProcess(process).Right
	check.Answer, err = socket.Ask(ctx, process)
	return check, err
}
