package foreign_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/virtnbd/streamtest"
)

const sectors = 16

// stream makes a stream of a small disk: number 0 holds all sectors, the others sector
// number N and the last one.
func stream(n int, dev, checkpoint, parent string) streamtest.Stream {
	s := streamtest.Stream{Size: sectors * 512, Disk: dev, Checkpoint: checkpoint, Parent: parent, Date: fmt.Sprintf("2026-11-20T11:17:%02d.5", n)}
	if n == 0 {
		s.Frames = []streamtest.Frame{{Data: bytes.Repeat([]byte{100}, sectors*512)}}
		return s
	}
	sector := bytes.Repeat([]byte{byte(100 + n)}, 512)
	s.Frames = []streamtest.Frame{{Off: int64(n) * 512, Data: sector}, {Off: (sectors - 1) * 512, Data: sector}}
	return s
}

func full(dev string) []byte { return stream(0, dev, "virtnbdbackup.0", "").Bytes() }

// inc is increment or diff number n, which says that it is of checkpoint c and made on p.
func inc(n int, dev string, c, p int) []byte {
	return stream(n, dev, fmt.Sprint("virtnbdbackup.", c), fmt.Sprint("virtnbdbackup.", p)).Bytes()
}

// sectorDisk is what the streams of these numbers are.
func sectorDisk(numbers ...int) []byte {
	b := bytes.Repeat([]byte{100}, sectors*512)
	for _, n := range numbers {
		for _, at := range []int{n, sectors - 1} {
			copy(b[at*512:], bytes.Repeat([]byte{byte(100 + n)}, 512))
		}
	}
	return b
}

func domainXML(name string) string {
	return "<domain type='qemu'><name>" + name + "</name><uuid>7997c872-2a18-45dd-89bc-69819caf0983</uuid><devices><name>x</name></devices></domain>"
}

// What virtnbdbackup's directories are, and what can be wrong with them.
func TestVirtnbdbackup(t *testing.T) {
	t.Parallel()
	bad := func(file []byte, old, with string) []byte {
		if !bytes.Contains(file, []byte(old)) {
			t.Fatalf("%s is not there", old)
		}
		return bytes.Replace(file, []byte(old), []byte(with), 1)
	}
	none := stream(1, "vda", "virtnbdbackup.1", "virtnbdbackup.0")
	none.Frames = nil
	for name, c := range map[string]struct {
		files files
		want  []want
	}{
		"a name that begins as another": {
			files{
				"vda.full.data": full("vda"), "vdaa.full.data": full("vdaa"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0),
				"vdaa.inc.virtnbdbackup.1.data": inc(2, "vdaa", 1, 0),
			},
			[]want{
				{file: "vda.full.data", disk: sectorDisk()},
				{file: "vdaa.full.data", disk: sectorDisk()},
				{file: "vda.inc.virtnbdbackup.1.data", disk: sectorDisk(1)},
				{file: "vdaa.inc.virtnbdbackup.1.data", disk: sectorDisk(2)},
			},
		},
		// Each diff names the checkpoint that the next increment makes; none is made on one.
		"diffs": {
			files{
				"vda.full.data": full("vda"), "vda.diff.1795173421.data": inc(1, "vda", 1, 0), "vda.inc.virtnbdbackup.1.data": inc(2, "vda", 1, 0),
				"vda.diff.1795173423.data": inc(3, "vda", 2, 1), "vda.diff.1795173424.data": inc(4, "vda", 2, 1), "vda.inc.virtnbdbackup.2.data": inc(5, "vda", 2, 1),
				"vda.inc.virtnbdbackup.10.data": inc(6, "vda", 10, 2),
			},
			[]want{
				{file: "vda.full.data", disk: sectorDisk(), when: "20261120T111700Z-"},
				{file: "vda.diff.1795173421.data", disk: sectorDisk(1)},
				{file: "vda.inc.virtnbdbackup.1.data", disk: sectorDisk(2), when: "20261120T111702Z-"},
				{file: "vda.diff.1795173423.data", disk: sectorDisk(2, 3), when: "20261120T111703Z-"},
				{file: "vda.diff.1795173424.data", disk: sectorDisk(2, 4)},
				{file: "vda.inc.virtnbdbackup.2.data", disk: sectorDisk(2, 5)},
				{file: "vda.inc.virtnbdbackup.10.data", disk: sectorDisk(2, 5, 6)},
			},
		},
		"a missing increment": {
			files{
				"vda.full.data": full("vda"), "vda.inc.virtnbdbackup.2.data": inc(2, "vda", 2, 1), "vda.inc.virtnbdbackup.3.data": inc(3, "vda", 3, 2),
				"vda.diff.1795173500.data": inc(4, "vda", 4, 3), "vda.diff.1795173501.data": inc(5, "vda", 1, 0),
			},
			[]want{
				{file: "vda.full.data", disk: sectorDisk()},
				{file: "vda.inc.virtnbdbackup.2.data", refuse: `checkpoint "virtnbdbackup.1" of vda, which is missing`},
				{file: "vda.inc.virtnbdbackup.3.data", refuse: "needs vda.inc.virtnbdbackup.2.data"},
				{file: "vda.diff.1795173500.data", refuse: "needs vda.inc.virtnbdbackup.2.data"},
				{file: "vda.diff.1795173501.data", disk: sectorDisk(5)},
			},
		},
		"another disk's full": {
			files{"sda.full.data": full("sda"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0)},
			[]want{{file: "sda.full.data", disk: sectorDisk()}, {file: "vda.inc.virtnbdbackup.1.data", refuse: "missing"}},
		},
		"swapped disks": {
			files{"vda.full.data": full("sda"), "sda.full.data": full("vda"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0)},
			[]want{
				{file: "vda.full.data", refuse: `of disk "sda"`},
				{file: "sda.full.data", refuse: `of disk "vda"`},
				{file: "vda.inc.virtnbdbackup.1.data", refuse: "needs vda.full.data"},
			},
		},
		"swapped increments": {
			files{"vda.full.data": full("vda"), "vda.inc.virtnbdbackup.1.data": inc(2, "vda", 2, 1), "vda.inc.virtnbdbackup.2.data": inc(1, "vda", 1, 0)},
			[]want{
				{file: "vda.full.data", disk: sectorDisk()},
				{file: "vda.inc.virtnbdbackup.1.data", refuse: `of checkpoint "virtnbdbackup.2"`},
				{file: "vda.inc.virtnbdbackup.2.data", refuse: `of checkpoint "virtnbdbackup.1"`},
			},
		},
		"swapped levels": {
			files{
				"vda.full.data": inc(1, "vda", 1, 0), "vda.copy.data": inc(1, "vda", 1, 0), "vda.diff.1795173500.data": full("vda"),
				"vda.inc.virtnbdbackup.1.data": full("vda"),
			},
			[]want{
				{file: "vda.full.data", refuse: "says full"},
				{file: "vda.copy.data", refuse: "says copy"},
				{file: "vda.diff.1795173500.data", refuse: "says diff"},
				{file: "vda.inc.virtnbdbackup.1.data", refuse: "says inc"},
			},
		},
		"two of one checkpoint": {
			files{
				"vda.full.data": bad(full("vda"), "virtnbdbackup.0", "virtnbdbackup.1"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0),
				"vda.inc.virtnbdbackup.2.data": inc(2, "vda", 2, 1),
			},
			[]want{
				{file: "vda.full.data", refuse: "another one of checkpoint"},
				{file: "vda.inc.virtnbdbackup.1.data", refuse: "another one of checkpoint"},
				{file: "vda.inc.virtnbdbackup.2.data", refuse: "needs vda"},
			},
		},
		"a ring": {
			files{
				"vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 2), "vda.inc.virtnbdbackup.2.data": inc(2, "vda", 2, 1), "vda.inc.virtnbdbackup.3.data": inc(3, "vda", 3, 3),
				"vda.diff.1795173500.data": inc(4, "vda", 4, 2),
			},
			[]want{
				{file: "vda.inc.virtnbdbackup.1.data", refuse: "backup is damaged"},
				{file: "vda.inc.virtnbdbackup.2.data", refuse: "backup is damaged"},
				{file: "vda.inc.virtnbdbackup.3.data", refuse: "made on what was made on it"},
				{file: "vda.diff.1795173500.data", refuse: "it needs"},
			},
		},
		"a copy": {
			files{"vda.copy.data": full("vda"), "vda.copy.qcow.json": "{}", "vmconfig.copy.xml": domainXML("web")},
			[]want{{file: "vda.copy.data", disk: sectorDisk()}},
		},
		"a copy is no full": {
			files{"vda.copy.data": full("vda"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0)},
			[]want{{file: "vda.copy.data", disk: sectorDisk()}, {file: "vda.inc.virtnbdbackup.1.data", refuse: "missing"}},
		},
		"version 1": {
			files{"vda.full.data": full("vda"), "vda.inc.virtnbdbackup.1.data": none.Bytes()},
			[]want{{file: "vda.full.data", disk: sectorDisk()}, {file: "vda.inc.virtnbdbackup.1.data", disk: sectorDisk()}},
		},
		"version 2": {
			files{
				"vda.full.data": full("vda"), "vda.full.data.chksum": streamtest.Sum(full("vda")), "vda.inc.virtnbdbackup.1.data": none.Bytes(),
				"vda.diff.1795173500.data": inc(2, "vda", 2, 1),
			},
			[]want{
				{file: "vda.full.data", disk: sectorDisk()},
				{file: "vda.inc.virtnbdbackup.1.data", disk: sectorDisk(), warn: foreign.ErrZeroes},
				{file: "vda.diff.1795173500.data", disk: sectorDisk(2), warn: foreign.ErrZeroes},
			},
		},
		"checkpoints ahead of the data": {
			files{
				"vda.full.data": full("vda"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0), "vda.inc.virtnbdbackup.2.data.partial": inc(2, "vda", 2, 1)[:500],
				"web.cpt": `["virtnbdbackup.0", "virtnbdbackup.1", "virtnbdbackup.2"]`, "checkpoints/virtnbdbackup.2.xml": "<domaincheckpoint/>",
				"backup.inc.11202026112753.log": "failed",
			},
			[]want{{file: "vda.full.data", disk: sectorDisk()}, {file: "vda.inc.virtnbdbackup.1.data", disk: sectorDisk(1)}},
		},
		"damaged streams": {
			files{
				"vda.full.data": full("vda"), "vda.inc.virtnbdbackup.1.data": []byte{}, "vda.inc.virtnbdbackup.2.data": inc(2, "vda", 2, 1),
				"vdb.full.data": full("vdb")[:1000], "vdb.inc.virtnbdbackup.1.data": inc(1, "vdb", 1, 0), "vdc.full.data": bad(full("vdc"), `"vdc"`, `[1]`),
				"vdd.full.data": bad(full("vdd"), `"streamVersion": 2`, `"streamVersion": 9`), "vdc.inc.virtnbdbackup.1.data": inc(1, "vdc", 1, 0),
			},
			[]want{
				{file: "vda.full.data", disk: sectorDisk()},
				{file: "vda.inc.virtnbdbackup.1.data", refuse: "not a virtnbdbackup stream"},
				{file: "vda.inc.virtnbdbackup.2.data", refuse: "needs vda.inc.virtnbdbackup.1.data"},
				{file: "vdb.full.data", opens: "cut off"},
				{file: "vdb.inc.virtnbdbackup.1.data", opens: "vdb.full.data"},
				{file: "vdc.full.data", refuse: "corrupt"},
				{file: "vdd.full.data", refuse: "version 9"},
				{file: "vdc.inc.virtnbdbackup.1.data", refuse: "needs vdc.full.data"},
			},
		},
		"what is no stream": {
			files{
				"vda.full.data": full("vda"), "vdb.full.data": link("vda.full.data"), "vda.inc..data": full("vda"), "vda.x.data": full("vda"),
				"vda.full.data.bak": full("vda"), ".full.data": full("vda"), "a/vda.full.data": full("vda"), "vda.diff.x.data": full("vda"),
				"vda.diff.999999999999.data": full("vda"), "v da.full.data": full("vda"), "checkpoints": "no folder",
			},
			[]want{{file: "vda.full.data", disk: sectorDisk()}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			check(t, write(t, c.files), c.want)
		})
	}
}

// The streams' times are local, which the diffs' are not. Which zone it is, the checkpoints
// tell.
func TestLocalTimes(t *testing.T) {
	t.Parallel()
	dated := func(n, c, p int, date string) []byte {
		s := stream(n, "vda", fmt.Sprint("virtnbdbackup.", c), "")
		if n > 0 {
			s.Parent = fmt.Sprint("virtnbdbackup.", p)
		}
		s.Date = date
		return s.Bytes()
	}
	created := func(at time.Time) string {
		return fmt.Sprintf("<domaincheckpoint><name>x</name><creationTime>%d</creationTime></domaincheckpoint>", at.Unix())
	}
	at := time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)
	f := files{
		"vda.full.data":                   dated(0, 0, 0, "2026-11-20T13:30:02.123456"), // 3:30 ahead
		"checkpoints/virtnbdbackup.0.xml": created(at),
		"vda.diff.1795168860.data":        dated(1, 1, 0, "2026-11-20T13:31:00"), // 10:01:00 UTC
		"vda.inc.virtnbdbackup.1.data":    dated(2, 1, 0, "2026-11-20T13:32:05"),
		"checkpoints/virtnbdbackup.1.xml": created(at.Add(2 * time.Minute)),
		// Nobody knows; but it is newer than what it was made on.
		"vda.inc.virtnbdbackup.2.data":    dated(3, 2, 1, "2026-11-20T02:00:00"),
		"checkpoints/virtnbdbackup.2.xml": "<",
		"vda.inc.virtnbdbackup.3.data":    dated(4, 3, 2, "2026-11-20T12:00:00+01:00"),
		"checkpoints/virtnbdbackup.3.xml": created(at.AddDate(1, 0, 0)),
	}
	check(t, write(t, f), []want{
		{file: "vda.full.data", disk: sectorDisk(), when: "20261120T100002Z-"},
		{file: "vda.diff.1795168860.data", disk: sectorDisk(1), when: "20261120T100100Z-"},
		{file: "vda.inc.virtnbdbackup.1.data", disk: sectorDisk(2), when: "20261120T100205Z-"},
		{file: "vda.inc.virtnbdbackup.2.data", disk: sectorDisk(2, 3), when: "20261120T100206Z-"},
		{file: "vda.inc.virtnbdbackup.3.data", disk: sectorDisk(2, 3, 4), when: "20261120T110000Z-"},
	})
}

// A set's guest is called as its domain, where that is known.
func TestGuestNames(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		files files
		want  string
	}{
		"by the list of checkpoints": {files{"web.cpt": "[]", "vmconfig.virtnbdbackup.0.xml": domainXML("db")}, "web"},
		"by the domain":              {files{"vmconfig.virtnbdbackup.0.xml": domainXML("db")}, "db"},
		"by none of two":             {files{"web.cpt": "[]", "db.cpt": "[]"}, "vm-1"},
		"by the folder":              {files{}, "vm-1"},
		"broken XML":                 {files{"vmconfig.virtnbdbackup.0.xml": "<domain><name>web"}, "vm-1"},
		"too much XML":               {files{"vmconfig.virtnbdbackup.0.xml": domainXML("web") + strings.Repeat(" ", 2<<20)}, "vm-1"},
		"deep XML":                   {files{"vmconfig.virtnbdbackup.0.xml": strings.Repeat("<a>", 200000)}, "vm-1"},
		"an entity":                  {files{"vmconfig.virtnbdbackup.0.xml": `<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain><name>&x;</name></domain>`}, "vm-1"},
		"a link":                     {files{"vmconfig.virtnbdbackup.0.xml": link("/etc/passwd"), "web.cpt": link("/etc/passwd")}, "vm-1"},
		"not a guest's name":         {files{"my web/server.cpt": "", "my web server (ä).cpt": "[]"}, "my_web_server____"},
		"a path":                     {files{"vmconfig.copy.xml": domainXML("../../etc")}, "guest-.._.._etc"},
		"a number":                   {files{"0110.cpt": "[]"}, "guest-0110"},
		"a VMID":                     {files{"110.cpt": "[]"}, "110"},
		"too long":                   {files{strings.Repeat("x", 90) + ".cpt": "[]"}, strings.Repeat("x", 64)},
		"odd and too long":           {files{"-" + strings.Repeat("x", 90) + ".cpt": "[]"}, "guest--" + strings.Repeat("x", 57)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.files["vda.full.data"] = full("vda")
			set, points := open(t, write(t, c.files))
			if set.Guest() != c.want || chain.CheckGuestName(set.Guest()) != nil {
				t.Errorf("guest %q", set.Guest())
			}
			if points.All[0].Guest.Name != c.want {
				t.Errorf("guest %q in a manifest", points.All[0].Guest.Name)
			}
		})
	}
}

// What the domain's XML says of a run goes with the point.
func TestDomain(t *testing.T) {
	t.Parallel()
	_, points := open(t, write(t, files{
		"vda.full.data": full("vda"), "vmconfig.virtnbdbackup.0.xml": domainXML("my web"), "vda.inc.virtnbdbackup.1.data": inc(1, "vda", 1, 0),
	}))
	g := points.All[0].Guest
	if g.VMName != "my web" || g.UUID != "7997c872-2a18-45dd-89bc-69819caf0983" {
		t.Errorf("%+v", g)
	}
	for i, want := range []string{"[vmconfig.virtnbdbackup.0.xml]", "[]"} {
		if files, err := points.Files(points.All[i]); err != nil || fmt.Sprint(files) != want {
			t.Errorf("files %v, %v", files, err)
		}
	}
}

func TestCheckSums(t *testing.T) {
	t.Parallel()
	a, b, c := full("a"), full("b"), full("c")
	dir := write(t, files{
		"a.full.data": a, "a.full.data.chksum": streamtest.Sum(a), "b.full.data": b, "b.full.data.chksum": append(streamtest.Sum(b), '\n'),
		"c.full.data": c, "d.full.data": full("d"), "d.full.data.chksum": "x", "e.full.data": full("e"), "e.full.data.chksum": streamtest.Sum(a),
		"f.full.data": full("f"), "f.full.data.chksum": link("a.full.data.chksum"), "g.full.data": full("g"), "g.full.data.chksum": strings.Repeat("1", 2<<20),
	})
	_, points := open(t, dir)
	m := points.All[0]
	for disk, want := range map[string]error{
		"a": nil, "b": nil, "c": foreign.ErrNoSum, "d": chain.ErrDamaged, "e": chain.ErrDamaged, "f": chain.ErrDamaged, "g": chain.ErrDamaged, "x": chain.ErrNoPoint,
	} {
		if err := points.CheckSums(context.Background(), m, disk); !errors.Is(err, want) {
			t.Errorf("disk %s: %v", disk, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := points.CheckSums(ctx, m, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	a[len(a)/2] ^= 1 // in the data, which has no other protection
	if err := os.WriteFile(filepath.Join(dir, "a.full.data"), a, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := points.CheckSums(context.Background(), m, "a"); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("changed: %v", err)
	}
}
