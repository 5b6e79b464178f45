package drill

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// arguments are QEMU's. Whatever the guest was attached to it gets something that its drivers know, by the disk's name.
func (d *drill) arguments() ([]string, error) {
	cfg := d.cfg
	if cfg.Sign == Text && cfg.Text == "" {
		return nil, errors.New("no text to wait for")
	}
	cpu := cmp.Or(cfg.CPU, map[string]string{"kvm": "host"}[cfg.Accel], "max")
	args := []string{
		"-name", "qmchain-drill", "-nodefaults", "-no-user-config",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", cmp.Or(cfg.Machine, "pc") + ",accel=" + cfg.Accel, "-cpu", cpu,
		"-m", strconv.FormatInt(cfg.Memory, 10), "-smp", strconv.Itoa(cfg.CPUs),
		"-display", "none", "-vga", "std", "-nic", "none",
		"-chardev", "socket,id=qmp,server=on,wait=off,path=" + escape(d.path("qmp")), "-mon", "chardev=qmp,mode=control",
		"-chardev", "file,id=console,path=" + escape(d.path("console")), "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,server=on,wait=off,path=" + escape(d.path("agent")),
		"-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
	}
	if cfg.UUID != "" {
		args = append(args, "-uuid", cfg.UUID)
	}
	if cfg.Kernel != "" {
		args = append(args, "-kernel", cfg.Kernel)
		if cfg.Initrd != "" {
			args = append(args, "-initrd", cfg.Initrd)
		}
		if cfg.Append != "" {
			args = append(args, "-append", cfg.Append)
		}
	}
	buses := make(map[string]bool)
	bus := func(device, id string) {
		if !buses[id] {
			buses[id] = true
			args = append(args, "-device", device+",id="+id)
		}
	}
	for i, disk := range cfg.Disks {
		node, err := json.Marshal(map[string]any{
			"driver": "qcow2", "node-name": fmt.Sprintf("disk%d", i), "file": map[string]any{"driver": "file", "filename": d.path(disk.Name + ".qcow2")},
			"backing": map[string]any{
				"driver": "raw", "read-only": true,
				"file": map[string]any{"driver": "nbd", "read-only": true, "export": disk.Name, "server": map[string]any{"type": "unix", "path": d.path("nbd")}},
			},
		})
		if err != nil {
			return nil, err
		}
		args = append(args, "-blockdev", string(node))
		kind := strings.TrimRight(disk.Name, "0123456789")
		drive := fmt.Sprintf("drive=disk%d,bootindex=%d", i, i+1)
		switch number := disk.Name[len(kind):]; kind {
		case "efidisk":
			if cfg.Firmware == "" {
				return nil, fmt.Errorf("disk %s is of no use without UEFI firmware", disk.Name)
			}
			code, err := json.Marshal(map[string]any{
				"driver": "raw", "node-name": "firmware", "read-only": true, "file": map[string]any{"driver": "file", "filename": cfg.Firmware},
			})
			if err != nil {
				return nil, err
			}
			args = append(args, "-blockdev", string(code), "-machine", fmt.Sprintf("pflash0=firmware,pflash1=disk%d", i))
		case "virtio":
			args = append(args, "-device", "virtio-blk-pci,"+drive)
		case "sata", "ide":
			if place, ok := idePlace(cfg.Machine, kind, number); ok {
				args = append(args, "-device", "ide-hd,"+place+","+drive)
				break
			}
			bus("ich9-ahci", "sata")
			args = append(args, "-device", fmt.Sprintf("ide-hd,bus=sata.%d,%s", ahciPorts(cfg.Disks[:i]), drive))
		case "nvme":
			args = append(args, "-device", fmt.Sprintf("nvme,serial=%s,%s", disk.Name, drive))
		default:
			controller, id := "scsi", scsiID(number, i)
			if n, err := strconv.Atoi(number); err == nil && strings.HasPrefix(cfg.SCSI, "lsi") {
				// It has room for seven.
				controller, id = fmt.Sprintf("scsi%d", n/7), strconv.Itoa(n%7)
			}
			bus(cmp.Or(cfg.SCSI, "virtio-scsi-pci"), controller)
			args = append(args, "-device", fmt.Sprintf("scsi-hd,bus=%s.0,scsi-id=%s,%s", controller, id, drive))
		}
	}
	return args, nil
}

// escape writes a value in QEMU's option syntax.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// idePlace is where on a PC's own IDE controller a disk is, if the machine has that: guests of the time need it.
func idePlace(machine, kind, number string) (place string, ok bool) {
	n, err := strconv.Atoi(number)
	if kind != "ide" || err != nil || n > 3 || strings.Contains(machine, "q35") {
		return "", false
	}
	return fmt.Sprintf("bus=ide.%d,unit=%d", n/2, n%2), true
}

// ahciPorts is how many ports of the AHCI controller the disks may take.
func ahciPorts(disks []Disk) int {
	n := 0
	for _, d := range disks {
		if strings.HasPrefix(d.Name, "sata") || strings.HasPrefix(d.Name, "ide") {
			n++
		}
	}
	return n
}

// scsiID is the number in a disk's name, or its place.
func scsiID(number string, place int) string {
	if n, err := strconv.Atoi(number); err == nil && n < 200 {
		return strconv.Itoa(n)
	}
	return strconv.Itoa(200 + place%50)
}
