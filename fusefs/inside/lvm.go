package inside

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"regexp"
	"slices"
	"strings"

	"qmchain/chain/image"
)

// LVM's format, of lib/format_text/layout.h and lib/label/label.h in its sources: one of the first four sectors of a
// physical volume (PV) has a label. It names the metadata areas, rings of text that begin with a header. Each PV has a copy
// of the text, or none.
const (
	lvmSector   = 512
	lvmCRC      = 0xf597a6cf // what a check sum begins with
	mdaMagic    = " LVM2 x[5A%r0N*>"
	mdaHeader   = 512     // bytes, and where the ring begins
	maxMetadata = 8 << 20 // bytes; a group of thousands of volumes has less than one MiB
	maxAreas    = 8       // of each list in a label
)

// errLVM is wrapped by what makes a physical volume unreadable as such.
var errLVM = errors.New("LVM metadata")

func badLVM(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errLVM}, args...)...)
}

// labelSector is the index of the sector that has a PV's label; -1: it is none.
func labelSector(head []byte) int {
	for i := range 4 {
		if off := i * lvmSector; mark(head, off, "LABELONE") && mark(head, off+24, "LVM2 001") {
			return i
		}
	}
	return -1
}

// physical is a PV that was found.
type physical struct {
	uuid string // without hyphens
	img  image.Image
}

// readPV reads a PV's label and the volume group of its metadata, which is nil where the PV holds no copy.
func readPV(img image.Image) (physical, *group, error) {
	head, err := readSome(img, 0, 4*lvmSector)
	if err != nil {
		return physical{}, nil, err
	}
	i := labelSector(head)
	if i < 0 || len(head) < 4*lvmSector {
		return physical{}, nil, badLVM("no label")
	}
	le := binary.LittleEndian
	label := head[i*lvmSector:][:lvmSector]
	if lvmSum(label[20:]) != le.Uint32(label[16:]) {
		return physical{}, nil, badLVM("the check sum of the label is wrong")
	}
	at := le.Uint32(label[20:])
	if at < 32 || at > lvmSector-40 {
		return physical{}, nil, badLVM("the label's content is at byte %d", at)
	}
	pv := physical{uuid: string(label[at : at+32]), img: img}
	areas := label[at+40:]
	if _, areas, err = diskAreas(areas); err != nil { // of data
		return physical{}, nil, err
	}
	mdas, _, err := diskAreas(areas)
	if err != nil {
		return physical{}, nil, err
	}
	var newest *group
	var wrong error
	for _, a := range mdas {
		g, err := readArea(img, a)
		if err != nil {
			wrong = err // a second copy may do
			continue
		}
		if g != nil && (newest == nil || g.seqno > newest.seqno) {
			newest = g
		}
	}
	if newest == nil && wrong != nil {
		return physical{}, nil, wrong
	}
	return pv, newest, nil
}

// diskArea is a range of a PV, in bytes.
type diskArea struct{ off, size int64 }

// diskAreas reads a list that ends with zeroes, and returns what is behind it.
func diskAreas(b []byte) ([]diskArea, []byte, error) {
	var list []diskArea
	for len(list) <= maxAreas && len(b) >= 16 {
		a := diskArea{int64(binary.LittleEndian.Uint64(b)), int64(binary.LittleEndian.Uint64(b[8:]))}
		b = b[16:]
		if a == (diskArea{}) {
			return list, b, nil
		}
		list = append(list, a)
	}
	return nil, nil, badLVM("a list of areas does not end")
}

// readArea reads the text that a metadata area's header points to; nil if there is none.
func readArea(img image.Image, a diskArea) (*group, error) {
	if a.off < lvmSector || a.size <= mdaHeader || a.off > img.Size()-a.size {
		return nil, badLVM("an area of %d bytes at %d", a.size, a.off)
	}
	b, err := readSome(img, a.off, mdaHeader)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if len(b) < mdaHeader || string(b[4:20]) != mdaMagic || le.Uint32(b[20:]) != 1 || lvmSum(b[4:]) != le.Uint32(b) {
		return nil, badLVM("the header of an area is damaged")
	}
	off, size, sum := int64(le.Uint64(b[40:])), int64(le.Uint64(b[48:])), le.Uint32(b[56:])
	switch {
	case off == 0:
		return nil, nil // a PV in no group
	case off < mdaHeader || off >= a.size || size <= 0 || size > a.size-mdaHeader || size > maxMetadata:
		return nil, badLVM("%d bytes at %d of an area of %d", size, off, a.size)
	}
	first := min(size, a.size-off)
	text, err := readSome(img, a.off+off, first)
	if err == nil && first < size { // goes on at the beginning of the ring
		var rest []byte
		rest, err = readSome(img, a.off+mdaHeader, size-first)
		text = append(text, rest...)
	}
	if err != nil {
		return nil, err
	}
	if lvmSum(text) != sum {
		return nil, badLVM("the check sum of the text is wrong")
	}
	return parseGroup(string(text))
}

// lvmSum is a CRC-32 without the usual inversions.
func lvmSum(b []byte) uint32 { return ^crc32.Update(^uint32(lvmCRC), crc32.IEEETable, b) }

// group is a volume group (VG). Sizes are in sectors, as in the text.
type group struct {
	name, uuid string
	seqno      int64
	extent     int64
	pvs        map[string]pvEntry // by the name in the text, "pv0"
	lvs        []logical          // that users see
}

type pvEntry struct {
	uuid  string // without hyphens
	start int64
}

// logical is a logical volume (LV).
type logical struct {
	name, uuid string
	segments   []segment
	// why is not empty if the LV is of a kind that is not understood here.
	why string
}

// segment is a run of extents: linear (one stripe), or striped.
type segment struct {
	extents    int64
	stripeSize int64 // sectors
	stripes    []stripe
}

// stripe is where a stripe of a segment begins, in extents.
type stripe struct {
	pv    string
	start int64
}

// lvmName is what LVM allows, lvm(8). The names become arguments of programs.
var lvmName = regexp.MustCompile(`^[a-zA-Z0-9+_.][a-zA-Z0-9+_.-]*$`)

// Bounds of what is sane, far from an overflow.
const (
	maxSectors = 1 << 50
	maxExtents = 1 << 40
)

// parseGroup takes what is needed from a VG's text.
func parseGroup(text string) (*group, error) {
	root, err := parseConfig(text)
	if err != nil {
		return nil, err
	}
	for _, name := range root.order {
		vg := root.section(name)
		if vg == nil {
			continue
		}
		if !lvmName.MatchString(name) {
			return nil, badLVM("%s is no name of a group", printable(name))
		}
		g := &group{name: name, uuid: vg.text("id"), seqno: vg.number("seqno"), extent: vg.number("extent_size"), pvs: map[string]pvEntry{}}
		if g.extent <= 0 || g.extent > maxSectors {
			return nil, badLVM("group %s: extents of %d sectors", printable(name), g.extent)
		}
		pvs := vg.section("physical_volumes")
		for _, name := range pvs.names() {
			pv := pvs.section(name)
			e := pvEntry{strings.ReplaceAll(pv.text("id"), "-", ""), pv.number("pe_start")}
			if e.start < 0 || e.start > maxSectors {
				return nil, badLVM("physical volume %s begins at sector %d", printable(name), e.start)
			}
			g.pvs[name] = e
		}
		lvs := vg.section("logical_volumes")
		for _, name := range lvs.names() {
			lv := lvs.section(name)
			if !slices.Contains(lv.list("status"), any("VISIBLE")) {
				continue // part of another one
			}
			if !lvmName.MatchString(name) {
				return nil, badLVM("%s is no name of a volume", printable(name))
			}
			g.lvs = append(g.lvs, parseLV(name, lv))
		}
		return g, nil
	}
	return nil, badLVM("no group")
}

func parseLV(name string, s *section) logical {
	lv := logical{name: name, uuid: s.text("id")}
	next := int64(0)
	for i := range s.number("segment_count") {
		seg := s.section(fmt.Sprintf("segment%d", i+1))
		if kind := seg.text("type"); kind != "striped" {
			lv.why = fmt.Sprintf("of LVM's type %q", printable(kind))
			return lv
		}
		g := segment{extents: seg.number("extent_count"), stripeSize: seg.number("stripe_size")}
		list := seg.list("stripes")
		for j := 0; j+1 < len(list); j += 2 {
			pv, _ := list[j].(string)
			start, ok := list[j+1].(int64)
			if !ok || start < 0 || start > maxExtents {
				break
			}
			g.stripes = append(g.stripes, stripe{pv, start})
		}
		n := int64(len(g.stripes))
		if seg.number("start_extent") != next || g.extents <= 0 || g.extents > maxExtents || n == 0 || n != seg.number("stripe_count") ||
			n > 1 && (g.stripeSize <= 0 || g.stripeSize > maxSectors || g.extents%n != 0) {
			lv.why = "damaged in LVM's metadata"
			return lv
		}
		next += g.extents
		lv.segments = append(lv.segments, g)
	}
	if len(lv.segments) == 0 {
		lv.why = "without segments in LVM's metadata"
	}
	return lv
}

// image makes the LV's disk of its PVs, found by their UUIDs.
func (g *group) image(lv logical, found map[string][]physical) (image.Image, error) {
	if lv.why != "" {
		return nil, errors.New(lv.why)
	}
	m := &mapped{}
	for _, seg := range lv.segments {
		p := piece{len: seg.extents * lvmSector, stripe: seg.stripeSize * lvmSector}
		if g.extent > maxSectors/seg.extents {
			return nil, errors.New("damaged in LVM's metadata")
		}
		p.len *= g.extent
		each := p.len / int64(len(seg.stripes))
		if len(seg.stripes) == 1 {
			p.stripe = p.len
		} else if each%p.stripe != 0 {
			return nil, errors.New("damaged in LVM's metadata")
		}
		for _, s := range seg.stripes {
			e, known := g.pvs[s.pv]
			pvs := found[e.uuid]
			switch {
			case !known || len(pvs) == 0:
				return nil, fmt.Errorf("its physical volume %s is on none of the disks", printable(e.uuid))
			case len(pvs) > 1:
				return nil, fmt.Errorf("its physical volume %s is there %d times: name the disk", printable(e.uuid), len(pvs))
			case s.start > maxSectors/g.extent:
				return nil, errors.New("damaged in LVM's metadata")
			}
			off := (e.start + s.start*g.extent) * lvmSector
			if off > pvs[0].img.Size()-each {
				return nil, errors.New("it ends behind the end of a physical volume")
			}
			p.at = append(p.at, place{pvs[0].img, off})
		}
		if m.add(p); m.size > maxSectors*lvmSector {
			return nil, errors.New("damaged in LVM's metadata")
		}
	}
	return m, nil
}
