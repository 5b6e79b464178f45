package pvetest

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

// shellwords splits the option args as PVE does, by the same Perl function.
func shellwords(ctx context.Context, args string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "perl", "-MText::ParseWords=shellwords", "-e", `print map { "$_\0" } shellwords($ARGV[0])`, "--", args)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("perl: %w", err)
	}
	words := strings.Split(string(out), "\x00")
	return words[:len(words)-1], nil
}

var unsafeWord = regexp.MustCompile(`[^A-Za-z0-9_!%+,\-./:@^]`)

// show is a command line for a shell, as showcmd prints it.
func show(args []string, pretty bool) string {
	quoted := make([]string, len(args))
	for i, arg := range args {
		if arg == "" || unsafeWord.MatchString(arg) {
			arg = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
		quoted[i] = arg
	}
	line := strings.Join(quoted, " ")
	if pretty {
		line = strings.ReplaceAll(line, " -", " \\\n  -")
	}
	return line
}

// builder makes PVE's command line. What it does not know (SMP, CPU models, USB, audio, PCI passthrough …) a VM here does
// not have, or QEMU's part of it says nothing about disks.
type builder struct {
	vmid   string
	conf   *conf
	layout layout
	pve8   bool // -drive instead of -blockdev
	q35    bool
	args   []string
}

// commandLine is the command line but for kvm itself and the option args.
func commandLine(vmid string, c *conf, l layout, pve int) []string {
	machine := c.main["machine"]
	// Before 10.0 machines get the older form, whatever the version of PVE.
	b := builder{vmid: vmid, conf: c, layout: l, pve8: pve < 9 || olderMachine(machine), q35: strings.Contains(machine, "q35")}
	b.head()
	b.firmware()
	b.board()
	b.agent()
	b.drives()
	b.network()
	b.machine()
	return b.args
}

var machineVersion = regexp.MustCompile(`-(\d+)\.\d+`)

func olderMachine(machine string) bool {
	m := machineVersion.FindStringSubmatch(machine)
	if m == nil {
		return false
	}
	major, _ := strconv.Atoi(m[1])
	return major < 10
}

func (b *builder) add(option string, values ...string) {
	b.args = append(append(b.args, option), values...)
}

func (b *builder) addf(option, format string, args ...any) {
	b.add(option, fmt.Sprintf(format, args...))
}

func (b *builder) head() {
	run := b.layout.run
	b.add("-id", b.vmid)
	b.addf("-name", "%s,debug-threads=on", b.conf.main["name"])
	b.add("-no-shutdown")
	b.addf("-chardev", "socket,id=qmp,path=%s/%s.qmp,server=on,wait=off", run, b.vmid)
	b.add("-mon", "chardev=qmp,mode=control")
	b.addf("-chardev", "socket,id=qmp-event,path=%s,reconnect-ms=5000", b.layout.events)
	b.add("-mon", "chardev=qmp-event,mode=control")
	b.addf("-pidfile", "%s/%s.pid", run, b.vmid)
	b.add("-daemonize")
	if smbios := b.conf.main["smbios1"]; smbios != "" {
		b.add("-smbios", "type=1,"+smbios)
	}
}

// efi is the drive that holds the EFI variables, if there is one.
func (b *builder) efi() (drive, bool) {
	if b.conf.main["bios"] != "ovmf" || b.conf.main["efidisk0"] == "" {
		return drive{}, false
	}
	return parseDrive("efidisk0", b.conf.main["efidisk0"]), true
}

func (b *builder) firmware() {
	d, ok := b.efi()
	if !ok {
		return
	}
	path := b.layout.volume(d.volume)
	if b.pve8 {
		b.add("-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+b.layout.firmware)
		b.addf("-drive", "if=pflash,unit=1,id=drive-efidisk0,format=%s,file=%s", d.format(), path)
		return
	}
	b.throttleGroup(d.id)
	b.add("-blockdev", toJSON(map[string]any{
		"driver": "raw", "node-name": "pflash0", "read-only": true,
		"file": map[string]any{"driver": "file", "filename": b.layout.firmware},
	}))
	b.blockdev(d, "writeback")
}

func (b *builder) board() {
	cpu, memory := "kvm64", b.conf.main["memory"]
	if b.conf.main["kvm"] == "0" {
		cpu = "qemu64"
	}
	if memory == "" {
		memory = "512"
	}
	b.add("-smp", "1,sockets=1,cores=1,maxcpus=1")
	b.add("-nodefaults")
	b.add("-boot", "menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg")
	b.addf("-vnc", "unix:%s/%s.vnc,password=on", b.layout.run, b.vmid)
	b.add("-cpu", cpu)
	b.add("-m", memory)
	for _, d := range b.conf.drives() {
		switch {
		case d.iothread() && d.bus() == "scsi":
			b.addf("-object", "iothread,id=iothread-virtioscsi%d", d.number())
		case d.iothread() && d.bus() == "virtio":
			b.add("-object", "iothread,id=iothread-"+d.id)
		}
	}
	for _, d := range b.conf.drives() {
		if !b.pve8 && !d.cdrom() && d.bus() != "efidisk" {
			b.throttleGroup(d.id)
		}
	}
	usb, vga := "uhci.0", "VGA,id=vga,bus=pci.0,addr=0x2"
	if b.q35 {
		b.add("-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1")
		b.add("-readconfig", "/usr/share/qemu-server/pve-q35-4.0.cfg")
		usb, vga = "ehci.0", "VGA,id=vga,bus=pcie.0,addr=0x1"
	} else {
		b.add("-device", "pci-bridge,id=pci.3,chassis_nr=3,bus=pci.0,addr=0x5")
		b.add("-device", "piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2")
	}
	if id := b.conf.main["vmgenid"]; id != "" {
		b.add("-device", "vmgenid,guid="+id)
	}
	b.addf("-device", "usb-tablet,id=tablet,bus=%s,port=1", usb)
	b.add("-device", vga)
}

func (b *builder) agent() {
	if agent := b.conf.main["agent"]; strings.HasPrefix(agent, "1") || strings.HasPrefix(agent, "enabled=1") {
		b.addf("-chardev", "socket,path=%s/%s.qga,server=on,wait=off,id=qga0", b.layout.run, b.vmid)
		b.add("-device", "virtio-serial,id=qga0,bus=pci.0,addr=0x8")
		b.add("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0")
	}
	b.add("-device", "virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on")
}

func (b *builder) throttleGroup(id string) {
	b.add("-object", toJSON(map[string]any{"id": "throttle-drive-" + id, "limits": map[string]any{}, "qom-type": "throttle-group"}))
}

func (b *builder) drives() {
	ahci := false
	for _, d := range b.conf.drives() {
		device := ""
		switch d.bus() {
		case "efidisk":
			continue
		case "ide":
			device = fmt.Sprintf("ide-hd,bus=ide.%d,unit=%d", d.number()/2, d.number()%2)
		case "scsi":
			device = b.scsi(d)
		case "virtio":
			device = "virtio-blk-pci"
		case "sata":
			if !ahci {
				b.add("-device", "ahci,id=ahci0,multifunction=on,bus=pci.0,addr=0x7")
				ahci = true
			}
			device = fmt.Sprintf("ide-hd,bus=ahci0.%d", d.number())
		}
		if d.cdrom() {
			device = strings.Replace(device, "-hd,", "-cd,", 1)
		}
		if d.volume != "none" || b.pve8 {
			if b.pve8 {
				b.drive(d)
			} else {
				b.blockdev(d, cacheOf(d))
			}
			device += ",drive=drive-" + d.id
		}
		device += ",id=" + d.id
		switch d.bus() {
		case "scsi":
			if !b.pve8 {
				device += ",device_id=drive-" + d.id
			}
		case "virtio":
			device += fmt.Sprintf(",bus=pci.0,addr=%#x", 0xa+d.number())
			if d.iothread() {
				device += ",iothread=iothread-" + d.id
			}
		}
		if d.get("ssd") == "1" {
			device += ",rotation_rate=1"
		}
		device += b.bootIndex(d.id)
		if serial := d.get("serial"); serial != "" {
			device += ",serial=" + serial
		}
		if !b.pve8 && !d.cdrom() {
			device += ",write-cache=" + onOff(cacheOf(d) != "writethrough" && cacheOf(d) != "directsync")
		}
		b.add("-device", device)
	}
}

// scsi is the device of a SCSI disk, whose controller it adds.
func (b *builder) scsi(d drive) string {
	thread := ""
	if d.iothread() {
		thread = fmt.Sprintf(",iothread=iothread-virtioscsi%d", d.number())
	}
	if b.conf.main["scsihw"] != "virtio-scsi-single" {
		if !strings.Contains(strings.Join(b.args, " "), "id=scsihw0") {
			b.add("-device", "virtio-scsi-pci,id=scsihw0,bus=pci.0,addr=0x5")
		}
		return fmt.Sprintf("scsi-hd,bus=scsihw0.0,channel=0,scsi-id=0,lun=%d", d.number())
	}
	b.addf("-device", "virtio-scsi-pci,id=virtioscsi%d,bus=pci.3,addr=%#x%s", d.number(), d.number()+1, thread)
	return fmt.Sprintf("scsi-hd,bus=virtioscsi%d.0,channel=0,scsi-id=0,lun=%d", d.number(), d.number())
}

func (b *builder) bootIndex(id string) string {
	order, _ := strings.CutPrefix(b.conf.main["boot"], "order=")
	for i, name := range strings.Split(order, ";") {
		if name == id {
			return fmt.Sprintf(",bootindex=%d", 100+i)
		}
	}
	return ""
}

func cacheOf(d drive) string {
	if c := d.get("cache"); c != "" {
		return c
	}
	return "none"
}

func detectZeroes(d drive) string {
	if d.get("discard") == "on" {
		return "unmap"
	}
	return "on"
}

// drive is the older form of a drive.
func (b *builder) drive(d drive) {
	text := ""
	if d.volume != "none" {
		text = "file=" + b.layout.volume(d.volume) + ","
	}
	text += "if=none,id=drive-" + d.id
	for _, name := range []string{"media", "cache", "discard"} {
		if value := d.get(name); value != "" {
			text += "," + name + "=" + value
		}
	}
	if !d.cdrom() {
		text += ",format=" + d.format()
		if d.get("cache") == "" {
			text += ",cache=none"
		}
	}
	text += ",aio=io_uring"
	if !d.cdrom() {
		text += ",detect-zeroes=" + detectZeroes(d)
	}
	b.add("-drive", text)
}

// blockdev is the newer form: a throttle filter over the format over the file.
func (b *builder) blockdev(d drive, cache string) {
	hash := fmt.Sprintf("%x", sha256.Sum256([]byte("drive="+d.id+",volid="+d.volume)))[:30]
	discard := "ignore"
	if d.get("discard") == "on" {
		discard = "unmap"
	}
	common := func(m map[string]any) map[string]any {
		m["read-only"] = d.cdrom()
		m["discard"], m["detect-zeroes"] = discard, detectZeroes(d)
		if d.cdrom() {
			m["detect-zeroes"] = "off"
		}
		return m
	}
	caches := map[string]any{"direct": cache == "none" || cache == "directsync", "no-flush": cache == "unsafe"}
	file := common(map[string]any{"driver": "file", "filename": b.layout.volume(d.volume), "node-name": "e" + hash, "aio": "io_uring", "cache": caches})
	format := common(map[string]any{"driver": d.format(), "node-name": "f" + hash, "file": file, "cache": caches})
	if d.cdrom() {
		format["node-name"] = "drive-" + d.id // no throttling of CD-ROMs here
		b.add("-blockdev", toJSON(format))
		return
	}
	b.add("-blockdev", toJSON(common(map[string]any{
		"driver": "throttle", "node-name": "drive-" + d.id, "throttle-group": "throttle-drive-" + d.id, "file": format,
	})))
}

func (b *builder) network() {
	net := b.conf.main["net0"]
	model, mac, _ := strings.Cut(strings.Split(net, ",")[0], "=")
	if net == "" || model != "virtio" {
		return
	}
	const scripts = "/usr/libexec/qemu-server/pve-bridge"
	b.addf("-netdev", "type=tap,id=net0,ifname=tap%si0,script=%s,downscript=%sdown", b.vmid, scripts, scripts)
	device := "virtio-net-pci,mac=" + mac + ",netdev=net0,bus=pci.0,addr=0x12,id=net0,rx_queue_size=1024,tx_queue_size=256" + b.bootIndex("net0")
	if !b.pve8 {
		device += ",host_mtu=1500"
	}
	b.add("-device", device)
}

func (b *builder) machine() {
	machine := b.conf.main["machine"]
	if machine == "" {
		machine = "pc"
	}
	if !strings.Contains(machine, "+pve") {
		machine += "+pve1"
	}
	if b.conf.main["kvm"] == "0" {
		machine = "accel=tcg,type=" + machine
	} else {
		machine = "type=" + machine
	}
	if _, ok := b.efi(); ok && !b.pve8 {
		machine = "pflash0=pflash0,pflash1=drive-efidisk0," + machine
	}
	b.add("-machine", machine)
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func toJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings and bools only
	}
	return string(text)
}
