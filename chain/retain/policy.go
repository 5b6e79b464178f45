package retain

import (
	"fmt"
	"time"

	"qmchain/chain"
)

// Policy says how many points to keep. The words and their meaning are those of Proxmox VE's prune-backups: each period keeps
// the newest point in it, for that many periods which have one; a period that already keeps a point, for the sake of a
// shorter one, does not count. The zero value keeps all.
type Policy struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly int

	// Location is where days begin; nil is the local time zone.
	Location *time.Location
}

// KeepsAll reports whether the policy removes nothing.
func (p Policy) KeepsAll() bool {
	return p.Last <= 0 && p.Hourly <= 0 && p.Daily <= 0 && p.Weekly <= 0 && p.Monthly <= 0 && p.Yearly <= 0
}

// Verdict is what becomes of a point.
type Verdict struct {
	Point  *chain.Manifest
	Keep   bool
	Reason string // why it is kept; "" where it is not
}

// Apply says what becomes of each point, the oldest first. Points that are bases already are left out.
//
// Beyond the policy itself, protected points are kept, which do not count for it, and so are tracking parents.
func (p Policy) Apply(points chain.Points) []Verdict {
	kept := points.Kept()
	reasons := make([]string, len(kept))
	if p.KeepsAll() {
		for i := range reasons {
			reasons[i] = "keep-all"
		}
	}
	where := p.Location
	if where == nil {
		where = time.Local
	}
	mark := func(word string, keep int, period func(time.Time) string) {
		if keep <= 0 {
			return
		}
		covered, counted := make(map[string]bool), 0
		for i, m := range kept {
			if reasons[i] != "" {
				covered[period(m.Time.In(where))] = true
			}
		}
		for i := len(kept) - 1; i >= 0 && counted < keep; i-- {
			id := period(kept[i].Time.In(where))
			if reasons[i] != "" || kept[i].Protected || covered[id] {
				continue
			}
			covered[id] = true
			counted++
			reasons[i] = word
		}
	}
	unique := 0
	mark("keep-last", p.Last, func(time.Time) string { unique++; return fmt.Sprint(unique) })
	mark("keep-hourly", p.Hourly, func(t time.Time) string { return t.Format("2006-01-02 15") })
	mark("keep-daily", p.Daily, func(t time.Time) string { return t.Format("2006-01-02") })
	mark("keep-weekly", p.Weekly, func(t time.Time) string {
		year, week := t.ISOWeek()
		return fmt.Sprint(year, week)
	})
	mark("keep-monthly", p.Monthly, func(t time.Time) string { return t.Format("2006-01") })
	mark("keep-yearly", p.Yearly, func(t time.Time) string { return t.Format("2006") })

	verdicts := make([]Verdict, len(kept))
	for i, m := range kept {
		reason := reasons[i]
		switch disk := trackedDisk(points, m); {
		case m.Protected:
			reason = "protected"
		case reason == "" && disk != "":
			reason = "increments of " + disk + " go on from it"
		}
		verdicts[i] = Verdict{Point: m, Keep: reason != "", Reason: reason}
	}
	return verdicts
}

// trackedDisk returns a disk whose next increment goes on from the point, or "".
func trackedDisk(points chain.Points, m *chain.Manifest) string {
	for _, d := range m.Disks {
		if layer, _ := points.Tracked(chain.BitmapName{Point: m.ID, Disk: d.Name}); layer != nil {
			return d.Name
		}
	}
	return ""
}
