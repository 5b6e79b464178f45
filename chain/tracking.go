package chain

import (
	"strings"
)

// BitmapName is the name of a tracking bitmap: which repository's, since which point, and the disk's name in that point.
// The disk's name keeps two swapped disks apart and lets a renamed one go on.
type BitmapName struct {
	Repo  string // the first 8 hex digits of the repository's id
	Point ID
	Disk  string
}

const bitmapPrefix = "qmchain:"

func (b BitmapName) String() string {
	return bitmapPrefix + b.Repo + ":" + string(b.Point) + ":" + b.Disk
}

// ParseBitmapName reads a bitmap's name; ok is false for all that are not ours.
func ParseBitmapName(s string) (b BitmapName, ok bool) {
	rest, ok := strings.CutPrefix(s, bitmapPrefix)
	if !ok {
		return BitmapName{}, false
	}
	parts := strings.SplitN(rest, ":", 3)
	if len(parts) != 3 || len(parts[0]) != 8 || CheckDiskName(parts[2]) != nil {
		return BitmapName{}, false
	}
	id, err := ParseID(parts[1])
	if err != nil {
		return BitmapName{}, false
	}
	return BitmapName{Repo: parts[0], Point: id, Disk: parts[2]}, true
}

// Superseded reports whether tracking has moved on from the image that a bitmap records from: a later point tracks the
// same disk, under the same name or as this image's child. Such a bitmap is of no use any more.
func (ps Points) Superseded(b BitmapName) bool {
	for i := len(ps) - 1; i >= 0 && ps[i].ID > b.Point; i-- {
		for _, d := range ps[i].Disks {
			if !d.Level.Tracked() {
				continue
			}
			if d.Name == b.Disk || d.Level == Inc && d.Parent.Point == b.Point && d.Parent.Disk == b.Disk {
				return true
			}
		}
	}
	return false
}

// Tracked returns the point and disk that a bitmap records from, if that image is still what tracking goes on from;
// nil, with the reason, if not.
func (ps Points) Tracked(b BitmapName) (*Layer, string) {
	m := ps.Find(b.Point)
	if m == nil {
		return nil, "the point that its bitmap records from, " + string(b.Point) + ", is not in the repository"
	}
	if m.Base {
		return nil, "the point that its bitmap records from, " + string(b.Point) + ", was removed"
	}
	d := m.Disk(b.Disk)
	if d == nil || !d.Level.Tracked() {
		return nil, "point " + string(b.Point) + " does not track disk " + b.Disk
	}
	if ps.Superseded(b) {
		return nil, "a newer point than " + string(b.Point) + " tracks the disk"
	}
	return &Layer{m, d}, ""
}
