package main

import (
	"fmt"
	"io"
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

// Events of run --json, one a line: "progress" of a disk at most twice a second, then one "point", "skipped" or
// "error" of each guest, and of several guests one "summary".
type progressEvent struct {
	Event string `json:"event"`
	Guest string `json:"guest"`
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
	Guest string `json:"guest"`
	Bytes int64  `json:"bytes"` // that have changed
}

type errorEvent struct {
	Event string `json:"event"`
	Guest string `json:"guest"`
	Error string `json:"error"`
	Code  int    `json:"exit_code"`
}

// display shows runs to whoever looks: bars or log lines for people, events for programs.
type display struct {
	u       *ui.UI
	asJSON  bool
	several bool
	bars    ui.Progress // nil with asJSON

	mu sync.Mutex // of standard output, and of the observers
}

func newDisplay(u *ui.UI, asJSON, several bool) *display {
	d := &display{u: u, asJSON: asJSON, several: several}
	if !asJSON {
		d.bars = u.NewProgress("copied")
	}
	return d
}

// end ends the display.
func (d *display) end() {
	if d.bars != nil {
		d.bars.Done()
	}
}

// result writes to standard output.
func (d *display) result(text func(io.Writer) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.u.Result(false, nil, text)
}

func (d *display) event(v any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.u.Event(v)
}

// of is the display of one guest.
func (d *display) of(guest string) *observer {
	return &observer{display: d, guest: guest, disks: make(map[string]ui.Bar)}
}

// observer shows the run of one guest.
type observer struct {
	*display
	guest string
	disks map[string]ui.Bar
}

// Disk implements backup.Progress.
func (o *observer) Disk(name string, done, total, fleece int64) {
	if o.asJSON {
		if err := o.event(progressEvent{"progress", o.guest, name, done, total, fleece}); err != nil {
			o.u.Log.Debug(err)
		}
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	bar, ok := o.disks[name]
	if !ok {
		label := name
		if o.several {
			label = o.guest + " " + name
		}
		bar = o.bars.Bar(label, total)
		o.disks[name] = bar
	}
	bar.Set(done, total)
	if fleece >= 1<<20 { // less is the empty image
		bar.Note("fleece " + humanize.IBytes(uint64(fleece)))
	}
}

// end sends the last event.
func (o *observer) end(result *backup.Result, took time.Duration, err error) error {
	switch {
	case !o.asJSON:
		return nil
	case err != nil:
		return o.event(errorEvent{"error", o.guest, err.Error(), ui.ExitCode(explain(err))})
	case result.Point == nil:
		return o.event(skippedEvent{"skipped", o.guest, result.Plan.Estimate()})
	default:
		return o.event(pointEvent{"point", took.Seconds(), append([]string{}, result.Warnings...), listing.Of(result.Point)})
	}
}

// metrics writes a file for node_exporter's textfile collector. It wants all lines of a metric together.
func metrics(path string, guests []string, runs map[string]*run) error {
	var b strings.Builder
	gauge := func(name, help string, value func(*run) (any, bool)) {
		fmt.Fprintf(&b, "# HELP qmchain_backup_%s %s\n# TYPE qmchain_backup_%s gauge\n", name, help, name)
		for _, guest := range guests {
			if v, ok := value(runs[guest]); ok {
				fmt.Fprintf(&b, "qmchain_backup_%s{guest=%q} %v\n", name, runs[guest].name(), v) // names hold nothing that needs another quoting
			}
		}
	}
	ofRun := func(value func(*run) any) func(*run) (any, bool) {
		return func(r *run) (any, bool) { return value(r), !r.began.IsZero() }
	}
	ofPoint := func(value func(*run, *chain.Manifest) any) func(*run) (any, bool) {
		return func(r *run) (any, bool) {
			if r.result == nil || r.result.Point == nil {
				return nil, false
			}
			return value(r, r.result.Point), true
		}
	}
	gauge("last_run_timestamp_seconds", "When the last run began.", ofRun(func(r *run) any { return r.began.Unix() }))
	gauge("last_run_duration_seconds", "How long it took.", ofRun(func(r *run) any { return r.took.Seconds() }))
	gauge("last_run_exit_code", "Its exit code.", ofRun(func(r *run) any { return ui.ExitCode(explain(r.err)) }))
	gauge("last_point_timestamp_seconds", "The instant of the newest point.", ofPoint(func(_ *run, p *chain.Manifest) any { return p.Time.Unix() }))
	gauge("last_point_bytes", "What it takes in the repository.", ofPoint(func(_ *run, p *chain.Manifest) any { _, stored := sizes(p); return stored }))
	gauge("last_point_full_disks", "How many of its disks are fulls.", ofPoint(func(_ *run, p *chain.Manifest) any {
		full := 0
		for _, d := range p.Disks {
			if d.Level == chain.Full {
				full++
			}
		}
		return full
	}))
	gauge("last_point_warnings", "How much of it went not quite as asked.", ofPoint(func(r *run, _ *chain.Manifest) any { return len(r.result.Warnings) }))
	return durable.FS{}.WriteFile(path, []byte(b.String()), 0o644)
}
