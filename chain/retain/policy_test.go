package retain_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/retain"
)

// at makes points of these times, each a full of a disk of its own, so that none is a tracking parent but the last.
func at(times ...string) chain.Points {
	var points chain.Points
	var last chain.ID
	for _, s := range times {
		when, err := time.Parse("2006-01-02 15:04", s)
		if err != nil {
			panic(err)
		}
		last = chain.NewID(when, last, 1)
		points = append(points, &chain.Manifest{ID: last, UUID: fmt.Sprintf("%032x", len(points)), Time: when, Disks: []chain.Disk{{Name: "scsi0", Level: chain.Full}}})
	}
	return points
}

func TestPolicy(t *testing.T) {
	points := at("2024-06-01 12:00", "2025-12-29 10:00", "2025-12-31 10:00", "2026-01-01 10:00", "2026-01-02 09:10", "2026-01-02 09:50",
		"2026-01-02 10:00", "2026-01-03 08:00", "2026-01-03 09:00")
	for _, test := range []struct {
		policy retain.Policy
		keep   string // indices
	}{
		{retain.Policy{}, "0 1 2 3 4 5 6 7 8"},
		{retain.Policy{Last: 1}, "8"},
		{retain.Policy{Last: 3}, "6 7 8"},
		{retain.Policy{Hourly: 3}, "6 7 8"},
		{retain.Policy{Hourly: 4}, "5 6 7 8"},
		{retain.Policy{Daily: 2}, "6 8"},
		{retain.Policy{Daily: 100}, "0 1 2 3 6 8"},
		{retain.Policy{Last: 1, Daily: 1}, "6 8"}, // the day of the last one is covered
		{retain.Policy{Last: 2, Daily: 1}, "6 7 8"},
		{retain.Policy{Weekly: 2}, "0 8"}, // 29 December to 4 January is one week
		{retain.Policy{Monthly: 2}, "2 8"},
		{retain.Policy{Yearly: 2}, "2 8"},
		{retain.Policy{Yearly: 3}, "0 2 8"},
		{retain.Policy{Last: 1, Daily: 1, Monthly: 1, Yearly: 1}, "0 2 6 8"},
	} {
		test.policy.Location = time.UTC
		var keep []string
		for i, v := range test.policy.Apply(points) {
			if v.Keep != (v.Reason != "") {
				t.Errorf("%+v", v)
			}
			if v.Keep {
				keep = append(keep, fmt.Sprint(i))
			}
		}
		if got := strings.Join(keep, " "); got != test.keep {
			t.Errorf("%+v keeps %s, not %s", test.policy, got, test.keep)
		}
	}
}

func TestPolicyKeepsWhatItMust(t *testing.T) {
	points := at("2026-01-01 10:00", "2026-01-02 10:00", "2026-01-03 10:00", "2026-01-04 10:00")
	points[0].Protected = true
	points[1].Base = true
	points[3].Disks[0].Level = chain.Copy // tracking goes on from the one before
	var reasons []string
	for _, v := range (retain.Policy{Last: 1, Location: time.UTC}).Apply(points) {
		reasons = append(reasons, string(v.Point.ID)+": "+v.Reason)
	}
	want := []string{string(points[0].ID) + ": protected", string(points[2].ID) + ": increments of scsi0 go on from it", string(points[3].ID) + ": keep-last"}
	if strings.Join(reasons, "\n") != strings.Join(want, "\n") {
		t.Errorf("%q", reasons)
	}
}
