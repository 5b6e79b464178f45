package figures

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// pageHead is the beginning of the page.
const pageHead = "# Benchmarks\n\n" + `What qmchain takes, beside what one would use instead, all in one run on one machine. ` + "`make bench` (quick) or `make bench-full` writes\n" +
	"this page, and `make bench-check` compares its ratios with new ones. Programs take turns in several rounds. Under qmchain stands the median of\n" +
	"its rounds. Under another program's name stand how many **times as good** as that qmchain was in the same round, as fast or as small, as the median\n" +
	"of the rounds and from the least to the most, and then the median of what that program took. Below 1 it was better than qmchain.\n" +
	"Programs are those of the system's packages, with their defaults. Aims are the project's own; those that are not reached are marked.\n"

// Markdown makes the page of a run. plots is the path from the page to the plots' folder.
func Markdown(r Run, plots string) []byte {
	var w strings.Builder
	w.WriteString(pageHead)
	fmt.Fprintf(&w, "\n## The run\n\n| | |\n|---|---|\n| form | %s, %s |\n| qmchain | %s |\n",
		r.Form, day(r.Time), cell(r.Version))
	for _, f := range r.Machine {
		fmt.Fprintf(&w, "| %s | %s |\n", cell(f.Name), cell(f.Value))
	}
	fmt.Fprintf(&w, "| load when cases began, much of it of the case before | %s |\n", loads(r.Cases))
	writeClaims(&w, r)
	for _, s := range sections {
		s.write(&w, r, plots)
	}
	writeCases(&w, r)
	return []byte(w.String())
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

// loads tells how much else the machine had to do.
func loads(cases []Case) string {
	var all []float64
	for _, c := range cases {
		all = append(all, c.Load)
	}
	if len(all) == 0 {
		return "unknown"
	}
	return fmt.Sprintf("%.1f to %.1f", slices.Min(all), slices.Max(all))
}

func writeClaims(w *strings.Builder, r Run) {
	w.WriteString("\n## What the README says\n\n| | shown by | times as good, and at least meant |\n|---|---|---|\n")
	for _, c := range claims {
		words := c.words // on the first of its lines alone
		for _, a := range c.ratios {
			shown, ratio := a.figure, "not measured"
			if f, ok := r.figure(a.figure); ok {
				got := SpreadOf(f.Ratios())
				shown, ratio = where(f)+", beside "+label(peers, f.Peer), spread(got)+a.against(got.Median, false)
			}
			fmt.Fprintf(w, "| %s | %s | %s |\n", cell(words), cell(shown), ratio)
			words = ""
		}
	}
}

// where is a figure's place on the page: its section, case and name.
func where(f Figure) string {
	for _, s := range sections {
		if m := s.cases.FindStringSubmatch(f.Case); m != nil {
			parts := slices.DeleteFunc([]string{s.title, caseLabel(m[1]), label(names, f.Name)}, func(p string) bool { return p == "" })
			return strings.Join(parts, ": ")
		}
	}
	return f.ID()
}

func (r Run) figure(id string) (Figure, bool) {
	i := slices.IndexFunc(r.Figures, func(f Figure) bool { return f.ID() == id })
	if i < 0 {
		return Figure{}, false
	}
	return r.Figures[i], true
}

// write writes the section, if there are figures for it.
func (s section) write(w *strings.Builder, r Run, plots string) {
	rows, columns := s.table(r)
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(w, "\n## %s\n\n%s\n", s.title, s.text)
	for _, file := range s.plots {
		if p := plotOf(file); p != nil && p.drawn(r) {
			fmt.Fprintf(w, "\n![%s](%s/%s)\n", p.title, plots, file)
		}
	}
	head, rule := "| | | qmchain |", "|---|---|---|"
	for _, peer := range columns {
		head, rule = head+" "+cell(label(peers, peer))+" |", rule+"---|"
	}
	fmt.Fprintf(w, "\n%s\n%s\n", head, rule)
	for _, row := range rows {
		w.WriteString(row.line(columns))
	}
}

// tableRow is one quantity of one case, beside all its peers.
type tableRow struct {
	of     string
	beside []Figure
}

// table has a row for each quantity, and a column for each peer.
func (s section) table(r Run) (rows []tableRow, columns []string) {
	for _, f := range r.Figures {
		m := s.cases.FindStringSubmatch(f.Case)
		if m == nil {
			continue
		}
		i := slices.IndexFunc(rows, func(t tableRow) bool { return t.beside[0].Case == f.Case && t.beside[0].amount() == f.amount() })
		if i < 0 {
			i, rows = len(rows), append(rows, tableRow{of: caseLabel(m[1])})
		}
		rows[i].beside = append(rows[i].beside, f)
		if f.Peer != "" && !slices.Contains(columns, f.Peer) {
			columns = append(columns, f.Peer)
		}
	}
	return rows, columns
}

func (t tableRow) line(columns []string) string {
	first := t.beside[0]
	ours := SpreadOf(first.Ours)
	cells := []string{t.of, label(names, first.Name), value(ours.Median, first.Unit)}
	if first.Peer == "" {
		cells[2] += fmt.Sprintf(" (%s to %s)", number(ours.Min), number(ours.Max))
	}
	cells[2] += aimOf(first.Case+" "+first.amount(), ours.Median, first.Less)
	for _, peer := range columns {
		text := ""
		if i := slices.IndexFunc(t.beside, func(f Figure) bool { return f.Peer == peer }); i >= 0 {
			f := t.beside[i]
			ratio := SpreadOf(f.Ratios())
			text = spread(ratio) + "; " + value(SpreadOf(f.Theirs).Median, f.Unit) + aimOf(f.ID(), ratio.Median, false)
		}
		cells = append(cells, text)
	}
	for i := range cells {
		cells[i] = cell(cells[i])
	}
	return "| " + strings.Join(cells, " | ") + " |\n"
}

// aimOf is what is wanted of a value, marked if it is not reached; nothing without an aim.
func aimOf(id string, got float64, less bool) string {
	i := slices.IndexFunc(aims, func(a aim) bool { return a.figure == id })
	if i < 0 {
		return ""
	}
	return aims[i].against(got, less)
}

func (a aim) against(got float64, less bool) string {
	text := "; aim " + number(a.limit)
	if less && got > a.limit || !less && got < a.limit {
		text += " **not reached**"
	}
	return text
}

// writeCases tells what the run was made of, what went wrong, and what is of another time than the rest.
func writeCases(w *strings.Builder, r Run) {
	w.WriteString("\n## The cases of the run\n\n| | took | processor time | load | |\n|---|--:|--:|--:|---|\n")
	var took, cpu float64
	for _, c := range r.Cases {
		result := "measured"
		switch {
		case c.Error != "":
			result = "**failed**: " + cell(c.Error)
		case c.Version != "" && (c.Version != r.Version || !c.Time.Equal(r.Time)):
			result = fmt.Sprintf("measured by itself, with %s, %s", cell(c.Version), day(c.Time))
		}
		fmt.Fprintf(w, "| %s | %.0f s | %.0f s | %.1f | %s |\n", cell(c.Name), c.Seconds, c.CPU, c.Load, result)
		took, cpu = took+c.Seconds, cpu+c.CPU
	}
	fmt.Fprintf(w, "| all | %.0f s | %.0f s | | |\n", took, cpu)
}

// caseLabel reads a part of a benchmark's name: points=200 is 200 points.
func caseLabel(text string) string {
	var parts []string
	for part := range strings.SplitSeq(text, "/") {
		name, value, found := strings.Cut(part, "=")
		switch {
		case !found:
			// Sections of one case are named by their title.
		case name == "points":
			unit := " points"
			if value == "1" {
				unit = " point"
			}
			if n, err := strconv.ParseInt(value, 10, 64); err == nil {
				value = grouped(n)
			}
			parts = append(parts, value+unit)
		case name == "qemu":
			parts = append(parts, "QEMU "+value)
		case name == "compressed" || name == "size":
			parts = append(parts, value)
		default:
			parts = append(parts, value+" "+name)
		}
	}
	return strings.Join(parts, ", ")
}

// label is the name on the page. Where there is none for NAME-cpu, it is made of that for NAME.
func label(labels map[string]string, name string) string {
	if text, ok := labels[name]; ok {
		return text
	}
	if of, found := strings.CutSuffix(name, "-cpu"); found {
		return label(labels, of) + ", processor time"
	}
	return name
}

// cell makes one line of a text, without what would end the cell of a table.
func cell(text string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", `\|`)
}

func spread(s Spread) string {
	return fmt.Sprintf("**%s** (%s to %s)", number(s.Median), number(s.Min), number(s.Max))
}

func value(v float64, unit string) string { return number(v) + " " + unit }

// number is a value to three digits: more would be noise.
func number(v float64) string {
	if v == 0 {
		return "0"
	}
	digits := 2 - int(math.Floor(math.Log10(math.Abs(v))))
	if digits < 0 {
		scale := math.Pow10(-digits)
		return grouped(int64(math.Round(v/scale) * scale))
	}
	text := strconv.FormatFloat(v, 'f', min(digits, 6), 64)
	if strings.Contains(text, ".") {
		text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
	}
	return text
}

// grouped is a whole number with commas.
func grouped(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
