package backup

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/qmp"
)

const (
	repoID          = "01234567"
	id1    chain.ID = "20261120T120000Z-0001"
	id2    chain.ID = "20261120T130000Z-0002"
	idNew  chain.ID = "20261120T150000Z-00ff"
)

func testPoint(id chain.ID, disks ...chain.Disk) *chain.Manifest {
	return &chain.Manifest{
		Format: 1, ID: id, UUID: strings.Repeat("a", 32), Time: time.Unix(0, 0),
		Guest: chain.GuestIdentity{Name: "110", UUID: "u", VMGenID: "g"}, QEMU: "10.1.2", Disks: disks,
	}
}

func testImage(name string, parent *chain.Manifest, parentDisk string) chain.Disk {
	d := chain.Disk{Name: name, Level: chain.Full, VirtualSize: 1 << 20}
	if parent != nil {
		ref := parent.Ref(parentDisk)
		d.Level, d.Parent = chain.Inc, &ref
	}
	return d
}

func recording(id chain.ID, disk string) qmp.DirtyBitmap {
	return qmp.DirtyBitmap{Name: bitmapOf(id, disk), Recording: true, Persistent: true}
}

func bitmapOf(id chain.ID, disk string) string {
	return chain.BitmapName{Repo: repoID, Point: id, Disk: disk}.String()
}

func testDisk(name string, bitmaps ...qmp.DirtyBitmap) Disk {
	return Disk{Name: name, Size: 1 << 20, Driver: "qcow2", compat: "1.1", format: "node-" + name, device: "/machine/peripheral/" + name, bitmaps: bitmaps}
}

func TestPlan(t *testing.T) {
	p1 := testPoint(id1, testImage("scsi0", nil, ""), testImage("scsi1", nil, ""))
	p2 := testPoint(id2, testImage("scsi0", p1, "scsi0"))
	with := func(d Disk, change func(*Disk)) Disk { change(&d); return d }
	bitmap := func(b qmp.DirtyBitmap, change func(*qmp.DirtyBitmap)) qmp.DirtyBitmap { change(&b); return b }
	guest := chain.GuestIdentity{UUID: "u", VMGenID: "g"}
	imported := testPoint(id1, testImage("scsi0", nil, ""))
	imported.Guest, imported.QEMU = chain.GuestIdentity{Name: "110"}, ""

	for _, test := range []struct {
		what      string
		points    chain.Points
		disk      Disk
		guest     chain.GuestIdentity
		unsound   bool
		level     chain.Level
		parent    chain.ID
		unplanned bool
		reason    string
	}{
		{what: "first run", disk: testDisk("scsi0"), level: chain.Full, reason: "first point of this disk"},
		{what: "increment", points: chain.Points{p1}, disk: testDisk("scsi0", recording(id1, "scsi0")), level: chain.Inc, parent: id1},
		{what: "increment on the newest", points: chain.Points{p1, p2}, disk: testDisk("scsi0", recording(id2, "scsi0")), level: chain.Inc, parent: id2},
		{
			what: "a disk that the last run left out", points: chain.Points{p1, p2},
			disk: testDisk("scsi1", recording(id1, "scsi1")), level: chain.Inc, parent: id1,
		},
		{
			what: "the old bitmap of a run that died after its commit", points: chain.Points{p1, p2},
			disk: testDisk("scsi0", recording(id1, "scsi0"), recording(id2, "scsi0")), level: chain.Inc, parent: id2,
		},
		{
			what: "only a bitmap that tracking has passed", points: chain.Points{p1, p2},
			disk: testDisk("scsi0", recording(id1, "scsi0")), level: chain.Full, unplanned: true, reason: "a newer point",
		},
		{what: "renamed", points: chain.Points{p1}, disk: testDisk("virtio7", recording(id1, "scsi0")), level: chain.Inc, parent: id1},
		{what: "replaced", points: chain.Points{p1}, disk: testDisk("scsi0"), level: chain.Full, unplanned: true, reason: "no bitmap records"},
		{what: "imported", points: chain.Points{imported}, disk: testDisk("scsi0"), level: chain.Full, reason: "after those that were imported"},
		{
			what: "imported, and lost since", points: chain.Points{imported, p2}, disk: testDisk("scsi0"),
			level: chain.Full, unplanned: true, reason: "no bitmap records",
		},
		{
			what: "inconsistent", points: chain.Points{p1},
			disk:  testDisk("scsi0", bitmap(recording(id1, "scsi0"), func(b *qmp.DirtyBitmap) { b.Inconsistent, b.Recording = true, false })),
			level: chain.Full, unplanned: true, reason: "inconsistent",
		},
		{
			what: "not recording", points: chain.Points{p1},
			disk:  testDisk("scsi0", bitmap(recording(id1, "scsi0"), func(b *qmp.DirtyBitmap) { b.Recording = false })),
			level: chain.Full, unplanned: true, reason: "does not record",
		},
		{
			what: "busy", points: chain.Points{p1},
			disk:  testDisk("scsi0", bitmap(recording(id1, "scsi0"), func(b *qmp.DirtyBitmap) { b.Busy = true })),
			level: chain.Full, unplanned: true, reason: "in use",
		},
		{
			what: "another repository's bitmap", points: chain.Points{p1},
			disk:  testDisk("scsi0", qmp.DirtyBitmap{Name: "qmchain:76543210:" + string(id1) + ":scsi0", Recording: true}),
			level: chain.Full, unplanned: true, reason: "no bitmap records",
		},
		{
			what: "foreign bitmaps", points: nil,
			disk:  testDisk("scsi0", qmp.DirtyBitmap{Name: "pbs-incremental-dirty-bitmap", Recording: true}, qmp.DirtyBitmap{Recording: true}),
			level: chain.Full, reason: "first point",
		},
		{
			what: "shrunk", points: chain.Points{p1},
			disk:  with(testDisk("scsi0", recording(id1, "scsi0")), func(d *Disk) { d.Size = 1 << 19 }),
			level: chain.Full, unplanned: true, reason: "shrunk",
		},
		{
			what: "grown", points: chain.Points{p1},
			disk: with(testDisk("scsi0", recording(id1, "scsi0")), func(d *Disk) { d.Size = 1 << 21 }), level: chain.Inc, parent: id1,
		},
		{
			what: "a raw volume that has grown", points: chain.Points{p1},
			disk:  with(testDisk("scsi0", recording(id1, "scsi0")), func(d *Disk) { d.Size, d.Driver = 1<<21, "raw" }),
			level: chain.Full, unplanned: true, reason: "grown",
		},
		{
			what: "rolled back", points: chain.Points{p1}, disk: testDisk("scsi0", recording(id1, "scsi0")),
			guest: chain.GuestIdentity{UUID: "u", VMGenID: "another"}, level: chain.Full, unplanned: true, reason: "vmgenid",
		},
		{
			what: "adopted", points: chain.Points{p1}, disk: testDisk("scsi0", recording(id1, "scsi0")),
			guest: chain.GuestIdentity{UUID: "another", VMGenID: "g"}, level: chain.Full, unplanned: true, reason: "another guest's",
		},
		{
			what: "a damaged chain", points: chain.Points{p1}, disk: testDisk("scsi0", recording(id1, "scsi0")),
			unsound: true, level: chain.Full, unplanned: true, reason: "made-up damage",
		},
		{
			what: "the point is gone", points: nil, disk: testDisk("scsi0", recording(id1, "scsi0")),
			level: chain.Full, unplanned: true, reason: "not in the repository",
		},
	} {
		t.Run(test.what, func(t *testing.T) {
			if test.guest == (chain.GuestIdentity{}) {
				test.guest = guest
			}
			p := planner{repo: repoID, memory: true, points: test.points, guest: test.guest, sound: func(chain.Layer) error {
				if test.unsound {
					return fmt.Errorf("%w: made-up damage", chain.ErrDamaged)
				}
				return nil
			}}
			plan, err := p.plan(idNew, []Disk{test.disk}, Request{Level: Auto, Adopt: true})
			if err != nil {
				t.Fatal(err)
			}
			d := plan.Disks[0]
			if d.Level != test.level || d.Unplanned != test.unplanned || !strings.Contains(d.Reason, test.reason) {
				t.Errorf("level %s, unplanned %v, reason %q", d.Level, d.Unplanned, d.Reason)
			}
			if d.New != bitmapOf(idNew, test.disk.Name) {
				t.Errorf("new bitmap %q", d.New)
			}
			if (d.Level == chain.Inc) != (d.Parent != nil && d.Old != "") {
				t.Errorf("parent %v, old %q", d.Parent, d.Old)
			}
			if d.Parent != nil && d.Parent.Point.ID != test.parent {
				t.Errorf("parent %s", d.Parent.Point.ID)
			}

			_, err = p.plan(idNew, []Disk{test.disk}, Request{Level: chain.Inc, Adopt: true})
			if (err == nil) != (test.level == chain.Inc) {
				t.Errorf("with level inc: %v", err)
			}
			plan, err = p.plan(idNew, []Disk{test.disk}, Request{Level: chain.Full, Adopt: true})
			if err != nil || plan.Disks[0].Level != chain.Full || plan.Disks[0].Parent != nil || plan.Disks[0].Unplanned {
				t.Errorf("with level full: %v, %v", plan, err)
			}
		})
	}
}

func TestPlanSwappedDisks(t *testing.T) {
	p1 := testPoint(id1, testImage("scsi0", nil, ""), testImage("scsi1", nil, ""))
	p := planner{repo: repoID, points: chain.Points{p1}, guest: p1.Guest, sound: func(chain.Layer) error { return nil }}
	plan, err := p.plan(idNew, []Disk{testDisk("scsi0", recording(id1, "scsi1")), testDisk("scsi1", recording(id1, "scsi0"))}, Request{Level: Auto})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"scsi1", "scsi0"} {
		if d := plan.Disks[i]; d.Level != chain.Inc || d.Parent.Disk.Name != want {
			t.Errorf("disk %s goes on from %v", d.Name, d.Parent)
		}
	}
}

func TestPlanChoice(t *testing.T) {
	disks := []Disk{testDisk("scsi0"), testDisk("scsi1"), {Name: "ide2", Left: "removable medium"}}
	p := planner{repo: repoID}
	names := func(req Request) string {
		t.Helper()
		req.Level = Auto
		plan, err := p.plan(idNew, disks, req)
		if err != nil {
			return err.Error()
		}
		var in []string
		for _, d := range plan.Disks {
			in = append(in, d.Name)
		}
		for _, d := range plan.Left {
			in = append(in, "-"+d.Name+" "+d.Left)
		}
		return strings.Join(in, ",")
	}
	for _, test := range []struct {
		req  Request
		want string
	}{
		{Request{}, "scsi0,scsi1,-ide2 removable medium"},
		{Request{Disks: []string{"scsi1"}}, "scsi1,-scsi0 not asked for,-ide2 not asked for"},
		{Request{Exclude: []string{"scsi1"}}, "scsi0,-scsi1 not asked for,-ide2 removable medium"},
		{Request{Disks: []string{"scsi7"}}, `the guest has no disk "scsi7", only scsi0, scsi1, ide2: not found`},
		{Request{Exclude: []string{"scsi7"}}, `the guest has no disk "scsi7", only scsi0, scsi1, ide2: not found`},
		{Request{Disks: []string{"ide2"}}, "disk ide2 can't be backed up: removable medium: not found"},
		{Request{Exclude: []string{"scsi0", "scsi1"}}, "the guest has no disk that can be backed up: not found"},
	} {
		if got := names(test.req); got != test.want {
			t.Errorf("%+v: %s", test.req, got)
		}
	}
}

func TestPlanRefusesAnotherGuest(t *testing.T) {
	p1 := testPoint(id1, testImage("scsi0", nil, ""))
	p := planner{repo: repoID, points: chain.Points{p1}, guest: chain.GuestIdentity{UUID: "other"}}
	if _, err := p.plan(idNew, []Disk{testDisk("scsi0")}, Request{Level: Auto}); !errors.Is(err, ErrOtherGuest) {
		t.Errorf("error is %v", err)
	}
	plan, err := p.plan(idNew, []Disk{testDisk("scsi0")}, Request{Level: Auto, Adopt: true})
	if err != nil || plan.Disks[0].Level != chain.Full {
		t.Errorf("adopted: %v, %v", plan, err)
	}
}

func TestUselessBitmaps(t *testing.T) {
	p1 := testPoint(id1, testImage("scsi0", nil, ""))
	p2 := testPoint(id2, testImage("virtio0", nil, ""))
	node := func(bitmaps ...qmp.DirtyBitmap) *view {
		return &view{nodes: map[string]*node{"n": {name: "n", info: &qmp.BlockDeviceInfo{DirtyBitmaps: bitmaps}}}}
	}
	backing := node(recording(idNew, "scsi0"))
	backing.nodes["n"].info.ReadOnly = true
	busy := recording(idNew, "scsi0")
	busy.Busy = true
	for _, test := range []struct {
		what     string
		view     *view
		partials []chain.ID
		want     []string
	}{
		{"what tracks", node(recording(id1, "scsi0")), nil, nil},
		{"of an unfinished point", node(recording(id1, "scsi0"), recording(idNew, "scsi0")), []chain.ID{idNew}, []string{bitmapOf(idNew, "scsi0")}},
		{"unexplained", node(recording(idNew, "scsi0")), nil, nil},
		{"a commit that a leftover folder of the same id denies", node(recording(id1, "scsi0")), []chain.ID{id1}, nil},
		{"passed on this node, under another name", node(recording(id1, "scsi0"), recording(id2, "virtio0")), nil, []string{bitmapOf(id1, "scsi0")}},
		{"on a backing image", backing, []chain.ID{idNew}, nil},
		{"in use", node(busy), []chain.ID{idNew}, nil},
		{"others'", node(qmp.DirtyBitmap{Name: "bitmap0"}, qmp.DirtyBitmap{Name: "qmchain:76543210:" + string(idNew) + ":scsi0"}, qmp.DirtyBitmap{}), []chain.ID{idNew}, nil},
	} {
		var got []string
		for _, b := range uselessBitmaps(test.view, repoID, chain.Points{p1, p2}, test.partials) {
			got = append(got, b.name)
		}
		if strings.Join(got, " ") != strings.Join(test.want, " ") {
			t.Errorf("%s: %v", test.what, got)
		}
	}
}

func TestPlanLevels(t *testing.T) {
	p1 := testPoint(id1, testImage("scsi0", nil, ""))
	p := planner{repo: repoID, points: chain.Points{p1}, guest: p1.Guest, now: time.Unix(86400*40, 0).UTC(), sound: func(chain.Layer) error { return nil }}
	tracked := testDisk("scsi0", recording(id1, "scsi0"))
	tracked.bitmaps[0].Count, tracked.allocated = 65536, 1<<20

	for level, want := range map[chain.Level]PlannedDisk{
		chain.Diff: {Level: chain.Diff, Old: bitmapOf(id1, "scsi0"), Estimate: 65536},
		chain.Inc:  {Level: chain.Inc, Old: bitmapOf(id1, "scsi0"), New: bitmapOf(idNew, "scsi0"), Estimate: 65536},
		chain.Copy: {Level: chain.Copy, Reason: "asked for", Estimate: 1 << 20},
		chain.Full: {Level: chain.Full, Reason: "asked for", New: bitmapOf(idNew, "scsi0"), Estimate: 1 << 20},
	} {
		plan, err := p.plan(idNew, []Disk{tracked}, Request{Level: level})
		if err != nil {
			t.Fatal(err)
		}
		d := plan.Disks[0]
		if d.Level != want.Level || d.Reason != want.Reason || d.Old != want.Old || d.New != want.New || d.Estimate != want.Estimate {
			t.Errorf("%s: %+v", level, d)
		}
		if (d.Parent != nil) != d.Level.Overlay() {
			t.Errorf("%s: parent %v", level, d.Parent)
		}
		if got := plan.below(65537); got != level.Overlay() {
			t.Errorf("%s: below the threshold: %v", level, got)
		}
		if plan.below(65536) {
			t.Errorf("%s: at the threshold it is not below", level)
		}
	}
	if _, err := p.plan(idNew, []Disk{testDisk("scsi0")}, Request{Level: chain.Diff}); err == nil {
		t.Error("a diff since nothing")
	}

	rotation, err := ParseRotation("monthly")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := p.plan(idNew, []Disk{tracked}, Request{Level: Auto, NewChain: rotation})
	if err != nil || plan.Disks[0].Level != chain.Full || plan.Disks[0].Unplanned || !strings.Contains(plan.Disks[0].Reason, "monthly") {
		t.Errorf("with a new chain due: %+v, %v", plan, err)
	}
}

// A stopped guest's disk is tracked by a bitmap in its image or not at all.
func TestPlanOffline(t *testing.T) {
	p1 := testPoint(id1, testImage("scsi0", nil, ""))
	raw := func(d *Disk) { d.Driver = "raw" }
	snapshots := func(d *Disk) { d.snapshots = true }
	plain := func(*Disk) {}
	lost := recording(id1, "scsi0")
	lost.Inconsistent, lost.Recording = true, false
	for _, test := range []struct {
		what      string
		change    func(*Disk)
		bitmaps   string // as asked for
		bitmap    []qmp.DirtyBitmap
		level     chain.Level
		tracked   bool
		unplanned bool
		reason    string
	}{
		{"qcow2", plain, "", []qmp.DirtyBitmap{recording(id1, "scsi0")}, chain.Inc, true, false, ""},
		{"qcow2 without its bitmap", plain, "", nil, chain.Full, true, true, "no bitmap records"},
		{"raw", raw, "", nil, chain.Full, false, false, "can't store bitmaps"},
		{"snapshots", snapshots, "", nil, chain.Full, false, false, "internal snapshots"},
		{"snapshots since the last point", snapshots, "", []qmp.DirtyBitmap{recording(id1, "scsi0")}, chain.Inc, false, false, ""},
		{"snapshots and a lost bitmap", snapshots, "", []qmp.DirtyBitmap{lost}, chain.Full, false, true, "inconsistent"},
		{"snapshots, persistent", snapshots, chain.KindPersistent, []qmp.DirtyBitmap{recording(id1, "scsi0")}, chain.Inc, true, false, ""},
		{"in memory", plain, chain.KindMemory, nil, chain.Full, false, false, "in memory alone"},
	} {
		p := planner{repo: repoID, points: chain.Points{p1}, guest: p1.Guest, sound: func(chain.Layer) error { return nil }}
		disk := testDisk("scsi0", test.bitmap...)
		test.change(&disk)
		plan, err := p.plan(idNew, []Disk{disk}, Request{Level: Auto, Bitmaps: test.bitmaps})
		if err != nil {
			t.Fatal(err)
		}
		d := plan.Disks[0]
		if d.Level != test.level || (d.New != "") != test.tracked || d.Unplanned != test.unplanned || !strings.Contains(d.Reason, test.reason) {
			t.Errorf("%s: level %s, new bitmap %q, unplanned %v: %s", test.what, d.Level, d.New, d.Unplanned, d.Reason)
		}
	}
}

func TestRotation(t *testing.T) {
	began := time.Date(2026, 11, 29, 23, 0, 0, 0, time.UTC) // a Sunday
	full := testPoint(id1, testImage("scsi0", nil, ""))
	full.Time = began
	layers := []chain.Layer{{Point: full}, {Point: full}, {Point: full}}
	for _, test := range []struct {
		rule string
		now  time.Time
		due  bool
	}{
		{"", began.AddDate(9, 0, 0), false},
		{"daily", began.Add(59 * time.Minute), false},
		{"daily", began.Add(time.Hour), true},
		{"daily", began.Add(59 * time.Minute).In(time.FixedZone("", 3600)), false}, // midnight passed before it began
		{"weekly", began.Add(time.Hour), true},
		{"weekly", began.AddDate(0, 0, -3), false},
		{"monthly", began.Add(24 * time.Hour), false},
		{"monthly", began.Add(25 * time.Hour), true},
		{"points:3", began, true},
		{"points:4", began, false},
		{"age:30d", began.Add(30*24*time.Hour - time.Second), false},
		{"age:30d", began.Add(30 * 24 * time.Hour), true},
		{"age:2h", began.Add(2 * time.Hour), true},
	} {
		r, err := ParseRotation(test.rule)
		if err != nil {
			t.Fatal(err)
		}
		if reason := r.due(layers, test.now); (reason != "") != test.due {
			t.Errorf("%s at %s: %q", test.rule, test.now, reason)
		}
	}
	for _, bad := range []string{"yearly", "points", "points:", "points:0", "points:-1", "age:", "age:d", "age:0d", "age:5", "age:5y", "age:99999999999999999999d", "monthly:2"} {
		if _, err := ParseRotation(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// A chain that can't be read just now is neither built on nor given up.
func TestPlanWithAShareThatHiccups(t *testing.T) {
	p1 := testPoint(id1, testImage("scsi0", nil, ""))
	hiccup := errors.New("stale file handle")
	p := planner{repo: repoID, points: chain.Points{p1}, guest: p1.Guest, sound: func(chain.Layer) error { return hiccup }}
	if plan, err := p.plan(idNew, []Disk{testDisk("scsi0", recording(id1, "scsi0"))}, Request{Level: Auto}); !errors.Is(err, hiccup) {
		t.Errorf("%+v, %v", plan, err)
	}
}
