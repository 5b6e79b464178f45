package chain

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// everything is a manifest with all that Encode can leave out.
func everything() *Manifest {
	first := point(id1, uuidA, fullDisk("scsi0"))
	m := point(id2, uuidB, incDisk("scsi0", first, "scsi0"), fullDisk("efidisk0"))
	m.Guest = GuestIdentity{Name: "110", VMName: "web", UUID: "4c4c4544-0000-1000-8000-000000000001", VMGenID: "5d5d5544-0000-1000-8000-000000000001"}
	m.Note, m.Protected = "before the upgrade", true
	m.Disks[0].Reason = "the point before it is missing"
	m.Disks[0].Tracking = &Tracking{BitmapName{"01234567", id2, "scsi0"}.String(), KindPersistent}
	m.Disks[0].Generation, m.Disks[0].Sums.File = 12, SumsFile("scsi0", 12)
	return m
}

// agrees makes sure that what decodeOwn reads is what encoding/json does.
func agrees(t *testing.T, text []byte) (own bool) {
	t.Helper()
	m, own := decodeOwn(text)
	if !own {
		return false
	}
	var want Manifest
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatalf("%s: read, but encoding/json says: %v", text, err)
	}
	if !reflect.DeepEqual(m, &want) {
		t.Fatalf("%s was read as %+v, not %+v", text, m, want)
	}
	return true
}

// What Encode writes is read without encoding/json, or reading many manifests would take three times as long.
func TestDecodeOwn(t *testing.T) {
	t.Parallel()
	for what, m := range map[string]*Manifest{
		"all that there can be":     everything(),
		"as little as there can be": point(id1, uuidA, fullDisk("scsi0")),
	} {
		text, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if !agrees(t, text) {
			t.Errorf("%s: not read:\n%s", what, text)
		}
		var dense bytes.Buffer
		if err := json.Compact(&dense, text); err != nil {
			t.Fatal(err)
		}
		if !agrees(t, dense.Bytes()) {
			t.Errorf("%s: not read without spaces", what)
		}
	}
}

// What decodeOwn does not know it leaves to encoding/json.
func TestDecodeLeaves(t *testing.T) {
	t.Parallel()
	next := everything()
	next.Disks[0].Next = &Next{Full, nil, 1 << 20, Sums{SumsFile("scsi0", 13), sha}}
	merging := everything()
	ref := merging.Ref("scsi0")
	merging.Disks[0].Merging = &ref
	note := everything()
	note.Note = "R&D: größer"
	for what, m := range map[string]*Manifest{"a next generation": next, "a merge": merging, "a note with more than ASCII": note} {
		text, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if agrees(t, text) {
			t.Errorf("%s: read by halves?", what)
		}
		if back, err := DecodeManifest(text); err != nil || !reflect.DeepEqual(back, m) {
			t.Errorf("%s: %+v, %v", what, back, err)
		}
	}
	text, err := everything().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for old, with := range map[string]string{
		`"format": 1`:       `"format": 1, "later": [null]`,
		`"bytes": 196616`:   `"bytes": 1e5`,
		`"generation": 12`:  `"generation": 0012`,
		`"protected": true`: `"protected": false`,
		`"disks": [`:        `"disks": [], "disks": [`,
	} {
		if changed := bytes.Replace(text, []byte(old), []byte(with), 1); bytes.Equal(changed, text) || agrees(t, changed) {
			t.Errorf("%s was read, or there is no %s", with, old)
		}
	}
}

// Whatever is changed in a manifest: it is read as encoding/json does it, or left to that.
func TestDecodeOwnAgrees(t *testing.T) {
	t.Parallel()
	text, err := everything().Encode()
	if err != nil {
		t.Fatal(err)
	}
	var dense bytes.Buffer
	if err := json.Compact(&dense, text); err != nil {
		t.Fatal(err)
	}
	text = dense.Bytes()
	for i := range text {
		for _, c := range []byte("\"\\,0 \x80") {
			changed := bytes.Clone(text)
			changed[i] = c
			agrees(t, changed)
		}
		agrees(t, text[:i])
		agrees(t, slices.Delete(bytes.Clone(text), i, i+1))
		agrees(t, slices.Insert(bytes.Clone(text), i, text[i]))
	}
}

func FuzzDecodeOwn(f *testing.F) {
	for _, m := range []*Manifest{everything(), point(id1, uuidA, fullDisk("scsi0"))} {
		text, err := m.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) { agrees(t, text) })
}

// The rules of names, as regular expressions say them.
func TestNamesByTheirPatterns(t *testing.T) {
	t.Parallel()
	name := regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	digits, vmid := regexp.MustCompile(`^[0-9]+$`), regexp.MustCompile(`^[1-9][0-9]{0,8}$`)
	shape := regexp.MustCompile(`^[0-9]{8}T[0-9]{6}Z-[0-9a-f]{4}$`)
	hex := regexp.MustCompile(`^[0-9a-f]{32}$`)
	check := func(s string) {
		if got, want := CheckDiskName(s) == nil, name.MatchString(s); got != want {
			t.Errorf("disk %q: %v", s, got)
		}
		if got, want := CheckGuestName(s) == nil, name.MatchString(s) && (!digits.MatchString(s) || vmid.MatchString(s)); got != want {
			t.Errorf("guest %q: %v", s, got)
		}
		if got, want := hasIDShape(s), shape.MatchString(s); got != want {
			t.Errorf("id %q: %v", s, got)
		}
		if got, want := checkUUID(s) == nil, hex.MatchString(s); got != want {
			t.Errorf("uuid %q: %v", s, got)
		}
	}
	random := rand.New(rand.NewPCG(1, 1))
	const letters = "aAfFgzZ0129.-_T/ \n\x00\xffäK"
	for _, s := range []string{
		"", "0", "1", "123456789", "1234567890", "-", "a.", string(id1), uuidA, strings.ToUpper(uuidB), strings.Repeat("a", 64), strings.Repeat("a", 65),
	} {
		check(s)
		for range 2000 {
			b := []byte(s)
			switch i := random.IntN(len(b) + 1); {
			case i == len(b) || random.IntN(4) == 0:
				b = append(b[:i:i], append([]byte{letters[random.IntN(len(letters))]}, b[i:]...)...)
			case random.IntN(3) == 0:
				b = append(b[:i:i], b[i+1:]...)
			default:
				b[i] = letters[random.IntN(len(letters))]
			}
			check(string(b))
		}
	}
}
