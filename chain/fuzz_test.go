package chain

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// sealed seals the text of a manifest, so that a made-up one is looked at behind its seal too.
func sealed(text []byte) []byte {
	text = bytes.Clone(text)
	at := bytes.LastIndex(text, []byte(sealKey)) + len(sealKey)
	if at < len(sealKey) || at+len(sealZeros) > len(text) {
		return text
	}
	copy(text[at:], sealZeros)
	sum := sha256.Sum256(text)
	hex.Encode(text[at:], sum[:])
	return text
}

// Whatever is in a manifest: what is read of it obeys the rules, names no file outside of its folders, and is written as it was
// read. A text whose seal does not fit is never read.
func FuzzManifest(f *testing.F) {
	first := point("20261120T101523Z-0001", uuidA, fullDisk("scsi0"), fullDisk("efidisk0"))
	second := point("20261120T111523Z-0002", uuidB, incDisk("scsi1", first, "scsi0"))
	second.Disks[0].Tracking = &Tracking{"qmchain:01234567:20261120T111523Z-0002:scsi1", KindMemory}
	second.Note, second.Protected = "before the upgrade\n\u2028", true
	third := point("20261120T121523Z-0003", uuidA, incDisk("scsi0", second, "scsi1"))
	next := Next{Full, nil, 1 << 20, Sums{SumsFile("scsi0", 1), sha}}
	ref := second.Ref("scsi1")
	third.Disks[0].Next, third.Disks[0].Merging = &next, &ref
	for _, m := range []*Manifest{first, second, third} {
		text, err := m.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
		f.Add(bytes.ReplaceAll(text, []byte("\n"), nil))
		f.Add(bytes.Replace(text, []byte(`"qemu"`), []byte(`"later": [null], "qemu"`), 1))
	}
	f.Add([]byte(`{"format": 2, "seal": "sha256:`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if m, err := DecodeManifest(text); err == nil && !bytes.Equal(sealed(text), text) {
			t.Fatalf("read without a seal that fits: %+v", m)
		}
		text = sealed(text)
		m, err := DecodeManifest(text)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !strings.Contains(err.Error(), "this version of qmchain reads up to") {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		for i := range m.Disks {
			d := &m.Disks[i]
			names := []string{d.File, d.Sums.File, m.Guest.Name, string(m.ID)}
			if d.Parent != nil {
				names = append(names, BackingFile(*d.Parent))
			}
			if d.Next != nil {
				names = append(names, d.Next.Sums.File)
				changed := *d
				if changed.Advance(); changed.validate(m.ID) != nil {
					t.Errorf("disk %s: its next generation is against the rules: %v", d.Name, changed.validate(m.ID))
				}
			}
			for _, name := range names {
				if name != filepath.Base(name) || strings.HasPrefix(name, ".") || len(name) > 255 {
					t.Errorf("%q names no file of its own folder", name)
				}
			}
			if layers, err := (Points{m}).Layers(m, d.Name); err == nil && d.Level.Overlay() || err != nil && !errors.Is(err, ErrDamaged) {
				t.Errorf("disk %s alone has the layers %v, %v", d.Name, layers, err)
			}
		}
		again, err := m.Encode()
		if err != nil {
			t.Fatalf("it can be read and not written: %v", err)
		}
		back, err := DecodeManifest(again)
		if err != nil {
			t.Fatal(err)
		}
		if !m.Time.Equal(back.Time) {
			t.Errorf("the time %s became %s", m.Time, back.Time)
		}
		back.Time = m.Time // the same moment can have another zone
		if !reflect.DeepEqual(m, back) {
			t.Errorf("%+v became %+v", m, back)
		}
		if err := KnowsAll(again); err != nil {
			t.Error(err)
		}
	})
}

// Names come from bitmaps in guests, file names and users. What is taken for one is written as it was, and can be a part of a path.
func FuzzNames(f *testing.F) {
	for _, s := range []string{
		"20261120T101523Z-3f9c", "20261399T101523Z-3f9c", "110", "web-1.example_2", "qmchain:01234567:20261120T111523Z-0002:scsi1",
		"qmchain:a:b:c", "qmchain:01234567:20261120T111523Z-0002:a:b", "110/latest", "web/2026", "a//", "../x", "0",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		plain := func(name string) {
			if !filepath.IsLocal(name) || filepath.Clean(name) != name || strings.ContainsAny(name, "/\x00\n:") || len(name) > 64 {
				t.Errorf("%q of %q", name, s)
			}
		}
		if id, err := ParseID(s); err == nil {
			plain(string(id))
			if next := NewID(id.Time(), id, 7); string(id) < "9999" && next <= id {
				t.Errorf("%s follows %s", next, id)
			}
			if string(NewID(id.Time(), "", 0))[:len(idTime)] != s[:len(idTime)] {
				t.Errorf("%q is the time %s", s, id.Time())
			}
		} else if !strings.Contains(err.Error(), "point's id") {
			t.Error(err)
		}
		if CheckGuestName(s) == nil {
			plain(s)
			if CheckDiskName(s) != nil {
				t.Errorf("%q can be a guest and not a disk", s)
			}
		}
		if CheckDiskName(s) == nil {
			plain(s)
		}
		if b, ok := ParseBitmapName(s); ok {
			if b.String() != s {
				t.Errorf("%q became %q", s, b)
			}
			plain(string(b.Point))
			plain(b.Disk)
		}
		if r, err := ParseRef(s); err == nil {
			plain(r.Guest)
			if r.Guest+"/"+r.Point != s {
				t.Errorf("%q became %+v", s, r)
			}
			m := point("20261120T101523Z-0001", uuidA, fullDisk("scsi0"))
			if found, err := (Points{m}).Resolve(r.Point); (err == nil) != (r.Point == "latest" || strings.HasPrefix(string(m.ID), r.Point)) || err == nil && found != m {
				t.Errorf("%q finds %v, %v", r.Point, found, err)
			}
		}
	})
}
