// Package fleet is the work on many guests: one after the other or some at once, each by itself, so that what fails for one
// stops none of the others; and the report of it, for a terminal, a file or a mail.
//
// Words:
//
//   - An [Outcome] is what came of one guest, and whether that is good, good with a remark, failed or left out.
//   - A [Report] is the outcomes of one run of the program.
package fleet

import (
	"context"
	"sync"
	"time"

	"qmchain/internal/ui"
)

// Verdict is what came of a guest.
type Verdict string

// Verdicts.
const (
	Good    Verdict = "ok"      // as asked
	Warning Verdict = "warning" // done, but not all as asked
	Failed  Verdict = "failed"
	Skipped Verdict = "skipped" // there was nothing to do
)

// Outcome is what came of one guest.
type Outcome struct {
	Guest   string        `json:"guest"`
	Name    string        `json:"name"` // for people: what its owner calls it
	Verdict Verdict       `json:"result"`
	Code    int           `json:"exit_code"`
	Point   string        `json:"point"` // the new point's id
	Level   string        `json:"level"`
	Size    int64         `json:"virtual_size"` // of its disks, in bytes
	Stored  int64         `json:"bytes"`        // of the new point's images
	Took    time.Duration `json:"-"`
	Seconds float64       `json:"seconds"`
	Remarks []string      `json:"remarks"` // warnings, or why it failed or was left out
}

// Each calls f for every guest, for at most jobs of them at once, and returns what came of them, in the order of the guests.
// When ctx ends no further guest is begun.
func Each(ctx context.Context, guests []string, jobs int, f func(ctx context.Context, guest string) Outcome) []Outcome {
	outcomes := make([]Outcome, len(guests))
	next := make(chan int)
	var workers sync.WaitGroup
	for range min(max(jobs, 1), len(guests)) {
		workers.Go(func() {
			for i := range next {
				began := time.Now()
				o := Outcome{Verdict: Failed, Code: ui.ExitInterrupted, Remarks: []string{"not begun: interrupted"}}
				if ctx.Err() == nil {
					o = f(ctx, guests[i])
				}
				o.Guest, o.Took = guests[i], time.Since(began)
				o.Seconds = o.Took.Seconds()
				if o.Remarks == nil {
					o.Remarks = []string{} // a list in JSON, too
				}
				outcomes[i] = o
			}
		})
	}
	for i := range guests {
		next <- i
	}
	close(next)
	workers.Wait()
	return outcomes
}

// Code is the exit code for several guests.
func Code(outcomes []Outcome) int {
	code := ui.ExitOK
	for _, o := range outcomes {
		switch {
		case o.Code == ui.ExitInterrupted:
			return ui.ExitInterrupted
		case o.Verdict == Failed || o.Code == ui.ExitNeedsDoctor:
			code = ui.ExitSomeFailed
		case o.Verdict == Warning && code == ui.ExitOK:
			code = ui.ExitPartly
		}
	}
	return code
}

// Count is how many outcomes have that verdict.
func Count(outcomes []Outcome, v Verdict) int {
	n := 0
	for _, o := range outcomes {
		if o.Verdict == v {
			n++
		}
	}
	return n
}
