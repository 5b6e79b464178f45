package main

import (
	"cmp"
	"errors"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"qmchain/chain"
	"qmchain/internal/ui"
)

// machine is what a drill's guest is made of, where the user does not say.
type machine struct {
	memory   int64 // bytes
	cpus     int
	kind     string // QEMU's machine type
	scsi     string // the device that SCSI disks are attached to; "": the drill's choice
	uuid     string
	seabios  bool     // known to start without UEFI, whatever disks it has
	bootable []string // disks to boot from, the first first
}

// What a drill needs no more of, and what it gets where nothing is known.
const (
	maxDrillMemory     = 4 << 30
	maxDrillCPUs       = 4
	defaultDrillMemory = 1 << 30
	defaultDrillCPUs   = 2
)

// machineOf says what a guest had, from the Proxmox VE configuration in the point, if it holds one.
func (p *point) machineOf(u *ui.UI) machine {
	m := machine{memory: defaultDrillMemory, cpus: defaultDrillCPUs, kind: "pc"}
	vm, err := p.savedVM()
	if err != nil {
		if !errors.Is(err, chain.ErrNoPoint) {
			u.Log.Warnf("the guest's configuration can't be read, so the machine is another one: %v", err)
		}
		return m
	}
	o := vm.config.Options
	m.uuid = vm.config.UUID()
	m.seabios = o["bios"] != "ovmf"
	// PVE's own default is 512 MiB; the property's first part may have a name.
	if mib, err := strconv.ParseInt(strings.TrimPrefix(cmp.Or(o["memory"], "512"), "current="), 10, 32); err == nil && mib > 0 {
		m.memory = min(mib<<20, maxDrillMemory)
	}
	m.cpus = min(max(1, number(o["sockets"]))*max(1, number(o["cores"])), maxDrillCPUs, runtime.NumCPU())
	if strings.Contains(o["machine"], "q35") {
		m.kind = "q35" // of whatever version: this QEMU need not have that one
	}
	m.scsi = map[string]string{
		"": "lsi", "lsi": "lsi", "lsi53c810": "lsi53c810", "megasas": "megasas", "pvscsi": "pvscsi",
	}[o["scsihw"]] // the others are kinds of virtio-scsi
	if list, found := strings.CutPrefix(o["boot"], "order="); found {
		m.bootable = strings.Split(list, ";")
	} else if o["bootdisk"] != "" {
		m.bootable = []string{o["bootdisk"]}
	}
	return m
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0
	}
	return min(n, 1<<10)
}

// order puts the first disk to boot from first, and leaves out firmware variables that the machine has no firmware for.
func (m machine) order(names []string) []string {
	if m.seabios {
		names = slices.DeleteFunc(slices.Clone(names), isEFI)
	}
	for _, id := range m.bootable {
		if i := slices.Index(names, id); i >= 0 {
			return append([]string{id}, slices.Delete(slices.Clone(names), i, i+1)...)
		}
	}
	return names
}
