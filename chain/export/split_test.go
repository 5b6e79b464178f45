package export

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestSplit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		pages string // d: data; z: zeroes; .: zeroes, but for the last byte; small letters at the end: half a page
		least int
		want  string
	}{
		{"", page, ""},
		{"d", page, "0-1"},
		{"z", page, "0-1z"},
		{"z", 9 * page, "0-1z"}, // all of it: nothing to write
		{"zz.", page, "0-2z 2-3"},
		{"dzd", page, "0-1 1-2z 2-3"},
		{"dzd", 2 * page, "0-3"},
		{"zdz", 2 * page, "0-3"},
		{"zzdzz", 2 * page, "0-2z 2-3 3-5z"},
		{"dzzdzdzz", 2 * page, "0-1 1-3z 3-6 6-8z"},
		{"..zz..", page, "0-2 2-4z 4-6"},
	} {
		var p []byte
		for _, c := range test.pages {
			b := make([]byte, page)
			switch c {
			case 'd':
				b[0] = 1
			case '.':
				b[page-1] = 1
			}
			p = append(p, b...)
		}
		var got []string
		err := split(p, test.least, func(start, end int, zero bool) error {
			got = append(got, fmt.Sprintf("%d-%d%s", start/page, end/page, map[bool]string{true: "z"}[zero]))
			return nil
		})
		if err != nil || strings.Join(got, " ") != test.want {
			t.Errorf("%q, %d: %q, %v", test.pages, test.least, got, err)
		}
	}
}

func TestSplitProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		length := rapid.IntRange(0, 20*page).Draw(t, "length")
		least := page * rapid.IntRange(1, 8).Draw(t, "least")
		rnd := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		p := make([]byte, length)
		for range rapid.IntRange(0, 6).Draw(t, "writes") {
			if length > 0 {
				p[rnd.IntN(length)] = 1
			}
		}
		at, failAt := 0, rapid.IntRange(0, 30).Draw(t, "fail at")
		wasZero := false
		calls := 0
		bad := errors.New("bad")
		err := split(p, least, func(start, end int, zero bool) error {
			if calls++; calls == failAt {
				return bad
			}
			if start != at || end <= start || at > 0 && zero == wasZero {
				t.Fatalf("%d to %d after %d", start, end, at)
			}
			if zero != (len(bytes.Trim(p[start:end], "\x00")) == 0) && (zero || end-start >= least) {
				t.Fatalf("%d to %d: zero is %v", start, end, zero)
			}
			at, wasZero = end, zero
			return nil
		})
		if calls == failAt && failAt > 0 {
			if !errors.Is(err, bad) {
				t.Fatalf("%v", err)
			}
		} else if err != nil || at != length {
			t.Fatalf("ends at %d of %d, %v", at, length, err)
		}
	})
}
