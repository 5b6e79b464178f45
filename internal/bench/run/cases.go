package main

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// benchCase is one benchmark, with its flags in each form.
type benchCase struct {
	name  string // of the function, without Benchmark
	flags map[string]string
}

// The forms of a run. On two idle processors the quick one takes below ten minutes, the full one about an hour. What smoke finds means nothing: it shows
// that all benchmarks work.
const smoke, quick, full = "smoke", "quick", "full"

// What is most likely to fail for want of something, the virtual machines of libguestfs, comes last.
var cases = []benchCase{
	{"Mount", map[string]string{
		smoke: "-mount-size 64MiB -mount-lengths 1,10 -mount-window 50ms -mount-rounds 1 -mount-files 500 -mount-text 32MiB",
		quick: "-mount-size 192MiB -mount-lengths 1,10,50,200,365 -mount-window 150ms -mount-rounds 3 -mount-files 10000 -mount-text 128MiB",
		full:  "-mount-size 1GiB -mount-lengths 1,10,50,200,365 -mount-window 500ms -mount-rounds 5 -mount-files 50000 -mount-text 256MiB",
	}},
	{"Restore", map[string]string{
		smoke: "-restore-data 64MiB -restore-change 1MiB -restore-lengths 1,10 -restore-rounds 1",
		quick: "-restore-data 300MiB -restore-change 2MiB -restore-lengths 1,30,200 -restore-rounds 3",
		full:  "-restore-data 1300MiB -restore-change 5MiB -restore-lengths 1,30,200,365 -restore-rounds 5",
	}},
	{"Verify", map[string]string{
		smoke: "-verify-size 32MiB -verify-lengths 1,5 -verify-rounds 1",
		quick: "-verify-size 256MiB -verify-lengths 1,50 -verify-rounds 3",
		full:  "-verify-size 1GiB -verify-lengths 1,50,200 -verify-rounds 5",
	}},
	{"Backup", map[string]string{
		smoke: "-backup-size 64MiB -backup-slow-size 10MiB -backup-rounds 1",
		quick: "-backup-size 512MiB -backup-slow-size 20MiB -backup-rounds 3",
		full:  "-backup-size 2GiB -backup-slow-size 50MiB -backup-rounds 5",
	}},
	{"IdleIncrement", map[string]string{smoke: "", quick: "-test.benchtime 10x", full: "-test.benchtime 50x"}},
	{"PeakMemory", map[string]string{smoke: "", quick: "-test.benchtime 2x", full: "-test.benchtime 7x"}},
	{"GuestLatency", map[string]string{
		smoke: "-latency-rounds 1 -latency-window 3s",
		quick: "-latency-rounds 3 -latency-window 3s",
		full:  "-latency-rounds 7 -latency-window 6s",
	}},
	{"Merge", map[string]string{
		smoke: "-merge-points 3 -restore-data 64MiB -restore-change 1MiB",
		quick: "-test.benchtime 3x -merge-points 8 -restore-data 600MiB -restore-change 10MiB",
		full:  "-test.benchtime 5x -merge-points 365 -restore-data 1300MiB -restore-change 10MiB",
	}},
	{"List", map[string]string{
		smoke: "-list-guests 5 -list-points 20 -list-rounds 1",
		quick: "-list-guests 50 -list-points 200 -list-rounds 3",
		full:  "-list-guests 500 -list-points 200 -list-rounds 5",
	}},
	{"Scale", map[string]string{
		smoke: "-scale-guests 5 -scale-points 20 -scale-rounds 1",
		quick: "-scale-guests 50 -scale-points 200 -scale-rounds 3",
		full:  "-scale-guests 500 -scale-points 200 -scale-rounds 3",
	}},
	{"Files", map[string]string{smoke: "-files-rounds 1", quick: "-files-rounds 2", full: "-files-rounds 5"}},
}

// form is how long a run takes, and how much of that any case may.
type form struct {
	name        string
	total, each time.Duration // limits
}

var forms = []form{
	{smoke, 20 * time.Minute, 5 * time.Minute},
	{quick, 30 * time.Minute, 15 * time.Minute},
	{full, 8 * time.Hour, 3 * time.Hour},
}

func formOf(name string) (form, error) {
	for _, f := range forms {
		if f.name == name {
			return f, nil
		}
	}
	return form{}, fmt.Errorf("form %q: it is quick, full or smoke", name)
}

// args are those of the test binary for this case.
func (c benchCase) args(form string) []string {
	args := []string{"-test.run", "^$", "-test.bench", "^Benchmark" + c.name + "$", "-test.benchtime", "1x", "-test.timeout", "0"}
	return append(args, strings.Fields(c.flags[form])...) // of a flag given twice the last one counts
}

// chosen are the cases whose names match.
func chosen(only string) ([]benchCase, error) {
	re, err := regexp.Compile(only)
	if err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	var some []benchCase
	for _, c := range cases {
		if re.MatchString(c.name) {
			some = append(some, c)
		}
	}
	if len(some) == 0 {
		return nil, fmt.Errorf("-only %s: there is no such case", only)
	}
	return some, nil
}

// owns tells whether a figure's case is of this benchmark.
func (c benchCase) owns(figureCase string) bool {
	name, _, _ := strings.Cut(figureCase, "/")
	return name == c.name
}
