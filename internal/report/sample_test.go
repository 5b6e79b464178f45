package report

import (
	"fmt"
	"time"

	"qmchain/chain"
)

// created is when the samples are made.
var created = time.Date(2026, 11, 21, 9, 30, 0, 0, time.UTC)

// hostile is what a guest might call itself.
const hostile = `</title><script src="http://hostile.invalid/x.js"></script><img src=http://hostile.invalid/x.png> "quoted' & <b>`

// sampleReport is a report on guests of which each shows something else.
func sampleReport() *Report {
	r := &Report{Set: "/mnt/backup", Kind: "qmchain", Host: "pve1", Version: "1.0", Created: created, MaxAge: (26 * time.Hour).Seconds(), State: Good}
	for _, g := range []*Guest{daily(), twoChains(), damaged(), late(), empty(), untrusted(), many()} {
		g.judge(Options{Now: created, MaxAge: 26 * time.Hour})
		r.Guests = append(r.Guests, g)
		r.State = worse(r.State, g.State)
		r.Points += g.kept()
		r.Bytes += g.Bytes
	}
	return r
}

// sampleGuest has points at these ages, the oldest of which is a full.
func sampleGuest(name, vm string, ages ...time.Duration) *Guest {
	g := &Guest{Name: name, VMName: vm, State: Good, Remarks: []Remark{}}
	for i, age := range ages {
		at := created.Add(-age)
		p := Point{
			ID: at.Format("20060102T150405Z") + fmt.Sprintf("-%04x", i), Time: at, Level: chain.Inc, Consistency: chain.Frozen,
			Disks: []Disk{{Name: "scsi0", Level: chain.Inc, Size: 32 << 30, Bytes: int64(180+37*(i*i%11)) << 20}},
		}
		if i == 0 {
			p.Level, p.Disks[0].Level, p.Disks[0].Reason, p.Disks[0].Bytes = chain.Full, chain.Full, "first point of the disk", 11<<30
		} else {
			p.Parents = []string{g.Points[i-1].ID}
		}
		p.Bytes = p.Disks[0].Bytes
		g.Bytes += p.Bytes
		g.Points = append(g.Points, p)
	}
	return g
}

func days(from, to int) (ages []time.Duration) {
	for i := from; i >= to; i-- {
		ages = append(ages, time.Duration(i)*24*time.Hour+7*time.Hour)
	}
	return ages
}

// daily has a year's points, thinned out.
func daily() *Guest {
	ages := []time.Duration{}
	for m := 11; m >= 3; m-- {
		ages = append(ages, days(m*30, m*30)...)
	}
	for w := 9; w >= 3; w-- {
		ages = append(ages, days(w*7, w*7)...)
	}
	g := sampleGuest("110", "web.example.org", append(ages, days(13, 0)...)...)
	g.Points[4].Protected = true
	last := &g.Points[len(g.Points)-1]
	last.Verified = &Verified{chain.ID(last.ID), created.Add(-3 * time.Hour), true, true, ""}
	last.Drilled = &Drilled{chain.ID(last.ID), created.Add(-2 * time.Hour), true, "the agent answers"}
	g.Verified, g.Drilled = last.Verified, last.Drilled
	return g
}

// twoChains has a new full, a copy, a diff, a removed point and a pause.
func twoChains() *Guest {
	g := sampleGuest("120", "db", append(days(30, 20), days(9, 0)...)...)
	p := g.Points
	p[0].Removed = true
	p[14].Level, p[14].Parents, p[14].Bytes = chain.Full, nil, 12<<30
	p[16].Level, p[16].Parents, p[16].Bytes = chain.Copy, nil, 12<<30
	p[17].Parents = []string{p[15].ID}
	p[18].Level, p[18].Bytes = chain.Diff, 900<<20
	p[19].Level, p[19].Parents = chain.Diff, []string{p[17].ID}
	p[20].Level, p[20].Parents = chain.Mixed, []string{p[17].ID}
	p[20].Protected = true
	g.Drilled = &Drilled{chain.ID(p[20].ID), created.Add(-26 * time.Hour), false, "no sign of life within 5m0s"}
	p[20].Drilled = g.Drilled
	return g
}

// damaged has points that are not whole.
func damaged() *Guest {
	g := sampleGuest("mail", "", days(12, 0)...)
	p := g.Points
	p[5].Damage = []string{"disk scsi0: its image mail/images/" + p[5].ID + ".scsi0.qcow2 is missing"}
	for i := 6; i < len(p); i++ {
		p[i].Damage = []string{"disk scsi0: the point " + p[i-1].ID + " that it was made on is not whole"}
	}
	p[8] = Point{ID: p[8].ID, Time: p[8].Time, Unreadable: true, Damage: []string{"manifest has no seal"}}
	p[9].Parents = []string{"20261101T000000Z-dead"}
	return g
}

func late() *Guest { return sampleGuest("win11", "Windows 11 (test)", days(9, 4)...) }

func empty() *Guest { return &Guest{Name: "gone", State: Good, Remarks: []Remark{}} }

// untrusted has texts that must not become anything else.
func untrusted() *Guest {
	g := sampleGuest("zz", hostile, days(2, 0)...)
	g.Points[1].Note = hostile
	g.Points[2].Disks[0].Reason = hostile
	g.remark(Warning, "%s", hostile)
	return g
}

// many has more points than there are places.
func many() *Guest {
	g := sampleGuest("many", "", days(239, 0)...)
	g.Points[100].Protected = true
	g.Points[120].Level, g.Points[120].Parents, g.Points[120].Bytes = chain.Full, nil, 12<<30
	return g
}
