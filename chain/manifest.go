package chain

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// FormatVersion is the version of the repository's and the manifest's format that this program writes. A larger one is
// refused when read.
const FormatVersion = 1

// ManifestFile is the name of a point's manifest in the point's folder.
const ManifestFile = "point.json"

// MaxManifest bounds the size of a manifest, in bytes.
const MaxManifest = 16 << 20

// ErrDamaged is wrapped by every error that says that a backup is not what it was when it was made: an edited or cut
// manifest, an image that is missing, truncated, swapped or altered, a gap in a chain.
var ErrDamaged = errors.New("backup is damaged")

// Level says how a disk's image relates to other images.
type Level string

// The levels of a disk in a point. Diff is an increment after which tracking does not advance; Copy is a full image
// outside of every chain.
const (
	Full  Level = "full"
	Inc   Level = "inc"
	Diff  Level = "diff"
	Copy  Level = "copy"
	Mixed Level = "mixed" // of a point whose disks' levels differ
)

// Overlay reports whether an image of this level needs its parent's.
func (l Level) Overlay() bool { return l == Inc || l == Diff }

// Tracked reports whether tracking advances to a point when a disk is stored in it at this level.
func (l Level) Tracked() bool { return l == Full || l == Inc }

// Consistency says how the disks of a point came to be of one instant.
type Consistency string

// Instant: all disks switched at one moment, as after a power cut. Frozen: the guest's file systems were frozen by its
// agent at that moment. Paused: the guest was paused for it by request. Unknown: the point was imported, and what it was
// imported from does not say.
const (
	Instant Consistency = "instant"
	Frozen  Consistency = "frozen"
	Paused  Consistency = "paused"
	Unknown Consistency = ""
)

// GuestIdentity is what tells a guest from another one with the same name.
type GuestIdentity struct {
	Name    string `json:"name"`              // the guest's name in the repository
	VMName  string `json:"vm_name,omitempty"` // QEMU's -name
	UUID    string `json:"uuid,omitempty"`    // the SMBIOS UUID; empty: the guest has none
	VMGenID string `json:"vmgenid,omitempty"` // the VM generation id; empty: the guest has none
}

// ImageRef names one image: that of a disk in a point. A child names its parent by id and by uuid, so that a point that
// was removed and made again, or two that were swapped, are noticed.
type ImageRef struct {
	Point ID     `json:"point"`
	UUID  string `json:"uuid"`
	Disk  string `json:"disk"` // the disk's name in that point: disks can be renamed
}

// Sums names the file with an image's check sums and seals it.
type Sums struct {
	File   string `json:"file"`
	SHA256 string `json:"sha256"` // of the file
}

// Tracking is the dirty bitmap that records on the guest's disk since this point.
type Tracking struct {
	Bitmap string `json:"bitmap"`
	Kind   string `json:"kind"` // KindPersistent or KindMemory
}

// Kinds of tracking bitmaps. Persistent ones live in the guest's qcow2 image and survive a clean stop of QEMU; those in
// memory end with the QEMU process.
const (
	KindPersistent = "persistent"
	KindMemory     = "memory"
)

// Disk is one disk of a point.
type Disk struct {
	Name         string    `json:"name"`
	Level        Level     `json:"level"`
	Reason       string    `json:"reason,omitempty"` // why this level, where it was not plainly what was asked for
	Parent       *ImageRef `json:"parent,omitempty"`
	SourceFormat string    `json:"source_format"` // of the guest's image
	VirtualSize  int64     `json:"virtual_size"`  // bytes
	File         string    `json:"file"`          // the qcow2 image, in the folder of the guest's images
	Bytes        int64     `json:"bytes"`         // size of that file
	Sums         Sums      `json:"sums"`
	Tracking     *Tracking `json:"tracking,omitempty"`

	// Generation counts how often the image has taken in its parent's, which was removed. Only then is an image changed:
	// what the disk reads as stays the same.
	Generation int `json:"generation,omitempty"`
	// Next is there while the image of the next generation is about to take this one's place: the file is one or the other.
	Next *Next `json:"next,omitempty"`
	// Merging is there while the image of a base is being merged with that of its child, which it names. Until then nobody
	// needs the base but those that descend from this child, for whom what is written to it is hidden.
	Merging *ImageRef `json:"merging,omitempty"`
}

// Next is what the next generation of an image changes of a Disk.
type Next struct {
	Level  Level     `json:"level"`
	Parent *ImageRef `json:"parent,omitempty"`
	Bytes  int64     `json:"bytes"`
	Sums   Sums      `json:"sums"`
}

// Advance makes the next generation of the image the one that is there.
func (d *Disk) Advance() {
	d.Level, d.Parent, d.Bytes, d.Sums = d.Next.Level, d.Next.Parent, d.Next.Bytes, d.Next.Sums
	d.Generation++
	d.Next = nil
}

// Manifest describes one point. It is written last, and is what makes a folder a point.
type Manifest struct {
	Format      int           `json:"format"`
	ID          ID            `json:"id"`
	UUID        string        `json:"uuid"` // 128 random bits in hex
	Time        time.Time     `json:"time"` // of the instant
	Guest       GuestIdentity `json:"guest"`
	Consistency Consistency   `json:"consistency"`
	Note        string        `json:"note,omitempty"`
	Protected   bool          `json:"protected,omitempty"`
	QEMU        string        `json:"qemu"` // its version; empty: the point was imported
	Disks       []Disk        `json:"disks"`

	// Base is set on a point that was removed, and is still there because points that are kept need its images, or somebody
	// reads it. It is not in the file but in the name of its folder.
	Base bool `json:"-"`
}

// Level is the level of all disks, or Mixed.
func (m *Manifest) Level() Level {
	level := m.Disks[0].Level
	for _, d := range m.Disks[1:] {
		if d.Level != level {
			return Mixed
		}
	}
	return level
}

// Disk returns the disk of that name, or nil.
func (m *Manifest) Disk(name string) *Disk {
	for i := range m.Disks {
		if m.Disks[i].Name == name {
			return &m.Disks[i]
		}
	}
	return nil
}

// Ref names the image of a disk in this point.
func (m *Manifest) Ref(disk string) ImageRef { return ImageRef{Point: m.ID, UUID: m.UUID, Disk: disk} }

// The seal is the last value of the file: the SHA-256 of the whole file with zeros in its own place. It makes the digest
// independent of how the JSON is laid out and of keys that this version does not know.
const (
	sealKey   = `"seal": "sha256:`
	sealZeros = "0000000000000000000000000000000000000000000000000000000000000000"
)

// Encode returns the manifest as the sealed text of its file.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(struct {
		*Manifest
		Seal string `json:"seal"`
	}{m, "sha256:" + sealZeros}, "", "  ")
	if err != nil {
		return nil, err
	}
	text = append(text, '\n')
	at := bytes.LastIndex(text, []byte(sealKey)) + len(sealKey)
	sum := sha256.Sum256(text)
	hex.Encode(text[at:], sum[:])
	return text, nil
}

// DecodeManifest reads a manifest's file and checks its seal and all that can be checked of it alone. Its errors wrap
// ErrDamaged, save for one of a newer format.
func DecodeManifest(text []byte) (*Manifest, error) {
	damaged := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
	}
	m, read := decodeOwn(text)
	if !read {
		var head struct {
			Format int `json:"format"`
		}
		if err := json.Unmarshal(text, &head); err != nil {
			return nil, damaged("manifest: %v", err)
		}
		m = &Manifest{Format: head.Format} // of the others a newer format may have made something else
	}
	if m.Format > FormatVersion {
		return nil, fmt.Errorf("manifest of format %d: this version of qmchain reads up to %d", m.Format, FormatVersion)
	}
	if err := checkSeal(text); err != nil {
		return nil, damaged("manifest %v", err)
	}
	if !read {
		if err := json.Unmarshal(text, m); err != nil {
			return nil, damaged("manifest: %v", err)
		}
	}
	if err := m.Validate(); err != nil {
		return nil, damaged("manifest: %v", err)
	}
	return m, nil
}

// checkSeal says what is wrong with the seal in the text of a manifest.
func checkSeal(text []byte) error {
	at := bytes.LastIndex(text, []byte(sealKey))
	if at < 0 || len(text) < at+len(sealKey)+len(sealZeros) {
		return errors.New("has no seal")
	}
	at += len(sealKey)
	h := sha256.New()
	h.Write(text[:at])
	h.Write([]byte(sealZeros))
	h.Write(text[at+len(sealZeros):])
	if hex.EncodeToString(h.Sum(nil)) != string(text[at:at+len(sealZeros)]) {
		return errors.New("was changed after it was written (its seal does not fit)")
	}
	return nil
}

// KnowsAll returns an error if a manifest's file has keys that this version does not know: it can be read, but not be written
// anew without a loss.
func KnowsAll(text []byte) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	var m struct {
		*Manifest
		Seal string `json:"seal"`
	}
	m.Manifest = &Manifest{}
	if err := dec.Decode(&m); err != nil {
		return fmt.Errorf("its manifest was written by a newer version of qmchain: %w", err)
	}
	return nil
}

// Validate checks the manifest's own rules. Names in it become paths, so what is not plainly a name in the point's own
// folder is refused.
func (m *Manifest) Validate() error {
	if m.Format != FormatVersion {
		return fmt.Errorf("format %d, not %d", m.Format, FormatVersion)
	}
	if _, err := ParseID(string(m.ID)); err != nil {
		return err
	}
	if err := checkUUID(m.UUID); err != nil {
		return fmt.Errorf("point %s: %w", m.ID, err)
	}
	if err := CheckGuestName(m.Guest.Name); err != nil {
		return err
	}
	switch m.Consistency {
	case Instant, Frozen, Paused, Unknown:
	default:
		return fmt.Errorf("unknown consistency %q", m.Consistency)
	}
	if len(m.Disks) == 0 {
		return errors.New("no disks")
	}
	seen := make(map[string]bool)
	for i := range m.Disks {
		d := &m.Disks[i]
		if err := d.validate(m.ID); err != nil {
			return fmt.Errorf("disk %q: %w", d.Name, err)
		}
		if seen[d.Name] {
			return fmt.Errorf("disk %q is there twice", d.Name)
		}
		seen[d.Name] = true
	}
	return nil
}

func (d *Disk) validate(point ID) error {
	if err := CheckDiskName(d.Name); err != nil {
		return err
	}
	if err := checkParent(point, d.Level, d.Parent); err != nil {
		return err
	}
	if d.VirtualSize <= 0 || d.VirtualSize%512 != 0 {
		return fmt.Errorf("virtual size %d is not a positive multiple of 512", d.VirtualSize)
	}
	if file := ImageFile(point, d.Name); d.File != file {
		return fmt.Errorf("image file %q, not %q", d.File, file)
	}
	if d.Generation < 0 || d.Generation > 1<<30 {
		return fmt.Errorf("generation %d", d.Generation)
	}
	if err := d.checkFile(d.Bytes, d.Sums, d.Generation); err != nil {
		return err
	}
	if d.Next != nil {
		if err := checkParent(point, d.Next.Level, d.Next.Parent); err != nil {
			return fmt.Errorf("next generation: %w", err)
		}
		if err := d.checkFile(d.Next.Bytes, d.Next.Sums, d.Generation+1); err != nil {
			return fmt.Errorf("next generation: %w", err)
		}
	}
	if d.Merging != nil {
		if err := d.Merging.validate(); err != nil {
			return fmt.Errorf("merging: %w", err)
		}
	}
	return nil
}

func checkParent(point ID, level Level, parent *ImageRef) error {
	switch level {
	case Full, Copy:
		if parent != nil {
			return fmt.Errorf("level %s with a parent", level)
		}
	case Inc, Diff:
		if parent == nil {
			return fmt.Errorf("level %s without a parent", level)
		}
		if err := parent.validate(); err != nil {
			return fmt.Errorf("parent: %w", err)
		}
		// This is also what keeps a made-up manifest from closing a ring.
		if parent.Point >= point {
			return fmt.Errorf("parent %s is not older than the point", parent.Point)
		}
	default:
		return fmt.Errorf("unknown level %q", level)
	}
	return nil
}

func (d *Disk) checkFile(bytes int64, sums Sums, generation int) error {
	if file := SumsFile(d.Name, generation); sums.File != file {
		return fmt.Errorf("sums file %q, not %q", sums.File, file)
	}
	if bytes <= 0 {
		return fmt.Errorf("image of %d bytes", bytes)
	}
	if !isHex(strings.ToLower(sums.SHA256), 2*sha256.Size) {
		return fmt.Errorf("%q is not a SHA-256", sums.SHA256)
	}
	return nil
}

func (r *ImageRef) validate() error {
	if _, err := ParseID(string(r.Point)); err != nil {
		return err
	}
	if err := checkUUID(r.UUID); err != nil {
		return err
	}
	return CheckDiskName(r.Disk)
}

func checkUUID(s string) error {
	if !isHex(s, 32) {
		return fmt.Errorf("%q is not a uuid of 32 lower-case hex digits", s)
	}
	return nil
}

// isHex reports whether s is that many hex digits, in lower case.
func isHex(s string, digits int) bool {
	return len(s) == digits && strings.Trim(s, "0123456789abcdef") == ""
}

// ImageFile is the name of a disk's image in the folder of the guest's images.
func ImageFile(point ID, disk string) string { return string(point) + "." + disk + ".qcow2" }

// SumsFile is the name of the file with the check sums of a generation of an image, in the point's folder: the old one is
// there until the new one counts.
func SumsFile(disk string, generation int) string {
	if generation == 0 {
		return disk + ".sums"
	}
	return fmt.Sprintf("%s.sums.%d", disk, generation)
}

// BackingFile is what the header of an overlay on parent must name as its backing file: a name in the overlay's own
// folder, so that a repository can be moved, and so that a chain can be of any length: QEMU joins the folders of all
// backing files of a chain to one path, which the system bounds.
func BackingFile(parent ImageRef) string { return ImageFile(parent.Point, parent.Disk) }
