package foreign_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/qcow2"
)

const (
	cluster  = 64 << 10
	clusters = 16
	diskSize = clusters * cluster
)

// The images that the tests' sets are made of: number 0 holds all clusters, the others
// cluster number N and the last one. What is in a cluster tells of which image it is.
var (
	imagesOnce sync.Once
	imageBytes [8][]byte
)

func qcow2Image(t testing.TB, n int) []byte {
	t.Helper()
	imagesOnce.Do(func() {
		dir := t.TempDir()
		for n := range imageBytes {
			path := filepath.Join(dir, fmt.Sprint(n))
			imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", path, fmt.Sprint(diskSize))
			writes := []string{fmt.Sprintf("write -P %d %d 64k", 100+n, n*cluster), fmt.Sprintf("write -P %d %d 64k", 100+n, diskSize-cluster)}
			if n == 0 {
				writes = []string{fmt.Sprintf("write -P 100 0 %d", diskSize)}
			}
			imagetest.QemuIO(t, "qcow2", path, writes...)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			imageBytes[n] = b
		}
	})
	return imageBytes[n]
}

// disk is what the images of these numbers, one on the other, are.
func disk(numbers ...int) []byte {
	b := make([]byte, diskSize)
	fill := func(c, n int) { copy(b[c*cluster:], bytes.Repeat([]byte{byte(100 + n)}, cluster)) }
	for _, n := range numbers {
		if n == 0 {
			for c := range clusters {
				fill(c, 0)
			}
			continue
		}
		fill(n, n)
		fill(clusters-1, n)
	}
	return b
}

type (
	files map[string]any // content by path: an image's number, bytes, text, a link
	link  string
)

// write makes a directory. All files are of the same, early time.
func write(t testing.TB, f files) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "vm-1")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range f {
		add(t, dir, name, content, time.Unix(1000, 0))
	}
	return dir
}

func add(t testing.TB, dir, name string, content any, mtime time.Time) {
	t.Helper()
	path := filepath.Join(dir, name)
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	if err == nil {
		switch c := content.(type) {
		case int:
			err = os.WriteFile(path, qcow2Image(t, c), 0o600)
		case []byte:
			err = os.WriteFile(path, c, 0o600)
		case string:
			err = os.WriteFile(path, []byte(c), 0o600)
		case link:
			if err := os.Symlink(string(c), path); err != nil {
				t.Fatal(err)
			}
			return
		default:
			t.Fatalf("%s: %T", name, c)
		}
	}
	if err == nil {
		err = os.Chtimes(path, mtime, mtime)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// want is what a file of a set must be read as.
type want struct {
	file   string
	disk   []byte
	level  chain.Level // if it is not what the file's name begins with
	refuse string      // what the reason says
	opens  string      // what it says if only opening it shows that
	warn   error
	when   string // the beginning of the point's id, if that is of interest
}

func (w want) wantLevel() chain.Level {
	if w.level != "" {
		return w.level
	}
	name := strings.ToLower(filepath.Base(w.file))
	for _, l := range []chain.Level{chain.Inc, chain.Copy, chain.Diff} {
		if strings.HasPrefix(name, string(l)+"-") || strings.Contains(name, "."+string(l)+".") {
			return l
		}
	}
	return chain.Full
}

// check compares a set with what is wanted of it, and that with it nothing else is there.
func check(t *testing.T, dir string, wants []want) {
	t.Helper()
	_, points := open(t, dir)
	count := 0
	for i, m := range points.All {
		count += len(m.Disks)
		if i > 0 && m.ID <= points.All[i-1].ID {
			t.Errorf("%s follows %s", m.ID, points.All[i-1].ID)
		}
	}
	if count != len(wants) {
		t.Errorf("%d disks in all points, %d expected: %v", count, len(wants), listed(points))
	}
	used := map[*chain.Disk]bool{}
	for _, w := range wants {
		var m *chain.Manifest
		var d *chain.Disk
		for _, p := range points.All {
			for i := range p.Disks {
				if d == nil && p.Disks[i].File == w.file && !used[&p.Disks[i]] {
					m, d = p, &p.Disks[i]
				}
			}
		}
		if d == nil {
			t.Errorf("%s: in no point: %v", w.file, listed(points))
			continue
		}
		used[d] = true
		if d.Level != w.wantLevel() || d.Level.Overlay() != (d.Parent != nil) {
			t.Errorf("%s: level %s, parent %v", w.file, d.Level, d.Parent)
		}
		if !strings.HasPrefix(string(m.ID), w.when) {
			t.Errorf("%s: point %s", w.file, m.ID)
		}
		problems, warnings := about(points.Problems, m, d.Name), about(points.Warnings, m, d.Name)
		got, err := content(points, m, d.Name)
		if w.refuse != "" {
			if !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), w.refuse) || len(problems) != 1 || !errors.Is(problems[0], chain.ErrDamaged) {
				t.Errorf("%s: refused by %v, problems %v", w.file, err, problems)
			}
			continue
		}
		if w.opens != "" {
			if !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), w.opens) || len(problems) > 0 {
				t.Errorf("%s: %v, problems %v", w.file, err, problems)
			}
			continue
		}
		if err != nil || len(problems) > 0 {
			t.Errorf("%s: %v, problems %v", w.file, err, problems)
		} else if !bytes.Equal(got, w.disk) {
			t.Errorf("%s: other content", w.file)
		}
		if w.warn == nil && len(warnings) > 0 || w.warn != nil && !slices.ContainsFunc(warnings, func(err error) bool { return errors.Is(err, w.warn) }) {
			t.Errorf("%s: warnings %v", w.file, warnings)
		}
		if len(points.All) > 0 && err == nil {
			if _, err := points.All.Layers(m, d.Name); err != nil {
				t.Errorf("%s: by the manifests: %v", w.file, err)
			}
		}
	}
}

func listed(points *foreign.Points) (list []string) {
	for _, m := range points.All {
		for _, d := range m.Disks {
			list = append(list, string(m.ID)+" "+d.File)
		}
	}
	return list
}

// content reads a whole small disk.
func content(points *foreign.Points, m *chain.Manifest, disk string) ([]byte, error) {
	img, err := points.OpenDisk(image.NewPool(image.PoolOptions{}), m, disk)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	b := make([]byte, img.Size())
	_, err = img.ReadAt(b, 0)
	return b, err
}

const (
	setUUID = "6a6e2b3c-0000-4000-8000-000000000001"
	asQcow2 = `{"virtual-size": 1048576, "filename": "/images/a", "format": "qcow2"}`
	asRaw   = `{"virtual-size": 1048576, "filename": "/images/a", "format": "raw"}`
)

// What qmpbackup's layouts are, and what can be wrong with them. The images' numbers say
// what is made on what.
func TestQmpbackup(t *testing.T) {
	t.Parallel()
	raw := disk(0)
	backed := func(n int, backing string) []byte {
		path := filepath.Join(t.TempDir(), "x")
		add(t, filepath.Dir(path), "x", n, time.Unix(1000, 0))
		imagetest.QemuImg(t, "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, path)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	cut := func(n, length int) []byte { return slices.Clone(qcow2Image(t, n)[:length]) }
	for name, c := range map[string]struct {
		files files
		want  []want
	}{
		"a name that ends another's": {
			files{
				"uuid": setUUID, "a.config": asQcow2, "x-a.config": asQcow2,
				"FULL-100-a": 0, "INC-200-a": 1, "FULL-100-x-a": 0, "INC-200-x-a": 2, "INC-300-a": 3,
			},
			[]want{
				{file: "FULL-100-a", disk: disk(0)},
				{file: "INC-200-a", disk: disk(0, 1)},
				{file: "INC-300-a", disk: disk(0, 1, 3)},
				{file: "FULL-100-x-a", disk: disk(0)},
				{file: "INC-200-x-a", disk: disk(0, 2)},
			},
		},
		"time stamps of other lengths": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/FULL-99-a": 0, "a/INC-1000-a": 2, "a/INC-100-a": 1},
			[]want{
				{file: "a/FULL-99-a", disk: disk(0), when: "19700101T000139Z-"},
				{file: "a/INC-100-a", disk: disk(0, 1)},
				{file: "a/INC-1000-a", disk: disk(0, 1, 2), when: "19700101T001640Z-"},
			},
		},
		"two chains, one uuid": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/INC-2-a": 1, "a/FULL-3-a": 0, "a/INC-4-a": 2, "a/COPY-5-a": 3, "a/INC-6-a": 4},
			[]want{
				{file: "a/FULL-1-a", disk: disk(0)},
				{file: "a/INC-2-a", disk: disk(0, 1)},
				{file: "a/FULL-3-a", disk: disk(0)},
				{file: "a/INC-4-a", disk: disk(0, 2)},
				{file: "a/COPY-5-a", disk: disk(3)},
				{file: "a/INC-6-a", disk: disk(0, 2, 4)},
			},
		},
		"months": {
			files{
				"2026-11/uuid": setUUID, "2026-11/a.config": asQcow2, "2026-11/a/FULL-1-a": 0, "2026-11/a/INC-2-a": 1,
				"2026-12/uuid": setUUID, "2026-12/a.config": asQcow2, "2026-12/a/FULL-3-a": 0, "2026-12/a/INC-4-a": 2,
				"2027-01/a.config": asQcow2, "2027-01/a/INC-5-a": 3,
			},
			[]want{
				{file: "2026-11/a/FULL-1-a", disk: disk(0)},
				{file: "2026-11/a/INC-2-a", disk: disk(0, 1)},
				{file: "2026-12/a/FULL-3-a", disk: disk(0)},
				{file: "2026-12/a/INC-4-a", disk: disk(0, 2)},
				{file: "2027-01/a/INC-5-a", refuse: "no full"},
			},
		},
		"a disk that is called as a month": {
			files{"uuid": setUUID, "2026-11.config": asQcow2, "2026-11/FULL-1-2026-11": 0},
			[]want{{file: "2026-11/FULL-1-2026-11", disk: disk(0)}},
		},
		"both layouts": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/INC-3-a": 1, "FULL-1-a": 0, "INC-2-a": 2, "INC-3-a": 3},
			[]want{
				{file: "a/FULL-1-a", disk: disk(0)},
				{file: "a/INC-3-a", disk: disk(0, 1)},
				{file: "FULL-1-a", disk: disk(0)},
				{file: "INC-2-a", disk: disk(0, 2)},
				{file: "INC-3-a", disk: disk(0, 2, 3)},
			},
		},
		"no full": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/INC-2-a": 1, "a/INC-3-a": 2, "a/COPY-4-a": 0},
			[]want{
				{file: "a/INC-2-a", refuse: "no full"}, {file: "a/INC-3-a", refuse: "it needs a/INC-2-a"}, {file: "a/COPY-4-a", disk: disk(0)},
			},
		},
		"one second": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/FULL-2-a": 0, "a/INC-2-a": 1, "a/INC-3-a": 2, "a/COPY-2-a": 3, "a/FULL-4-a": 0},
			[]want{
				{file: "a/FULL-1-a", disk: disk(0)},
				{file: "a/FULL-2-a", disk: disk(0)},
				{file: "a/INC-2-a", refuse: "same time stamp"},
				{file: "a/INC-3-a", refuse: "it needs a/INC-2-a"},
				{file: "a/COPY-2-a", disk: disk(3)},
				{file: "a/FULL-4-a", disk: disk(0)},
			},
		},
		"no time stamps": {
			files{
				"uuid": setUUID, "a.config": asQcow2, "b.config": asQcow2, "a": 0, "b": 0,
				"FULL-a": link("/gone/a"), "FULL-b": link("/gone/b"), "INC-2000-a": 1, "INC-3000-a": 2,
			},
			[]want{
				{file: "a", disk: disk(0), when: "19700101T000000Z-"},
				{file: "b", disk: disk(0)},
				{file: "INC-2000-a", disk: disk(0, 1)},
				{file: "INC-3000-a", disk: disk(0, 1, 2)},
			},
		},
		"no time stamps and no links": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/a": 0, "a/INC-2000-a": 1},
			[]want{{file: "a/a", disk: disk(0)}, {file: "a/INC-2000-a", disk: disk(0, 1)}},
		},
		"links that were copied as files": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/a": 0, "a/FULL-a": 0, "a/INC-2000-a": 1},
			[]want{{file: "a/a", disk: disk(0)}, {file: "a/INC-2000-a", disk: disk(0, 1)}},
		},
		"a full or a copy": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/a": 0, "a/FULL-a": link("a"), "a/COPY-a": link("a"), "a/INC-2000-a": 1, "a/INC-3000-a": 2},
			[]want{
				{file: "a/a", disk: disk(0), warn: foreign.ErrOrder},
				{file: "a/INC-2000-a", disk: disk(0, 1), warn: foreign.ErrOrder},
				{file: "a/INC-3000-a", disk: disk(0, 1, 2), warn: foreign.ErrOrder},
			},
		},
		"a copy instead of the full": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/a": 0, "a/COPY-a": link("a"), "a/INC-2000-a": 1},
			[]want{{file: "a/a", disk: disk(0), warn: foreign.ErrOrder}, {file: "a/INC-2000-a", disk: disk(0, 1), warn: foreign.ErrOrder}},
		},
		"a copy beside the full": {
			files{"uuid": setUUID, "a.config": asQcow2, "a/a": 3, "a/COPY-a": link("a"), "a/FULL-1-a": 0, "a/INC-2000-a": 1},
			[]want{{file: "a/a", disk: disk(3), level: chain.Copy}, {file: "a/FULL-1-a", disk: disk(0)}, {file: "a/INC-2000-a", disk: disk(0, 1)}},
		},
		"only a copy": {
			files{"a.config": asQcow2, "a": 0, "COPY-a": link("/gone/a")},
			[]want{{file: "a", disk: disk(0), level: chain.Copy}},
		},
		"fulls of both kinds": {
			files{"uuid": setUUID, "a.config": asQcow2, "a": 0, "INC-2000-a": 1, "FULL-3000-a": 0, "INC-4000-a": 2, "INC-5000-a": 3},
			[]want{
				{file: "a", disk: disk(0)},
				{file: "INC-2000-a", disk: disk(0, 1)},
				{file: "FULL-3000-a", disk: disk(0)},
				{file: "INC-4000-a", disk: disk(0, 2), warn: foreign.ErrOrder},
				{file: "INC-5000-a", disk: disk(0, 2, 3), warn: foreign.ErrOrder},
			},
		},
		"a full that failed for another disk": {
			files{"uuid": setUUID, "a.config": asQcow2, "b.config": asQcow2, "a": 0, "b": 0, "b.partial": 0, "INC-2000-a": 1, "INC-2000-b": 1},
			[]want{
				{file: "a", disk: disk(0), warn: foreign.ErrOrder},
				{file: "INC-2000-a", disk: disk(0, 1), warn: foreign.ErrOrder},
				{file: "b", disk: disk(0)},
				{file: "INC-2000-b", disk: disk(0, 1)},
			},
		},
		"rebased in place": {
			files{
				"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/INC-2-a": backed(1, "/gone/FULL-1-a"), "a/INC-3-a": backed(2, "/gone/INC-2-a"),
				"a/image": link("/gone/INC-2-a"), "a/INC-4-a": 3,
			},
			[]want{
				{file: "a/FULL-1-a", disk: disk(0)},
				{file: "a/INC-2-a", disk: disk(0, 1)},
				{file: "a/INC-3-a", disk: disk(0, 1, 2)},
				{file: "a/INC-4-a", disk: disk(0, 1, 2, 3)},
			},
		},
		"a header that contradicts": {
			files{
				"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/INC-2-a": 1, "a/INC-3-a": backed(2, "/gone/FULL-1-a"), "a/INC-4-a": 3,
				"a/FULL-5-a": backed(0, "/etc/passwd"), "a/COPY-6-a": backed(0, "FULL-1-a"),
			},
			[]want{
				{file: "a/FULL-1-a", disk: disk(0)},
				{file: "a/INC-2-a", disk: disk(0, 1)},
				{file: "a/INC-3-a", refuse: `backing file "/gone/FULL-1-a"`},
				{file: "a/INC-4-a", refuse: "it needs a/INC-3-a"},
				{file: "a/FULL-5-a", refuse: "/etc/passwd"},
				{file: "a/COPY-6-a", refuse: "no increment"},
			},
		},
		"raw": {
			files{
				"uuid": setUUID, "a.config": asRaw, "b.config": asQcow2, "a/FULL-1-a": raw, "a/INC-2-a": raw, "a/FULL-3-a": raw[:cluster], "a/COPY-4-a": raw,
				"b/FULL-1-b": 0, "b/INC-2-b": 1, "a/FULL-5-a": 0,
			},
			[]want{
				{file: "a/FULL-1-a", disk: raw},
				{file: "a/INC-2-a", refuse: "raw increment"},
				{file: "a/FULL-3-a", disk: raw[:cluster], warn: foreign.ErrSize},
				{file: "a/COPY-4-a", disk: raw},
				{file: "b/FULL-1-b", disk: disk(0)},
				{file: "b/INC-2-b", disk: disk(0, 1)},
				{file: "a/FULL-5-a", refuse: "begins like a qcow2 image"},
			},
		},
		"raw without time stamps": {
			files{"uuid": setUUID, "a.config": asRaw, "a/a": raw},
			[]want{{file: "a/a", disk: raw}},
		},
		"other formats": {
			files{
				"uuid": setUUID, "a.config": `{"format": "vmdk"}`, "a/FULL-1-a": 0, "b.config": "[", "b/FULL-1-b": 0, "c/FULL-1-c": 0,
				"d.config": `{"format": "qcow2", "virtual-size": -1}`, "d/FULL-1-d": 0, "e.config": strings.Repeat("x", 2<<20), "e/FULL-1-e": 0,
				"f.config": `{"virtual-size": "x"}`, "f/FULL-1-f": 0,
			},
			[]want{
				{file: "a/FULL-1-a", refuse: "vmdk"},
				{file: "b/FULL-1-b", refuse: "b.config"},
				{file: "c/FULL-1-c", refuse: "c.config is missing"},
				{file: "d/FULL-1-d", refuse: "virtual size -1"},
				{file: "e/FULL-1-e", refuse: "more than"},
				{file: "f/FULL-1-f", refuse: "f.config"},
			},
		},
		"damaged images": {
			files{
				"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/INC-2-a": cut(1, 50), "a/INC-3-a": 2, "a/FULL-4-a": []byte{}, "a/FULL-5-a": cut(0, cluster),
				"a/FULL-6-a": raw,
			},
			[]want{
				{file: "a/FULL-1-a", disk: disk(0)},
				{file: "a/INC-2-a", refuse: "not a qcow2"},
				{file: "a/INC-3-a", refuse: "it needs a/INC-2-a"},
				{file: "a/FULL-4-a", refuse: "not a qcow2"},
				{file: "a/FULL-5-a", opens: "outside the file"},
				{file: "a/FULL-6-a", refuse: "not a qcow2"},
			},
		},
		"what is no backup": {
			files{
				"uuid": setUUID, "a.config": asQcow2, "a/FULL-1-a": 0, "a/INC-2-a.partial": 1, "a/FULL-1-n-a.fleece.qcow2": 0, "FULL-1-a.fleece.qcow2": 0,
				"a/INC-3-b": 1, "a/XINC-3-a": 1, "a/INC-3-a.bak": 1, "a/INC--3-a": 1, "a/INC-9999999999999999-a": 1, "a/INC-999999999999-a": 1,
				"a/inc-3-a": 1, "a/INC-0x3-a": 1, "a/sub/INC-3-a": 1, "a/INC-3-a\x1b[2J": 1, "a/INC-3-\xff": 1, "other/INC-3-a": 1,
				"a/INC-4-a": link("FULL-1-a"), "b": link("a"), "b.config": asQcow2, "c.config": link("a.config"), "c/x": 1,
			},
			[]want{{file: "a/FULL-1-a", disk: disk(0)}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			check(t, write(t, c.files), c.want)
		})
	}
}

// A file without a time stamp that is newer than an increment on it may have been replaced.
// All others' times say nothing.
func TestTimeStamps(t *testing.T) {
	t.Parallel()
	dir := write(t, files{
		"uuid": setUUID, "a.config": asQcow2, "b.config": asQcow2, "a": 0, "INC-2000-a": 1, "INC-9000-a": 2,
		"FULL-1500-b": 0, "INC-2000-b": 1, "INC-9000-b": 2,
	})
	wants := func(warn error) []want {
		return []want{
			{file: "a", disk: disk(0), warn: warn},
			{file: "INC-2000-a", disk: disk(0, 1), warn: warn},
			{file: "INC-9000-a", disk: disk(0, 1, 2), warn: warn},
			{file: "FULL-1500-b", disk: disk(0)},
			{file: "INC-2000-b", disk: disk(0, 1)},
			{file: "INC-9000-b", disk: disk(0, 1, 2)},
		}
	}
	touch := func(times map[string]int64) {
		for name, at := range times {
			if err := os.Chtimes(filepath.Join(dir, name), time.Unix(at, 0), time.Unix(at, 0)); err != nil {
				t.Fatal(err)
			}
		}
	}
	check(t, dir, wants(nil))
	_, before := open(t, dir)
	touch(map[string]int64{"INC-2000-a": 20000, "INC-9000-a": 5, "FULL-1500-b": 30000, "INC-2000-b": 9, "INC-9000-b": 7})
	check(t, dir, wants(nil))
	touch(map[string]int64{"a": 2001})
	check(t, dir, wants(foreign.ErrOrder))
	_, after := open(t, dir)
	for i := range before.All {
		if before.All[i].ID != after.All[i].ID {
			t.Errorf("%s has become %s", before.All[i].ID, after.All[i].ID)
		}
		// Who keeps what was read of the first must not take it for the second.
		if base := before.All[i].Disk("a") != nil; base == (before.All[i].UUID == after.All[i].UUID) {
			t.Errorf("%s: uuid %s and %s", before.All[i].ID, before.All[i].UUID, after.All[i].UUID)
		}
	}
}

// Ids and uuids stay the same in a copy that has lost all times, and when other points go.
func TestIdsAreStable(t *testing.T) {
	t.Parallel()
	f := files{
		"uuid": setUUID, "a.config": asQcow2, "b.config": asQcow2, "a/FULL-1000000000-a": 0, "b/FULL-1000000000-b": 0, "a/INC-1000000001-a": 1, "b/INC-1000000001-b": 1,
		"a/COPY-1000000001-a": 2, "a/FULL-1000000002-a": 0, "a/INC-1000000003-a": 4,
	}
	first := write(t, f)
	_, one := open(t, first)
	delete(f, "a/FULL-1000000000-a")
	delete(f, "b/FULL-1000000000-b")
	delete(f, "a/INC-1000000001-a")
	delete(f, "b/INC-1000000001-b")
	second := filepath.Join(t.TempDir(), "elsewhere")
	for name, c := range f {
		add(t, second, name, c, time.Now())
	}
	_, two := open(t, second)
	if len(one.All) != 5 || len(two.All) != 3 {
		t.Fatal(listed(one), listed(two))
	}
	for _, m := range two.All {
		if same := one.All.Find(m.ID); same == nil || same.UUID != m.UUID {
			t.Errorf("%s: %v, %s", m.ID, same, m.UUID)
		}
	}
	if one.All[0].ID != "20010909T014640Z-"+one.All[0].ID[17:] || len(one.All[0].Disks) != 2 {
		t.Errorf("first point %+v", one.All[0])
	}
}

// Nothing outside of the set is read, also if a folder becomes a link after the look.
func TestLinksOut(t *testing.T) {
	t.Parallel()
	outside := write(t, files{"a/FULL-1-a": 0, "FULL-1-a": 0, "a.config": asQcow2, "b.config": asQcow2, "b/FULL-1-b": 0})
	dir := write(t, files{
		"uuid": setUUID, "a.config": asQcow2, "b.config": asQcow2, "c.config": link(outside + "/a.config"), "FULL-1-a": link(outside + "/FULL-1-a"),
		"a": link(outside + "/a"), "b/FULL-1-b": 0, "c/FULL-1-c": 0, "2026-11": link(outside),
	})
	wants := []want{{file: "b/FULL-1-b", disk: disk(0)}, {file: "c/FULL-1-c", refuse: "c.config is missing"}}
	check(t, dir, wants)
	_, points := open(t, dir)
	if err := os.RemoveAll(filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	add(t, dir, "b", link(outside+"/b"), time.Time{})
	if _, err := content(points, points.All[0], "b"); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("read through a link: %v", err)
	}
}

// What `qmprestore snapshotrebase` makes: one file with a snapshot for each run.
func TestMerged(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	full := filepath.Join(work, "FULL")
	add(t, work, "FULL", 0, time.Unix(1000, 0))
	snapshot := func(name string) { imagetest.QemuImg(t, "snapshot", "-c", name, full) }
	snapshot("FULL-BACKUP")
	for i, at := range []string{"2026-11-20-11:20:24", "2026-11-20-11:20:26"} {
		imagetest.QemuIO(t, "qcow2", full, fmt.Sprintf("write -P %d %d 64k", 101+i, (1+i)*cluster), fmt.Sprintf("write -P %d %d 64k", 101+i, diskSize-cluster))
		snapshot(at)
	}
	read := func() []byte {
		b, err := os.ReadFile(full)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const name = "a/FULL-1795170022-a" // an hour before, as the snapshots have the time of another zone
	merged := []want{
		{file: name, disk: disk(0), when: "20261120T102022Z-"},
		{file: name, disk: disk(0, 1), when: "20261120T112024Z-"},
		{file: name, disk: disk(0, 1, 2), when: "20261120T112026Z-"},
	}
	set := files{"uuid": setUUID, "a.config": asQcow2, name: read()}
	t.Run("alone", func(t *testing.T) { check(t, write(t, set), merged) })
	// One that the program did not get round to remove, and one that was made later.
	set["a/INC-1795170026-a"] = 2
	set["a/INC-1795173700-a"] = 3
	t.Run("with others", func(t *testing.T) {
		check(t, write(t, set), append(merged, want{file: "a/INC-1795170026-a", refuse: "merged"}, want{file: "a/INC-1795173700-a", disk: disk(0, 1, 2, 3)}))
	})
	// Names of UTC mean one time only: the increment of an hour before or after is another one.
	f, err := os.OpenFile(full, os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(qcow2.SetIdentity(f, []byte(foreign.UTCSnapshots)), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	set = files{"uuid": setUUID, "a.config": asQcow2, name: read(), "a/INC-1795173624-a": 2, "a/INC-1795177226-a": 3}
	t.Run("by UTC", func(t *testing.T) {
		check(t, write(t, set), append(merged, want{file: "a/INC-1795173624-a", refuse: "merged"}, want{file: "a/INC-1795177226-a", disk: disk(0, 1, 2, 3)}))
	})
	set = files{"uuid": setUUID, "a.config": asQcow2, "a/INC-1795173700-a": 3}
	// Written to by somebody: the snapshots are as they were.
	imagetest.QemuIO(t, "qcow2", full, fmt.Sprintf("write -P 104 %d 64k", 4*cluster), fmt.Sprintf("write -P 104 %d 64k", diskSize-cluster))
	set[name] = read()
	t.Run("changed", func(t *testing.T) {
		check(t, write(t, set), append(merged,
			want{file: name, disk: disk(0, 1, 2, 4), when: "20261120T112027Z-", warn: foreign.ErrOrder},
			want{file: "a/INC-1795173700-a", disk: disk(0, 1, 2, 4, 3), warn: foreign.ErrOrder}))
	})
}

// Chains with all kinds of clusters are read as qemu-img reads a copy whose headers name
// the backing files.
func TestQemuImg(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "vm")
	oracle := t.TempDir()
	const size = 4<<20 + 512
	w := imagetest.NewWriter(t, 42)
	add(t, dir, "uuid", setUUID, time.Unix(1, 0))
	add(t, dir, "a.config", asQcow2, time.Unix(1, 0))
	if err := os.Mkdir(filepath.Join(dir, "a"), 0o700); err != nil {
		t.Fatal(err)
	}
	names := []string{"FULL-100-a", "INC-200-a", "INC-300-a", "INC-400-a"}
	for i, name := range names {
		path := filepath.Join(dir, "a", name)
		imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", path, fmt.Sprint(size))
		var commands []string
		for range 12 {
			off := w.Rand().Int64N(size-512) &^ 511
			c, _ := w.Write(t, "", off, min(size-off, 512*(1+w.Rand().Int64N(200))))
			commands = append(commands, c)
		}
		for range 3 {
			commands = append(commands, fmt.Sprintf("write -z %d 64k", w.Rand().Int64N(size/cluster)*cluster))
		}
		if i != 3 { // an increment of nothing
			imagetest.QemuIO(t, "qcow2", path, commands...)
		}
		if i == 2 {
			imagetest.QemuImg(t, "convert", "-c", "-f", "qcow2", "-O", "qcow2", path, path+".c")
			if err := os.Rename(path+".c", path); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		add(t, oracle, name, b, time.Unix(1, 0))
		if i > 0 {
			imagetest.QemuImg(t, "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", names[i-1], filepath.Join(oracle, name))
		}
	}
	_, points := open(t, dir)
	if len(points.All) != len(names) || len(points.Problems)+len(points.Warnings) > 0 {
		t.Fatal(listed(points), points.Problems, points.Warnings)
	}
	for i, m := range points.All {
		want := imagetest.Content(t, "qcow2", filepath.Join(oracle, names[i]))
		imagetest.Run(t, func() (image.Image, error) {
			return points.OpenDisk(image.NewPool(image.PoolOptions{}), m, "a")
		}, want)
	}
}
