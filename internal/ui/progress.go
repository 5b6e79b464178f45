package ui

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/sirupsen/logrus"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// logInterval is the time between two lines about one disk where no bar can be drawn.
const logInterval = 10 * time.Second

// Progress shows how far the copying of several disks is.
type Progress interface {
	// Bar adds a disk of total bytes; 0 if that is not known yet.
	Bar(name string, total int64) Bar
	// Done ends the display. What is not complete then, stays as it is.
	Done()
}

// Bar is one disk's progress.
type Bar interface {
	// Set says how many bytes of how many are done. The total may change from call to call.
	Set(done, total int64)
	// Note says something more about the disk, in a few words; "" takes it back.
	Note(text string)
}

// NewProgress returns the Progress that fits: bars on a terminal, a log line every ten seconds elsewhere, and nothing
// at all when the user asked for quiet. The lines say that this much is verb ("copied").
func (u *UI) NewProgress(verb string) Progress {
	switch {
	case u.quiet:
		return silent{}
	case u.terminal != nil:
		return newBars(u.terminal, u.screen)
	default:
		return newLines(u.Log, verb, logInterval)
	}
}

type silent struct{}

func (silent) Bar(string, int64) Bar { return silent{} }
func (silent) Set(int64, int64)      {}
func (silent) Note(string)           {}
func (silent) Done()                 {}

// meter turns byte counts into a rate. The rate is a moving average: a disk's empty parts pass at no time, and the mean
// since the start would go on boasting of them.
type meter struct {
	mu          sync.Mutex
	done, total int64
	rate        float64 // bytes per second
	at          time.Time
	atDone      int64
	note        string
}

// The average's memory, and the least time between two samples.
const (
	rateMemory = 15 * time.Second
	rateSample = 500 * time.Millisecond
)

func newMeter(total int64, now time.Time) *meter { return &meter{total: total, at: now} }

func (m *meter) set(done, total int64, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done, m.total = done, total
	dt := now.Sub(m.at)
	if dt < rateSample {
		return
	}
	sample := float64(max(0, done-m.atDone)) / dt.Seconds()
	if m.atDone == 0 {
		m.rate = sample
	} else {
		w := min(1, dt.Seconds()/rateMemory.Seconds())
		m.rate += w * (sample - m.rate)
	}
	m.at, m.atDone = now, done
}

func (m *meter) setNote(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note = text
}

// text is "1.2 GiB of 32 GiB, 210 MiB/s, 2m30s left", and the note.
func (m *meter) text() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.figures()
	if m.note != "" {
		s += ", " + m.note
	}
	return s
}

func (m *meter) figures() string {
	s := humanize.IBytes(uint64(max(0, m.done)))
	if m.total > 0 {
		s += " of " + humanize.IBytes(uint64(m.total))
	}
	if m.rate < 1 || m.complete() {
		return s
	}
	s += ", " + humanize.IBytes(uint64(m.rate)) + "/s"
	if left := float64(m.total-m.done) / m.rate; m.total > 0 && left < 1000*3600 {
		s += ", " + time.Duration(left*float64(time.Second)).Round(time.Second).String() + " left"
	}
	return s
}

func (m *meter) complete() bool { return m.total > 0 && m.done >= m.total }

// bars draws on a terminal.
type bars struct {
	screen *screen
	before io.Writer // where log lines went
	mpb    *mpb.Progress

	mu  sync.Mutex
	all []*mpb.Bar
}

func newBars(terminal *os.File, s *screen) *bars {
	p := &bars{screen: s, mpb: mpb.New(mpb.WithOutput(terminal), mpb.WithAutoRefresh())}
	p.before = s.swap(p.mpb) // log lines go above the bars
	return p
}

type bar struct {
	meter *meter
	mpb   *mpb.Bar
}

func (p *bars) Bar(name string, total int64) Bar {
	m := newMeter(total, time.Now())
	b := p.mpb.AddBar(total,
		mpb.BarWidth(30),
		mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(
			decor.Percentage(decor.WC{W: 5}),
			decor.Any(func(decor.Statistics) string { return "  " + m.text() }),
		),
	)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, b)
	return &bar{m, b}
}

func (b *bar) Set(done, total int64) {
	b.meter.set(done, total, time.Now())
	b.mpb.SetTotal(total, false)
	b.mpb.SetCurrent(done)
}

func (b *bar) Note(text string) { b.meter.setNote(text) }

func (p *bars) Done() {
	p.mu.Lock()
	for _, b := range p.all {
		b.Abort(false) // without effect on a complete one
	}
	p.mu.Unlock()
	p.mpb.Wait()
	p.screen.swap(p.before)
}

// lines writes to the log.
type lines struct {
	verb string
	log  *logrus.Logger
	stop chan struct{}
	wg   sync.WaitGroup

	mu  sync.Mutex
	all []*line
}

type line struct {
	meter *meter
	name  string
	said  bool // that it is complete
}

func newLines(log *logrus.Logger, verb string, interval time.Duration) *lines {
	p := &lines{log: log, verb: verb, stop: make(chan struct{})}
	p.wg.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.report()
			case <-p.stop:
				return
			}
		}
	})
	return p
}

func (p *lines) Bar(name string, total int64) Bar {
	l := &line{meter: newMeter(total, time.Now()), name: name}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, l)
	return l
}

func (l *line) Set(done, total int64) { l.meter.set(done, total, time.Now()) }

func (l *line) Note(text string) { l.meter.setNote(text) }

func (p *lines) report() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.all {
		if l.said {
			continue
		}
		l.meter.mu.Lock()
		l.said = l.meter.complete()
		l.meter.mu.Unlock()
		p.log.WithField("disk", l.name).Info(p.verb + " " + l.meter.text())
	}
}

func (p *lines) Done() {
	close(p.stop)
	p.wg.Wait()
}
