package cli

import (
	"strings"
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"0": 0, "0s": 0, "90s": 90 * time.Second, "10m": 10 * time.Minute, "26h": 26 * time.Hour, "1h30m": 90 * time.Minute,
		"1d": 24 * time.Hour, "2w": 14 * 24 * time.Hour, "1d12h": 36 * time.Hour, "1.5d": 36 * time.Hour, "0.5s": 500 * time.Millisecond,
		"3us": 3 * time.Microsecond, "3µs": 3 * time.Microsecond, "250ms": 250 * time.Millisecond, "5ns": 5, "200y": -1, "876000h": 876000 * time.Hour,
		"": -1, "1": -1, "1.5": -1, "-1s": -1, "1 s": -1, "s": -1, "1s2": -1, "1x": -1, "1.s": -1, ".5s": -1, "1e3s": -1, "1D": -1, "1s-2s": -1,
		"300000000000d": -1, "15251w": -1, "1" + strings.Repeat("0", 400) + "s": -1,
	} {
		got, err := ParseDuration(text)
		if want < 0 {
			if err == nil {
				t.Errorf("%q: %s", text, got)
			}
			continue
		}
		if err != nil || got != want {
			t.Errorf("%q: %s, %v; want %s", text, got, err, want)
		}
		// What is printed is read again: processes pass it on.
		if again, err := ParseDuration(got.String()); err != nil || again != got {
			t.Errorf("%s: %s, %v", got, again, err)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	f.Add("1d12h")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDuration(text)
		if err == nil && d < 0 {
			t.Errorf("%q: %s", text, d)
		}
		if want, stdErr := time.ParseDuration(text); err == nil && stdErr == nil && (want-d).Abs() > time.Microsecond {
			t.Errorf("%q: %s, and time.ParseDuration has %s", text, d, want)
		}
	})
}
