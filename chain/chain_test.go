package chain

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
)

const (
	uuidA = "000102030405060708090a0b0c0d0e0f"
	uuidB = "ffffffffffffffffffffffffffffffff"
	sha   = "0000000000000000000000000000000000000000000000000000000000000001"
)

func TestNewIDNeverGoesBack(t *testing.T) {
	noon := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	first := NewID(noon, "", 0x3f9c)
	if first != "20261120T120000Z-3f9c" {
		t.Fatalf("first id is %s", first)
	}
	for name, now := range map[string]time.Time{
		"the same second": noon.Add(900 * time.Millisecond),
		"an hour back":    noon.Add(-time.Hour),
	} {
		if next := NewID(now, first, 0); next != "20261120T120001Z-0000" || next <= first {
			t.Errorf("%s: next id is %s", name, next)
		}
	}
	if later := NewID(noon.Add(time.Minute).In(time.FixedZone("", 3600)), first, 1); later != "20261120T120100Z-0001" {
		t.Errorf("a minute later: %s", later)
	}
}

func TestParseIDRefuses(t *testing.T) {
	for _, s := range []string{"", "latest", "20261120T101523Z", "20261320T101523Z-3f9c", "20261120T101523Z-3F9C", "20261120T101523Z-3f9c/..", ".20261120T101523Z-3f9c"} {
		if id, err := ParseID(s); err == nil {
			t.Errorf("%q was taken for the id %s", s, id)
		}
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"110": true, "web": true, "web-1.example_2": true, "A": true, strings.Repeat("a", 64): true,
		"": false, ".": false, "..": false, "-x": false, "a/b": false, "a b": false, "0": false, "0110": false, "1234567890": false,
		strings.Repeat("a", 65): false, "ä": false, "a\n": false,
	} {
		if err := CheckGuestName(name); (err == nil) != ok {
			t.Errorf("guest %q: %v", name, err)
		}
	}
}

func fullDisk(name string) Disk {
	return Disk{
		Name: name, Level: Full, SourceFormat: "qcow2", VirtualSize: 1 << 20, Bytes: 196616,
		Sums: Sums{File: SumsFile(name, 0), SHA256: sha},
	}
}

func incDisk(name string, parent *Manifest, disk string) Disk {
	d := fullDisk(name)
	d.Level = Inc
	ref := parent.Ref(disk)
	d.Parent = &ref
	return d
}

func point(id ID, uuid string, disks ...Disk) *Manifest {
	for i := range disks {
		disks[i].File = ImageFile(id, disks[i].Name)
	}
	return &Manifest{
		Format: 1, ID: id, UUID: uuid, Time: time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC),
		Guest: GuestIdentity{Name: "110"}, Consistency: Instant, QEMU: "10.0.13", Disks: disks,
	}
}

const (
	id1 ID = "20261120T120000Z-0001"
	id2 ID = "20261120T130000Z-0002"
	id3 ID = "20261120T140000Z-0003"
)

func TestManifestRoundTrip(t *testing.T) {
	m := point(id1, uuidA, fullDisk("scsi0"), fullDisk("virtio1"))
	text, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeManifest(text)
	if err != nil {
		t.Fatal(err)
	}
	again, err := back.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(text, again) {
		t.Errorf("changed by a round trip:\n%s\n%s", text, again)
	}
}

func TestManifestShowsEveryChange(t *testing.T) {
	text, err := point(id1, uuidA, fullDisk("scsi0")).Encode()
	if err != nil {
		t.Fatal(err)
	}
	for i := range text {
		for _, change := range []byte{1, 0x20} {
			broken := bytes.Clone(text)
			broken[i] ^= change
			if _, err := DecodeManifest(broken); err == nil {
				t.Fatalf("byte %d (%q) changed to %q unnoticed", i, text[i], broken[i])
			}
		}
	}
	for n := range text {
		// The line feed at the end is the one byte whose loss could go unnoticed, but for the seal.
		if _, err := DecodeManifest(text[:n]); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestManifestOfNewerFormat(t *testing.T) {
	_, err := DecodeManifest([]byte(`{"format": 2, "disks": "something else"}`))
	if err == nil || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("error is %v", err)
	}
}

func TestManifestRefuses(t *testing.T) {
	p1 := point(id1, uuidA, fullDisk("scsi0"))
	for name, change := range map[string]func(*Manifest){
		"a disk twice":             func(m *Manifest) { m.Disks = append(m.Disks, m.Disks[0]) },
		"no disk":                  func(m *Manifest) { m.Disks = nil },
		"a path for an image":      func(m *Manifest) { m.Disks[0].File = "../x/scsi0.qcow2" },
		"another point's image":    func(m *Manifest) { m.Disks[0].File = ImageFile(id1, "scsi0") },
		"a path for a disk":        func(m *Manifest) { m.Disks[0].Name = "../x"; m.Disks[0].File = "../x.qcow2" },
		"a path for sums":          func(m *Manifest) { m.Disks[0].Sums.File = "/etc/passwd" },
		"a parent of a full":       func(m *Manifest) { r := p1.Ref("scsi0"); m.Disks[0].Parent = &r },
		"no parent of an inc":      func(m *Manifest) { m.Disks[0].Level = Inc },
		"a parent that is newer":   func(m *Manifest) { r := point(id3, uuidA).Ref("scsi0"); m.Disks[0].Level, m.Disks[0].Parent = Inc, &r },
		"itself as parent":         func(m *Manifest) { r := m.Ref("scsi0"); m.Disks[0].Level, m.Disks[0].Parent = Inc, &r },
		"an odd size":              func(m *Manifest) { m.Disks[0].VirtualSize = 513 },
		"a negative size":          func(m *Manifest) { m.Disks[0].VirtualSize = -512 },
		"an unknown level":         func(m *Manifest) { m.Disks[0].Level = "half" },
		"an unknown consistency":   func(m *Manifest) { m.Consistency = "fine" },
		"another guest's bad name": func(m *Manifest) { m.Guest.Name = "../110" },
	} {
		m := point(id2, uuidB, fullDisk("scsi0"))
		change(m)
		if err := m.Validate(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestLayers(t *testing.T) {
	p1 := point(id1, uuidA, fullDisk("scsi0"), fullDisk("scsi1"))
	p2 := point(id2, uuidB, incDisk("scsi0", p1, "scsi0"))
	p3 := point(id3, uuidA, incDisk("virtio0", p2, "scsi0"), incDisk("scsi1", p1, "scsi1"))
	ps := Points{p1, p2, p3}

	layers, err := ps.Layers(p3, "virtio0")
	if err != nil {
		t.Fatal(err)
	}
	if len(layers) != 3 || layers[0].Point != p1 || layers[1].Point != p2 || layers[2].Point != p3 || layers[1].Disk.Name != "scsi0" {
		t.Errorf("layers of a renamed disk: %v", layers)
	}
	if _, err := ps.Layers(p3, "scsi9"); !errors.Is(err, ErrNoPoint) {
		t.Errorf("unknown disk: %v", err)
	}
	if _, err := (Points{p1, p3}).Layers(p3, "virtio0"); !errors.Is(err, ErrDamaged) {
		t.Errorf("a gap: %v", err)
	}
	other := point(id2, "0123456789abcdef0123456789abcdef", incDisk("scsi0", p1, "scsi0"))
	if _, err := (Points{p1, other, p3}).Layers(p3, "virtio0"); !errors.Is(err, ErrDamaged) {
		t.Errorf("a parent that was made again: %v", err)
	}
}

func TestResolve(t *testing.T) {
	ps := Points{point(id1, uuidA, fullDisk("a")), point(id2, uuidB, fullDisk("a"))}
	for name, want := range map[string]ID{"latest": id2, string(id1): id1, "20261120T12": id1} {
		m, err := ps.Resolve(name)
		if err != nil || m.ID != want {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
	for _, name := range []string{"2026", "2027", "x"} {
		if _, err := ps.Resolve(name); !errors.Is(err, ErrNoPoint) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (Points{}).Resolve("latest"); !errors.Is(err, ErrNoPoint) {
		t.Error("latest of nothing")
	}
}

func TestBitmapName(t *testing.T) {
	b := BitmapName{Repo: "01234567", Point: id1, Disk: "scsi0"}
	back, ok := ParseBitmapName(b.String())
	if !ok || back != b {
		t.Errorf("%s became %v", b, back)
	}
	for _, s := range []string{"", "bitmap0", "qmchain:", "qmchain:01234567:x:scsi0", "qmchain:0123:" + string(id1) + ":scsi0", "qmchain:01234567:" + string(id1), "pbs-incremental-dirty-bitmap"} {
		if b, ok := ParseBitmapName(s); ok {
			t.Errorf("%q was taken for %v", s, b)
		}
	}
}

func TestTracked(t *testing.T) {
	p1 := point(id1, uuidA, fullDisk("scsi0"), fullDisk("scsi1"))
	diff := incDisk("scsi0", p1, "scsi0")
	diff.Level = Diff
	copied := fullDisk("scsi1")
	copied.Level = Copy
	p2 := point(id2, uuidB, diff, copied)
	renamed := point(id3, uuidA, incDisk("virtio0", p1, "scsi0"))

	name := func(id ID, disk string) BitmapName { return BitmapName{"01234567", id, disk} }
	for _, test := range []struct {
		what   string
		points Points
		bitmap BitmapName
		want   bool
	}{
		{"the newest point", Points{p1}, name(id1, "scsi0"), true},
		{"a diff and a copy leave tracking where it was", Points{p1, p2}, name(id1, "scsi0"), true},
		{"of a diff itself there is no tracking", Points{p1, p2}, name(id2, "scsi0"), false},
		{"of a copy neither", Points{p1, p2}, name(id2, "scsi1"), false},
		{"a disk that later points leave out", Points{p1, point(id3, uuidA, fullDisk("scsi0"))}, name(id1, "scsi1"), true},
		{"a later full", Points{p1, point(id3, uuidA, fullDisk("scsi0"))}, name(id1, "scsi0"), false},
		{"an increment under a new name", Points{p1, renamed}, name(id1, "scsi0"), false},
		{"that new name", Points{p1, renamed}, name(id3, "virtio0"), true},
		{"a point that is not there", Points{p1}, name(id2, "scsi0"), false},
		{"a disk that is not there", Points{p1}, name(id1, "scsi7"), false},
	} {
		layer, reason := test.points.Tracked(test.bitmap)
		if (layer != nil) != test.want || (reason == "") != test.want {
			t.Errorf("%s: %v, %q", test.what, layer, reason)
		}
	}
}
