package testenv

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// Style is the way in which a disk's block graph is built.
type Style int

const (
	// Drive is PVE 8's, and PVE 9's for machine types before 10.0:
	// -drive if=none,id=drive-scsi0. The device has a name, the nodes have
	// generated ones.
	Drive Style = iota
	// Throttle is PVE 9's: a throttle filter drive-scsi0 over f<hash> (format)
	// over e<hash> (protocol). The device has no name.
	Throttle
	// Blockdev is a bare -blockdev: scsi0-format over scsi0-file.
	Blockdev
)

// Styles are all of them.
var Styles = []Style{Drive, Throttle, Blockdev}

func (s Style) String() string {
	switch s {
	case Drive:
		return "drive"
	case Throttle:
		return "throttle"
	case Blockdev:
		return "blockdev"
	}
	return "style " + strconv.Itoa(int(s))
}

// Disk is one drive of a guest.
type Disk struct {
	// ID is PVE's name of the drive, such as scsi0 or virtio1. It is the id of
	// the device.
	ID string
	// Path is the image, made with Format and Size when it is not there yet.
	// When empty, the image lies in the VM's own folder, and goes with it.
	// A CD-ROM with an empty path is an empty CD-ROM.
	Path   string
	Format string // qcow2 (the default) or raw
	Size   int64  // bytes
	// Device is the kind of device. The default depends on the start of ID:
	//
	//	scsi     scsi-hd on a virtio-scsi-pci of its own
	//	virtio   virtio-blk-pci
	//	sata     ide-hd on an ahci
	//	ide      ide-hd
	//	nvme     nvme
	//	usb      usb-storage
	//	efidisk  pflash, as the second flash of the machine
	//
	// Also understood: scsi-cd and ide-cd in place of -hd.
	Device   string
	IOThread bool // scsi and virtio only
	ReadOnly bool
	// Cache is none (the default, as in PVE), writeback, writethrough,
	// directsync or unsafe. Where the file system can't do direct I/O, none
	// becomes writeback and directsync writethrough.
	Cache string
	// Discard is ignore (the default) or unmap.
	Discard string
	// DetectZeroes is off, on or unmap. The default is PVE's: on, and unmap
	// where Discard is unmap.
	DetectZeroes string
}

// Config says how to start a VM. The zero value of a field other than QEMU
// means its default.
type Config struct {
	QEMU  QEMU
	Style Style
	Disks []Disk

	Name    string // "qmchain-test"
	UUID    string // random; the same over restarts
	VMGenID string // random; the same over restarts

	// Prelaunch leaves the guest waiting for `cont` (-S).
	Prelaunch bool
	// NoShutdown keeps QEMU alive, in the state "shutdown", when the guest
	// powers off. PVE starts every guest so.
	NoShutdown bool
	// NoLocking switches image locking off, as PVE's build of QEMU does.
	NoLocking bool
	// SeaBIOS runs QEMU's real firmware in place of the one that halts. It
	// sets up virtio devices and reads the disks: a virtio-blk disk with an
	// iothread is not in that thread before some driver has started it.
	SeaBIOS bool
	// Guest boots Linux, which has drivers for all but sata and usb disks.
	Guest bool

	Memory int      // MiB; 64, and 384 with Guest
	Args   []string // more arguments, after all others

	// CommandLine is what QEMU is started with, for who makes command lines in another way. Disks then only says which
	// devices there are; the fields that say how to start have no effect, but Guest adds what Linux needs.
	CommandLine []string
}

// files are the paths in a VM's own folder that its command line names.
type files struct {
	socket, spare, harness, agent string // listening sockets
	firmware                      string
	console, log, runner          string // of a Linux guest
	kernel, initrd                string
}

// commandLine returns the arguments of qemu-system-x86_64. Order and wording
// follow the command line that PVE makes.
func commandLine(cfg Config, f files, aio func(Disk) string) ([]string, error) {
	args := []string{
		"-name", escape(cfg.Name) + ",debug-threads=on",
		"-nodefaults", "-display", "none",
		"-m", strconv.Itoa(cfg.Memory),
		"-smbios", "type=1,uuid=" + cfg.UUID,
		"-device", "vmgenid,guid=" + cfg.VMGenID,
	}
	for _, mon := range []struct{ id, path string }{
		{"qmp", f.harness}, {"qmp-backup", f.socket}, {"qmp-spare", f.spare},
	} {
		args = append(args,
			"-chardev", "socket,id="+mon.id+",path="+escape(mon.path)+",server=on,wait=off",
			"-mon", "chardev="+mon.id+",mode=control")
	}
	args = append(args,
		"-chardev", "socket,path="+escape(f.agent)+",server=on,wait=off,id=qga0",
		"-device", "virtio-serial,id=qga0",
		"-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0")

	machine := "accel=tcg,type=pc"
	flash := ""
	for _, d := range cfg.Disks {
		device, err := deviceArgs(cfg, d)
		if err != nil {
			return nil, err
		}
		drive, err := driveArgs(cfg, d, aio(d))
		if err != nil {
			return nil, err
		}
		if d.kind() == "pflash" {
			flash = d.ID
		}
		// A controller can serve several disks: name it once.
		for _, c := range device.controllers {
			if !hasPair(args, c[0], c[1]) {
				args = append(args, c[0], c[1])
			}
		}
		args = append(args, drive...)
		if device.device != "" {
			args = append(args, "-device", device.device)
		}
	}
	// The firmware is the first flash where there is a second one, which needs
	// it; else it is a plain ROM.
	switch {
	case flash != "" && cfg.SeaBIOS:
		return nil, fmt.Errorf("disk %s: flash with SeaBIOS is not supported", flash)
	case flash != "" && cfg.Guest:
		return nil, fmt.Errorf("disk %s: flash with a Linux guest is not supported", flash)
	case flash != "" && cfg.Style == Drive:
		args = append(args, "-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+escape(f.firmware))
	case flash != "":
		args = append(args, "-blockdev", toJSON(map[string]any{
			"driver": "raw", "node-name": "pflash0", "read-only": true,
			"file": map[string]any{"driver": "file", "filename": f.firmware},
		}))
		machine += ",pflash0=pflash0,pflash1=" + topNode(cfg.Style, flash)
	case cfg.Guest || cfg.SeaBIOS:
	default:
		args = append(args, "-bios", f.firmware)
	}
	args = append(args, "-machine", machine)
	if cfg.Guest {
		args = append(args, guestArgs(f)...)
	}
	if cfg.Prelaunch {
		args = append(args, "-S")
	}
	if cfg.NoShutdown {
		args = append(args, "-no-shutdown")
	}
	return append(args, cfg.Args...), nil
}

// guestArgs are what Linux needs, after a virtio-serial.
func guestArgs(f files) []string {
	return []string{
		// Without cmpxchg16b: as QEMU 7.2 emulates it, the kernel's allocator crashes now and then.
		"-cpu", "max,-cx16",
		"-kernel", f.kernel, "-initrd", f.initrd,
		// The kernel's check of its timer panics where the host is too busy to run the guest meanwhile.
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check",
		"-device", "virtio-rng-pci",
		"-chardev", "socket,id=console,path=" + escape(f.console) + ",server=on,wait=off,logfile=" + escape(f.log),
		"-serial", "chardev:console",
		"-chardev", "socket,id=runner,path=" + escape(f.runner) + ",server=on,wait=off",
		"-device", "virtserialport,chardev=runner,name=qmchain.test.0",
	}
}

// kind is the kind of the disk's device.
func (d Disk) kind() string {
	if d.Device != "" {
		return d.Device
	}
	switch d.bus() {
	case "scsi":
		return "scsi-hd"
	case "virtio":
		return "virtio-blk-pci"
	case "sata", "ide":
		return "ide-hd"
	case "nvme":
		return "nvme"
	case "usb":
		return "usb-storage"
	case "efidisk":
		return "pflash"
	}
	return ""
}

// bus is the disk's id without its number.
func (d Disk) bus() string { return strings.TrimRight(d.ID, "0123456789") }

func (d Disk) number() (int, error) {
	n, err := strconv.Atoi(strings.TrimPrefix(d.ID, d.bus()))
	if err != nil {
		return 0, fmt.Errorf("disk %q: its id must end in a number", d.ID)
	}
	return n, nil
}

func (d Disk) cdrom() bool { return strings.HasSuffix(d.kind(), "-cd") }

// qom is the absolute QOM path of the device that holds the block backend.
func (d Disk) qom() string {
	path := "/machine/peripheral/" + d.ID
	switch d.kind() {
	case "virtio-blk-pci":
		return path + "/virtio-backend"
	case "usb-storage":
		return path + "/" + d.ID + ".0/legacy[0]"
	case "pflash":
		return "/machine/system.flash1"
	}
	return path
}

type device struct {
	controllers [][2]string // option and value, needed before device
	device      string
}

// deviceArgs returns the device of a disk, and what it is plugged into.
func deviceArgs(cfg Config, d Disk) (device, error) {
	n, err := d.number()
	if err != nil {
		return device{}, err
	}
	drive := ",drive=" + topNode(cfg.Style, d.ID)
	if d.cdrom() && d.Path == "" && cfg.Style != Drive {
		drive = "" // an empty CD-ROM has no block node
	}
	drive += ",id=" + d.ID
	if cfg.Guest || d.bus() == "nvme" { // nvme must have one
		drive += ",serial=" + d.ID // the disk's name in the guest
	}
	if cfg.Style == Throttle && !d.cdrom() {
		drive += ",write-cache=" + onOff(d.Cache != "writethrough" && d.Cache != "directsync")
	}
	var controllers [][2]string
	thread := ""
	switch {
	case !d.IOThread:
	case d.bus() == "scsi":
		controllers = append(controllers, [2]string{"-object", fmt.Sprintf("iothread,id=iothread-virtioscsi%d", n)})
		thread = fmt.Sprintf(",iothread=iothread-virtioscsi%d", n)
	case d.bus() == "virtio":
		controllers = append(controllers, [2]string{"-object", "iothread,id=iothread-" + d.ID})
		thread = ",iothread=iothread-" + d.ID
	default:
		return device{}, fmt.Errorf("disk %s: a %s has no iothread", d.ID, d.kind())
	}
	add := func(device string) { controllers = append(controllers, [2]string{"-device", device}) }
	switch kind := d.kind(); d.bus() {
	case "scsi":
		add(fmt.Sprintf("virtio-scsi-pci,id=virtioscsi%d%s", n, thread))
		return device{controllers, fmt.Sprintf("%s,bus=virtioscsi%d.0,channel=0,scsi-id=0,lun=%d%s", kind, n, n, drive)}, nil
	case "virtio":
		return device{controllers, kind + drive + thread}, nil
	case "sata":
		if cfg.Guest {
			return device{}, fmt.Errorf("disk %s: the Linux guest has no driver for an ahci", d.ID)
		}
		add("ahci,id=ahci0")
		return device{controllers, fmt.Sprintf("%s,bus=ahci0.%d%s", kind, n, drive)}, nil
	case "ide":
		return device{controllers, fmt.Sprintf("%s,bus=ide.%d,unit=%d%s", kind, n/2, n%2, drive)}, nil
	case "nvme":
		return device{controllers, kind + drive}, nil
	case "usb":
		add("qemu-xhci,id=xhci")
		return device{controllers, kind + ",bus=xhci.0" + drive}, nil
	case "efidisk":
		return device{}, nil // a flash is part of the machine
	}
	return device{}, fmt.Errorf("disk %q: no such kind of disk", d.ID)
}

// driveArgs returns the block nodes of a disk.
func driveArgs(cfg Config, d Disk, aio string) ([]string, error) {
	switch d.Format {
	case "qcow2", "raw":
	default:
		return nil, fmt.Errorf("disk %s: unknown format %q", d.ID, d.Format)
	}
	if cfg.Style == Drive {
		return []string{"-drive", driveOption(cfg, d, aio)}, nil
	}
	if d.cdrom() && d.Path == "" {
		return nil, nil
	}
	common := func(node string, m map[string]any) map[string]any {
		m["node-name"] = node
		m["read-only"] = d.ReadOnly
		m["discard"] = d.Discard
		m["detect-zeroes"] = d.DetectZeroes
		m["cache"] = map[string]any{"direct": d.direct(), "no-flush": d.Cache == "unsafe"}
		return m
	}
	file := map[string]any{"driver": protocol(d.Path), "filename": d.Path, "aio": aio}
	if cfg.NoLocking {
		file["locking"] = "off"
	}
	format := map[string]any{"driver": d.Format}
	if cfg.Style == Blockdev {
		format["file"] = common(d.ID+"-file", file)
		return []string{"-blockdev", toJSON(common(d.ID+"-format", format))}, nil
	}
	// PVE hashes the drive and the volume. The names say nothing, and other
	// disks have others: that is all a test may rely on.
	hash := fmt.Sprintf("%x", sha256.Sum256([]byte(d.ID+":"+d.Path)))[:30]
	format["file"] = common("e"+hash, file)
	group := "throttle-drive-" + d.ID
	top := common("drive-"+d.ID, map[string]any{
		"driver": "throttle", "throttle-group": group, "file": common("f"+hash, format),
	})
	delete(top, "cache")
	return []string{
		"-object", toJSON(map[string]any{"qom-type": "throttle-group", "id": group, "limits": map[string]any{}}),
		"-blockdev", toJSON(top),
	}, nil
}

func driveOption(cfg Config, d Disk, aio string) string {
	var opts []string
	if d.Path != "" {
		opts = append(opts, "file="+escape(d.Path))
	}
	switch {
	case d.kind() == "pflash":
		opts = append(opts, "if=pflash", "unit=1")
	case d.cdrom():
		opts = append(opts, "if=none", "media=cdrom")
	default:
		opts = append(opts, "if=none")
	}
	opts = append(opts, "id=drive-"+d.ID)
	if d.Path == "" {
		return strings.Join(opts, ",")
	}
	opts = append(opts, "format="+d.Format, "cache="+d.Cache, "aio="+aio, "detect-zeroes="+d.DetectZeroes)
	if d.Discard == "unmap" {
		opts = append(opts, "discard=on")
	}
	if d.ReadOnly {
		opts = append(opts, "readonly=on")
	}
	if cfg.NoLocking {
		opts = append(opts, "file.locking=off")
	}
	return strings.Join(opts, ",")
}

// topNode is what the device's drive property names.
func topNode(style Style, id string) string {
	if style == Blockdev {
		return id + "-format"
	}
	return "drive-" + id
}

func (d Disk) direct() bool { return d.Cache == "none" || d.Cache == "directsync" }

// protocol is the driver that opens path: QEMU has one for block devices.
func protocol(path string) string {
	if fi, err := os.Stat(path); err == nil && fi.Mode()&os.ModeDevice != 0 {
		return "host_device"
	}
	return "file"
}

// escape makes a value fit for QEMU's key=value,... options.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func toJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings and bools only
	}
	return string(b)
}

func hasPair(args []string, option, value string) bool {
	for i := 0; i+1 < len(args); i++ {
		if args[i] == option && args[i+1] == value {
			return true
		}
	}
	return false
}

// withDefaults fills in what the machine decides: whether the disk's file
// system can do direct I/O.
func (d Disk) withDefaults() Disk {
	if d.Format == "" {
		d.Format = "qcow2"
	}
	if d.Cache == "" {
		d.Cache = "none"
	}
	if d.Discard == "" {
		d.Discard = "ignore"
	}
	if d.DetectZeroes == "" {
		d.DetectZeroes = "on"
		if d.Discard == "unmap" {
			d.DetectZeroes = "unmap"
		}
	}
	if d.direct() && d.Path != "" && !canDirect(d.Path) {
		d.Cache = map[string]string{"none": "writeback", "directsync": "writethrough"}[d.Cache]
	}
	return d
}

func canDirect(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// aioFor is PVE's choice where the kernel allows it: containers often forbid
// io_uring, and native needs direct I/O.
func aioFor(d Disk) string {
	switch {
	case canIOUring():
		return "io_uring"
	case d.direct():
		return "native"
	}
	return "threads"
}

func canIOUring() bool {
	const ioUringSetup = 425 // the same number on every architecture
	var params [120]byte     // struct io_uring_params, all zero
	fd, _, errno := syscall.Syscall(ioUringSetup, 128, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return false
	}
	_ = syscall.Close(int(fd))
	return true
}
