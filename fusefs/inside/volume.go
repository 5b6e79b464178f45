package inside

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/dustin/go-humanize"

	"qmchain/chain/image"
	"qmchain/fusefs/partition"
)

var (
	// ErrNotFound means that there is no such disk, partition or logical volume.
	ErrNotFound = errors.New("not found")
	// ErrAmbiguous means that more than one volume is meant. The error lists what there is.
	ErrAmbiguous = errors.New("say which volume")
	// ErrNoFiles means that there are no files to see in a volume, or none that can be seen.
	ErrNoFiles = errors.New("no file system that can be shown")
)

// Disk is a disk of a point.
type Disk struct {
	Name string
	image.Image
}

// Volume is a place where a file system can be: a disk, a partition or a logical volume.
type Volume struct {
	Disk string // its name; empty for a logical volume
	Part string // as partition.Partition.Name has it; empty for a disk and a logical volume
	LV   string // GROUP/NAME; else empty

	Size  int64  // bytes
	Type  string // of the content, as blkid(8) calls it; empty: not known, or nothing
	Label string // of the file system; printable
	UUID  string
	Why   string // why it can't be shown by itself; empty: it can

	img image.Image // nil where Why is that its blocks can't be found
	in  []string    // disks that it is on
	lvm bool        // only LVM itself could put it together: the appliance has one, and must get all disks
}

// String is how users name it, beside the point.
func (v Volume) String() string {
	switch {
	case v.LV != "":
		return printable(v.LV)
	case v.Part != "":
		return v.Disk + "-" + v.Part
	}
	return v.Disk
}

// Find looks at disks and returns the volumes on them: each disk that has no partitions, the partitions, and the logical
// volumes of LVM. Nothing is mounted for that, and no program is started. What is damaged is told to problem, and left out.
func Find(ctx context.Context, disks []Disk, problem func(error)) ([]Volume, error) {
	var found []Volume
	for _, d := range disks {
		parts, err := partition.Find(ctx, d, d.Size())
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil && !errors.Is(err, partition.ErrNone) && !errors.Is(err, partition.ErrDamaged):
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		case errors.Is(err, partition.ErrDamaged):
			problem(fmt.Errorf("disk %s: %w", d.Name, err))
		}
		whole := Volume{Disk: d.Name, Size: d.Size(), img: d, in: []string{d.Name}}
		if len(parts) == 0 {
			found = append(found, whole)
		}
		for _, p := range parts {
			v := whole
			v.Part, v.Size, v.img = p.Name(), p.Size, partOf(d, p.Offset, p.Size)
			found = append(found, v)
		}
	}
	for i := range found {
		if err := cmp.Or(ctx.Err(), look(&found[i])); err != nil {
			return nil, err
		}
	}
	lvs, err := findLVs(ctx, found, problem)
	return append(found, lvs...), err
}

// look finds out what is in a volume.
func look(v *Volume) error {
	c, err := probe(v.img)
	if err != nil {
		return fmt.Errorf("%s: %w", v, err)
	}
	v.Type, v.Label, v.UUID = c.kind, c.label, c.uuid
	_, mountable := fileSystems[c.kind]
	switch {
	case c.why != "":
		v.Why = c.why
	case c.devices > 1:
		v.Why = fmt.Sprintf("its file system is on %d devices", c.devices)
	case c.kind == lvmMember:
		v.Why = "it is a physical volume of LVM"
	case c.kind == raidMember:
		v.Why = "it is a part of a RAID"
	case c.kind == luks || c.kind == bitLocker:
		v.Why = "it is encrypted"
	case c.kind == "":
		v.Why = "it has no file system that is known"
	case !mountable:
		v.Why = "it is " + c.kind
	}
	return nil
}

// maxLVM is the most volumes of either kind that a group may have here. LVM itself gets slow long before.
const maxLVM = 10_000

// findLVs returns the logical volumes of the physical ones among volumes.
func findLVs(ctx context.Context, volumes []Volume, problem func(error)) ([]Volume, error) {
	found := map[string][]physical{}
	on := map[string][]string{} // disks by a PV's UUID
	groups := map[string]*group{}
	for _, v := range volumes {
		if v.Type != lvmMember {
			continue
		}
		pv, g, err := readPV(v.img)
		if err != nil && !errors.Is(err, errLVM) {
			return nil, fmt.Errorf("%s: %w", v, err)
		}
		if err != nil {
			problem(fmt.Errorf("%s: %w", v, err))
			continue
		}
		found[pv.uuid] = append(found[pv.uuid], pv)
		on[pv.uuid] = append(on[pv.uuid], v.Disk)
		if g != nil && (groups[g.uuid] == nil || groups[g.uuid].seqno < g.seqno) {
			groups[g.uuid] = g
		}
	}
	var lvs []Volume
	for _, g := range groups {
		if len(g.pvs) > maxLVM || len(g.lvs) > maxLVM {
			problem(fmt.Errorf("volume group %s has more than %d volumes: %w", printable(g.name), maxLVM, errLVM))
			continue
		}
		var in []string
		for _, e := range g.pvs {
			in = append(in, on[e.uuid]...)
		}
		slices.Sort(in)
		in = slices.Compact(in)
		for _, lv := range g.lvs {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			v := Volume{LV: g.name + "/" + lv.name, in: in}
			for _, seg := range lv.segments {
				v.Size += seg.extents * g.extent * lvmSector
			}
			img, err := g.image(lv, found)
			if err != nil {
				v.Why, v.lvm = err.Error(), lv.why != ""
			} else {
				v.img, v.Size = img, img.Size()
				if err := look(&v); err != nil {
					return nil, err
				}
			}
			lvs = append(lvs, v)
		}
	}
	slices.SortStableFunc(lvs, func(a, b Volume) int {
		return cmp.Or(strings.Compare(a.LV, b.LV), slices.Compare(a.in, b.in))
	})
	return lvs, nil
}

// Want says which volume is meant. The zero value means that it does not matter, if there is but one.
type Want struct {
	Disk string
	Part string // 3, part3, 1-2 or part1-part2
	LV   string // GROUP/NAME
}

// Choose returns the volume that is meant. It wraps ErrNotFound, ErrAmbiguous, or ErrNoFiles where there is no file system in
// it that could be mounted by itself.
//
// A logical volume that only LVM can put together is returned too: an Appliance can show it, a kernel mount can't.
func Choose(volumes []Volume, want Want) (Volume, error) {
	part := partName(want.Part)
	var meant []Volume
	for _, v := range volumes {
		if (want.Disk == "" || slices.Contains(v.in, want.Disk)) && (part == "" || v.Part == part) && (want.LV == "" || v.LV == want.LV) {
			meant = append(meant, v)
		}
	}
	named := want.Part != "" || want.LV != ""
	if !named {
		meant = slices.DeleteFunc(meant, func(v Volume) bool { return v.Why != "" })
	}
	switch {
	case len(meant) == 1 && (meant[0].Why == "" || meant[0].lvm):
		return meant[0], nil
	case len(meant) == 1:
		return Volume{}, fmt.Errorf("%s: %w: %s%s", meant[0], ErrNoFiles, meant[0].Why, list(volumes))
	case len(meant) > 1:
		return Volume{}, fmt.Errorf("%d volumes are meant: %w%s", len(meant), ErrAmbiguous, list(volumes))
	case named:
		return Volume{}, fmt.Errorf("volume %s: %w%s", want, ErrNotFound, list(volumes))
	}
	return Volume{}, fmt.Errorf("%w%s", ErrNoFiles, list(volumes))
}

func (w Want) String() string {
	var s []string
	for _, f := range []struct{ name, value string }{{"--disk", w.Disk}, {"--part", w.Part}, {"--lv", w.LV}} {
		if f.value != "" {
			s = append(s, f.name+" "+printable(f.value))
		}
	}
	return strings.Join(s, " ")
}

// partName makes part1-part2 of 1-2.
func partName(s string) string {
	if s == "" {
		return ""
	}
	numbers := strings.Split(s, "-")
	for i, n := range numbers {
		if !strings.HasPrefix(n, "part") {
			numbers[i] = "part" + n
		}
	}
	return strings.Join(numbers, "-")
}

// list is what errors say that there is.
func list(volumes []Volume) string {
	var b strings.Builder
	b.WriteString("; there is:\n")
	_ = Print(&b, volumes) // a Builder takes everything
	return strings.TrimRight(b.String(), "\n")
}

// Print writes volumes as a table, with the flags that name each.
func Print(w io.Writer, volumes []Volume) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range volumes {
		flags := "--disk " + v.Disk
		switch {
		case v.LV != "":
			flags = "--lv " + printable(v.LV)
		case v.Part != "":
			flags += " --part " + strings.ReplaceAll(v.Part, "part", "")
		}
		if _, err := fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\n", flags, humanize.IBytes(uint64(v.Size)), cmp.Or(v.Type, "-"), cmp.Or(v.Label, "-"), v.Why); err != nil {
			return err
		}
	}
	return t.Flush()
}

// printable replaces what a terminal would not print as itself. Names and labels are the guest's.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// Inspectable tells whether an appliance may find files on these volumes though none of them is the obvious one.
func Inspectable(volumes []Volume) bool {
	return slices.ContainsFunc(volumes, func(v Volume) bool {
		_, ok := fileSystems[v.Type]
		return ok || v.lvm || v.Type == raidMember
	})
}

// WithVolumes adds to an error what there is to choose from.
func WithVolumes(err error, volumes []Volume) error {
	return fmt.Errorf("%w%s", err, list(volumes))
}
