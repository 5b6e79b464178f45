package tree_test

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain"
	"qmchain/fusefs/tree"
)

var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

const (
	id0 chain.ID = "20261120T101523Z-3f9c"
	id1 chain.ID = "20261120T111523Z-81aa"
)

func uuid(n int) string { return fmt.Sprintf("%032x", n) }

// twoPoints are a full and an increment of scsi0, of 10 GiB.
func twoPoints() chain.Points {
	ref := chain.ImageRef{Point: id0, UUID: uuid(1), Disk: "scsi0"}
	return chain.Points{
		{ID: id0, UUID: uuid(1), Time: noon, Disks: []chain.Disk{
			{Name: "scsi0", Level: chain.Full, VirtualSize: 10 << 30, File: chain.ImageFile(id0, "scsi0"), Bytes: 3 << 30},
		}},
		{ID: id1, UUID: uuid(2), Time: noon.Add(time.Hour), Disks: []chain.Disk{
			{Name: "scsi0", Level: chain.Inc, Parent: &ref, VirtualSize: 10 << 30, File: chain.ImageFile(id1, "scsi0"), Bytes: 1 << 30},
			{Name: "efidisk0", Level: chain.Full, VirtualSize: 540672, File: chain.ImageFile(id1, "efidisk0"), Bytes: 720896},
		}},
	}
}

func perm(mode fs.FileMode, owner ...uint32) tree.Perm {
	p := tree.Perm{Mode: mode}
	if len(owner) > 0 {
		p.UID = owner[0]
	}
	if len(owner) > 1 {
		p.GID = owner[1]
	}
	return p
}

func points(ps chain.Points) []tree.Point {
	var out []tree.Point
	for _, m := range ps {
		out = append(out, tree.Point{Manifest: m, Folder: perm(0o700)})
	}
	return out
}

// show is what `ls -l` would, without times.
func show(nodes []tree.Node) string {
	var b strings.Builder
	for _, n := range nodes {
		kind := map[tree.Kind]string{tree.Dir: "d", tree.Link: "l", tree.File: "f", tree.Disk: "D"}[n.Kind]
		fmt.Fprintf(&b, "%s %03o %d:%d %s", kind, n.Mode, n.UID, n.GID, n.Name)
		switch n.Kind {
		case tree.Link:
			fmt.Fprintf(&b, " -> %s (%d)", n.Target, n.Size)
		case tree.File:
			fmt.Fprintf(&b, " %d %s", n.Size, n.Path)
		case tree.Disk:
			fmt.Fprintf(&b, " %d %d %s", n.Size, n.Blocks, n.Disk)
		case tree.Dir:
			fmt.Fprintf(&b, " %+v", n.Place)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func TestGuestFolder(t *testing.T) {
	folder := tree.Stat{Perm: perm(0o750, 7, 8), Time: noon}
	got := show([]tree.Node{tree.Root(folder), tree.Guest("110", folder)})
	want := `d 550 7:8  {Guest: Point: UUID: Files:false}
d 550 7:8 110 {Guest:110 Point: UUID: Files:false}
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	for _, test := range []struct {
		name   string
		points chain.Points
		want   string
	}{
		{"no point, no link", nil, ""},
		{"one", twoPoints()[:1], `
d 500 0:0 20261120T101523Z-3f9c {Guest:110 Point:20261120T101523Z-3f9c UUID:00000000000000000000000000000001 Files:false}
l 777 7:8 latest -> 20261120T101523Z-3f9c (21)
`},
		{"the newest is the latest", twoPoints(), `
d 500 0:0 20261120T101523Z-3f9c {Guest:110 Point:20261120T101523Z-3f9c UUID:00000000000000000000000000000001 Files:false}
d 500 0:0 20261120T111523Z-81aa {Guest:110 Point:20261120T111523Z-81aa UUID:00000000000000000000000000000002 Files:false}
l 777 7:8 latest -> 20261120T111523Z-81aa (21)
`},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := show(tree.Points("110", folder, points(test.points)))
			if diff := cmp.Diff(strings.TrimPrefix(test.want, "\n"), got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if n := tree.Points("110", folder, points(twoPoints()))[1]; !n.Time.Equal(noon.Add(time.Hour)) {
		t.Errorf("the point's time is %s", n.Time)
	}
}

func TestPointFolder(t *testing.T) {
	manifest := &tree.Stat{Perm: perm(0o600), Size: 1234, Blocks: 8}
	images := func(full, inc tree.Perm) func(chain.Layer) (tree.Stat, bool) {
		return func(l chain.Layer) (tree.Stat, bool) {
			if l.Point.ID == id0 {
				return tree.Stat{Perm: full}, true
			}
			return tree.Stat{Perm: inc}, true
		}
	}
	with := func(f func(ps chain.Points)) chain.Points {
		ps := twoPoints()
		f(ps)
		return ps
	}
	files := &tree.Stat{Perm: perm(0o700)}
	for _, test := range []struct {
		name    string
		lineage chain.Points
		point   int
		files   *tree.Stat
		image   func(chain.Layer) (tree.Stat, bool)
		want    string
	}{
		{"full", twoPoints(), 0, nil, images(perm(0o600), perm(0o600)), `
f 400 0:0 point.json 1234 point.json
D 400 0:0 scsi0.raw 10737418240 6291456 scsi0
`},
		{"the blocks of all layers", twoPoints(), 1, files, images(perm(0o600), perm(0o600)), `
D 400 0:0 efidisk0.raw 540672 1055 efidisk0
d 500 0:0 guest {Guest:110 Point:20261120T111523Z-81aa UUID:00000000000000000000000000000002 Files:true}
f 400 0:0 point.json 1234 point.json
D 400 0:0 scsi0.raw 10737418240 8388608 scsi0
`},
		{"never dense, for cp would copy the zeroes", with(func(ps chain.Points) { ps[0].Disks[0].Bytes = 11 << 30 }), 0, nil, images(perm(0o600), perm(0o600)), `
f 400 0:0 point.json 1234 point.json
D 400 0:0 scsi0.raw 10737418240 20971519 scsi0
`},
		{"never empty, for tar would not read it", with(func(ps chain.Points) { ps[0].Disks[0].Bytes = 100 }), 0, nil, images(perm(0o600), perm(0o600)), `
f 400 0:0 point.json 1234 point.json
D 400 0:0 scsi0.raw 10737418240 1 scsi0
`},
		{"the strictest layer decides", twoPoints(), 1, nil, images(perm(0o600), perm(0o644)), `
D 444 0:0 efidisk0.raw 540672 1055 efidisk0
f 400 0:0 point.json 1234 point.json
D 400 0:0 scsi0.raw 10737418240 8388608 scsi0
`},
		{"never writable or executable", twoPoints(), 0, nil, images(perm(0o777), perm(0o777)), `
f 400 0:0 point.json 1234 point.json
D 444 0:0 scsi0.raw 10737418240 6291456 scsi0
`},
		{"a layer of another owner and group", twoPoints(), 1, nil, images(perm(0o640, 5, 6), perm(0o644, 7, 8)), `
D 444 7:8 efidisk0.raw 540672 1055 efidisk0
f 400 0:0 point.json 1234 point.json
D 000 7:8 scsi0.raw 10737418240 8388608 scsi0
`},
		{"a disk without its parent is still there", twoPoints()[1:], 0, nil, images(perm(0o600), perm(0o600)), `
D 400 0:0 efidisk0.raw 540672 1055 efidisk0
f 400 0:0 point.json 1234 point.json
D 400 0:0 scsi0.raw 10737418240 2097152 scsi0
`},
		{"so is one without its image", twoPoints(), 0, nil, func(chain.Layer) (tree.Stat, bool) { return tree.Stat{}, false }, `
f 400 0:0 point.json 1234 point.json
D 400 0:0 scsi0.raw 10737418240 6291456 scsi0
`},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodes := tree.PointContents("110", tree.Contents{
				Point:    points(test.lineage)[test.point],
				Lineage:  test.lineage,
				Manifest: manifest,
				Files:    test.files,
				Image:    test.image,
			})
			if diff := cmp.Diff(strings.TrimPrefix(test.want, "\n"), show(nodes)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Inode numbers are what the kernel's cache of a disk hangs on.
func TestInodes(t *testing.T) {
	all := func(ps chain.Points) map[uint64]string {
		seen := map[uint64]string{}
		add := func(where string, nodes ...tree.Node) {
			for _, n := range nodes {
				if other, ok := seen[n.Ino]; ok {
					t.Errorf("%s%s and %s have the same inode number", where, n.Name, other)
				}
				if n.Ino == 0 || n.Ino >= 1<<63 {
					t.Errorf("%s: inode number %d", n.Name, n.Ino)
				}
				seen[n.Ino] = where + n.Name
			}
		}
		add("", tree.Root(tree.Stat{}))
		for _, guest := range []string{"110", "111"} {
			add("", tree.Guest(guest, tree.Stat{}))
			latest, _ := tree.Latest(guest, tree.Stat{}, points(ps))
			add(guest+"/", latest)
		}
		for _, p := range points(ps) {
			add("110/", tree.PointFolder("110", p))
			add("110/"+string(p.Manifest.ID)+"/", tree.PointContents("110", tree.Contents{
				Point: p, Lineage: ps, Manifest: &tree.Stat{}, Files: &tree.Stat{}, Image: func(chain.Layer) (tree.Stat, bool) { return tree.Stat{}, false },
			})...)
			add("110/"+string(p.Manifest.ID)+"/guest/", tree.GuestFile("110", p.Manifest.UUID, "guest/point.json", tree.Stat{}))
		}
		return seen
	}
	first := all(twoPoints())
	if diff := cmp.Diff(first, all(twoPoints())); diff != "" {
		t.Errorf("the same repository, other numbers:\n%s", diff)
	}
	again := twoPoints()
	again[1].UUID = uuid(3)
	for n, name := range all(again) {
		if first[n] != "" && strings.HasPrefix(name, "110/"+string(id1)) {
			t.Errorf("%s of another point under the same id has the number of the first", name)
		}
	}
}

func TestFind(t *testing.T) {
	nodes := tree.Points("110", tree.Stat{}, points(twoPoints()))
	if n, ok := tree.Find(nodes, "latest"); !ok || n.Kind != tree.Link {
		t.Errorf("latest: %+v", n)
	}
	if _, ok := tree.Find(nodes, "late"); ok {
		t.Error("found what is not there")
	}
}
