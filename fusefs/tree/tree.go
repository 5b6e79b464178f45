// Package tree says what a mounted set looks like: which names there are, and every file's attributes. It is pure; what
// it needs to know of the set is handed to it.
//
//	110/                               a guest
//	110/latest -> 20261120T111523Z-81aa
//	110/20261120T111523Z-81aa/         a point
//	110/.../scsi0.raw                  a disk
//	110/.../scsi0-part1.raw            a partition of it; scsi0-part1-part2.raw is one inside that
//	110/.../point.json                 the point's manifest, as it is in the repository; foreign points have none
//	110/.../guest/                     the guest's configuration files, if the point has any, as they are
//
// A disk's name ends in .raw, so all else in a point's folder has room beside it. Where a disk is called as another one's
// partition would be, the name is the disk's: see PartitionDisk.
//
// Disks, partitions and folders have extended attributes, which say what the manifest does: see attributes.go.
package tree

import (
	"crypto/sha256"
	"encoding/binary"
	"io/fs"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/fusefs/partition"
)

// Names that are not those of guests, points or disks.
const (
	LatestName  = "latest"
	FilesFolder = "guest"
	diskSuffix  = ".raw"
)

// Kind is what a node is.
type Kind int

const (
	Dir Kind = iota + 1
	Link
	File // passed through from the set
	Disk
)

// Perm is who may read a node: permission bits and owner.
type Perm struct {
	Mode     fs.FileMode
	UID, GID uint32
}

// Stat is what is known of a file or folder of the set.
type Stat struct {
	Perm
	Size, Blocks int64 // bytes; blocks of 512 bytes
	Time         time.Time
}

// Place names a folder of the tree: the root, a guest, a point, or the folder with a point's configuration files. The
// zero value is the root.
type Place struct {
	Guest string
	Point chain.ID
	UUID  string // of the point
	Files bool
}

// Node is a file, link or folder of the tree.
type Node struct {
	Name string
	Kind Kind
	// Ino is the inode number: the same for the same thing as long as it exists, in every mount. Another point under the
	// same id has another one, so nothing that was kept of the first is taken for the second.
	Ino uint64
	Perm
	Size   int64 // bytes
	Blocks int64 // of 512 bytes
	Time   time.Time

	Place  Place  // Dir: the folder's own place
	Target string // Link
	Disk   string // Disk: its name in the manifest
	Path   string // File: where it is in the point's folder

	Partition *partition.Partition // Disk: the part of the disk that this is; nil: all of it
}

// Inode numbers that are fixed: the root's, and that of the file with the mount's counters.
const (
	RootIno  = 1
	StatsIno = 2
)

// ino hashes what names a node for good. Numbers below 2^63 are ours, those above are go-fuse's own.
func ino(parts ...string) uint64 {
	h := sha256.New()
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return max(binary.BigEndian.Uint64(h.Sum(nil))>>1, StatsIno+1)
}

// dirPerm and filePerm are the set's own bits without the right to write, or to run a disk.
func dirPerm(p Perm) Perm {
	p.Mode &= 0o555
	return p
}

func filePerm(p Perm) Perm {
	p.Mode &= 0o444
	return p
}

// Root is the mount's own folder.
func Root(set Stat) Node {
	return Node{Kind: Dir, Ino: RootIno, Perm: dirPerm(set.Perm), Time: set.Time}
}

// Guest is a guest's folder.
func Guest(name string, folder Stat) Node {
	return Node{
		Name: name, Kind: Dir, Ino: ino("guest", name), Perm: dirPerm(folder.Perm), Time: folder.Time,
		Place: Place{Guest: name},
	}
}

// Point is a readable point of a guest.
type Point struct {
	Manifest *chain.Manifest
	Folder   Perm
}

// Points is what a guest's folder holds: its points, oldest first, and the link to the newest, if there is any.
func Points(guest string, folder Stat, points []Point) []Node {
	nodes := make([]Node, 0, len(points)+1)
	for _, p := range points {
		nodes = append(nodes, PointFolder(guest, p))
	}
	if latest, ok := Latest(guest, folder, points); ok {
		nodes = append(nodes, latest)
	}
	return nodes
}

// PointFolder is one point's folder.
func PointFolder(guest string, p Point) Node {
	m := p.Manifest
	return Node{
		Name: string(m.ID), Kind: Dir, Ino: ino("point", guest, m.UUID), Perm: dirPerm(p.Folder), Time: m.Time,
		Place: Place{Guest: guest, Point: m.ID, UUID: m.UUID},
	}
}

// Latest is the link to the newest point.
func Latest(guest string, folder Stat, points []Point) (Node, bool) {
	if len(points) == 0 {
		return Node{}, false
	}
	m := points[len(points)-1].Manifest
	return Node{
		Name: LatestName, Kind: Link, Ino: ino("latest", guest),
		// A link has no rights of its own; its target's count.
		Perm: Perm{Mode: 0o777, UID: folder.UID, GID: folder.GID},
		Size: int64(len(m.ID)), Time: m.Time, Target: string(m.ID),
	}, true
}

// Contents is what is known of what there is of a point.
type Contents struct {
	Point    Point
	Lineage  chain.Points                   // all points that its disks may descend from
	Manifest *Stat                          // of the manifest's file; nil: it has none
	Files    *Stat                          // of the folder with the guest's files; nil: there is none
	Image    func(chain.Layer) (Stat, bool) // of an image file; false: it can't be looked at

	Partitions map[string][]partition.Partition // by disk, as far as they are known
}

// PointContents is what a point's folder holds.
func PointContents(guest string, c Contents) []Node {
	m := c.Point.Manifest
	nodes := make([]Node, 0, len(m.Disks)+2)
	for i := range m.Disks {
		whole := disk(guest, c, &m.Disks[i])
		nodes = append(nodes, whole)
		for _, p := range c.Partitions[whole.Disk] {
			part := partitionOf(guest, m, whole, p)
			if owner, ok := PartitionDisk(m, part.Name); ok && owner == whole.Disk {
				nodes = append(nodes, part)
			}
		}
	}
	if c.Manifest != nil {
		nodes = append(nodes, passed(guest, m.UUID, chain.ManifestFile, *c.Manifest))
	}
	if c.Files != nil {
		nodes = append(nodes, Node{
			Name: FilesFolder, Kind: Dir, Ino: ino("folder", guest, m.UUID, FilesFolder), Perm: dirPerm(c.Files.Perm), Time: c.Files.Time,
			Place: Place{Guest: guest, Point: m.ID, UUID: m.UUID, Files: true},
		})
	}
	slices.SortFunc(nodes, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	return nodes
}

// GuestFile is one of the guest's configuration files in a point. path is where it is in the point's folder.
func GuestFile(guest, uuid, path string, s Stat) Node { return passed(guest, uuid, path, s) }

func passed(guest, uuid, path string, s Stat) Node {
	return Node{
		Name: path[strings.LastIndexByte(path, '/')+1:], Kind: File, Ino: ino("file", guest, uuid, path), Perm: filePerm(s.Perm),
		Size: s.Size, Blocks: s.Blocks, Time: s.Time, Path: path,
	}
}

func disk(guest string, c Contents, d *chain.Disk) Node {
	m := c.Point.Manifest
	n := Node{
		Name: d.Name + diskSuffix, Kind: Disk, Ino: ino("disk", guest, m.UUID, d.Name),
		Size: d.VirtualSize, Time: m.Time, Disk: d.Name,
	}
	layers, err := c.Lineage.Layers(m, d.Name)
	if err != nil {
		// The disk can't be opened; who looks at it learns why from the log.
		layers = []chain.Layer{{Point: m, Disk: d}}
	}
	n.Perm = diskPerm(c, layers)
	n.Blocks = diskBlocks(layers, d.VirtualSize)
	return n
}

// partitionOf is a partition of a disk.
func partitionOf(guest string, m *chain.Manifest, disk Node, p partition.Partition) Node {
	n := disk
	n.Name = disk.Disk + "-" + p.Name() + diskSuffix
	n.Ino = ino("partition", guest, m.UUID, disk.Disk, p.Name())
	n.Size = p.Size
	// Its share of what is an estimate already, and within the same limits.
	share := float64(p.Size) / float64(disk.Size) * float64(disk.Blocks)
	n.Blocks = max(1, min(int64(share), (p.Size-1)/512))
	n.Partition = &p
	return n
}

// PartitionDisk returns the disk that a file of that name would be a partition of; false if it can't be any. It depends on
// the disks' names alone and not on what is in them: if one is called scsi0 and another scsi0-part1, then scsi0-part1.raw is
// the latter, and scsi0-part1-part2.raw is in the latter, whether it is there or not.
func PartitionDisk(m *chain.Manifest, name string) (disk string, ok bool) {
	stem, raw := strings.CutSuffix(name, diskSuffix)
	if !raw || m.Disk(stem) != nil {
		return "", false
	}
	for i := range m.Disks {
		d := m.Disks[i].Name
		if rest, is := strings.CutPrefix(stem, d+"-"); is && len(d) >= len(disk) && partition.IsName(rest) {
			disk, ok = d, true
		}
	}
	return disk, ok
}

// diskPerm is what the strictest of the images allows: whoever reads the disk reads them all. Where an image has another
// owner or group than the point's own, that class has no right to it.
func diskPerm(c Contents, layers []chain.Layer) Perm {
	own, ok := c.Image(layers[len(layers)-1])
	if !ok {
		own = Stat{Perm: Perm{Mode: 0o400, UID: c.Point.Folder.UID, GID: c.Point.Folder.GID}}
	}
	p := filePerm(own.Perm)
	for _, l := range layers[:len(layers)-1] {
		s, ok := c.Image(l)
		if !ok {
			continue
		}
		p.Mode &= s.Mode
		if s.UID != p.UID {
			p.Mode &^= 0o400
		}
		if s.GID != p.GID {
			p.Mode &^= 0o040
		}
	}
	return p
}

// diskBlocks estimates how much of a disk is allocated, in blocks of 512 bytes, from the sizes of its images alone: what
// is exact would need every table of every image, for each `ls -l`. The estimate is too large where increments wrote to
// the same places, and too small where images are compressed.
//
// What programs make of it allows for that. cp, tar and qemu-img take a file with less blocks than its size for sparse
// and then ask for the holes, which are exact; so the estimate stays below the size, always: a disk that is called dense
// would be copied with all its zeroes. And it is never 0: tar takes a file without blocks for empty and does not read it.
func diskBlocks(layers []chain.Layer, size int64) int64 {
	var bytes int64
	for _, l := range layers {
		bytes += l.Disk.Bytes
	}
	return max(1, min(bytes, size-1)/512)
}

// Find returns the node of that name.
func Find(nodes []Node, name string) (Node, bool) {
	i := slices.IndexFunc(nodes, func(n Node) bool { return n.Name == name })
	if i < 0 {
		return Node{}, false
	}
	return nodes[i], true
}
