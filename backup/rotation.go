package backup

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"qmchain/chain"
)

// Rotation says when a chain is long or old enough for a new one to begin with a full. The zero value says never.
type Rotation struct {
	period string        // "monthly", "weekly" or "daily": a calendar period other than the full's
	points int           // the chain has that many points
	age    time.Duration // the full is that old
}

// ParseRotation reads monthly, weekly, daily, points:N or age:TIME, where TIME is a number with d, w, h or m for days, weeks,
// hours and minutes.
func ParseRotation(s string) (Rotation, error) {
	kind, value, _ := strings.Cut(s, ":")
	switch {
	case s == "":
		return Rotation{}, nil
	case s == "monthly", s == "weekly", s == "daily":
		return Rotation{period: s}, nil
	case kind == "points":
		if n, err := strconv.Atoi(value); err == nil && n > 0 {
			return Rotation{points: n}, nil
		}
	case kind == "age":
		if age, err := parseAge(value); err == nil {
			return Rotation{age: age}, nil
		}
	}
	return Rotation{}, fmt.Errorf("%q does not say when a new chain begins: monthly, weekly, daily, points:N or age:30d", s)
}

func parseAge(s string) (time.Duration, error) {
	units := map[string]time.Duration{"m": time.Minute, "h": time.Hour, "d": 24 * time.Hour, "w": 7 * 24 * time.Hour}
	if s == "" {
		return 0, strconv.ErrSyntax
	}
	n, err := strconv.Atoi(s[:len(s)-1])
	unit := units[s[len(s)-1:]]
	if err != nil || n <= 0 || unit == 0 || n > 36500 {
		return 0, strconv.ErrSyntax
	}
	return time.Duration(n) * unit, nil
}

// due returns why a new chain is to begin now in place of one more point on these layers, or "". Calendar periods are those
// of now's time zone.
func (r Rotation) due(layers []chain.Layer, now time.Time) string {
	began := layers[0].Point.Time.In(now.Location())
	switch {
	case r.period == "monthly" && began.Format("2006-01") != now.Format("2006-01"),
		r.period == "weekly" && week(began) != week(now),
		r.period == "daily" && began.Format(time.DateOnly) != now.Format(time.DateOnly):
		return fmt.Sprintf("a new chain %s: the last one began at %s", r.period, began.Format(time.DateTime))
	case r.points > 0 && len(layers) >= r.points:
		return fmt.Sprintf("a new chain: the last one has %d points", len(layers))
	case r.age > 0 && now.Sub(began) >= r.age:
		return fmt.Sprintf("a new chain: the last one began at %s", began.Format(time.DateTime))
	}
	return ""
}

func week(t time.Time) [2]int {
	year, week := t.ISOWeek()
	return [2]int{year, week}
}
