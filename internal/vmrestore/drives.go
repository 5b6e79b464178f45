package vmrestore

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"qmchain/proxmox"
)

// cloudInit is what, after the storage, asks qm for a new cloud-init drive.
const cloudInit = ":cloudinit,media=cdrom"

// needed are options that qm wants where it imports a drive of that kind, with what PVE takes them for where they are not
// there.
var needed = map[string]proxmox.Options{
	"efidisk0":  {"efitype": "2m", "pre-enrolled-keys": "0"},
	"tpmstate0": {"version": "v1.2"},
}

// planDrives decides on all drives.
func (p *Plan) planDrives(point Point, o Options, site Site) error {
	drives := point.Config.Drives()
	for _, d := range drives {
		if err := p.planDrive(d, point, o, site); err != nil {
			return fmt.Errorf("drive %s: %w", d.ID, err)
		}
	}
	has := func(id string) bool {
		return slices.ContainsFunc(drives, func(d proxmox.Drive) bool { return d.ID == id })
	}
	for _, name := range slices.Sorted(maps.Keys(point.Files)) {
		if !has(name) {
			p.note(true, "disk %s is in no drive of the saved configuration: left out; `qmchain-restore image` writes it to a file", name)
		}
	}
	for id := range o.Storages {
		if !has(id) {
			return fmt.Errorf("--storage %s=: the VM has no such drive: %w", id, ErrStorage)
		}
	}
	return nil
}

func (p *Plan) planDrive(d proxmox.Drive, point Point, o Options, site Site) error {
	file := point.Files[d.ID]
	switch {
	case d.CloudInit():
		storage, _, err := target(d, o, site)
		if err != nil {
			return err
		}
		p.Drives = append(p.Drives, Drive{ID: d.ID, Storage: storage, Value: storage + cloudInit})
	case d.CDROM():
		p.planCDROM(d, site)
	case file != "":
		return p.planImport(d, file, o, site)
	case d.TPM() && !slices.Contains(point.Disks, d.ID):
		storage, _, err := target(d, o, site)
		if err != nil {
			return err
		}
		d.Options = withNeeded(d)
		p.Drives = append(p.Drives, Drive{ID: d.ID, Storage: storage, Value: storage + ":1" + rest(d)})
		p.note(true, "the point does not hold the TPM's state: the VM gets an empty one, without the keys that were in it")
	case slices.Contains(point.Disks, d.ID):
		p.note(false, "%s is left out, as you asked", d.ID)
	case !d.Backup():
		p.note(false, "%s is left out: its backup=0 keeps it out of backups", d.ID)
	default:
		p.note(true, "%s is left out: the point does not hold it", d.ID)
	}
	return nil
}

// planCDROM keeps a CD-ROM, and its medium if that is here.
func (p *Plan) planCDROM(d proxmox.Drive, site Site) {
	path := d.Volume
	if !filepath.IsAbs(path) {
		path = proxmox.VolumeFile(site.Storages, d.Volume)
	}
	if d.Volume != "none" && d.Volume != "cdrom" && !site.Exists(path) {
		p.note(false, "%s: %s is not on this host: the drive is empty", d.ID, d.Volume)
		d.Volume = "none"
	}
	p.Drives = append(p.Drives, Drive{ID: d.ID, Value: d.Volume + rest(d)})
}

// planImport has a drive's data copied into a new volume.
func (p *Plan) planImport(d proxmox.Drive, file string, o Options, site Site) error {
	storage, s, err := target(d, o, site)
	if err != nil {
		return err
	}
	format := ""
	switch {
	case d.TPM():
		format = "raw" // all that swtpm takes
	case s.Path != "":
		// What the volume was; where that was none with a name that tells, the storage's own.
		if ext := strings.TrimPrefix(filepath.Ext(d.Volume), "."); ext == "qcow2" || ext == "raw" {
			format = ext
		}
	}
	d.Options = withNeeded(d)
	p.Drives = append(p.Drives, Drive{ID: d.ID, Storage: storage, File: file, Format: format, Value: rest(d)})
	return nil
}

// target is the storage that a drive goes to.
func target(d proxmox.Drive, o Options, site Site) (string, proxmox.Storage, error) {
	name := o.Storages[d.ID]
	if name == "" {
		name = o.Storage
	}
	asked := name != ""
	if !asked {
		if filepath.IsAbs(d.Volume) {
			return "", proxmox.Storage{}, fmt.Errorf("it was %s, a device or a file of its host: %w", d.Volume, ErrStorage)
		}
		name, _, _ = strings.Cut(d.Volume, ":")
	}
	s, ok := site.Storages[name]
	switch {
	case !ok && asked:
		return "", s, fmt.Errorf("this host has no storage %q: %w", name, ErrStorage)
	case !ok:
		return "", s, fmt.Errorf("it was on storage %q, which this host does not have: %w", name, ErrStorage)
	case !s.Images():
		return "", s, fmt.Errorf("storage %q is not for VMs' disks: %w", name, ErrStorage)
	}
	return name, s, nil
}

// withNeeded are a drive's options with those that qm wants.
func withNeeded(d proxmox.Drive) proxmox.Options {
	all := maps.Clone(d.Options)
	for key, value := range needed[d.ID] {
		if all[key] == "" {
			all[key] = value
		}
	}
	return all
}

// rest are a drive's options, each with a comma before it, without those that are the old volume's.
func rest(d proxmox.Drive) string {
	var b strings.Builder
	for _, key := range slices.Sorted(maps.Keys(d.Options)) {
		switch key {
		case "size", "format", "import-from", "volume":
			continue
		}
		b.WriteString("," + key + "=" + d.Options[key])
	}
	return b.String()
}
