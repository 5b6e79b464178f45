package testenv

import (
	"context"
	"fmt"
)

// haltFirmware is a BIOS that switches interrupts off and halts. The guest
// then counts as running, and costs no CPU time.
func haltFirmware() []byte {
	rom := make([]byte, 64<<10)     // the smallest size QEMU takes
	copy(rom[len(rom)-16:], []byte{ // where the CPU starts
		0xfa,       // cli
		0xf4,       // hlt
		0xeb, 0xfd, // jmp back to hlt, should an NMI come
	})
	return rom
}

// PowerOff powers the guest off from within, as its operating system does
// through ACPI: QEMU ends, or with Config.NoShutdown stays in the state
// "shutdown".
//
// Without an operating system the monitor does what one would do on a pc: its
// chipset has the power management block at an address that software chooses.
func (vm *VM) PowerOff() {
	vm.tb.Helper()
	const (
		pciAddress, pciData = 0xcf8, 0xcfc
		powerFunction       = 0x80000000 | 1<<11 | 3<<8 // device 1, function 3, as PCI addresses it
		base                = 0xb000
		control             = base + 4
		sleepOff            = 1 << 13 // SLP_EN, and sleep type 0: soft off
	)
	if vm.Config().Guest {
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		defer cancel()
		vm.Run(ctx, "(sleep 0.1; shutdown) >/dev/null 2>&1 &") // the agent still has to answer
		return
	}
	out := func(size string, port, value uint32) {
		vm.tb.Helper()
		if text := vm.HMP(fmt.Sprintf("o /%s %#x %#x", size, port, value)); text != "" {
			vm.tb.Fatalf("testenv: power off: %s", text)
		}
	}
	out("w", pciAddress, powerFunction|0x40) // its address
	out("w", pciData, base|1)
	out("w", pciAddress, powerFunction|0x80) // enable it
	out("b", pciData, 1)
	out("h", control, sleepOff)
}
