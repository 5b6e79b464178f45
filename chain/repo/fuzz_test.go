package repo

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain"
	"qmchain/internal/durable"
)

// A file of check sums that is read is written as it was, but for capitals, and has as many sums as the image has blocks.
func FuzzSums(f *testing.F) {
	for _, size := range []int64{0, 1, SumsBlock, 2*SumsBlock + 1} {
		s := &Sums{Size: size}
		for i := range blocks(size) {
			s.Blocks = append(s.Blocks, sha256.Sum256([]byte{byte(i)}))
		}
		f.Add(s.Text())
	}
	f.Add([]byte("qmchain-sums 1 sha256 4194304 9223372036854775807\n"))
	f.Add([]byte("qmchain-sums 1 sha256 4194304 +1\n" + strings.Repeat("0", 64) + "\n"))
	f.Add([]byte("qmchain-sums 1 sha256 4194304\t1\n" + strings.Repeat("0", 64) + "\n"))
	f.Add([]byte("qmchain-sums 2 md5 4194304 0\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parseSums(text)
		if err != nil {
			return
		}
		if s.Size < 0 || int64(len(s.Blocks)) != blocks(s.Size) {
			t.Fatalf("%d sums of %d bytes", len(s.Blocks), s.Size)
		}
		_, sums, _ := bytes.Cut(text, []byte("\n"))
		_, want, _ := bytes.Cut(s.Text(), []byte("\n"))
		if !bytes.EqualFold(sums, want) {
			t.Errorf("%q became %q", text, s.Text())
		}
		if again, err := parseSums(s.Text()); err != nil || again.Size != s.Size {
			t.Errorf("%+v, %v", again, err)
		}
	})
}

// FuzzFolder puts a file of any name and content into a repository, a guest's folder and a point's: never a panic, the point
// that was there is the same or damaged, and nothing outside is touched.
func FuzzFolder(f *testing.F) {
	f.Add("qmchain.json", []byte(`{"format":1,"id":"00000000000000000000000000000000"}`), byte(0))
	f.Add("qmchain.json", []byte(`{"format":2}`), byte(0))
	f.Add(".20261120T111523Z-81aa.partial", []byte{}, byte(1))
	f.Add(".20261120T101523Z-0001.base", []byte{}, byte(1))
	f.Add("20261120T111523Z-81aa", []byte{}, byte(1))
	f.Add("20261120T111523Z-81aa.scsi0.qcow2", []byte("QFI\xfb"), byte(3))
	f.Add("scsi0.touched", []byte("1\n0\n9223372036854775807\n"), byte(2))
	f.Add("scsi0.sums", []byte("qmchain-sums 1 sha256 4194304 0\n"), byte(2))
	f.Add("point.json", []byte(`{"format":1}`), byte(2))
	f.Add("images", []byte{}, byte(1))
	f.Add(checkedFile, []byte(`{"format":1,"verified":[{"point":"20261120T101523Z-0001","time":"2026-11-20T10:15:23Z","good":true}],"drilled":[{"point":"x"}]}`), byte(1))
	f.Add(checkedFile, []byte(`null`), byte(1))
	base := f.TempDir()
	f.Fuzz(func(t *testing.T, name string, content []byte, where byte) {
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 200 {
			return
		}
		dir := filepath.Join(base, "repo")
		folder := Folder{ID: "20261120T101523Z-0001"}
		folder.Name = string(folder.ID)
		guest := filepath.Join(dir, "110")
		point := filepath.Join(guest, folder.Name)
		defer func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}()
		m := &chain.Manifest{
			Format: 1, ID: folder.ID, UUID: strings.Repeat("0", 32), Guest: chain.GuestIdentity{Name: "110"}, Consistency: chain.Instant,
			Disks: []chain.Disk{{
				Name: "scsi0", Level: chain.Full, VirtualSize: 512, File: chain.ImageFile(folder.ID, "scsi0"), Bytes: 3,
				Sums: chain.Sums{File: chain.SumsFile("scsi0", 0), SHA256: digest((&Sums{}).Text())},
			}},
		}
		text, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(guest, ImagesFolder), dirMode); err != nil {
			t.Fatal(err)
		}
		put := func(path string, b []byte) error {
			if err := os.MkdirAll(filepath.Dir(path), dirMode); err != nil {
				return err
			}
			return os.WriteFile(path, b, fileMode)
		}
		for path, b := range map[string][]byte{
			filepath.Join(dir, HeadFile):             fmt.Appendf(nil, `{"format":1,"id":%q}`, strings.Repeat("ab", 16)),
			filepath.Join(point, chain.ManifestFile): text,
			filepath.Join(point, "scsi0.sums"):       (&Sums{}).Text(),
		} {
			if err := put(path, b); err != nil {
				t.Fatal(err)
			}
		}
		place := []string{dir, guest, point, filepath.Join(guest, ImagesFolder)}[where%4]
		_ = put(filepath.Join(place, name), content) // a folder may be there

		r, err := Open(dir, durable.FS{})
		if err != nil {
			if !strings.Contains(err.Error(), dir) {
				t.Errorf("an error that does not say where: %v", err)
			}
			return
		}
		guests, err := r.Guests()
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range guests {
			if chain.CheckGuestName(n) != nil {
				t.Errorf("guest %q", n)
			}
		}
		g, err := r.Guest("110")
		if err != nil {
			t.Fatal(err)
		}
		points, problems, err := g.Points()
		if err != nil {
			t.Fatal(err)
		}
		if len(points)+len(problems) == 0 {
			t.Error("the point is neither there nor damaged")
		}
		for _, p := range points {
			if p.ID == folder.ID && (p.UUID != m.UUID || p.Disks[0].Sums != m.Disks[0].Sums) && !(name == chain.ManifestFile && where%4 == 2) {
				t.Errorf("the point became %+v", p)
			}
		}
		if partials, err := g.Partials(); err != nil || len(partials) > 1 {
			t.Errorf("%v, %v", partials, err)
		}
		if _, err := g.Strays(); err != nil {
			t.Error(err)
		}
		if _, err := g.Folders(); err != nil {
			t.Error(err)
		}
		if _, err := g.ReadSums(t.Context(), folder, &m.Disks[0]); err != nil && !errors.Is(err, chain.ErrDamaged) {
			t.Error(err)
		}
		noted := Checked{Verified: []Verified{{Point: folder.ID, Good: true}}}
		if c, err := g.Checked(); err != nil && !strings.Contains(err.Error(), checkedFile) {
			t.Errorf("an error that does not say where: %v", err)
		} else if writeErr := g.NoteChecked(t.Context(), noted); err == nil && writeErr == nil {
			again, err := g.Checked()
			if err != nil || len(again.Verified) == 0 || len(again.Verified) > len(c.Verified)+1 {
				t.Errorf("%+v became %+v, %v", c, again, err)
			}
		}
		touched := map[int64]bool{}
		_ = g.ReadTouched(folder, "scsi0", touched)
		if len(touched) > len(content) {
			t.Errorf("%d blocks in %d bytes", len(touched), len(content))
		}
	})
}
