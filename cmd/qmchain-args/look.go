package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"qmchain/cmd/internal/vms"
	"qmchain/internal/ui"
	"qmchain/proxmox"
)

type showCmd struct{ vms.Flags }

// state is what is known of a VM's args and socket.
type state struct {
	VMID       proxmox.VMID   `json:"vmid"`
	Name       string         `json:"name,omitempty"`
	Running    bool           `json:"running"`
	Template   bool           `json:"template,omitempty"`
	Lock       string         `json:"lock,omitempty"`
	Socket     string         `json:"socket"`
	Args       string         `json:"args"`
	Next       string         `json:"next"`
	Configured bool           `json:"configured"`
	Pending    bool           `json:"pending"`
	Active     bool           `json:"active"`
	Answers    proxmox.Answer `json:"answers,omitempty"`
	Unreadable bool           `json:"unreadable,omitempty"`
	Faults     []string       `json:"faults,omitempty"`
	Ready      bool           `json:"ready"`
	Error      string         `json:"error,omitempty"`
}

func stateOf(host proxmox.Host, c proxmox.Check, err error) state {
	s := state{
		VMID: c.VMID, Name: c.Name, Running: c.Running, Template: c.Template, Lock: c.Lock, Socket: host.Socket(c.VMID).Path(),
		Args: c.Args, Next: c.Next, Configured: c.Configured, Pending: c.Pending, Active: c.Active, Answers: c.Answer,
		Unreadable: c.Unreadable, Faults: c.Faults, Ready: c.Ready(),
	}
	if err != nil {
		s.Error, s.Ready = err.Error(), false
	}
	return s
}

func (c *showCmd) Run(ctx context.Context, u *ui.UI, host proxmox.Host) error {
	states := []state{}
	failure := c.Each(ctx, u, host, func(id proxmox.VMID) error {
		check, err := host.CheckSocket(ctx, id)
		states = append(states, stateOf(host, check, err))
		return err
	})
	if len(states) == 0 {
		return failure
	}
	err := u.Result(c.JSON, states, func(w io.Writer) error {
		for _, s := range states {
			if s.Error != "" {
				continue
			}
			if _, err := fmt.Fprintf(w, "%s %s\n", s.VMID, s.Name); err != nil {
				return err
			}
			lines := [][2]string{{"backup socket", s.socket()}, {"args", s.Args}}
			if s.Pending {
				lines = append(lines, [2]string{"after the next start", s.Next})
			}
			for _, fault := range s.Faults {
				lines = append(lines, [2]string{"fault", fault})
			}
			for _, l := range lines {
				if _, err := fmt.Fprintf(w, "  %s: %s\n", l[0], orDash(l[1])); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return failure
}

// Help is what "check --help" says in addition.
func (*checkCmd) Help() string {
	return `Configured: args of the next start have exactly one socket, and it is this VM's. Pending: args change with the next start. Active: the running QEMU was started with the socket. Answers: "yes" is this VM's own QEMU, known by its process and not by the path; "busy" is the same, talking with somebody else, a backup for one; "other" is another process, such as a clone that was started with this VM's socket; "no" is nobody.

Exit codes: 0 where every VM can be backed up through its socket, now or once it runs; 4 where nothing but a stop and start is missing; else 1, and 7 of several VMs.`
}

// socket is the path of the backup socket, or what there is in its place.
func (s state) socket() string {
	switch {
	case s.Configured:
		return s.Socket
	case s.Unreadable:
		return "none: PVE drops these args"
	case len(s.Faults) > 0:
		return "wrong"
	}
	return ""
}

type checkCmd struct{ vms.Flags }

// Of a VM that can't be backed up through its socket.
var (
	errNotReady = errors.New("no backup socket that can be used")
	errRestart  = errors.New("a stop and start is still to be done")
)

// Run fails where a VM can't be looked at. Else the exit code is 1 (of several VMs, 7) where a socket is missing or wrong,
// and 4 where all that is missing is a stop and start.
func (c *checkCmd) Run(ctx context.Context, u *ui.UI, host proxmox.Host) error {
	states := []state{}
	waiting, notReady := 0, 0
	failure := c.Each(ctx, u, host, func(id proxmox.VMID) error {
		check, err := host.CheckSocket(ctx, id)
		s := stateOf(host, check, err)
		states = append(states, s)
		switch verdict := s.verdict(); {
		case err != nil: // told already
		case errors.Is(verdict, errRestart):
			waiting++
		case verdict != nil:
			notReady++
		}
		return err
	})
	if len(states) == 0 {
		return failure
	}
	err := u.Result(c.JSON, states, func(w io.Writer) error {
		looked := slices.DeleteFunc(slices.Clone(states), func(s state) bool { return s.Error != "" })
		if len(looked) == 0 {
			return nil
		}
		if _, err := fmt.Fprintln(w, "VMID\tNAME\tSTATUS\tCONFIGURED\tPENDING\tACTIVE\tANSWERS\tREMARK"); err != nil {
			return err
		}
		for _, s := range looked {
			_, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.VMID, orDash(s.Name), s.status(),
				yesNo(s.Configured), yesNo(s.Pending), s.ifRunning(yesNo(s.Active)), s.ifRunning(string(s.Answers)), s.remark())
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	switch {
	case failure != nil:
		return failure
	case notReady > 0 && len(states) > 1:
		return ui.Exit(ui.ExitSomeFailed, fmt.Errorf("%d of %d VMs: %w", notReady, len(states), errNotReady))
	case notReady > 0:
		return fmt.Errorf("VM %s: %w", states[0].VMID, errNotReady)
	case waiting > 0:
		return ui.Exit(ui.ExitPartly, fmt.Errorf("%d of %d VMs: %w", waiting, len(states), errRestart))
	}
	return nil
}

// verdict is nil for a VM that can be backed up through its socket once it runs.
func (s state) verdict() error {
	switch {
	case s.Template || s.Ready && s.Configured:
		return nil
	case s.Running && s.Configured && !s.Active:
		return errRestart
	}
	return errNotReady
}

// remark says what is to be done.
func (s state) remark() string {
	var remarks []string
	switch {
	case s.Template:
		return "a template never runs"
	case errors.Is(s.verdict(), errRestart):
		remarks = append(remarks, "stop and start the VM")
	case !s.Configured && len(s.Faults) == 0 && s.Active:
		remarks = append(remarks, "gone after the next start")
	case s.Unreadable: // that is the fault
	case !s.Configured:
		remarks = append(remarks, fmt.Sprintf("qmchain-args add %s", s.VMID))
	case s.Answers == proxmox.AnswerBusy:
		remarks = append(remarks, "a backup is running, or something else holds it")
	case s.Answers == proxmox.AnswerOther:
		remarks = append(remarks, "another process has the socket, a clone for one: check that, then stop and start the VM")
	case s.Active && s.Answers == proxmox.AnswerNone:
		remarks = append(remarks, "the socket has been removed: stop and start the VM")
	}
	remarks = append(remarks, s.Faults...)
	if s.Lock != "" {
		remarks = append(remarks, "locked ("+s.Lock+")")
	}
	return strings.Join(remarks, "; ")
}

func (s state) status() string {
	switch {
	case s.Template:
		return "template"
	case s.Running:
		return "running"
	}
	return "stopped"
}

func (s state) ifRunning(text string) string {
	if !s.Running {
		return "-"
	}
	return text
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
