package pvetest

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"qmchain/internal/testenv"
)

// Options, with a value each, that only PVE's build of QEMU or only a real host can take, or that cost time and say
// nothing about disks.
var dropped = []string{"-id", "-boot", "-vnc", "-cpu", "-smp", "-global", "-readconfig", "-netdev"}

// Devices of that kind as well.
var droppedDevices = []string{"usb-tablet", "VGA", "virtio-balloon-pci", "virtio-net-pci", "pci-bridge", "piix3-usb-uhci"}

var (
	pciPlace   = regexp.MustCompile(`,bus=pcie?\.\d+,addr=[0-9a-fx.]+`)
	bootIndex  = regexp.MustCompile(`,bootindex=\d+`)
	drivePath  = regexp.MustCompile(`^file=([^,]*),`)
	nodePath   = regexp.MustCompile(`"filename":"([^"]*)"`)
	pveMachine = regexp.MustCompile(`\+pve\d+`)
	// Each QEMU has its own versions of them.
	machineOf35  = regexp.MustCompile(`type=pc-q35-[\d.]+`)
	machineOf440 = regexp.MustCompile(`type=pc-i440fx-[\d.]+`)
)

// launchable is PVE's command line in a form that a plain QEMU on a host without KVM, and perhaps without io_uring and
// direct I/O, can take. Drives, their devices, monitors and the option args stay as they are.
func launchable(args []string, q testenv.QEMU, l layout, guest bool) []string {
	var out []string
	firmware := guest
	for i := 0; i < len(args); i++ {
		option := args[i]
		if option == "-daemonize" {
			continue // a child of the test dies with it
		}
		if !hasValue(option) || i+1 == len(args) {
			out = append(out, option)
			continue
		}
		i++
		value := args[i]
		switch option {
		case "-device":
			kind, _, _ := strings.Cut(value, ",")
			if slices.Contains(droppedDevices, kind) {
				continue
			}
			value = bootIndex.ReplaceAllString(pciPlace.ReplaceAllString(value, ""), "")
			if !q.AtLeast(10, 0) && strings.HasPrefix(value, "ide-") {
				value = strings.Replace(value, ",write-cache=on", "", 1)
			}
		case "-chardev":
			if !q.AtLeast(9, 2) {
				value = strings.Replace(value, "reconnect-ms=5000", "reconnect=5", 1)
			}
		case "-machine":
			value = strings.Replace(pveMachine.ReplaceAllString(value, ""), "accel=tcg,", "", 1)
			value = machineOf35.ReplaceAllString(machineOf440.ReplaceAllString(value, "type=pc"), "type=q35") + ",accel=tcg"
			firmware = firmware || strings.Contains(strings.Join(args, " "), "pflash")
		case "-drive":
			value = openable(value, drivePath, "aio=io_uring", "aio=threads", "cache=none", "cache=writeback")
		case "-blockdev":
			value = openable(value, nodePath, `"aio":"io_uring"`, `"aio":"threads"`, `"direct":true`, `"direct":false`)
		}
		if !slices.Contains(dropped, option) {
			out = append(out, option, value)
		}
	}
	if !firmware {
		out = append(out, "-bios", l.firmware)
	}
	if guest && !strings.Contains(strings.Join(out, " "), "virtio-serial") {
		out = append(out, "-device", "virtio-serial") // the harness's own agent
	}
	return append(out, "-display", "none")
}

// hasValue tells whether an option of QEMU's is one of those that PVE uses with a value. The option args may hold any.
func hasValue(option string) bool {
	return strings.HasPrefix(option, "-") && !slices.Contains([]string{"-no-shutdown", "-nodefaults", "-S", "-no-reboot", "-snapshot"}, option)
}

// openable makes a drive one that this host can open.
func openable(value string, path *regexp.Regexp, uring, threads, direct, cached string) string {
	value = strings.ReplaceAll(value, uring, threads)
	for _, m := range path.FindAllStringSubmatch(value, -1) {
		f, err := os.OpenFile(m[1], os.O_RDONLY|syscall.O_DIRECT, 0)
		if err != nil {
			return strings.ReplaceAll(value, direct, cached)
		}
		_ = f.Close()
	}
	return value
}

// haltFirmware is a BIOS that halts: the guest counts as running, and costs nothing.
func haltFirmware() []byte {
	rom := make([]byte, 64<<10)
	copy(rom[len(rom)-16:], []byte{0xfa, 0xf4, 0xeb, 0xfd}) // cli; hlt; again after an NMI
	return rom
}
