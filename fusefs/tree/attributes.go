package tree

import (
	"fmt"
	"strconv"
	"time"

	"qmchain/chain"
	"qmchain/fusefs/partition"
)

// AttributePrefix begins the names of all extended attributes. They are in the namespace of users, which every program may
// read, and tar and rsync copy.
const AttributePrefix = "user.qmchain."

// MaxAttribute is the largest value that Linux lets an attribute have, in bytes: XATTR_SIZE_MAX.
const MaxAttribute = 64 << 10

// Attribute is an extended attribute of a node.
type Attribute struct {
	Name  string // with the prefix
	Value string
}

// Attributes of one node. What is not known of it has no attribute. All values are text, as they are in the manifest.
//
// Of a guest's folder:
//
//	guest        the guest's name
//	source       whose backups they are: qmchain, qmpbackup or virtnbdbackup
//	points       how many points there are
//	point        the id of the newest
//
// Of a point's folder, its disks and its partitions:
//
//	guest        the guest's name
//	point, uuid  the point's id, and what tells it from another one of that id
//	time         of the instant, in UTC, RFC 3339
//	consistency  instant, frozen or paused; not there where it is not known
//	level        full, inc, diff or copy; of a point whose disks' levels differ, mixed
//	note         what was noted at the backup
//	protected    "true": prune leaves the point alone
//
// Of disks and partitions as well:
//
//	disk         the disk's name
//	reason       why it has that level
//	parent       the point that it was made on; with the disk's name there, POINT/DISK, if that is another one
//	image        the file that holds it, from the set's directory on
//	format       of the guest's own image
//	sums         sha256:, and the digest of the file with the image's check sums
//	warning      why it may not be what the guest had
//
// And of partitions:
//
//	partition.start  bytes from the start of the disk
//	partition.type   a GUID, or of an MBR a number such as 0x83
//	partition.uuid   as in Linux' /dev/disk/by-partuuid
//	partition.label  its name in a GPT; the guest's own words, which can be any characters
type Attributes []Attribute

// add returns the attributes with one more, if there is a value and it can be one.
func (a Attributes) add(name, value string) Attributes {
	if value == "" || len(value) > MaxAttribute {
		return a
	}
	return append(a, Attribute{AttributePrefix + name, value})
}

// Get returns the value of an attribute.
func (a Attributes) Get(name string) (string, bool) {
	for _, x := range a {
		if x.Name == name {
			return x.Value, true
		}
	}
	return "", false
}

// GuestAttributes are those of a guest's folder.
func GuestAttributes(guest, source string, points []Point) Attributes {
	var a Attributes
	a = a.add("guest", guest)
	a = a.add("source", source)
	a = a.add("points", strconv.Itoa(len(points)))
	if len(points) > 0 {
		a = a.add("point", string(points[len(points)-1].Manifest.ID))
	}
	return a
}

// PointAttributes are those of a point's folder.
func PointAttributes(guest string, m *chain.Manifest) Attributes {
	return pointAttributes(guest, m, m.Level())
}

func pointAttributes(guest string, m *chain.Manifest, level chain.Level) Attributes {
	var a Attributes
	a = a.add("guest", guest)
	a = a.add("point", string(m.ID))
	a = a.add("uuid", m.UUID)
	if !m.Time.IsZero() {
		a = a.add("time", m.Time.UTC().Format(time.RFC3339Nano))
	}
	a = a.add("consistency", string(m.Consistency))
	a = a.add("level", string(level))
	a = a.add("note", m.Note)
	if m.Protected {
		a = a.add("protected", "true")
	}
	return a
}

// DiskAttributes are those of a disk; image is the name of its file, and warning what is to be known of it, if anything.
// With a partition they are that one's.
func DiskAttributes(guest string, m *chain.Manifest, d *chain.Disk, image, warning string, p *partition.Partition) Attributes {
	a := pointAttributes(guest, m, d.Level)
	a = a.add("disk", d.Name)
	a = a.add("reason", d.Reason)
	if d.Parent != nil {
		parent := string(d.Parent.Point)
		if d.Parent.Disk != d.Name {
			parent = fmt.Sprintf("%s/%s", d.Parent.Point, d.Parent.Disk)
		}
		a = a.add("parent", parent)
	}
	a = a.add("image", image)
	a = a.add("format", d.SourceFormat)
	if d.Sums.SHA256 != "" {
		a = a.add("sums", "sha256:"+d.Sums.SHA256)
	}
	a = a.add("warning", warning)
	if p != nil {
		a = a.add("partition.start", strconv.FormatInt(p.Offset, 10))
		a = a.add("partition.type", p.Type)
		a = a.add("partition.uuid", p.UUID)
		a = a.add("partition.label", p.Label)
	}
	return a
}
