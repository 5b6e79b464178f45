package testenv

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// The Linux guest boots from nothing but its initrd, sees its disks under
// the names that the test gave it, and has two agents.
func TestGuest(t *testing.T) {
	t.Parallel()
	eachQEMU(t, func(t *testing.T, q QEMU) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		const size = 32 << 20
		ids := []string{"scsi0", "virtio1", "ide1", "nvme0"}
		cfg := Config{QEMU: q, Style: Throttle, Guest: true, NoShutdown: true}
		for _, id := range ids {
			cfg.Disks = append(cfg.Disks, Disk{ID: id, Size: size})
		}
		vm := Start(t, cfg)
		for _, id := range ids {
			if out := vm.Run(ctx, "blockdev --getsize64 /dev/disk/"+id); out != fmt.Sprintln(size) {
				t.Errorf("%s: %q bytes", id, out)
			}
		}
		vm.Run(ctx, "mkfs.ext4 -q /dev/disk/virtio1 && mount /dev/disk/virtio1 /mnt")
		vm.Run(ctx, "dd if=/dev/urandom of=/mnt/a bs=1M count=4 && echo hello >/mnt/b")
		sum := vm.Run(ctx, "cd /mnt && sha256sum a b")

		a := vm.Agent(ctx)
		if n, err := a.Freeze(ctx); n != 1 || err != nil {
			t.Errorf("freeze: %d, %v", n, err)
		}
		if frozen, err := a.Frozen(ctx); !frozen || err != nil {
			t.Errorf("frozen: %v, %v", frozen, err)
		}
		// A frozen file system holds writers back, and can be read.
		if out := vm.Run(ctx, "(echo late >/mnt/c) >/dev/null 2>&1 & sleep 0.2; ls /mnt/c /mnt/b 2>/dev/null; echo"); strings.Contains(out, "/mnt/c") || !strings.Contains(out, "/mnt/b") {
			t.Errorf("a write got through the freeze: %q", out)
		}
		if n, err := a.Thaw(ctx); n != 1 || err != nil {
			t.Errorf("thaw: %d, %v", n, err)
		}
		if out := vm.Run(ctx, "sync; cat /mnt/c"); out != "late\n" {
			t.Errorf("the write after the thaw: %q", out)
		}
		if _, err := vm.TryRun(ctx, "echo oops >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "exit code 3") || !strings.Contains(err.Error(), "oops") {
			t.Errorf("a command that fails: %v", err)
		}

		vm.PowerOff()
		vm.WaitEvent("SHUTDOWN", time.Minute)
		if s := vm.Status(); s != "shutdown" {
			t.Errorf("status %s after power off", s)
		}
		vm.Reconfigure(func(c *Config) { c.Prelaunch = true })
		if _, err := vm.TryRun(ctx, "true"); err == nil {
			t.Error("a command ran before the guest did")
		}
		vm.Execute("cont", nil, nil)
		vm.WaitBoot()
		vm.Run(ctx, "mount /dev/disk/virtio1 /mnt")
		if got := vm.Run(ctx, "cd /mnt && sha256sum a b"); got != sum {
			t.Errorf("after a restart:\n%swant\n%s", got, sum)
		}
		vm.Run(ctx, "umount /mnt && e2fsck -fn /dev/disk/virtio1")
		vm.Execute("system_powerdown", nil, nil) // the power button
		vm.WaitEvent("SHUTDOWN", time.Minute)
		if !strings.Contains(vm.Console(), guestReady) {
			t.Errorf("console: %q", vm.Console())
		}
	})
}
