package main

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/cmd/internal/listing"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// Events of run --json, one a line: "progress" of a disk at most twice a second, then one "point", "skipped" or "error".
type progressEvent struct {
	Event string `json:"event"`
	Disk  string `json:"disk"`
	Done  int64  `json:"done"` // bytes
	Total int64  `json:"total"`
	// Fleece is what the disk's fleece image takes, in bytes.
	Fleece int64 `json:"fleece"`
}

type pointEvent struct {
	Event    string   `json:"event"`
	Seconds  float64  `json:"seconds"`
	Warnings []string `json:"warnings"`
	listing.Point
}

type skippedEvent struct {
	Event string `json:"event"`
	Bytes int64  `json:"bytes"` // that have changed
}

type errorEvent struct {
	Event string `json:"event"`
	Error string `json:"error"`
	Code  int    `json:"exit_code"`
}

// observer shows a run to whoever looks: bars or log lines for people, events for programs.
type observer struct {
	u      *ui.UI
	asJSON bool
	bars   ui.Progress // nil with asJSON

	mu    sync.Mutex
	disks map[string]ui.Bar
}

func newObserver(u *ui.UI, asJSON bool) *observer {
	o := &observer{u: u, asJSON: asJSON, disks: make(map[string]ui.Bar)}
	if !asJSON {
		o.bars = u.NewProgress("copied")
	}
	return o
}

// Disk implements backup.Progress.
func (o *observer) Disk(name string, done, total, fleece int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.asJSON {
		if err := o.u.Event(progressEvent{"progress", name, done, total, fleece}); err != nil {
			o.u.Log.Debug(err)
		}
		return
	}
	bar, ok := o.disks[name]
	if !ok {
		bar = o.bars.Bar(name, total)
		o.disks[name] = bar
	}
	bar.Set(done, total)
	if fleece >= 1<<20 { // less is the empty image
		bar.Note("fleece " + humanize.IBytes(uint64(fleece)))
	}
}

// end ends the display, and sends the last event.
func (o *observer) end(result *backup.Result, took time.Duration, err error) error {
	switch {
	case !o.asJSON:
		o.bars.Done()
		return nil
	case err != nil:
		return o.u.Event(errorEvent{"error", err.Error(), ui.ExitCode(explain(err))})
	case result.Point == nil:
		return o.u.Event(skippedEvent{"skipped", result.Plan.Estimate()})
	default:
		return o.u.Event(pointEvent{"point", took.Seconds(), append([]string{}, result.Warnings...), listing.Of(result.Point)})
	}
}

// metrics writes a file for node_exporter's textfile collector.
func metrics(path, guest string, result *backup.Result, began time.Time, err error) error {
	var b strings.Builder
	label := fmt.Sprintf("{guest=%q}", guest) // names hold nothing that needs another quoting
	gauge := func(name, help string, value any) {
		fmt.Fprintf(&b, "# HELP qmchain_backup_%s %s\n# TYPE qmchain_backup_%s gauge\nqmchain_backup_%s%s %v\n", name, help, name, name, label, value)
	}
	gauge("last_run_timestamp_seconds", "When the last run began.", began.Unix())
	gauge("last_run_duration_seconds", "How long it took.", time.Since(began).Seconds())
	gauge("last_run_exit_code", "Its exit code.", ui.ExitCode(explain(err)))
	if err == nil && result.Point != nil {
		var bytes int64
		full := 0
		for _, d := range result.Point.Disks {
			bytes += d.Bytes
			if d.Level == chain.Full {
				full++
			}
		}
		gauge("last_point_timestamp_seconds", "The instant of the newest point.", result.Point.Time.Unix())
		gauge("last_point_bytes", "What it takes in the repository.", bytes)
		gauge("last_point_full_disks", "How many of its disks are fulls.", full)
		gauge("last_point_warnings", "How much of it went not quite as asked.", len(result.Warnings))
	}
	return durable.FS{}.WriteFile(path, []byte(b.String()), 0o644)
}
