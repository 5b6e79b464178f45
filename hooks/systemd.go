package hooks

import (
	"context"
	"path/filepath"
	"strconv"
	"time"

	"qmchain/internal/child"
	"qmchain/proxmox"
)

// Units of the package, with a VMID.
func backupUnit(vmid proxmox.VMID) string { return "qmchain-backup@" + vmid.String() + ".service" }
func keepUnit(vmid proxmox.VMID) string   { return "qmchain-keep@" + vmid.String() + ".service" }

// Units that are made for what is done before a stop, and go with it.
func lastUnit(vmid proxmox.VMID) string { return "qmchain-last-" + vmid.String() + ".service" }
func saveUnit(vmid proxmox.VMID) string { return "qmchain-save-" + vmid.String() + ".service" }

// Systemd are systemd's programs. What they start lives in a group of its own: it is not ended with the task of PVE's that
// called the hook, and a process that hangs in there does not hang here.
type Systemd struct {
	Dir string // the folder with them: /usr/bin
}

// handOver bounds the asking for a unit, which needs no more than a message to systemd.
const handOver = 8 * time.Second

// Start asks for a unit to be started, and does not wait until it is.
func (s Systemd) Start(ctx context.Context, unit string) error {
	_, err := child.Run(ctx, handOver, filepath.Join(s.Dir, "systemctl"), "--no-ask-password", "--no-block", "start", unit)
	return err
}

// RunUnit runs a command as a unit of that name and waits for its end. When limit has passed the unit is told to end, and a little
// later it is not waited for any more. Done, but not quite as asked (exit code 4), is no error.
func (s Systemd) RunUnit(ctx context.Context, unit string, limit time.Duration, command ...string) error {
	return s.run(ctx, limit+undoLimit, unit, command, "--wait", "--service-type=exec", "--property=RuntimeMaxSec="+seconds(limit))
}

// StartReady runs a command as a unit of that name and waits until it says that it is ready, by sd_notify. It has limit for that,
// and goes on then for no longer than that again.
func (s Systemd) StartReady(ctx context.Context, unit string, limit time.Duration, command ...string) error {
	return s.run(ctx, limit, unit, command,
		"--service-type=notify", "--property=TimeoutStartSec="+seconds(limit), "--property=RuntimeMaxSec="+seconds(limit))
}

func (s Systemd) run(ctx context.Context, limit time.Duration, unit string, command []string, how ...string) error {
	args := append([]string{"--quiet", "--collect", "--no-ask-password", "--unit=" + unit}, how...)
	args = append(args,
		"--property=TimeoutStopSec="+seconds(undoLimit),
		"--property=KillMode=mixed", // only the program itself is told to end: it undoes everything, and ends its helpers
		"--property=SuccessExitStatus=4",
		// VMs are stopped when the host shuts down too, and then systemd starts nothing that has the usual dependencies.
		"--property=DefaultDependencies=no",
		"--")
	_, err := child.Run(ctx, limit+handOver/2, filepath.Join(s.Dir, "systemd-run"), append(args, command...)...)
	return err
}

func seconds(d time.Duration) string { return strconv.Itoa(int(d.Seconds())) }
