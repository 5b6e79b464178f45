package bench

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"qmchain/internal/bench/figures"
)

// way is a way to read.
type way struct {
	name    string
	files   []string
	server  *server  // nil: none
	backing []string // what the kernel must forget before each turn; nil: nothing
	keep    bool     // the kernel may keep what it has of files
}

// speed is what one turn gave.
type speed struct {
	rate float64 // bytes per second
	cpu  float64 // seconds for a byte, of reader and server
}

// trial is a number of rounds in which ways took turns: speeds by way and round.
type trial map[string][]speed

// try has the ways take turns to do a job. Which one is first changes from round to round.
func try(b *testing.B, j job, ways ...way) trial {
	b.Helper()
	t := trial{}
	j.For = *mountWindow
	for round := range *mountRounds {
		for i := range ways {
			w := ways[(i+round)%len(ways)]
			j.Files, j.Keep, j.Seed = w.files, w.keep, uint64(round)
			dropCache(b, w.backing...)
			before := w.cpu()
			d := j.read(b)
			t[w.name] = append(t[w.name], speed{float64(d.Bytes) / d.Seconds, (w.cpu() - before + d.CPU) / float64(d.Bytes)})
		}
	}
	return t
}

func (w way) cpu() float64 {
	if w.server == nil {
		return 0
	}
	return w.server.cpu()
}

// values are those of a way, by round.
func (t trial) values(way string, of func(speed) float64) (values []float64) {
	for _, s := range t[way] {
		values = append(values, of(s))
	}
	return values
}

// report reports ours beside others.
func (t trial) report(b *testing.B, what string, others ...string) {
	b.Helper()
	f := figures.Figure{Name: what, Unit: "MB/s"}
	of := func(s speed) float64 { return s.rate / 1e6 }
	if strings.HasPrefix(what, "qd") {
		f.Unit, of = "IOPS", func(s speed) float64 { return s.rate / small }
	}
	t.record(b, f, of, others)
	var parts []string
	for name, speeds := range t {
		for _, s := range speeds {
			parts = append(parts, fmt.Sprintf("%s %.0f MB/s %.2f s/GB", name, s.rate/1e6, s.cpu*1e9))
		}
	}
	slices.Sort(parts)
	b.Logf("%s: %s; load %s", what, strings.Join(parts, ", "), load())
}

// reportCPU reports what ours took of the processors beside others.
func (t trial) reportCPU(b *testing.B, others ...string) {
	b.Helper()
	t.record(b, figures.Figure{Name: "cpu", Unit: "s/GB", Less: true}, func(s speed) float64 { return s.cpu * 1e9 }, others)
}

func (t trial) record(b *testing.B, f figures.Figure, of func(speed) float64, others []string) {
	b.Helper()
	for _, other := range others {
		f.Peer, f.Ours, f.Theirs = other, t.values("ours", of), t.values(other, of)
		record(b, f)
	}
}

const small, large = 4 << 10, 1 << 20

var (
	sequential = job{Workers: 1, Block: large}
	oneAtATime = job{Workers: 1, Block: small, Random: true}
	many       = job{Workers: 16, Block: small, Random: true}
)

// once runs f as a benchmark that is measured by what it reports.
func once(b *testing.B, f func()) {
	for b.Loop() {
		f()
	}
	b.ReportMetric(0, "ns/op")
}
