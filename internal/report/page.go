package report

import (
	"crypto/sha256"
	_ "embed" // the page's parts
	"encoding/base64"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

//go:embed page.html
var pageHTML string

//go:embed page.css
var pageCSS string

// The bounds of a page. Half a thousand guests with hundreds of points each make 4 MB, and less than
// twice that if all their texts are as long as can be.
const (
	maxPlaces  = 10_000 // in all pictures
	mostPlaces = 60     // in one
	fewPlaces  = 20
	maxRows    = 5_000 // in all tables of points
	mostRows   = 200   // in one
	fewRows    = 8
	maxRemarks = 12 // of a guest
	maxText    = 400
)

// share is what one of n guests gets of a bound.
func share(all, n, few, most int) int { return min(max(all/max(n, 1), few), most) }

// Page writes the report as one HTML page.
func (r *Report) Page(w io.Writer) error {
	t, err := template.New("page").Funcs(template.FuncMap{
		"bytes": iec, "second": second, "minute": minute, "counted": counted, "short": short,
		"comma": func(n int) string { return humanize.Comma(int64(n)) },
		"ago":   func(t time.Time) string { return ago(t, r.Created) },
		"iso":   func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	}).Parse(pageHTML)
	if err != nil {
		return fmt.Errorf("page: %w", err)
	}
	if err := t.Execute(w, r.page()); err != nil {
		return fmt.Errorf("page: %w", err)
	}
	return nil
}

// page is what the template is given.
type page struct {
	*Report
	CSS    template.CSS
	Policy string // what the browser may do: apply that style
	Limit  string // that the newest point of a guest may have as its age
	Sum    summary
	Guests []*guestPage
}

// summary is what stands at the top.
type summary struct {
	Good, Warning, Bad int // guests
	Size               int64
	Damaged, Protected int    // points
	Oldest             *Guest // whose last point is the oldest
	Without            int    // guests without a point that is whole
	Verified           int    // guests of which a point ever was
	DrillPassed        int    // guests, by their last one
	DrillFailed        int
}

// guestPage is one guest on the page.
type guestPage struct {
	*Guest
	Index    int // which makes ids
	Kept     int
	Shown    []Remark
	Hidden   int // remarks beyond these
	Picture  picture
	InWords  string
	Rows     []row
	NotShown int // points beyond the rows
}

// row is one point in a guest's table.
type row struct {
	*Point
	Remarks []Remark
}

func (r *Report) page() *page {
	sum := sha256.Sum256([]byte(pageCSS))
	p := &page{
		Report: r, CSS: template.CSS(pageCSS),
		Policy: "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; img-src data:; base-uri 'none'; form-action 'none'",
		Limit:  span(time.Duration(r.MaxAge * float64(time.Second))),
	}
	places := share(maxPlaces, len(r.Guests), fewPlaces, mostPlaces)
	rows := share(maxRows, len(r.Guests), fewRows, mostRows)
	for i, g := range r.Guests {
		p.Sum.add(g)
		p.Guests = append(p.Guests, guestOnPage(i, g, r.Created, places, rows))
	}
	return p
}

func (s *summary) add(g *Guest) {
	switch g.State {
	case Good:
		s.Good++
	case Warning:
		s.Warning++
	case Bad:
		s.Bad++
	}
	s.Size += g.Size
	for i := range g.Points {
		p := &g.Points[i]
		if p.Removed {
			continue
		}
		if p.damaged() {
			s.Damaged++
		}
		if p.Protected {
			s.Protected++
		}
	}
	if g.Last == nil {
		s.Without++
	} else if s.Oldest == nil || g.Last.Before(*s.Oldest.Last) {
		s.Oldest = g
	}
	if g.Verified != nil {
		s.Verified++
	}
	switch {
	case g.Drilled == nil:
	case g.Drilled.Passed:
		s.DrillPassed++
	default:
		s.DrillFailed++
	}
}

func guestOnPage(index int, g *Guest, now time.Time, places, rows int) *guestPage {
	p := &guestPage{Guest: g, Index: index, Kept: g.kept(), Shown: g.Remarks, Picture: draw(g.Points, now, places)}
	if len(p.Shown) > maxRemarks {
		p.Shown, p.Hidden = p.Shown[:maxRemarks], len(p.Shown)-maxRemarks
	}
	p.InWords = p.Picture.describe(g.Points)
	for i := range slices.Backward(g.Points) { // the newest first
		if len(p.Rows) == rows {
			p.NotShown = i + 1
			break
		}
		p.Rows = append(p.Rows, rowOf(&g.Points[i]))
	}
	return p
}

func rowOf(p *Point) row {
	r := row{Point: p}
	note := func(state State, format string, args ...any) {
		r.Remarks = append(r.Remarks, Remark{state, short(fmt.Sprintf(format, args...))})
	}
	for i, d := range p.Damage {
		if i == 3 {
			note(Bad, "and %d more", len(p.Damage)-i)
			break
		}
		note(Bad, "%s", d)
	}
	if p.Unreadable && len(p.Damage) == 0 {
		note(Bad, "can't be read just now")
	}
	if p.Removed {
		note(Good, "removed; others need it still")
	}
	if p.Protected {
		note(Good, "protected")
	}
	if v := p.Verified; v != nil && v.Good {
		note(Good, "verified%s %s", map[bool]string{true: " deeply"}[v.Deep], minute(v.Time))
	}
	if d := p.Drilled; d != nil {
		if d.Passed {
			note(Good, "drill passed %s", minute(d.Time))
		} else {
			note(Warning, "drill failed %s: %s", minute(d.Time), d.Why)
		}
	}
	for _, d := range p.Disks {
		if d.Reason != "" {
			note(Good, "%s is %s: %s", d.Name, d.Level, d.Reason)
		}
	}
	if p.Note != "" {
		note(Good, "note: %s", p.Note)
	}
	return r
}

// short is a text, or its beginning.
func short(s string) string {
	if len(s) > 4*maxText {
		s = s[:4*maxText]
	}
	s = strings.Join(strings.Fields(s), " ")
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "…"
}
