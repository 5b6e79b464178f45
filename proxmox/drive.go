package proxmox

import (
	"cmp"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Drive is a drive of a VM's configuration.
type Drive struct {
	ID string // scsi0; QEMU's device has that id, and QEMU's drive has drive- before it
	// Volume is the volume's id, such as local-lvm:vm-110-disk-0; or an absolute path; none and cdrom are drives without a
	// medium, or with the host's.
	Volume  string
	Options Options // the rest: backup, cache, iothread, media, size …
}

var (
	driveRE     = regexp.MustCompile(`^(ide|sata|scsi|virtio|efidisk|tpmstate)(\d{1,2})$`)
	cloudInitRE = regexp.MustCompile(`[:/]vm-\d+-cloudinit(\.[a-z0-9]+)?$`)
)

// Drives are the drives in the configuration's main section, CD-ROMs and the like included, ordered by bus and number.
func (c *Config) Drives() []Drive {
	var drives []Drive
	for key, value := range c.Options {
		if driveRE.MatchString(key) {
			drives = append(drives, parseDrive(key, value))
		}
	}
	slices.SortFunc(drives, func(a, b Drive) int {
		busA, nA := a.place()
		busB, nB := b.place()
		return cmp.Or(cmp.Compare(busA, busB), cmp.Compare(nA, nB))
	})
	return drives
}

func parseDrive(id, value string) Drive {
	d := Drive{ID: id, Options: properties(value, "file")}
	d.Volume = d.Options["file"]
	delete(d.Options, "file")
	return d
}

func (d Drive) place() (bus string, number int) {
	m := driveRE.FindStringSubmatch(d.ID)
	number, _ = strconv.Atoi(m[2]) // two digits
	return m[1], number
}

// CDROM tells whether it is a CD-ROM: not the VM's own data. A cloud-init drive is one too.
func (d Drive) CDROM() bool { return d.Options["media"] == "cdrom" }

// CloudInit tells whether it is the drive that PVE makes from the VM's cloud-init options at every start.
func (d Drive) CloudInit() bool { return cloudInitRE.MatchString(d.Volume) }

// TPM tells whether it is the state of a TPM, which swtpm holds and QEMU has no block device for.
func (d Drive) TPM() bool { return strings.HasPrefix(d.ID, "tpmstate") }

// Backup is false for a drive that the admin has excluded from backups (backup=0).
func (d Drive) Backup() bool { return truth(d.Options["backup"], true) }

// IOThread tells whether the drive has an iothread. It is not so for IDE and SATA, whatever is written there.
func (d Drive) IOThread() bool {
	bus, _ := d.place()
	return (bus == "scsi" || bus == "virtio") && truth(d.Options["iothread"], false)
}

// Size is the drive's size in bytes, as the configuration has it. Only QEMU knows for certain: PVE writes it down when it
// makes or resizes the volume.
func (d Drive) Size() (bytes int64, ok bool) {
	text := d.Options["size"]
	digits := strings.TrimRight(text, "KMGT")
	number, err := strconv.ParseFloat(digits, 64)
	unit, known := map[string]float64{"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[text[len(digits):]]
	if err != nil || !known || !(number >= 0 && number*unit < math.MaxInt64) {
		return 0, false
	}
	return int64(number * unit), true
}

// IsDrive tells whether an option of that name is a drive.
func IsDrive(key string) bool { return driveRE.MatchString(key) }
