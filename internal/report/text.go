package report

import (
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
)

// minute is an instant to the minute, for the middle of a sentence.
func minute(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

// second is an instant in full.
func second(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// iec is a size.
func iec(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

// counted is a number of things: "1 point", "2 points".
func counted(n int, one, many string) string {
	if n == 1 {
		many = one
	}
	return fmt.Sprintf("%s %s", humanize.Comma(int64(n)), many)
}

// span is a length of time in its largest unit, with one more digit where that is small.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%d h", d/time.Hour)
	case d < 7*day && d%day >= time.Hour:
		return fmt.Sprintf("%d d %d h", d/day, d%day/time.Hour)
	}
	return humanize.Comma(int64(d/day)) + " d"
}

// ago is an instant's distance from another, later one.
func ago(t, now time.Time) string {
	if now.Sub(t) < -time.Minute {
		return "in " + span(t.Sub(now))
	}
	return span(now.Sub(t)) + " ago"
}
