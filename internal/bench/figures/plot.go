package figures

import (
	"bytes"
	_ "embed"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/template"
)

//go:embed plot.svg.tmpl
var plotText string

// plot is a picture of some figures of a run: medians with all rounds around them, on a logarithmic scale.
type plot struct {
	file  string
	title string
	of    func(r Run) (columns []string, lines []series)
	join  bool // columns are in an order that means something
}

// series is what is joined by a line.
type series struct {
	name   string
	unit   string
	values []*Spread // by column; nil: not measured
}

var plots = []plot{
	{"mount-sequential.svg", "Reading a point sequentially, by the length of its chain", byPoints("Mount/warm/", "seq"), true},
	{"mount-random-1.svg", "4 KiB at random, one at a time, by the length of the chain", byPoints("Mount/warm/", "qd1"), true},
	{"mount-random-16.svg", "4 KiB at random, 16 at a time, by the length of the chain", byPoints("Mount/warm/", "qd16"), true},
	{"mount-open.svg", "From the start to the first byte, by the length of the chain", byPoints("Mount/open/", "first-byte"), true},
	{"restore.svg", "Restoring a disk, by the length of its chain", byPoints("Restore/", "image"), true},
	{"latency.svg", "99 of 100 of the guest's writes during a full backup", latency, false},
}

func plotOf(file string) *plot {
	i := slices.IndexFunc(plots, func(p plot) bool { return p.file == file })
	if i < 0 {
		return nil
	}
	return &plots[i]
}

// Plots are the pictures of a run, as SVG, by the names of their files. What was not measured has none.
func Plots(r Run) (map[string][]byte, error) {
	t, err := template.New("plot").Parse(plotText)
	if err != nil {
		return nil, fmt.Errorf("plot: %w", err)
	}
	all := map[string][]byte{}
	for _, p := range plots {
		if !p.drawn(r) {
			continue
		}
		var out bytes.Buffer
		if err := t.Execute(&out, p.lay(p.of(r))); err != nil {
			return nil, fmt.Errorf("plot %s: %w", p.file, err)
		}
		all[p.file] = out.Bytes()
	}
	return all, nil
}

// PlotFiles are the names of all files that [Plots] can make.
func PlotFiles() (names []string) {
	for _, p := range plots {
		names = append(names, p.file)
	}
	return names
}

// drawn tells whether there is something to draw.
func (p plot) drawn(r Run) bool {
	_, lines := p.of(r)
	return len(lines) > 0
}

// byPoints has a column for each length of a chain, and a line for qmchain and each peer.
func byPoints(cases, name string) func(r Run) ([]string, []series) {
	return func(r Run) (columns []string, lines []series) {
		points := func(f Figure) (int, bool) {
			text, found := strings.CutPrefix(f.Case, cases+"points=")
			n, err := strconv.Atoi(text)
			return n, found && err == nil && f.Name == name
		}
		var lengths []int
		for _, f := range r.Figures {
			if n, ok := points(f); ok {
				lengths = append(lengths, n)
			}
		}
		slices.Sort(lengths)
		lengths = slices.Compact(lengths)
		for _, n := range lengths {
			columns = append(columns, caseLabel(fmt.Sprint("points=", n)))
		}
		note := func(who, unit string, column int, values []float64) {
			i := slices.IndexFunc(lines, func(s series) bool { return s.name == who })
			if i < 0 {
				i, lines = len(lines), append(lines, series{who, unit, make([]*Spread, len(columns))})
			}
			s := SpreadOf(values)
			lines[i].values[column] = &s
		}
		for _, f := range r.Figures {
			n, ok := points(f)
			if !ok {
				continue
			}
			column := slices.Index(lengths, n)
			note("qmchain", f.Unit, column, f.Ours)
			if f.Peer != "" {
				note(label(peers, f.Peer), f.Unit, column, f.Theirs)
			}
		}
		return columns, lines
	}
}

// latency has a column for each way to back up, and marks for each target.
func latency(r Run) (columns []string, lines []series) {
	columns = []string{"no backup", "with fleecing", "without fleecing"}
	for _, target := range []string{"slow", "fast"} {
		s := series{name: target + " target", values: make([]*Spread, len(columns))}
		for i, peer := range []string{"none", "", "direct"} {
			for _, f := range r.Figures {
				if f.Case != "GuestLatency/target="+target || f.Name != "p99" || peer != "" && f.Peer != peer {
					continue
				}
				values := f.Ours
				if peer != "" {
					values = f.Theirs
				}
				spread := SpreadOf(values)
				s.values[i], s.unit = &spread, f.Unit
			}
		}
		if s.unit != "" {
			lines = append(lines, s)
		}
	}
	return columns, lines
}

// The measures of a picture, in CSS pixels.
const (
	plotWidth, plotHeight  = 820, 380
	plotLeft, plotRight    = 84, 560 // of the lines
	plotTop, plotBottom    = 64, 340
	plotInset, labelHeight = 28, 17
)

// colors that also those tell apart who don't see all of them (Okabe and Ito), the darkest first.
var colors = []string{"#0072b2", "#d55e00", "#009e73", "#9a5b87", "#7a6a00", "#444444"}

type drawing struct {
	Title, Text                string
	Width, Height, Left, Right int
	Ticks, Columns             []mark
	Lines                      []line
}

type line struct {
	Color string
	Thick float64
	Path  string
	Marks []mark
	Label mark
}

type mark struct {
	X, Y, Low, High float64
	Text            string
}

// lay gives all of a picture its place.
func (p plot) lay(columns []string, lines []series) drawing {
	d := drawing{
		Title: p.title, Text: lines[0].unit + ", logarithmic; the median of the rounds, and all of them",
		Width: plotWidth, Height: plotHeight, Left: plotLeft, Right: plotRight,
	}
	low, high := bounds(lines)
	y := func(v float64) float64 {
		v = max(v, low)
		return pixel(plotBottom - (plotBottom-plotTop)*math.Log(v/low)/math.Log(high/low))
	}
	for _, v := range ticks(low, high) {
		d.Ticks = append(d.Ticks, mark{X: plotLeft - 8, Y: y(v), Text: number(v)})
	}
	x := func(column int) float64 {
		if len(columns) == 1 {
			return (plotLeft + plotRight) / 2
		}
		return pixel(plotLeft + plotInset + float64(column)*(plotRight-plotLeft-2*plotInset)/float64(len(columns)-1))
	}
	for i, text := range columns {
		d.Columns = append(d.Columns, mark{X: x(i), Y: plotBottom + 24, Text: text})
	}
	for i, s := range lines {
		l := line{Color: colors[i%len(colors)], Thick: 1.5}
		if i == 0 {
			l.Thick = 3
		}
		for column, v := range s.values {
			if v == nil {
				continue
			}
			m := mark{X: x(column), Y: y(v.Median), Low: y(v.Min), High: y(v.Max)}
			m.Text = fmt.Sprintf("%s, %s: %s (%s to %s)", s.name, columns[column], value(v.Median, s.unit), number(v.Min), number(v.Max))
			if p.join {
				l.Path += fmt.Sprintf("%s%g %g", map[bool]string{true: "M", false: "L"}[l.Path == ""], m.X, m.Y)
			}
			l.Marks = append(l.Marks, m)
		}
		l.Label = mark{X: plotRight + 12, Y: l.Marks[len(l.Marks)-1].Y, Text: s.name}
		d.Lines = append(d.Lines, l)
	}
	part(d.Lines)
	return d
}

// bounds are those of the scale, with some room.
func bounds(lines []series) (low, high float64) {
	low, high = math.Inf(1), math.SmallestNonzeroFloat64
	for _, s := range lines {
		for _, v := range s.values {
			if v == nil {
				continue
			}
			high = max(high, v.Max)
			if v.Min > 0 {
				low = min(low, v.Min)
			}
		}
	}
	low = min(low, high)
	return low / 1.3, high * 1.3
}

// ticks are round values from low to high: 1, 2 and 5 of each power of ten, or its ones where these are many.
func ticks(low, high float64) (values []float64) {
	steps := []float64{1, 2, 5}
	if high/low > 3000 {
		steps = steps[:1]
	}
	for power := math.Floor(math.Log10(low)); power <= math.Log10(high); power++ {
		for _, step := range steps {
			if v := step * math.Pow(10, power); v >= low && v <= high {
				values = append(values, v)
			}
		}
	}
	return values
}

// part moves labels so that none covers another.
func part(lines []line) {
	order := make([]*line, 0, len(lines))
	for i := range lines {
		order = append(order, &lines[i])
	}
	slices.SortFunc(order, func(a, b *line) int { return int(a.Label.Y*10) - int(b.Label.Y*10) })
	for i := 1; i < len(order); i++ {
		order[i].Label.Y = max(order[i].Label.Y, order[i-1].Label.Y+labelHeight)
	}
	// Those that went below the bottom push the others up.
	for i, limit := len(order)-1, float64(plotHeight-12); i >= 0; i, limit = i-1, limit-labelHeight {
		order[i].Label.Y = min(order[i].Label.Y, limit)
	}
}

// pixel is a place to a tenth of a pixel.
func pixel(v float64) float64 { return math.Round(v*10) / 10 }
