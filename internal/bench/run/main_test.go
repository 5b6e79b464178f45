package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/internal/bench/figures"
)

// Each case is a benchmark, and its flags are flags of the benchmarks.
func TestCases(t *testing.T) {
	t.Parallel()
	sources, err := filepath.Glob("../*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, name := range sources {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(source)
	}
	for _, c := range cases {
		if !strings.Contains(text.String(), "func Benchmark"+c.name+"(b *testing.B)") {
			t.Errorf("there is no Benchmark%s", c.name)
		}
		for _, form := range forms {
			if _, ok := c.flags[form.name]; !ok {
				t.Errorf("%s: no flags of form %s", c.name, form.name)
			}
			for _, arg := range c.args(form.name) {
				flag, found := strings.CutPrefix(arg, "-")
				if !found || strings.HasPrefix(flag, "test.") {
					continue
				}
				if !regexp.MustCompile(`flag\.\w+\("` + flag + `"`).MatchString(text.String()) {
					t.Errorf("%s, %s: there is no flag -%s", c.name, form.name, flag)
				}
			}
		}
	}
	if args := (benchCase{name: "X", flags: map[string]string{quick: "-test.benchtime 3x"}}).args(quick); args[len(args)-1] != "3x" {
		t.Errorf("%v: the case's own benchtime is not the last", args)
	}
}

func TestChosen(t *testing.T) {
	t.Parallel()
	if some, err := chosen(""); err != nil || len(some) != len(cases) {
		t.Errorf("%d of %d cases, %v", len(some), len(cases), err)
	}
	if some, err := chosen("^(Mount|List)$"); err != nil || len(some) != 2 || some[0].name != "Mount" {
		t.Errorf("%v, %v", some, err)
	}
	for _, only := range []string{"Nothing", "("} {
		if some, err := chosen(only); err == nil {
			t.Errorf("%q: %v", only, some)
		}
	}
}

func TestUsage(t *testing.T) {
	t.Chdir("../../..")
	empty := t.TempDir()
	for _, c := range []struct {
		args string
		want string
	}{
		{"-form large", "quick, full or smoke"},
		{"-form smoke", "needs -out"},
		{"-only Nothing", "no such case"},
		{"-check -out " + empty, "nothing recorded"},
		{"-page -out " + empty, "nothing recorded"},
	} {
		err := command(t.Context(), strings.Fields(c.args), io.Discard)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, not %q", c.args, err, c.want)
		}
	}
}

func TestReason(t *testing.T) {
	t.Parallel()
	said := `goos: linux
BenchmarkMount/warm/points=1-2   1   2 seq-MB/s
--- BENCH: BenchmarkMount/warm/points=1-2
    mount_test.go:1: seq: fine
--- FAIL: BenchmarkMount/huge
    mount_test.go:2: seq: fine
    mount_test.go:3: nbdfuse does not answer: no such file
        or directory
BenchmarkMount/tar-2   1   2 tar-s
--- FAIL: BenchmarkMount
    mount_test.go:4: a chain
FAIL
`
	if got := reason(said, errors.New("exit status 1")).Error(); got != "Mount/huge: nbdfuse does not answer: no such file; Mount: a chain" {
		t.Error(got)
	}
	if got := reason("panic: oh\nexit\n", errors.New("exit status 2")).Error(); got != "exit status 2: exit" {
		t.Error(got)
	}
}

func TestJoined(t *testing.T) {
	t.Parallel()
	machine := []figures.Fact{{Name: "processor", Value: "one"}}
	figure := func(of string, v float64) figures.Figure {
		return figures.Figure{Case: of, Name: "n", Unit: "s", Ours: []float64{v}}
	}
	before := figures.Run{
		Version: "old", Machine: machine, Cases: []figures.Case{{Name: "List"}, {Name: "Merge"}},
		Figures: []figures.Figure{figure("List/points=1", 1), figure("Merge", 1)},
	}
	now := figures.Run{Version: "new", Machine: machine, Cases: []figures.Case{{Name: "List"}}, Figures: []figures.Figure{figure("List/points=2", 2)}}
	both, err := joined(before, now)
	if err != nil || len(both.Cases) != 2 || len(both.Figures) != 2 || both.Figures[0].Case != "Merge" || both.Figures[1].Case != "List/points=2" || both.Version != "old" {
		t.Errorf("%v, %v", both, err)
	}
	now.Machine = nil
	if _, err := joined(before, now); err == nil {
		t.Error("figures of two machines were put together")
	}
}

// binary stands for the benchmarks: a script that is called like them, and finds what it is told to.
func binary(t *testing.T, script string) *measuring {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root, for namespaces")
	}
	dir := t.TempDir()
	m := &measuring{form: form{quick, time.Minute, 20 * time.Second}, out: io.Discard, dir: dir, binary: filepath.Join(dir, "bench.test")}
	script = "#!/bin/sh\nfor out; do :; done\nfigure() { echo '{\"case\":\"'$1'\",\"name\":\"n\",\"unit\":\"s\",\"less\":true,\"peer\":\"p\",\"ours\":['$2'],\"theirs\":[10]}' >>$out; }\n" + script
	if err := os.WriteFile(m.binary, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return m
}

// A case that fails keeps what it has found; the next one goes on. What a case leaves, processes, mounts and files, goes.
func TestRun(t *testing.T) {
	t.Chdir("../../..")
	left := filepath.Join(t.TempDir(), "alive")
	m := binary(t, `
case "$*" in
*BenchmarkA*) figure A 1; echo '--- FAIL: BenchmarkA'; echo '    a_test.go:1: broken'; exit 1 ;;
*BenchmarkB*)
	mount -t tmpfs none "$TMPDIR"; touch "$TMPDIR/file"
	(trap '' TERM INT HUP; while :; do touch `+left+`; sleep 0.05; done) >/dev/null 2>&1 &
	until [ -e `+left+` ]; do sleep 0.05; done
	figure B 2 ;;
*BenchmarkC*) exit 0 ;;
esac
`)
	r := m.run(t.Context(), []benchCase{{name: "A"}, {name: "B"}, {name: "C"}})
	var got []string
	for _, c := range r.Cases {
		got = append(got, c.Name+": "+c.Error)
	}
	if want := []string{"A: A: broken", "B: ", "C: it has found nothing"}; !slices.Equal(got, want) {
		t.Errorf("%q, not %q", got, want)
	}
	if len(r.Figures) != 2 || r.Figures[0].Case != "A" || r.Figures[1].Case != "B" {
		t.Errorf("%v", r.Figures)
	}
	if err := os.Remove(left); err != nil {
		t.Fatal("the process that B has left was never there:", err)
	}
	time.Sleep(300 * time.Millisecond)
	if _, err := os.Stat(left); err == nil {
		t.Error("the process that B has left is alive")
	}
	names, err := filepath.Glob(filepath.Join(m.dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if info, err := os.Stat(name); err != nil || info.IsDir() {
			t.Errorf("%s was left, %v", name, err)
		}
	}
}

// A case that does not end is ended; with it what it has started.
func TestLimits(t *testing.T) {
	t.Chdir("../../..")
	m := binary(t, `figure A 1; sleep 1000 & sleep 1000`)
	m.form.each = 4 * time.Second
	began := time.Now()
	r := m.run(t.Context(), []benchCase{{name: "A"}})
	if took := time.Since(began); took > time.Minute {
		t.Errorf("it took %s", took)
	}
	if !strings.Contains(r.Cases[0].Error, "ended before it was done") || len(r.Figures) != 1 {
		t.Errorf("%v", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r := m.run(ctx, []benchCase{{name: "A"}}); !strings.Contains(r.Cases[0].Error, "not begun") {
		t.Errorf("%v", r)
	}
}

// A ratio has fallen only if it has twice.
func TestGuard(t *testing.T) {
	before := figures.Run{Figures: []figures.Figure{
		{Case: "A", Name: "n", Unit: "s", Less: true, Peer: "p", Ours: []float64{1}, Theirs: []float64{10}},
		{Case: "B", Name: "n", Unit: "s", Less: true, Peer: "p", Ours: []float64{1}, Theirs: []float64{10}},
		{Case: "Other", Name: "n", Unit: "s", Less: true, Peer: "p", Ours: []float64{1}, Theirs: []float64{10}},
	}}
	some := []benchCase{{name: "A"}, {name: "B"}}
	t.Chdir("../../..")
	for name, c := range map[string]struct{ ofA, want string }{
		"as it was":    {`figure A 1`, ""},
		"slower":       {`figure A 2`, "1 ratios have fallen"},
		"slower once":  {`if [ -e "$0.once" ]; then figure A 1; else figure A 2; touch "$0.once"; fi`, ""},
		"missing":      {`exit 1`, "1 ratios have fallen"},
		"missing once": {`if [ -e "$0.once" ]; then figure A 1; else touch "$0.once"; exit 1; fi`, ""},
	} {
		m := binary(t, `case "$*" in *BenchmarkA*) `+c.ofA+` ;; *) figure B 1 ;; esac`)
		var said bytes.Buffer
		err := guard(t.Context(), m, before, m.run(t.Context(), some), some, &said)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, not %q: %s", name, err, c.want, said.String())
		}
	}
}

// The page is that of a record in the tree.
func TestPageIsOfRecord(t *testing.T) {
	t.Chdir("../../..")
	var pages []string
	for _, form := range []string{quick, full} {
		at := placesOf(form, "")
		r, err := readRun(at.record)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, string(figures.Markdown(r, at.plots)))
	}
	page, err := os.ReadFile(placesOf(quick, "").page)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if len(pages) > 0 && !slices.Contains(pages, string(page)) || len(pages) == 0 && err == nil {
		t.Error("BENCHMARKS.md is not what its record gives: go run ./internal/bench/run -page")
	}
}
