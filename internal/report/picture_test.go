package report

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"qmchain/chain"
)

func matches(pattern, text string) bool { return regexp.MustCompile(pattern).MatchString(text) }

// Whatever a guest has, the picture has all of it in order, in as many places as there are, and nothing lies upon anything.
func TestPicture(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 300).Draw(t, "points")
		places := rapid.IntRange(1, 80).Draw(t, "places")
		var points []Point
		at := created.Add(-1000 * time.Hour)
		for i := range n {
			at = at.Add(time.Duration(rapid.SampledFrom([]int{0, 1, 1, 1, 1, 24, 700}).Draw(t, "hours")) * time.Hour)
			p := Point{
				ID: fmt.Sprintf("%06d", i), Time: at, Level: rapid.SampledFrom([]chain.Level{"inc", "inc", "inc", "inc", "full", "diff", "copy", "mixed", ""}).Draw(t, "level"),
				Protected: rapid.IntRange(0, 9).Draw(t, "protected") == 0, Bytes: rapid.SampledFrom([]int64{0, 1, 1 << 20, 1 << 40, math.MaxInt64}).Draw(t, "bytes"),
			}
			if p.Level.Overlay() {
				p.Parents = []string{fmt.Sprintf("%06d", rapid.IntRange(-1, i-1).Draw(t, "parent"))}
			}
			points = append(points, p)
		}
		picture := draw(points, created, places)
		if len(picture.Places) > places || n <= places && len(picture.Places) != n {
			t.Fatalf("%d points in %d places, with room for %d", n, len(picture.Places), places)
		}
		var drawn []string
		x := 0.0
		for i, p := range picture.Places {
			if p.Count != len(p.points) || p.X-x < 2*nodeSize || p.Bar < 0 || p.Bar > barsY-barsTop || math.IsNaN(p.Bar) || p.Bar > 0 && math.Abs(p.BarY+p.Bar-barsY) > 0.01 {
				t.Fatalf("place %d after %g: %+v", i, x, p)
			}
			x = p.X
			protected := false
			for _, q := range p.points {
				drawn = append(drawn, q.ID)
				protected = protected || q.Protected
			}
			if protected != p.Protected || p.Title == "" {
				t.Fatalf("place %d: %+v", i, p)
			}
		}
		if len(drawn) != n || !slices.IsSorted(drawn) || picture.Single+picture.Grouped != n {
			t.Fatalf("%d points, of which %d are alone and %d in groups: %v", n, picture.Single, picture.Grouped, drawn)
		}
		if n > 0 && (picture.Now <= x || picture.Width <= picture.Now || picture.Width > 4000) {
			t.Fatalf("the picture is %g wide, and now is at %g", picture.Width, picture.Now)
		}
		for i := 1; i < len(picture.Dates); i++ {
			if picture.Dates[i].X-picture.Dates[i-1].X < dateStep-0.01 {
				t.Fatalf("dates lie on one another: %+v", picture.Dates)
			}
		}
		for _, l := range append(slices.Clone(picture.Dates), picture.Scale...) {
			if l.X < 29 || l.X > picture.Width || l.Y < 0 || l.Y > height {
				t.Fatalf("a label out of the picture: %+v", l)
			}
		}
	})
}

// What a reader looks for stays a place of its own, for as long as there is room.
func TestPictureSpecial(t *testing.T) {
	t.Parallel()
	g := many()
	p := draw(g.Points, created, mostPlaces)
	alone := map[string]bool{}
	for _, place := range p.Places {
		if place.Count == 1 {
			alone[place.points[0].ID] = true
		}
	}
	for _, i := range []int{0, 100, 120, len(g.Points) - 1, len(g.Points) - alwaysSingle} {
		if !alone[g.Points[i].ID] {
			t.Errorf("point %d is in a group", i)
		}
	}
	if len(p.Places) < mostPlaces/2 || p.Grouped == 0 {
		t.Errorf("%d places, %d points in groups", len(p.Places), p.Grouped)
	}
}

func TestSpan(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "0 s", -time.Hour: "0 s", 59 * time.Second: "59 s", time.Minute: "1 min", 119 * time.Minute: "119 min", 2 * time.Hour: "2 h", 47 * time.Hour: "47 h",
		48 * time.Hour: "2 d", 51 * time.Hour: "2 d 3 h", 7 * 24 * time.Hour: "7 d", 24000 * time.Hour: "1,000 d",
	} {
		if got := span(d); got != want {
			t.Errorf("%v is %q, not %q", d, got, want)
		}
	}
}

func TestShort(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ text, want string }{
		{" a\n b\t", "a b"},
		{strings.Repeat("x", maxText), strings.Repeat("x", maxText)},
		{strings.Repeat("x", maxText+1), strings.Repeat("x", maxText) + "…"},
		{strings.Repeat("x", maxText-1) + "ä", strings.Repeat("x", maxText-1) + "…"},
		{strings.Repeat("\n", 1<<20) + "x", ""},
	} {
		if got := short(c.text); got != c.want {
			t.Errorf("%d bytes become %q", len(c.text), got)
		}
	}
}
