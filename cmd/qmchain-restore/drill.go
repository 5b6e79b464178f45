package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/points"
	"qmchain/internal/drill"
	"qmchain/internal/ui"
)

type drillCmd struct {
	points.Flags `embed:""`
	Until        string        `default:"agent" enum:"agent,login,text" help:"What the guest must show: agent, an answer of its guest agent; login, a login prompt on the serial console; text, what --text says."`
	Text         string        `placeholder:"TEXT" help:"The text on the serial console to wait for; implies --until text."`
	Timeout      time.Duration `positive:"" default:"5m" placeholder:"TIME" help:"How long to wait for that."`
	Screenshot   string        `conf:"no" placeholder:"FILE" help:"Write what is on the screen at the end to this PNG."`
	Memory       string        `placeholder:"SIZE" help:"Of the guest. Default: what its Proxmox VE configuration says, 4GiB at most; else 1GiB."`
	CPUs         int           `name:"cpus" placeholder:"N" help:"Of the guest. Default: as many as it had, 4 at most; else 2."`
	Machine      string        `placeholder:"TYPE" help:"QEMU's machine type, such as pc or q35. Default: what the guest had; else pc."`
	Accel        string        `default:"auto" enum:"auto,kvm,tcg" help:"kvm, tcg (slow, needs no hardware), or auto: kvm where it is."`
	CPU          string        `name:"cpu" placeholder:"MODEL" help:"QEMU's CPU model. Default: the host's, or all that can be emulated."`
	Boot         string        `conf:"no" placeholder:"D" help:"The disk to boot from. Default: the guest's own; else the first."`
	Firmware     string        `placeholder:"FILE" help:"UEFI code, for a guest with efidisk0. Default: what is installed."`
	Kernel       string        `conf:"no" placeholder:"FILE" help:"Start this kernel instead of what is on a disk."`
	Initrd       string        `conf:"no" placeholder:"FILE" help:"Its initrd."`
	Append       string        `conf:"no" placeholder:"TEXT" help:"Its command line."`
	QEMU         string        `name:"qemu" placeholder:"PROGRAM" help:"QEMU. Default: kvm (Proxmox VE's) or qemu-system-x86_64."`
	Result       string        `conf:"no" placeholder:"FILE" help:"Write the result to FILE, as --json prints it, and not into the repository: note-drill does that."`
	JSON         bool          `conf:"no" name:"json" help:"Print one JSON document."`
}

// drilled is the output of drill --json, and what note-drill reads.
type drilled struct {
	Guest   string    `json:"guest"`
	ID      chain.ID  `json:"id"`
	Time    time.Time `json:"time"` // at the end
	Passed  bool      `json:"passed"`
	Why     string    `json:"why"`
	Seconds float64   `json:"seconds"` // from the start of QEMU to the sign of life, or to the end of patience
	Console string    `json:"console"` // the end of what the guest printed
}

// Run fails with exit code 1 where the guest does not show what it must.
func (c *drillCmd) Run(ctx context.Context, u *ui.UI) error {
	if c.Text != "" {
		c.Until = "text"
	}
	var memory int64
	var err error
	if c.Memory != "" {
		memory, err = cli.Size("--memory", c.Memory)
	}
	switch {
	case err != nil:
		return err
	case c.Memory != "" && memory < 16<<20:
		return ui.Exit(ui.ExitUsage, errors.New("--memory: a guest needs 16MiB at least"))
	case c.CPUs < 0:
		return ui.Exit(ui.ExitUsage, errors.New("--cpus: a guest needs one at least"))
	case c.Until == "text" && c.Text == "":
		return ui.Exit(ui.ExitUsage, errors.New("--until text: --text is missing"))
	case c.Timeout <= 0:
		return ui.Exit(ui.ExitUsage, errors.New("--timeout must be more than 0s"))
	}
	p, err := openPoint(c.Repo, c.Point)
	if err != nil {
		return err
	}
	names, err := p.Choose(c.Disk)
	if err != nil {
		return err
	}
	had := p.machineOf(u)
	if names, err = bootOrder(u, had.order(names), c.Boot); err != nil {
		return err
	}
	disks, closeAll, err := p.OpenDisks(names)
	if err != nil {
		return err
	}
	defer closeAll()
	p.damage(u, names)
	cfg := drill.Config{
		Memory: cmp.Or(memory, had.memory) >> 20, CPUs: cmp.Or(c.CPUs, had.cpus), Accel: c.Accel, CPU: c.CPU,
		Machine: cmp.Or(c.Machine, had.kind), SCSI: had.scsi, UUID: had.uuid, Firmware: c.Firmware,
		Kernel: c.Kernel, Initrd: c.Initrd, Append: c.Append,
		Sign: drill.Sign(c.Until), Text: c.Text, Timeout: c.Timeout, Screenshot: c.Screenshot,
		QEMU: c.QEMU, QemuImg: "qemu-img", Log: u.Log, Now: time.Now,
	}
	for _, d := range disks {
		cfg.Disks = append(cfg.Disks, drill.Disk{Name: d.Name, Image: d})
	}
	if cfg.Firmware == "" && slices.ContainsFunc(names, isEFI) {
		if cfg.Firmware, err = drill.FindFirmware(); err != nil {
			return err
		}
	}
	if cfg.Accel == "auto" {
		cfg.Accel = accelerator()
	}
	if cfg.QEMU == "" {
		cfg.QEMU = drill.FindQEMU()
	}
	u.Log.Infof("starting %s in a guest of its own, without a network (%s)", p.Name(), cfg.Accel)
	result, err := drill.Run(ctx, cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", p.Name(), err)
	}
	out := drilled{p.Guest.Name, p.ID, time.Now().UTC().Truncate(time.Second), result.Passed, result.Why, result.Took.Seconds(), result.Console}
	var fileErr error
	if c.Result == "" {
		note(ctx, u, p.Set, p.Guest.Name, out.record())
	} else {
		fileErr = out.write(c.Result)
	}
	err = u.Result(c.JSON, out, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.Name(), map[bool]string{true: "passed", false: "FAILED"}[out.Passed], result.Took.Round(100*time.Millisecond), out.Why)
		return err
	})
	if err := errors.Join(fileErr, err); err != nil || result.Passed {
		return err
	}
	return ui.Exit(ui.ExitFailed, fmt.Errorf("%s does not boot as it should: %s", p.Name(), result.Why))
}

func isEFI(disk string) bool { return strings.HasPrefix(disk, "efidisk") }

// bootOrder puts the disk to boot from first, and leaves out what a guest can't be given.
func bootOrder(u *ui.UI, names []string, first string) ([]string, error) {
	var order []string
	for _, name := range names {
		if strings.HasPrefix(name, "tpmstate") {
			u.Log.Infof("%s is left out: the guest gets no TPM", name)
			continue
		}
		order = append(order, name)
	}
	if first == "" {
		// What holds firmware variables is no disk to boot from.
		slices.SortStableFunc(order, func(a, b string) int {
			switch {
			case isEFI(a) == isEFI(b):
				return 0
			case isEFI(a):
				return 1
			}
			return -1
		})
		return order, nil
	}
	i := slices.Index(order, first)
	if i < 0 {
		return nil, ui.Exit(ui.ExitUsage, fmt.Errorf("--boot: %q is not one of %s", first, strings.Join(order, ", ")))
	}
	return append([]string{first}, slices.Delete(order, i, i+1)...), nil
}

// accelerator is kvm where this process may use it.
func accelerator() string {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg"
	}
	_ = f.Close()
	return "kvm"
}
