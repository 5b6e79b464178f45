package vmrestore

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"qmchain/proxmox"
)

// What can be wrong with what was asked for.
var (
	// ErrStorage: a disk has no storage to go to.
	ErrStorage = errors.New("no storage for it")
	// ErrCannot: it can't be done in this way with this VM.
	ErrCannot = errors.New("not possible")
)

// Point is what is restored.
type Point struct {
	Name     string          // as users call it
	Config   *proxmox.Config // of the VM when the point was made
	Firewall []byte          // its rules; nil: none
	Disks    []string        // those that the point holds
	// Files are the disks that are to be restored: absolute paths of raw files, or of qcow2 files that name no others. Their
	// names have no commas.
	Files map[string]string
}

// Options are what the user wants of the VM.
type Options struct {
	VMID proxmox.VMID
	// Storages says where drives go, by their ids; Storage where all others go. Those without either go where they were.
	Storages map[string]string
	Storage  string
	Unique   bool // new MAC addresses and a new UUID
	Live     bool
	Start    bool
}

// Site is where the VM is to live.
type Site struct {
	Socket   proxmox.Socket // that of the new VM
	Storages map[string]proxmox.Storage
	Exists   func(path string) bool
	// Twin: the VM that the point is of is still there, and is another than the new one.
	Twin bool
	// Old is the configuration of the VM that is replaced; nil: there is none.
	Old *proxmox.Config
	// Dir is a private folder for what qm reads from files.
	Dir     string
	NewUUID func() string
}

// Note says what is not as it was.
type Note struct {
	Text string
	Loss bool // and nobody could expect that
}

// Drive is a drive of the new VM.
type Drive struct {
	ID      string
	Storage string // of a new volume; "" if it has none
	File    string // that its data comes from; "" if it has none
	Format  string // of the volume; "" is the storage's own
	Value   string // what qm is told, but for File and Format
	Kept    bool   // of the VM that is replaced: nothing is done about it
}

// value is what `qm set` is told, of a new volume with the data.
func (d Drive) value() string {
	if d.File == "" {
		return d.Value
	}
	text := d.Storage + ":0,import-from=" + d.File
	if d.Format != "" {
		text += ",format=" + d.Format
	}
	return text + d.Value
}

// Plan is what the VM will be.
type Plan struct {
	VMID        proxmox.VMID
	VMGenID     string          // new; what the VM is known by
	Options     proxmox.Options // but for drives, and for what comes last
	Description string
	Drives      []Drive
	Firewall    []byte
	Notes       []Note

	last     proxmox.Options // set when all drives are there
	drop     []string        // options that qm makes by itself and the VM did not have
	noGenID  bool            // the VM had no vmgenid, so it goes when all is done
	template bool
	old      *proxmox.Config
	sshKeys  string // the text of a file
	sshFile  string
	Live     bool
	Start    bool
}

// note adds a note; with loss, one of something that is missing and that nobody could expect.
func (p *Plan) note(loss bool, format string, args ...any) {
	p.Notes = append(p.Notes, Note{fmt.Sprintf(format, args...), loss})
}

// Loss returns the first note of a loss, or "".
func (p *Plan) Loss() string {
	if i := slices.IndexFunc(p.Notes, func(n Note) bool { return n.Loss }); i >= 0 {
		return p.Notes[i].Text
	}
	return ""
}

// moment are options that belong to a moment of a VM, or that only PVE writes.
var moment = regexp.MustCompile(`^(lock|parent|meta|digest|snaptime|snapstate|vmstate|runningmachine|runningcpu|running-nets-host-mtu|unused\d+)$`)

var (
	netRE  = regexp.MustCompile(`^net\d+$`)
	macRE  = regexp.MustCompile(`^([a-z0-9]+)=[0-9A-Fa-f:]{17}(,|$)|(^|,)macaddr=[0-9A-Fa-f:]{17}`)
	uuidRE = regexp.MustCompile(`(^|,)uuid=[0-9A-Fa-f-]+`)
)

// NewPlan works out the VM. Its errors wrap ErrStorage, ErrCannot, or a *proxmox.QuoteError.
func NewPlan(point Point, o Options, site Site) (*Plan, error) {
	p := &Plan{
		VMID: o.VMID, VMGenID: site.NewUUID(), Options: proxmox.Options{}, Description: point.Config.Description, Firewall: point.Firewall,
		last: proxmox.Options{}, old: site.Old, Live: o.Live, Start: o.Start,
	}
	if err := p.planDrives(point, o, site); err != nil {
		return nil, fmt.Errorf("%s: %w", point.Name, err)
	}
	for _, key := range slices.Sorted(maps.Keys(point.Config.Options)) {
		if !moment.MatchString(key) && !proxmox.IsDrive(key) {
			p.planOption(key, point.Config.Options[key], o, site)
		}
	}
	if keys := p.reaching(site.Socket); len(keys) > 0 {
		p.note(false, "%s: taken over from the backup, and what is in there reaches into this host", strings.Join(keys, ", "))
	}
	p.Options["vmgenid"] = p.VMGenID
	p.noGenID = slices.Contains([]string{"", "0"}, point.Config.Options["vmgenid"])
	if p.last["boot"] == "" {
		p.drop = append(p.drop, "boot")
	}
	if site.Twin && !o.Unique {
		p.note(false, "VM %s is still there and has the same MAC addresses and the same UUID: don't run both, or use --unique", point.Config.VMID)
	}
	if o.Unique && o.VMID == point.Config.VMID {
		p.note(false, "VM %s has a new UUID, and so is another VM to a repository with points of the old one: the next backup refuses it, unless it is made with --adopt, or under another --name", o.VMID)
	}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", point.Name, err)
	}
	return p, nil
}

// planOption decides on one option.
func (p *Plan) planOption(key, value string, o Options, site Site) {
	switch {
	case key == "vmgenid":
		return
	case key == "args":
		value = p.args(value, site.Socket)
	case key == "boot":
		p.last[key] = p.bootOrder(value)
		return
	case key == "bootdisk" || key == "protection":
		p.last[key] = value
		return
	case key == "template":
		p.template = value == "1"
		return
	case key == "hookscript":
		if !site.Exists(proxmox.VolumeFile(site.Storages, value)) {
			p.note(true, "the hook script %s is not on this host: left out", value)
			return
		}
	case key == "vmstatestorage":
		if _, ok := site.Storages[value]; !ok {
			p.note(false, "vmstatestorage: there is no storage %s here: left out", value)
			return
		}
	case key == "sshkeys":
		// qm takes the name of a file with them, and encodes them again.
		text, err := url.PathUnescape(value)
		if err != nil {
			p.note(true, "sshkeys can't be read: left out")
			return
		}
		p.sshKeys, p.sshFile = text, filepath.Join(site.Dir, "sshkeys")
		value = p.sshFile
	case o.Unique && netRE.MatchString(key):
		value = macRE.ReplaceAllString(value, "$1$2") // qm makes one up
	case o.Unique && key == "smbios1":
		value = uuidRE.ReplaceAllString(value, "${1}uuid="+site.NewUUID())
	}
	p.Options[key] = value
}

// hostOptionRE are options that give a VM devices, folders or programs of the host; PVE lets hardly anybody but root set them.
var hostOptionRE = regexp.MustCompile(`^(args|hookscript|(hostpci|usb|serial|parallel|virtiofs)[0-9]+)$`)

// reaching returns the options that reach into the host, but for our own socket and what is of the display alone.
func (p *Plan) reaching(socket proxmox.Socket) (keys []string) {
	for _, key := range slices.Sorted(maps.Keys(p.Options)) {
		value := p.Options[key]
		if key == "args" {
			if others, err := socket.Remove(value); err == nil {
				value = others
			}
		}
		if hostOptionRE.MatchString(key) && strings.TrimSpace(value) != "" && value != "socket" && !strings.HasPrefix(strings.TrimPrefix(value, "host="), "spice") {
			keys = append(keys, key)
		}
	}
	return keys
}

// args has the backup socket of another VM made that of this one.
func (p *Plan) args(value string, socket proxmox.Socket) string {
	found, err := socket.Look(value)
	if err != nil {
		p.note(false, "args: %v", err)
		return value
	}
	if !found.Present {
		return value
	}
	mended, err := socket.Add(value)
	if err != nil {
		p.note(false, "args: %v", err)
		return value
	}
	return mended
}

// bootOrder leaves out devices that the VM does not have, which qm refuses.
func (p *Plan) bootOrder(value string) string {
	list, found := strings.CutPrefix(value, "order=")
	if !found {
		return value
	}
	kept := slices.DeleteFunc(strings.Split(list, ";"), func(id string) bool {
		return proxmox.IsDrive(id) && !slices.ContainsFunc(p.Drives, func(d Drive) bool { return d.ID == id })
	})
	return "order=" + strings.Join(kept, ";")
}

// check refuses what can't be done.
func (p *Plan) check() error {
	switch {
	case p.Live && p.old != nil:
		return fmt.Errorf("a live restore in place of VM %s: %w", p.VMID, ErrCannot)
	case p.Live && p.template:
		return fmt.Errorf("a live restore of a template: %w", ErrCannot)
	case p.Live && slices.ContainsFunc(p.Drives, func(d Drive) bool { return isTPM(d.ID) && d.File != "" }):
		// PVE would have QEMU move what swtpm has open.
		return fmt.Errorf("a live restore of a VM with the state of a TPM: %w", ErrCannot)
	case p.Start && p.template:
		return fmt.Errorf("--start of a template: %w", ErrCannot)
	}
	if p.old == nil {
		return nil
	}
	return p.checkOld()
}

// checkOld refuses to replace a VM where something that is not in the way of PVE's own restore would be lost.
func (p *Plan) checkOld() error {
	c := p.old
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("VM %s can't be replaced: %w: %s", c.VMID, ErrCannot, fmt.Sprintf(format, args...))
	}
	switch {
	case len(c.Snapshots) > 0:
		return refuse("it has snapshots, which would go with it: `qm delsnapshot %s NAME`, or restore under another VMID", c.VMID)
	case c.Template():
		return refuse("it is a template, which others may be linked to")
	case c.Options["protection"] == "1":
		return refuse("it is protected: `qm set %s --protection 0`", c.VMID)
	case len(c.Pending)+len(c.PendingDelete) > 0:
		return refuse("it has pending changes")
	}
	// A storage has but one cloud-init drive of a VM: the new one can't be made beside the old.
	for _, d := range c.Drives() {
		if !d.CloudInit() {
			continue
		}
		i := slices.IndexFunc(p.Drives, func(n Drive) bool { return n.ID == d.ID })
		storage, _, _ := strings.Cut(d.Volume, ":")
		if i < 0 || p.Drives[i].Value != storage+cloudInit {
			return refuse("its cloud-init drive is in the way: `qm set %s --delete %s`", c.VMID, d.ID)
		}
		p.Drives[i].Kept = true
	}
	going := p.oldVolumes()
	for _, d := range c.Drives() {
		if p.ownVolume(d) && !slices.Contains(going, d.Volume) {
			p.note(false, "%s, which was %s, stays as an unused volume: no restored disk takes its place", d.Volume, d.ID)
		}
	}
	return nil
}

func isTPM(id string) bool { return strings.HasPrefix(id, "tpmstate") }
