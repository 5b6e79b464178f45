// Package figures is what the benchmarks have found out, and what is made of it. It knows nothing of how it was measured.
//
//   - A [Figure] is one quantity of one case, in every round: what qmchain took, and mostly what a peer took in the same
//     round, another program that a user would take instead, or a limit such as cp.
//   - A ratio says how many times as good as the peer qmchain was in one round: as fast, or as small. Ratios of one round
//     can be compared with those of another day or machine, times can't.
//   - A [Run] is all figures of one call of the benchmarks, and where they were taken.
//
// From a run come a page ([Markdown]) with plots ([Plots]), and the verdict of the guard ([Fallen]): which ratios have
// fallen since another run.
package figures

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

// Figure is one quantity of one case.
type Figure struct {
	Case   string    `json:"case"`             // the benchmark: Mount/warm/points=200
	Name   string    `json:"name"`             // what was measured, such as seq
	Unit   string    `json:"unit"`             // MB/s, s …
	Less   bool      `json:"less,omitempty"`   // the less the better: times, memory
	Ours   []float64 `json:"ours"`             // of each round
	Peer   string    `json:"peer,omitempty"`   // besides whom; nobody, if empty
	Theirs []float64 `json:"theirs,omitempty"` // of each round
}

// Metric is the figure's name among those of its case: NAME-x-PEER for one with a peer, else NAME-UNIT.
func (f Figure) Metric() string {
	if f.Peer == "" {
		return f.amount()
	}
	return f.Name + "-x-" + f.Peer
}

// amount is the name of what qmchain took, whoever is beside it.
func (f Figure) amount() string { return f.Name + "-" + f.Unit }

// ID is the figure's name among those of a run.
func (f Figure) ID() string { return f.Case + " " + f.Metric() }

// Ratios are how many times as good as the peer qmchain was, in each round; none without a peer.
func (f Figure) Ratios() []float64 {
	var ratios []float64
	for i := range min(len(f.Ours), len(f.Theirs)) {
		if f.Less {
			ratios = append(ratios, f.Theirs[i]/f.Ours[i])
		} else {
			ratios = append(ratios, f.Ours[i]/f.Theirs[i])
		}
	}
	return ratios
}

// check finds what can't be a figure.
func (f Figure) check() error {
	switch {
	case f.Case == "" || f.Name == "" || f.Unit == "":
		return fmt.Errorf("figure %q: it has no name or no unit", f.ID())
	case len(f.Ours) == 0:
		return fmt.Errorf("figure %q: it has no values", f.ID())
	case f.Peer != "" && len(f.Ours) != len(f.Theirs):
		return fmt.Errorf("figure %q: %d values beside %d of %s", f.ID(), len(f.Ours), len(f.Theirs), f.Peer)
	}
	for _, v := range slices.Concat(f.Ours, f.Theirs, f.Ratios()) {
		if math.IsNaN(v) || math.IsInf(v, 0) || v < 0 {
			return fmt.Errorf("figure %q: %v is no value", f.ID(), v)
		}
	}
	return nil
}

// Spread is the middle of some values, and how far they are apart.
type Spread struct{ Median, Min, Max float64 }

// SpreadOf is that of values, which must not be empty.
func SpreadOf(values []float64) Spread {
	values = slices.Sorted(slices.Values(values))
	n := len(values)
	return Spread{(values[(n-1)/2] + values[n/2]) / 2, values[0], values[n-1]}
}

// Run is one call of the benchmarks.
type Run struct {
	Form    string    `json:"form"`    // quick or full
	Time    time.Time `json:"time"`    // when it began; that of most of its cases, where others were measured again
	Version string    `json:"version"` // of qmchain
	Machine []Fact    `json:"machine"`
	Cases   []Case    `json:"cases"`
	Figures []Figure  `json:"figures"`
}

// Fact is something that the figures depend on: the processor, the version of a program.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Case is one benchmark of a run.
type Case struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`         // that it took
	CPU     float64 `json:"cpu"`             // of the processors' time, in seconds
	Load    float64 `json:"load"`            // of the machine, when it began
	Error   string  `json:"error,omitempty"` // why not all of it was measured
	// Time and Version are those of the run that the case is of.
	Time    time.Time `json:"time"`
	Version string    `json:"version,omitempty"`
}

// Write writes a figure as one line.
func (f Figure) Write(w io.Writer) error {
	if err := f.check(); err != nil {
		return err
	}
	text, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("figure %q: %w", f.ID(), err)
	}
	_, err = w.Write(append(text, '\n'))
	return err
}

// Read reads what [Figure.Write] has written, as far as it goes: a benchmark can have been killed in mid-line.
func Read(r io.Reader) ([]Figure, error) {
	var all []Figure
	for d := json.NewDecoder(r); ; {
		var f Figure
		err := d.Decode(&f)
		if err == io.EOF { //nolint:errorlint // Decode returns it as it is
			return all, nil
		}
		if err == nil {
			err = f.check()
		}
		if err != nil {
			return all, err
		}
		all = append(all, f)
	}
}

// Encode makes a file of a run.
func (r Run) Encode() ([]byte, error) {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return nil, fmt.Errorf("run: %w", err)
	}
	return append(text, '\n'), nil
}

// Decode reads what [Run.Encode] has made.
func Decode(text []byte) (Run, error) {
	var r Run
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("run: %w", err)
	}
	for _, f := range r.Figures {
		if err := f.check(); err != nil {
			return r, err
		}
	}
	return r, nil
}
