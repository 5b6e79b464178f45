package bench

import (
	"flag"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"qmchain/internal/bench/figures"
)

var benchOut = flag.String("bench-out", "", "file to which figures are added with the values of every round, one JSON document a line; empty: none")

// record reports figures of a benchmark: the median of the ratios as NAME-x-PEER, and what qmchain took as NAME-UNIT.
func record(b *testing.B, all ...figures.Figure) {
	b.Helper()
	for _, f := range all {
		f.Case = strings.TrimPrefix(b.Name(), "Benchmark")
		b.ReportMetric(figures.SpreadOf(f.Ours).Median, f.Name+"-"+f.Unit)
		if f.Peer != "" {
			b.ReportMetric(figures.SpreadOf(f.Ratios()).Median, f.Metric())
		}
		if *benchOut == "" {
			continue
		}
		out, err := os.OpenFile(*benchOut, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
		if err != nil {
			b.Fatal(err)
		}
		err = f.Write(out)
		_ = out.Close()
		if err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(0, "ns/op") // of all rounds and ways together
}

// rounds are values of several rounds, by what was measured.
type rounds map[string][]float64

func (r rounds) add(name string, value float64) { r[name] = append(r[name], value) }

// alone is a figure without a peer, of which less is better.
func (r rounds) alone(name, unit string) figures.Figure {
	return figures.Figure{Name: name, Unit: unit, Less: true, Ours: r[name]}
}

// beside is a figure with a peer, of which less is better. Whose values they are is told by a prefix: ours-NAME, PEER-NAME.
func (r rounds) beside(name, unit, peer string) figures.Figure {
	return figures.Figure{Name: name, Unit: unit, Less: true, Peer: peer, Ours: r["ours-"+name], Theirs: r[peer+"-"+name]}
}

// recordAmounts records figures without peers, of which less is better, whose names are NAME-UNIT: of each thing its time, its
// processor time NAME-cpu, and then its memory.
func recordAmounts(b *testing.B, all map[string][]float64) {
	b.Helper()
	order := func(metric string) string {
		of, isMemory := strings.CutSuffix(metric, "-MB")
		if isMemory {
			return of + " 2"
		}
		if of, isCPU := strings.CutSuffix(metric, "-cpu-s"); isCPU {
			return of + " 1"
		}
		return metric[:strings.LastIndexByte(metric, '-')]
	}
	metrics := slices.SortedFunc(maps.Keys(all), func(one, other string) int { return strings.Compare(order(one), order(other)) })
	for _, metric := range metrics {
		at := strings.LastIndexByte(metric, '-')
		record(b, figures.Figure{Name: metric[:at], Unit: metric[at+1:], Less: true, Ours: all[metric]})
	}
}
