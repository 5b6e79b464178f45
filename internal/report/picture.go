package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
)

// picture is one guest's points as they are drawn. Lengths are in CSS pixels.
type picture struct {
	Width, Height float64
	Places        []place
	Links         []link
	Gaps          []gapLabel // where there was no point for long
	Dates         []label
	Scale         []label // of the bars
	Now           float64 // x of the moment of the report
	Single        int     // points that have a place of their own
	Grouped       int     // points in groups
}

// place is where a point, or a group of points, stands.
type place struct {
	Symbol    string // of its level; see page.html
	X         float64
	Bar       float64 // height
	BarY      float64
	Title     string
	Count     int // of points
	Protected bool
	Removed   bool
	Damaged   bool

	points []*Point
	time   time.Time
}

// link joins a place to what it was made on.
type link struct {
	Path   string
	Broken bool // it is missing
}

type label struct {
	X, Y float64
	Text string
}

type gapLabel struct {
	From, To float64
	label
}

// The measures of a picture, from top to bottom: arcs, the line of nodes, bars, dates.
const (
	lineY     = 34
	nodeSize  = 6 // half of it
	barsTop   = 50
	barsY     = 114 // their foot
	dateY     = 130
	height    = 136
	leftEdge  = 32
	rightEdge = 92 // for the present and the scale
	wide      = 760
	minStep   = 15
	maxStep   = 44
	dateStep  = 76 // that a date needs
)

// draw makes the picture of a guest's points in at most so many places.
func draw(points []Point, now time.Time, places int) picture {
	p := picture{Height: height}
	for _, group := range grouped(points, places) {
		p.Places = append(p.Places, placeOf(group))
		if len(group) == 1 {
			p.Single++
		} else {
			p.Grouped += len(group)
		}
	}
	p.spread(now)
	p.bars()
	p.join()
	return p
}

// alwaysSingle is how many of the newest points are never in a group.
const alwaysSingle = 8

// grouped divides points into runs of which each gets a place. Where there is room all are single; else runs of older
// points grow until there is. What a reader looks for is kept single for as long as there is room.
func grouped(points []Point, places int) [][]*Point {
	divide := func(size int, apart func(i int) bool) (groups [][]*Point) {
		open := false // the last group can grow
		for i := range points {
			single := apart(i)
			if single || !open || len(groups[len(groups)-1]) >= size {
				groups = append(groups, nil)
			}
			groups[len(groups)-1] = append(groups[len(groups)-1], &points[i])
			open = !single
		}
		return groups
	}
	newest := func(i int) bool { return i >= len(points)-alwaysSingle }
	special := func(i int) bool {
		p := &points[i]
		return newest(i) || p.Level != chain.Inc || p.Protected || p.Removed || p.damaged() || p.Unreadable
	}
	if groups := divide(1, special); len(groups) <= places {
		return groups
	}
	for _, apart := range []func(int) bool{special, newest, func(int) bool { return false }} {
		if len(divide(len(points), apart)) > places {
			continue // however large the groups
		}
		for size := max(2, len(points)/places); ; size += 1 + size/16 {
			if groups := divide(size, apart); len(groups) <= places {
				return groups
			}
		}
	}
	return divide(len(points), func(int) bool { return false }) // one place for all
}

// placeOf is the place of some points, without its measures.
func placeOf(points []*Point) place {
	last := points[len(points)-1]
	p := place{points: points, Count: len(points), time: last.Time, Symbol: symbol(last)}
	var stored int64
	for _, q := range points {
		stored += q.Bytes
		p.Protected = p.Protected || q.Protected
		p.Damaged = p.Damaged || q.damaged() || q.Unreadable
		p.Removed = p.Removed || q.Removed
	}
	if len(points) > 1 {
		p.Symbol = "group"
		p.Title = fmt.Sprintf("%d points, %s to %s, %s", len(points), minute(points[0].Time), minute(last.Time), iec(stored))
		if p.Removed {
			p.Title += ", removed ones among them"
		}
	} else {
		p.Title = fmt.Sprintf("%s, %s, %s", minute(last.Time), levelName(last), iec(stored))
		if p.Removed {
			p.Title += ", removed, but needed by others"
		}
		if v := last.Verified; v != nil && v.Good {
			p.Title += ", verified"
		}
		if d := last.Drilled; d != nil {
			p.Title += map[bool]string{true: ", drill passed", false: ", drill failed"}[d.Passed]
		}
	}
	if p.Protected {
		p.Title += ", protected"
	}
	if p.Damaged {
		p.Title += ", not whole"
	}
	return p
}

func symbol(p *Point) string {
	if p.Level == "" {
		return "unknown"
	}
	return string(p.Level)
}

func levelName(p *Point) string {
	if p.Level == "" {
		return "unreadable"
	}
	return string(p.Level)
}

// longGap is how many times the usual distance a pause must have to be shown as one.
const longGap = 2.5

// spread gives the places their x. Each has room, and a pause has more: to scale, the backups of the last days would be
// one blot beside those of the last years.
func (p *picture) spread(now time.Time) {
	n := len(p.Places)
	if n == 0 {
		p.Width = leftEdge + rightEdge
		return
	}
	var usual time.Duration
	if n > 1 {
		var all []time.Duration
		for i := 1; i < n; i++ {
			all = append(all, p.Places[i].points[0].Time.Sub(p.Places[i-1].time))
		}
		slices.Sort(all)
		usual = all[len(all)/2]
	}
	long := func(d time.Duration) bool { return usual > 0 && float64(d) > longGap*float64(usual) }
	steps := make([]float64, n) // before each place, in the usual step
	total := 0.0
	for i := 1; i < n; i++ {
		steps[i] = 1
		if long(p.Places[i].points[0].Time.Sub(p.Places[i-1].time)) {
			steps[i] = longGap
		}
		total += steps[i]
	}
	step := min(max(wide/max(total, 1), minStep), maxStep)
	x := float64(leftEdge)
	for i := range p.Places {
		if from := x; steps[i] > 1 {
			x += steps[i] * step
			d := p.Places[i].points[0].Time.Sub(p.Places[i-1].time)
			p.Gaps = append(p.Gaps, gapLabel{from + nodeSize + 3, x - nodeSize - 3, label{round((from + x) / 2), lineY + 14, span(d)}})
		} else {
			x += steps[i] * step
		}
		p.Places[i].X = round(x)
	}
	p.Now = round(x + min(max(step, 26), 44))
	if d := now.Sub(p.Places[n-1].time); long(d) {
		p.Gaps = append(p.Gaps, gapLabel{x + nodeSize + 3, p.Now - 3, label{round((x + p.Now) / 2), lineY + 14, span(d)}})
	}
	p.Width = round(p.Now + rightEdge - 26)
	next := 0.0
	for _, q := range p.Places {
		if q.X >= next && !q.time.IsZero() {
			p.Dates = append(p.Dates, label{q.X, dateY, q.time.Format("2006-01-02")})
			next = q.X + dateStep
		}
	}
}

// bars gives the bars their heights, which are logarithmic: a full is a thousand times as large as an increment.
func (p *picture) bars() {
	least, most := int64(math.MaxInt64), int64(0)
	size := func(q *place) (n int64) {
		for _, r := range q.points {
			n = max(n, r.Bytes)
		}
		return n
	}
	for i := range p.Places {
		if n := size(&p.Places[i]); n > 0 {
			least, most = min(least, n), max(most, n)
		}
	}
	if most == 0 {
		return
	}
	// From a power of two below the least.
	low := math.Floor(math.Log2(float64(least))) - 1
	high := math.Max(math.Log2(float64(most)), low+2)
	at := func(bytes float64) float64 {
		return round((barsY - barsTop) * (math.Log2(bytes) - low) / (high - low))
	}
	for i := range p.Places {
		if n := size(&p.Places[i]); n > 0 {
			p.Places[i].Bar = max(at(float64(n)), 1)
			p.Places[i].BarY = barsY - p.Places[i].Bar
		}
	}
	// A line at each unit of 1024, or where these are far apart at more.
	for _, every := range []float64{10, 5, 2} {
		p.Scale = nil
		for e := math.Ceil((low+0.01)/every) * every; e <= high; e += every {
			p.Scale = append(p.Scale, label{p.Width, barsY - at(math.Exp2(e)), iec(int64(math.Exp2(e)))})
		}
		if len(p.Scale) >= 2 {
			break
		}
	}
}

// join draws what was made on what.
func (p *picture) join() {
	at := map[string]int{} // by id, index in p.Places
	for i := range p.Places {
		for _, q := range p.Places[i].points {
			at[q.ID] = i
		}
	}
	for i := range p.Places {
		var parents []string
		for _, q := range p.Places[i].points {
			parents = append(parents, q.Parents...)
		}
		slices.Sort(parents)
		drawn := map[int]bool{i: true}
		for _, id := range slices.Compact(parents) {
			j, ok := at[id]
			switch {
			case !ok && !drawn[-1]:
				drawn[-1] = true
				p.Links = append(p.Links, link{fmt.Sprintf("M%g %dh-12", p.Places[i].X-nodeSize, lineY), true})
			case ok && !drawn[j]:
				drawn[j] = true
				p.Links = append(p.Links, p.link(j, i))
			}
		}
	}
}

// link is the line from one place to a later one: straight to a neighbour, else an arc above those between.
func (p *picture) link(from, to int) link {
	a, b := p.Places[from].X, p.Places[to].X
	if to == from+1 {
		return link{Path: fmt.Sprintf("M%g %dH%g", a+nodeSize, lineY, b-nodeSize)}
	}
	up := math.Min(8+4*math.Log2(float64(to-from)), lineY-nodeSize-4)
	y := float64(lineY - nodeSize)
	// A cubic curve reaches three quarters of what its handles do.
	return link{Path: fmt.Sprintf("M%g %gC%g %g %g %g %g %g", a, y, a, round(y-up*4/3), b, round(y-up*4/3), b, y)}
}

// round is enough for a screen, and keeps the page small.
func round(x float64) float64 { return math.Round(x*10) / 10 }

// describe is the picture in words.
func (p *picture) describe(points []Point) string {
	if len(points) == 0 {
		return "There is no point."
	}
	levels := map[string]int{}
	protected, damaged, removed := 0, 0, 0
	for i := range points {
		q := &points[i]
		if q.Removed {
			removed++
			continue
		}
		levels[levelName(q)]++
		if q.Protected {
			protected++
		}
		if q.damaged() || q.Unreadable {
			damaged++
		}
	}
	var parts []string
	for _, level := range []string{"full", "inc", "diff", "copy", "mixed", "unreadable"} {
		if n := levels[level]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, level))
		}
	}
	for _, c := range []struct {
		n    int
		what string
	}{{protected, "protected"}, {damaged, "not whole"}, {removed, "removed but needed by others"}} {
		if c.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	return fmt.Sprintf("Points from %s to %s: %s.", minute(points[0].Time), minute(points[len(points)-1].Time), strings.Join(parts, ", "))
}
