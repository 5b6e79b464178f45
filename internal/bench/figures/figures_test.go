package figures

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// sample is a run with figures in several sections, whose rounds go down from the middle to 0.9 and up to 1.1 of it.
func sample() Run {
	around := func(v float64) []float64 { return []float64{v, 0.9 * v, 1.1 * v} }
	same := func(v float64) []float64 { return []float64{v, v, v} }
	return Run{
		Form: "quick", Time: time.Date(2026, 11, 20, 10, 15, 0, 0, time.UTC), Version: "v1",
		Machine: []Fact{{"processor", "a|b"}},
		Cases: []Case{
			{Name: "Mount", Seconds: 61, CPU: 30, Load: 0.5},
			{Name: "Files", Load: 1.5, Error: "no kernel"},
			{Name: "List", Seconds: 2, CPU: 1, Load: 1, Version: "v2", Time: time.Date(2026, 11, 21, 10, 15, 0, 0, time.UTC)},
		},
		Figures: []Figure{
			{Case: "Mount/warm/points=1", Name: "seq", Unit: "MB/s", Peer: "daemon", Ours: around(3000), Theirs: same(1000)},
			{Case: "Mount/warm/points=1", Name: "seq", Unit: "MB/s", Peer: "raw", Ours: around(3000), Theirs: same(6000)},
			{Case: "Mount/warm/points=200", Name: "seq", Unit: "MB/s", Peer: "daemon", Ours: around(2800), Theirs: same(280)},
			{Case: "Mount/warm/points=200", Name: "seq", Unit: "MB/s", Peer: "nbdfuse", Ours: around(2800), Theirs: same(281)},
			{Case: "Mount/open/points=200", Name: "first-byte", Unit: "ms", Less: true, Peer: "daemon", Ours: around(50), Theirs: same(2000)},
			{Case: "Mount/huge", Name: "memory", Unit: "MB", Less: true, Peer: "daemon", Ours: around(40), Theirs: same(10)},
			{Case: "GuestLatency/target=slow", Name: "p99", Unit: "ms", Less: true, Peer: "none", Ours: around(20), Theirs: same(16)},
			{Case: "GuestLatency/target=slow", Name: "p99", Unit: "ms", Less: true, Peer: "direct", Ours: around(20), Theirs: same(400)},
			{Case: "IdleIncrement/qemu=7.2", Name: "tool", Unit: "ms", Less: true, Ours: around(200)},
		},
	}
}

func TestRatios(t *testing.T) {
	t.Parallel()
	fast := Figure{Case: "c", Name: "seq", Unit: "MB/s", Peer: "p", Ours: []float64{20, 30}, Theirs: []float64{10, 10}}
	if diff := cmp.Diff([]float64{2, 3}, fast.Ratios()); diff != "" {
		t.Error("the more the better:", diff)
	}
	short := fast
	short.Less = true
	if diff := cmp.Diff([]float64{0.5, 1. / 3}, short.Ratios()); diff != "" {
		t.Error("the less the better:", diff)
	}
	if got := fast.ID(); got != "c seq-x-p" {
		t.Errorf("ID %q", got)
	}
	for want, values := range map[Spread][]float64{
		{2, 1, 9}:   {9, 1, 2},
		{2.5, 1, 9}: {9, 1, 2, 3},
		{7, 7, 7}:   {7},
	} {
		if got := SpreadOf(values); got != want {
			t.Errorf("spread of %v: %v, not %v", values, got, want)
		}
	}
}

func TestWriteRead(t *testing.T) {
	t.Parallel()
	want := sample().Figures
	var file bytes.Buffer
	for _, f := range want {
		if err := f.Write(&file); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Read(bytes.NewReader(file.Bytes()))
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	// Killed in mid-line: what was whole counts.
	got, err = Read(bytes.NewReader(file.Bytes()[:file.Len()-5]))
	if diff := cmp.Diff(want[:len(want)-1], got); !errors.Is(err, io.ErrUnexpectedEOF) || diff != "" {
		t.Error(err, diff)
	}
}

func TestNoFigures(t *testing.T) {
	t.Parallel()
	good := Figure{Case: "c", Name: "n", Unit: "s", Peer: "p", Ours: []float64{1, 2}, Theirs: []float64{1, 2}}
	if err := good.Write(io.Discard); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(f *Figure){
		"no case":         func(f *Figure) { f.Case = "" },
		"no unit":         func(f *Figure) { f.Unit = "" },
		"no values":       func(f *Figure) { f.Ours, f.Theirs = nil, nil },
		"not in pairs":    func(f *Figure) { f.Theirs = []float64{1} },
		"not a number":    func(f *Figure) { f.Ours = []float64{1, math.NaN()} },
		"below nothing":   func(f *Figure) { f.Ours = []float64{1, -1} },
		"through nothing": func(f *Figure) { f.Theirs = []float64{1, 0} },
	} {
		f := good
		change(&f)
		if err := f.Write(io.Discard); err == nil {
			t.Errorf("%s: no error", what)
		}
		text, err := Run{Figures: []Figure{good, f}}.Encode()
		if err != nil {
			continue // JSON knows no such number
		}
		if _, err := Decode(text); err == nil {
			t.Errorf("%s: it was decoded", what)
		}
	}
	if _, err := Decode([]byte("{")); err == nil {
		t.Error("half a document was decoded")
	}
}

func TestEncodeDecode(t *testing.T) {
	t.Parallel()
	text, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(text)
	if diff := cmp.Diff(sample(), got); err != nil || diff != "" {
		t.Error(err, diff)
	}
}

func TestFallen(t *testing.T) {
	t.Parallel()
	figure := func(ours ...float64) Figure {
		f := Figure{Case: "c", Name: "n", Unit: "MB/s", Peer: "p", Ours: ours}
		for range ours {
			f.Theirs = append(f.Theirs, 1)
		}
		return f
	}
	for name, c := range map[string]struct {
		was, now []float64
		want     bool
	}{
		"the same":                           {[]float64{10, 9, 11}, []float64{10, 9, 11}, false},
		"better":                             {[]float64{10, 9, 11}, []float64{20, 19, 21}, false},
		"a fifth less is not more than that": {[]float64{10, 9, 11}, []float64{8, 8, 8}, false},
		"more than a fifth less":             {[]float64{10, 9, 11}, []float64{7.9, 7.9, 7.9}, true},
		"one bad round":                      {[]float64{10, 9, 11}, []float64{10, 1, 11}, false},
		"one good round below the median":    {[]float64{10, 9, 11}, []float64{7, 7, 9.5}, true},
		"it varied as much before":           {[]float64{10, 5, 11}, []float64{6, 6, 6}, false},
		"below all of what varied":           {[]float64{10, 5, 11}, []float64{4, 4, 4.5}, true},
		"varies as much now":                 {[]float64{10, 9, 11}, []float64{6, 6, 10}, false},
	} {
		falls := Fallen(Run{Figures: []Figure{figure(c.was...)}}, Run{Figures: []Figure{figure(c.now...)}})
		if got := len(falls) == 1; got != c.want {
			t.Errorf("%s: %v", name, falls)
		}
	}

	before, now := sample(), sample()
	now.Figures = now.Figures[1 : len(now.Figures)-1] // without the first ratio, and the one figure that is none
	falls := Fallen(before, now)
	if len(falls) != 1 || !falls[0].Missing || !strings.Contains(falls[0].String(), "Mount/warm/points=1 seq-x-daemon: it was 3, and was not measured") {
		t.Errorf("missing: %v", falls)
	}
	// Of what was not compared with anything, more is no fall.
	now = sample()
	now.Figures[len(now.Figures)-1].Ours = []float64{1e6, 1e6, 1e6}
	if falls := Fallen(before, now); len(falls) > 0 {
		t.Errorf("a time: %v", falls)
	}
}

func TestMarkdown(t *testing.T) {
	t.Parallel()
	page := string(Markdown(sample(), "packaging/doc"))
	for _, want := range []string{
		"| form | quick, 2026-11-20 10:15 UTC |\n",
		"| processor | a\\|b |\n",
		"| load when cases began, much of it of the case before | 0.5 to 1.5 |\n",
		"not the guest's own writes. | GuestLatency/target=slow p95-x-none | not measured |\n",
		"|  | The guest's own writes during a backup: slow target: 99 of 100 writes within, beside a backup without fleecing | **20** (18.2 to 22.2); aim 10 |\n",
		"so that one full is enough | Merge written-x-full | not measured |\n",
		"| | | qmchain | qemu-storage-daemon, FUSE export | a raw file | qemu-nbd, nbdfuse |\n|---|---|---|---|---|---|\n",
		"| 1 point | sequential, 1 MiB | 3,000 MB/s | **3** (2.7 to 3.3); 1,000 MB/s; aim 3.5 **not reached** | **0.5** (0.45 to 0.55); 6,000 MB/s; aim 0.35 |  |\n",
		"| 200 points | sequential, 1 MiB | 2,800 MB/s | **10** (9 to 11); 280 MB/s; aim 10 |  | **9.96** (8.97 to 11); 281 MB/s |\n",
		"![Reading a point sequentially, by the length of its chain](packaging/doc/mount-sequential.svg)\n",
		"| 200 points | to the first byte | 50 ms; aim 100 | **40** (36.4 to 44.4); 2,000 ms |\n",
		"|  | memory | 40 MB; aim 64 | **0.25** (0.227 to 0.278); 10 MB |\n",
		"| QEMU 7.2 | … qmchain's own | 200 ms (180 to 220); aim 150 **not reached** |\n",
		"| Mount | 61 s | 30 s | 0.5 | measured |\n",
		"| Files | 0 s | 0 s | 1.5 | **failed**: no kernel |\n",
		"| List | 2 s | 1 s | 1.0 | measured by itself, with v2, 2026-11-21 10:15 UTC |\n",
		"| all | 63 s | 31 s | | |\n",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not have %q", want)
		}
	}
	for _, not := range []string{"restore.svg", "## Restoring"} {
		if strings.Contains(page, not) {
			t.Errorf("the page has %q, of which there is nothing in the run", not)
		}
	}
	if t.Failed() {
		t.Log(page)
	}
}

func TestCaseLabel(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"points=1": "1 point", "points=100000": "100,000 points", "qemu=7.2/size=4.0TiB": "QEMU 7.2, 4.0TiB", "compressed=zlib": "zlib", "target=slow": "slow target", "tar": "",
	} {
		if got := caseLabel(name); got != want {
			t.Errorf("%s: %q, not %q", name, got, want)
		}
	}
}

// Each table has as many cells in each row as in its head, whatever names hold.
func TestTables(t *testing.T) {
	t.Parallel()
	cells := 0
	for line := range strings.Lines(string(Markdown(sample(), "."))) {
		if !strings.HasPrefix(line, "|") {
			cells = 0
			continue
		}
		n := strings.Count(strings.ReplaceAll(line, `\|`, ""), "|")
		if cells != 0 && n != cells {
			t.Errorf("%d cells, not %d: %s", n, cells, line)
		}
		cells = n
	}
}

func TestNumber(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{
		0: "0", 1: "1", 0.12345: "0.123", 1.2345: "1.23", 12.345: "12.3", 123.45: "123", 1234.5: "1,230", 1234567: "1,230,000", 0.00001234: "0.000012", 99.96: "100",
	} {
		if got := number(v); got != want {
			t.Errorf("%v: %s, not %s", v, got, want)
		}
	}
}

// element is any element of a picture.
type element struct {
	XMLName  xml.Name
	X        float64   `xml:"x,attr"`
	Y        float64   `xml:"y,attr"`
	CY       float64   `xml:"cy,attr"`
	Text     string    `xml:",chardata"`
	Elements []element `xml:",any"`
}

func (e element) all(name string) (found []element) {
	for _, child := range e.Elements {
		if child.XMLName.Local == name {
			found = append(found, child)
		}
		found = append(found, child.all(name)...)
	}
	return found
}

func TestPlots(t *testing.T) {
	t.Parallel()
	r := sample()
	r.Figures[0].Peer = "<&>" // a name is never markup
	drawn, err := Plots(r)
	if err != nil {
		t.Fatal(err)
	}
	files := []string{"latency.svg", "mount-open.svg", "mount-sequential.svg"}
	for _, name := range PlotFiles() {
		if _, ok := drawn[name]; ok != slices.Contains(files, name) {
			t.Errorf("%s: drawn %v", name, ok)
		}
	}
	for name, text := range drawn {
		var root element
		if err := xml.Unmarshal(text, &root); err != nil || root.XMLName.Local != "svg" || root.XMLName.Space != "http://www.w3.org/2000/svg" {
			t.Fatalf("%s: %v: %s", name, err, text)
		}
		for _, e := range slices.Concat(root.all("text"), root.all("circle")) {
			if y := max(e.Y, e.CY); y <= 0 || y >= plotHeight {
				t.Errorf("%s: %q is at %v, outside of the picture", name, e.Text, y)
			}
		}
	}
	var root element
	if err := xml.Unmarshal(drawn["mount-sequential.svg"], &root); err != nil {
		t.Fatal(err)
	}
	var labels []string
	last := math.Inf(-1)
	texts := root.all("text")
	for _, e := range texts {
		if e.X > plotRight {
			labels = append(labels, e.Text)
		}
	}
	if diff := cmp.Diff([]string{"qmchain", "<&>", "a raw file", "qemu-storage-daemon, FUSE export", "qemu-nbd, nbdfuse"}, labels); diff != "" {
		t.Error("lines:", diff)
	}
	slices.SortFunc(texts, func(a, b element) int { return int(a.Y) - int(b.Y) })
	for _, e := range texts {
		if e.X > plotRight {
			if e.Y-last < labelHeight {
				t.Errorf("%q covers another label", e.Text)
			}
			last = e.Y
		}
	}
	// Two lengths of qmchain, one of each peer.
	marks := root.all("circle")
	if len(marks) != 6 {
		t.Fatalf("%d marks", len(marks))
	}
	if marks[0].CY > marks[1].CY { // 3000 above 2800
		t.Errorf("the larger value is lower: %v", marks)
	}
}

// Many labels at one place still fit into the picture.
func TestPart(t *testing.T) {
	t.Parallel()
	for _, at := range []float64{plotTop, 200, plotBottom} {
		lines := make([]line, 8)
		for i := range lines {
			lines[i].Label.Y = at
		}
		part(lines)
		var ys []float64
		for _, l := range lines {
			ys = append(ys, l.Label.Y)
		}
		slices.Sort(ys)
		for i, y := range ys {
			if y > plotHeight || i > 0 && y-ys[i-1] < labelHeight {
				t.Errorf("at %v: %v", at, ys)
			}
		}
	}
}

func TestTicks(t *testing.T) {
	t.Parallel()
	if diff := cmp.Diff([]float64{50, 100, 200, 500, 1000}, ticks(40, 1200)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]float64{1, 10, 100, 1000, 10000}, ticks(0.9, 12000)); diff != "" {
		t.Error(diff)
	}
}

// Aims and claims are of figures that the page has names for, and claims are what README.md says.
func TestAimsAndClaims(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	readme := strings.NewReplacer("*", "").Replace(strings.Join(strings.Fields(string(text)), " "))
	var ids []string
	for _, a := range aims {
		ids = append(ids, a.figure)
	}
	for _, c := range claims {
		if len(c.ratios) == 0 || !strings.Contains(readme, c.words) {
			t.Errorf("README.md does not say %q", c.words)
		}
		for _, a := range c.ratios {
			ids = append(ids, a.figure)
		}
	}
	for _, id := range ids {
		of, metric, _ := strings.Cut(id, " ")
		name, peer, beside := strings.Cut(metric, "-x-")
		if !beside {
			name = metric[:strings.LastIndexByte(metric, '-')]
		}
		if !slices.ContainsFunc(sections, func(s section) bool { return s.cases.MatchString(of) }) {
			t.Errorf("%s: in no section", id)
		}
		if names[name] == "" || beside && peers[peer] == "" {
			t.Errorf("%s: without a name on the page", id)
		}
	}
	for _, s := range sections {
		for _, file := range s.plots {
			if plotOf(file) == nil {
				t.Errorf("%s: there is no plot %s", s.title, file)
			}
		}
	}
}
