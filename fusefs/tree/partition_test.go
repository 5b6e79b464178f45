package tree_test

import (
	"io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain"
	"qmchain/fusefs/partition"
	"qmchain/fusefs/tree"
)

// withDisks is a point with disks of these names, of 10 GiB each.
func withDisks(names ...string) *chain.Manifest {
	m := &chain.Manifest{ID: id0, UUID: uuid(1), Time: noon}
	for _, name := range names {
		m.Disks = append(m.Disks, chain.Disk{Name: name, Level: chain.Full, VirtualSize: 10 << 30, File: chain.ImageFile(id0, name), Bytes: 5 << 30})
	}
	return m
}

func TestPartitionDisk(t *testing.T) {
	for _, test := range []struct {
		disks, name, want string
	}{
		{"scsi0", "scsi0-part1.raw", "scsi0"},
		{"scsi0", "scsi0-part255.raw", "scsi0"},
		{"scsi0", "scsi0-part12-part3.raw", "scsi0"},
		{"scsi0", "scsi0.raw", ""},
		{"scsi0", "scsi0-part1", ""},
		{"scsi0", "scsi0-part0.raw", ""},
		{"scsi0", "scsi0-part01.raw", ""},
		{"scsi0", "scsi0-part+1.raw", ""},
		{"scsi0", "scsi0-part256.raw", ""},
		{"scsi0", "scsi0-part.raw", ""},
		{"scsi0", "scsi0-part1-part2-part3.raw", ""},
		{"scsi0", "scsi1-part1.raw", ""},
		{"scsi0", "point.json", ""},
		// A disk's name is the disk's, and so is what its partitions would be called.
		{"scsi0 scsi0-part1", "scsi0-part1.raw", ""},
		{"scsi0 scsi0-part1", "scsi0-part1-part2.raw", "scsi0-part1"},
		{"scsi0-part1 scsi0", "scsi0-part1-part2.raw", "scsi0-part1"},
		{"scsi0 scsi0-part1", "scsi0-part2.raw", "scsi0"},
		{"scsi0 scsi0-part1", "scsi0-part2-part1.raw", "scsi0"},
		{"a-part1 a-part1-part1 a", "a-part1-part1-part1.raw", "a-part1-part1"},
	} {
		got, ok := tree.PartitionDisk(withDisks(strings.Fields(test.disks)...), test.name)
		if got != test.want || ok != (test.want != "") {
			t.Errorf("%s: %s is of %q (%v), want %q", test.disks, test.name, got, ok, test.want)
		}
	}
}

// No two nodes of a folder have one name or inode number, and each name leads to the disk that PartitionDisk says.
func TestPartitionsInAFolder(t *testing.T) {
	m := withDisks("scsi0", "scsi0-part1", "efidisk0")
	parts := []partition.Partition{
		{Number: 1, Offset: 1 << 20, Size: 1 << 30},
		{Number: 2, Outer: 1, Offset: 2 << 20, Size: 1 << 20},
		{Number: 2, Offset: 5 << 30, Size: 4<<30 + 512},
		{Number: 3, Offset: 9 << 30, Size: 512},
	}
	nodes := tree.PointContents("110", tree.Contents{
		Point: tree.Point{Manifest: m, Folder: perm(0o700)}, Lineage: chain.Points{m},
		Image:      func(chain.Layer) (tree.Stat, bool) { return tree.Stat{Perm: perm(0o640, 7, 8)}, true },
		Partitions: map[string][]partition.Partition{"scsi0": parts, "scsi0-part1": parts},
	})
	want := `
D 440 7:8 efidisk0.raw 10737418240 10485760 efidisk0
D 440 7:8 scsi0-part1-part1-part2.raw 1048576 1024 scsi0-part1
D 440 7:8 scsi0-part1-part1.raw 1073741824 1048576 scsi0-part1
D 440 7:8 scsi0-part1-part2.raw 4294967808 4194304 scsi0-part1
D 440 7:8 scsi0-part1-part3.raw 512 1 scsi0-part1
D 440 7:8 scsi0-part1.raw 10737418240 10485760 scsi0-part1
D 440 7:8 scsi0-part2.raw 4294967808 4194304 scsi0
D 440 7:8 scsi0-part3.raw 512 1 scsi0
D 440 7:8 scsi0.raw 10737418240 10485760 scsi0
`
	if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), show(nodes)); diff != "" {
		t.Error(diff)
	}
	seen := map[uint64]string{}
	for _, n := range nodes {
		if other, ok := seen[n.Ino]; ok {
			t.Errorf("%s and %s have the same inode number", n.Name, other)
		}
		seen[n.Ino] = n.Name
		if (n.Partition != nil) != strings.Contains(n.Name, n.Disk+"-part") {
			t.Errorf("%s: partition %+v", n.Name, n.Partition)
		}
	}
}

func TestPartitionAttributes(t *testing.T) {
	m := withDisks("scsi0")
	m.Note = strings.Repeat("n", tree.MaxAttribute+1)
	m.Protected = true
	ref := chain.ImageRef{Point: id1, UUID: uuid(2), Disk: "virtio0"}
	m.Disks[0].Parent, m.Disks[0].Level, m.Disks[0].Reason = &ref, chain.Inc, "why not"
	p := &partition.Partition{Number: 1, Offset: 1 << 20, Size: 512, Type: "0x83", Label: "a\nb/\x1b"}
	got := map[string]string{}
	for _, a := range tree.DiskAttributes("110", m, &m.Disks[0], "images/x", "", p) {
		got[a.Name] = a.Value
	}
	want := map[string]string{ // no note, as it does not fit; no sums, warning or uuid, as there are none
		"user.qmchain.guest": "110", "user.qmchain.point": string(id0), "user.qmchain.uuid": uuid(1), "user.qmchain.time": "2026-11-20T12:00:00Z",
		"user.qmchain.level": "inc", "user.qmchain.protected": "true", "user.qmchain.disk": "scsi0", "user.qmchain.reason": "why not",
		"user.qmchain.parent": string(id1) + "/virtio0", "user.qmchain.image": "images/x",
		"user.qmchain.partition.start": "1048576", "user.qmchain.partition.type": "0x83", "user.qmchain.partition.label": "a\nb/\x1b",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestView(t *testing.T) {
	id := func(n uint32) *uint32 { return &n }
	mask := func(m fs.FileMode) *fs.FileMode { return &m }
	for _, test := range []struct {
		name string
		view tree.View
		kind tree.Kind
		in   tree.Perm
		want tree.Perm
	}{
		{"nothing asked", tree.View{}, tree.Disk, perm(0o400, 5, 6), perm(0o400, 5, 6)},
		{"another owner", tree.View{UID: id(7)}, tree.Disk, perm(0o400, 5, 6), perm(0o400, 7, 6)},
		{"root as owner", tree.View{UID: id(0), GID: id(0)}, tree.Dir, perm(0o500, 5, 6), perm(0o500)},
		{"a group gets no rights by being named", tree.View{GID: id(8)}, tree.Disk, perm(0o400, 5, 6), perm(0o400, 5, 8)},
		{"an umask says what there is", tree.View{Umask: mask(0o27)}, tree.Disk, perm(0o400, 5, 6), perm(0o440, 5, 6)},
		{"also where the set allows more", tree.View{Umask: mask(0o77)}, tree.Disk, perm(0o444, 5, 6), perm(0o400, 5, 6)},
		{"of folders", tree.View{Umask: mask(0o27)}, tree.Dir, perm(0o500, 5, 6), perm(0o550, 5, 6)},
		{"of files", tree.View{Umask: mask(0)}, tree.File, perm(0), perm(0o444)},
		{"never to write", tree.View{Umask: mask(0)}, tree.Dir, perm(0), perm(0o555)},
		{"not of links", tree.View{UID: id(7), Umask: mask(0o77)}, tree.Link, perm(0o777), perm(0o777, 7)},
	} {
		if got := test.view.Perm(test.kind, test.in); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}
