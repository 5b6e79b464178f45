package listing

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dustin/go-humanize"

	"qmchain/chain"
	"qmchain/internal/ui"
)

// The columns of a tree.
const (
	name = iota // with the lines that lead to it
	age
	level
	size
	stored
	remark
	columns
)

type row [columns]string

// right are the columns that are lined up at their right.
var right = [columns]bool{age: true, size: true, stored: true}

// The lines that lead to a row, as they go on below it and at it.
const (
	through = "│  "
	beyond  = "   "
	branch  = "├─ "
	end     = "└─ "
)

// entry is a point of a chain: one that can be read, or only what is known of one that can't.
type entry struct {
	id    string
	point *Point // nil: it can't be read
	why   string // it can't
}

// tree is the rows of a listing: each guest, below it its chains by their first point, and below that the others of the chain.
// That one chain's points are all on one level, and not each below its parent, keeps long chains on the page.
func (l *listing) tree(now time.Time, long bool) tree {
	return append(tree{heading}, l.rows(now, long)...)
}

var heading = row{"POINT", "AGE", "LEVEL", "SIZE", "STORED", "REMARK"}

// rows are those below the heading.
func (l *listing) rows(now time.Time, long bool) (t tree) {
	for guest, entries := range l.guests() {
		chains := chainsOf(entries)
		t = append(t, guestRow(guest, entries, len(chains), now))
		for i, c := range chains {
			at, below := branch, through
			if i == len(chains)-1 {
				at, below = end, beyond
			}
			for j, e := range c {
				onward := beyond
				if j < len(c)-1 {
					onward = through
				}
				switch {
				case j > 0 && onward == through:
					at = below + branch
				case j > 0:
					at = below + end
				}
				t = append(t, pointRow(at, e, before(c, j), now, long))
				if long {
					t = append(t, diskRows(below+onward, e)...)
				}
			}
		}
	}
	return t
}

type tree []row

// guests goes through what was found of each guest, in the order of their ids.
func (l *listing) guests() func(yield func(string, []entry) bool) {
	return func(yield func(string, []entry) bool) {
		var names []string
		found := map[string][]entry{}
		add := func(guest string, e entry) {
			if found[guest] == nil {
				names = append(names, guest)
			}
			found[guest] = append(found[guest], e)
		}
		for i := range l.points {
			add(l.points[i].Guest, entry{id: string(l.points[i].ID), point: &l.points[i]})
		}
		for _, p := range l.problems {
			if p.lost {
				add(p.guest, entry{id: p.point, why: p.text})
			}
		}
		for _, guest := range names {
			slices.SortStableFunc(found[guest], func(a, b entry) int { return strings.Compare(a.id, b.id) })
			if !yield(guest, found[guest]) {
				return
			}
		}
	}
}

// chainsOf puts points into chains: each into that of the newest point that one of its disks was made on.
func chainsOf(entries []entry) [][]entry {
	var chains [][]entry
	of := map[chain.ID]int{} // by point; also those that are not there any more, but that others were made on
	for _, e := range entries {
		var parent chain.ID
		if e.point != nil {
			for _, d := range e.point.Disks {
				parent = max(parent, d.Parent)
			}
		}
		i, known := of[parent]
		if !known || parent == "" {
			i = len(chains)
			chains = append(chains, nil)
			if parent != "" {
				of[parent] = i
			}
		}
		chains[i] = append(chains[i], e)
		of[chain.ID(e.id)] = i
	}
	return chains
}

// before is the last readable point before the one at i, or nil.
func before(c []entry, i int) *Point {
	for i--; i >= 0; i-- {
		if c[i].point != nil {
			return c[i].point
		}
	}
	return nil
}

func guestRow(guest string, entries []entry, chains int, now time.Time) row {
	r := row{name: guest, remark: fmt.Sprintf("%s in %s", count(len(entries), "point"), count(chains, "chain"))}
	var all int64
	for _, e := range entries {
		if e.point == nil {
			continue
		}
		virtual, images := e.point.sizes()
		all += images
		r[age], r[size] = ageText(now.Sub(e.point.Time)), bytesText(virtual)
		if e.point.VMName != "" && e.point.VMName != guest {
			r[remark] = e.point.VMName + ": " + fmt.Sprintf("%s in %s", count(len(entries), "point"), count(chains, "chain"))
		}
	}
	r[stored] = bytesText(all)
	return r
}

func pointRow(at string, e entry, last *Point, now time.Time, long bool) row {
	if e.point == nil {
		return row{name: at + e.id, level: "?", remark: strings.Join(strings.Fields(e.why), " ")}
	}
	p := e.point
	virtual, images := p.sizes()
	r := row{name: at + e.id, age: ageText(now.Sub(p.Time)), level: string(p.Level), size: bytesText(virtual), stored: bytesText(images)}
	var remarks []string
	if p.Protected {
		remarks = append(remarks, "protected")
	}
	if damaged := p.damaged(); damaged != "" {
		remarks = append(remarks, damaged)
	}
	switch {
	case long:
		remarks = append(remarks, p.Time.Local().Format("2006-01-02 15:04:05"))
		if p.Consistency != chain.Unknown {
			remarks = append(remarks, string(p.Consistency))
		}
	case p.Level == chain.Mixed:
		remarks = append(remarks, p.disks(true))
	case last == nil || last.disks(false) != p.disks(false):
		remarks = append(remarks, p.disks(false))
	}
	if note := strings.Join(strings.Fields(p.Note), " "); note != "" {
		remarks = append(remarks, note)
	}
	r[remark] = strings.Join(remarks, ", ")
	return r
}

// diskRows are those of a point's disks.
func diskRows(at string, e entry) (rows []row) {
	if e.point == nil {
		return nil
	}
	for _, d := range e.point.Disks {
		r := row{name: at + d.Name, level: string(d.Level), size: bytesText(d.VirtualSize), stored: bytesText(d.Bytes), remark: d.Reason}
		if d.Parent != "" {
			r[remark] = "since " + string(d.Parent)
		}
		if d.Damage != "" {
			r[remark] = strings.TrimPrefix(r[remark]+"; "+d.Damage, "; ")
		}
		rows = append(rows, r)
	}
	return rows
}

// sizes are those of its disks and of its images.
func (p *Point) sizes() (virtual, images int64) {
	for _, d := range p.Disks {
		virtual, images = virtual+d.VirtualSize, images+d.Bytes
	}
	return virtual, images
}

// damaged says which of its disks verify has found damaged.
func (p *Point) damaged() string {
	var names []string
	for _, d := range p.Disks {
		if d.Damage != "" {
			names = append(names, d.Name)
		}
	}
	switch len(names) {
	case 0:
		return ""
	case len(p.Disks):
		return "DAMAGED"
	}
	return "DAMAGED (" + strings.Join(names, ", ") + ")"
}

// disks names its disks.
func (p *Point) disks(levels bool) string {
	var names []string
	for _, d := range p.Disks {
		text := d.Name
		if levels {
			text += " " + string(d.Level)
		}
		names = append(names, text)
	}
	return strings.Join(names, ", ")
}

// print writes the rows in lines of at most width columns, if that is not 0. Where the terminal is narrow, columns that can be
// missed give way to the remarks.
func (t tree) print(w io.Writer, unicode bool, width int) error {
	var wide [columns]int
	for i := range t {
		if !unicode {
			t[i][name] = inASCII.Replace(t[i][name])
		}
		for c, text := range t[i][:remark] {
			wide[c] = max(wide[c], utf8.RuneCountInString(text))
		}
	}
	if width > 0 {
		for _, c := range []int{size, level, stored} {
			if sum(wide)+leastRemark > width {
				wide[c] = 0
			}
		}
	}
	b := bufio.NewWriter(w)
	for _, r := range t {
		if _, err := b.WriteString(ui.Cut(r.line(wide), width) + "\n"); err != nil {
			return err
		}
	}
	return b.Flush()
}

var inASCII = strings.NewReplacer(through, "|  ", branch, "|- ", end, "`- ")

const (
	gap         = 2  // between columns
	leastRemark = 12 // what of a remark is worth a column's place
)

func sum(wide [columns]int) (n int) {
	for _, w := range wide {
		if w > 0 {
			n += w + gap
		}
	}
	return n
}

// line lines up a row's cells; those of columns without a width are left out.
func (r row) line(wide [columns]int) string {
	var b strings.Builder
	for c, text := range r[:remark] {
		if wide[c] == 0 {
			continue
		}
		room := strings.Repeat(" ", wide[c]-utf8.RuneCountInString(text))
		if right[c] {
			text = room + text
		} else {
			text += room
		}
		b.WriteString(text + strings.Repeat(" ", gap))
	}
	return strings.TrimRight(b.String()+r[remark], " ")
}

// ageText is a time that has passed, in one unit. The clock that a point was taken by can be ahead of ours.
func ageText(d time.Duration) string {
	const day = 24 * time.Hour
	switch d = max(d, 0); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dmin", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d < 1000*day:
		return fmt.Sprintf("%dd", d/day)
	}
	return fmt.Sprintf("%dy", d/(365*day))
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
