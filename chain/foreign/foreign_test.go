package foreign_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
)

// Whose a directory is, its files say.
func TestOpen(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		files files
		kind  foreign.Kind // "" is none
		err   string
	}{
		"nothing":                        {files{}, "", "no backups"},
		"something else":                 {files{"a": "x", "b/c": "y", "uuid": setUUID}, "", "no backups"},
		"a file and its config":          {files{"a": "x", "a.config": asQcow2}, "", "no backups"},
		"a name of a stream":             {files{"vda.full.data": "x"}, "", "no backups"},
		"an unfinished stream":           {files{"vda.full.data.partial": full("vda")[:100]}, foreign.Virtnbdbackup, ""},
		"a run that failed":              {files{"uuid": setUUID, "a b.config": asQcow2, "a b/FULL-1-a b.partial": 0}, foreign.Qmpbackup, ""},
		"a uuid that is none":            {files{"uuid": "x", "a.config": asQcow2}, "", "no backups"},
		"a long uuid":                    {files{"uuid": strings.Repeat("x", 2<<20), "a.config": asQcow2}, "", "no backups"},
		"a month":                        {files{"2026-11/uuid": setUUID, "2026-11/a.config": asQcow2, "2026-11/a/FULL-1-a": 0}, foreign.Qmpbackup, ""},
		"another folder":                 {files{"2026/uuid": setUUID, "2026/a.config": asQcow2, "2026/a/FULL-1-a": 0}, "", "no backups"},
		"its configuration lost":         {files{"a/FULL-1-a": 0}, foreign.Qmpbackup, ""},
		"both":                           {files{"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "vda.full.data": full("vda")}, "", "which are meant"},
		"named as the other's directory": {files{"virtnbdbackup/vda.full.data": full("vda"), "uuid": setUUID, "a.config": asQcow2}, foreign.Qmpbackup, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			set, err := foreign.Open(write(t, c.files))
			if err == nil {
				defer set.Close()
				if set.Kind() != c.kind {
					t.Errorf("kind %q", set.Kind())
				}
				if _, err := set.Points(); err != nil {
					t.Error(err)
				}
			} else if c.kind != "" || !strings.Contains(err.Error(), c.err) || (c.err == "no backups") != errors.Is(err, foreign.ErrNotSet) {
				t.Error(err)
			}
		})
	}
	if _, err := foreign.Open(filepath.Join(t.TempDir(), "gone")); !errors.Is(err, os.ErrNotExist) || errors.Is(err, foreign.ErrNotSet) {
		t.Errorf("no directory: %v", err)
	}
}

// A set is looked at again each time, and by as many as want to.
func TestLookAgain(t *testing.T) {
	t.Parallel()
	dir := write(t, files{"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/INC-2-a": "x"})
	set, points := open(t, dir)
	if len(points.All) != 2 || len(points.Problems) != 1 {
		t.Fatal(listed(points), points.Problems)
	}
	old := points.All[1]
	add(t, dir, "a/INC-2-a", 2, time.Unix(1000, 0))
	add(t, dir, "a/INC-3-a", 3, time.Unix(1000, 0))
	done := make(chan *foreign.Points)
	for range 4 {
		go func() {
			p, err := set.Points()
			if err != nil {
				t.Error(err)
			}
			done <- p
		}()
	}
	for range 4 {
		p := <-done
		if len(p.All) != 3 || len(p.Problems) != 0 {
			t.Error(listed(p), p.Problems)
			continue
		}
		if got, err := content(p, p.All[2], "a"); err != nil || string(got) != string(disk(0, 2, 3)) {
			t.Errorf("other content, %v", err)
		}
	}
	// The look of before does not change; what it found has.
	if _, err := content(points, old, "a"); !errors.Is(err, chain.ErrDamaged) {
		t.Error(err)
	}
	now, err := set.Points()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(path string) error{
		"a/INC-3-a":  func(path string) error { return os.Truncate(path, 1000) },
		"a/INC-2-a":  os.Remove,
		"a/FULL-1-a": func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)) },
	} {
		if err := change(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := content(now, now.All[2], "a"); !errors.Is(err, chain.ErrDamaged) {
			t.Errorf("%s was changed: %v", name, err)
		}
	}
}

// What does not exist is told from what is damaged.
func TestNoPoint(t *testing.T) {
	t.Parallel()
	_, points := open(t, write(t, files{"vda.full.data": full("vda")}))
	pool := image.NewPool(image.PoolOptions{})
	if _, err := points.OpenDisk(pool, points.All[0], "vdb"); !errors.Is(err, chain.ErrNoPoint) {
		t.Error(err)
	}
	if _, err := points.OpenDisk(pool, &chain.Manifest{UUID: "x"}, "vda"); !errors.Is(err, chain.ErrNoPoint) {
		t.Error(err)
	}
	d := points.All[0].Disk("vda")
	l, ok := points.Image(chain.Layer{Point: points.All[0], Disk: d})
	if !ok || l.Name != "vda.full.data" || l.Format != image.Stream || l.Bytes != d.Bytes {
		t.Errorf("%+v, %v", l, ok)
	}
}

// FuzzSet adds a file of any name and content to a set: never a panic, and what comes of it are points in order, or an error that says
// which set it is about. The seeds are the small files of real sets.
func FuzzSet(f *testing.F) {
	for _, set := range []string{"qmpbackup/j-qemu10/", "virtnbdbackup/v1-copy/", "virtnbdbackup/v3-odd/"} {
		err := filepath.WalkDir(foreigntest.Unpack(f, set), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			text, err := os.ReadFile(path)
			if err == nil && len(text) <= 4096 {
				f.Add(d.Name(), text)
			}
			return err
		})
		if err != nil {
			f.Fatal(err)
		}
	}
	f.Add("FULL-3-a", []byte("QFI\xfb"))
	f.Add("INC-3-a", []byte{})
	f.Add("b.config", []byte(asRaw))
	f.Add("a.config", []byte("{"))
	f.Add("2026-11", []byte(setUUID))
	f.Add("vda.inc.virtnbdbackup.2.data", inc(2, "vda", 2, 1))
	f.Add("vda.diff.1795173423.data", inc(3, "vda", 2, 1))
	f.Add("vda.full.data.chksum", []byte("1"))
	f.Add("vmconfig.virtnbdbackup.0.xml", []byte(domainXML("web")))
	f.Add("checkpoints", []byte("<domaincheckpoint><creationTime>1</creationTime></domaincheckpoint>"))
	f.Add("web.cpt", []byte("[]"))
	base := f.TempDir()
	n := 0
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 200 {
			return
		}
		n++
		for kind, has := range map[string]files{
			"q": {"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": "QFI\xfb", "a/INC-2-a": "x"},
			"v": {"vda.full.data": full("vda"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0)},
		} {
			dir := filepath.Join(base, kind)
			for path, c := range has {
				add(t, dir, path, c, time.Unix(1000, 0))
			}
			folders := []string{dir, filepath.Join(dir, "a"), filepath.Join(dir, "checkpoints")}
			for _, folder := range folders {
				_ = os.MkdirAll(folder, 0o700)
				_ = os.WriteFile(filepath.Join(folder, name), content, 0o600) // a folder may be there
			}
			set, err := foreign.Open(dir)
			if err != nil && !strings.Contains(err.Error(), dir) {
				t.Errorf("an error that does not say where: %v", err)
			}
			if err == nil {
				p, err := set.Points()
				if err != nil {
					t.Error(err)
				}
				for i, m := range p.All {
					if i > 0 && m.ID <= p.All[i-1].ID {
						t.Errorf("%s follows %s", m.ID, p.All[i-1].ID)
					}
					if _, err := chain.ParseID(string(m.ID)); err != nil {
						t.Error(err)
					}
					for _, d := range m.Disks {
						img, err := p.OpenDisk(image.NewPool(image.PoolOptions{}), m, d.Name)
						if err == nil {
							_, _ = img.ReadAt(make([]byte, 4096), 0)
							_ = img.Close()
						}
						_, _ = p.All.Layers(m, d.Name)
					}
				}
				_ = set.Close()
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
	})
}
