package fusefs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"qmchain/fusefs/partition"
	"qmchain/fusefs/tree"
)

// Which partitions a disk has stands in the disk, so to show them the disk must be opened and read. That is done when a
// point's folder is listed or a partition asked for by its name; never for the list of points. Whoever asks waits for a
// moment only: a disk that can't be read, or not just now, is listed without its partitions.

const (
	// tablePatience is how long a request waits for tables to be read. In a share's bad moments a folder is then listed
	// without partitions.
	tablePatience = 3 * time.Second
	// tableAgain is how long an error is kept that may pass.
	tableAgain = 10 * time.Second
	// maxTables is how many are kept. One takes some hundred bytes for each partition.
	maxTables = 4096
	// tableReaders is how many are read at a time.
	tableReaders = 8
)

// errNotYet is returned where a table was not read in time.
var errNotYet = errors.New("its partition table is still being read")

// found is what a look at a disk's partition table gave. A disk without one, or with one that is damaged, is no error.
type found struct {
	parts []partition.Partition
	err   error
}

// tables remember the partition tables of disks.
type tables struct {
	disks *disks
	log   *quietLog
	now   func() time.Time

	ctx    context.Context // of those that are being read
	cancel context.CancelFunc
	slots  chan struct{}

	mu      sync.Mutex
	known   map[diskKey]*table
	reading int           // how many are being read
	idle    chan struct{} // closed when none is, once the tables have ended

	reads, kept atomic.Uint64 // asked for: read; taken from what is known
}

// table is one disk's, read or being read. What is behind done is not changed after that is closed.
type table struct {
	done chan struct{}
	found
	at time.Time
}

func newTables(d *disks, log *quietLog, now func() time.Time) *tables {
	ctx, cancel := context.WithCancel(context.Background())
	return &tables{
		disks: d, log: log, now: now, ctx: ctx, cancel: cancel,
		slots: make(chan struct{}, tableReaders), known: map[diskKey]*table{}, idle: make(chan struct{}),
	}
}

// of returns what the tables of these disks of a point say. All are read at once.
func (t *tables) of(ctx context.Context, p tree.Place, disks []string) map[string]found {
	asked := make(map[string]*table, len(disks))
	for _, d := range disks {
		asked[d] = t.ask(p, d)
	}
	ctx, cancel := context.WithTimeout(ctx, tablePatience)
	defer cancel()
	out := make(map[string]found, len(disks))
	for d, e := range asked {
		select {
		case <-e.done:
			out[d] = e.found
			continue
		case <-ctx.Done():
		}
		select {
		case <-e.done: // both were
			out[d] = e.found
		default:
			out[d] = found{err: fmt.Errorf("point %s/%s: disk %s: %w", p.Guest, p.Point, d, errNotYet)}
		}
	}
	return out
}

// ask returns the table of a disk, which may still be being read.
func (t *tables) ask(p tree.Place, disk string) *table {
	key := diskKey{p.Guest, p.UUID, disk}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.known[key]; e != nil && !t.outdated(e) {
		t.kept.Add(1)
		return e
	}
	e := &table{done: make(chan struct{})}
	if t.ctx.Err() != nil {
		e.err = errUnmounted
		close(e.done)
		return e
	}
	t.reads.Add(1)
	t.makeRoom()
	t.known[key] = e
	t.reading++
	go t.read(e, p, disk)
	return e
}

// outdated tells whether an error is to be tried again.
func (t *tables) outdated(e *table) bool {
	select {
	case <-e.done:
		return e.err != nil && t.now().Sub(e.at) > tableAgain
	default:
		return false
	}
}

// makeRoom forgets some table, whichever, when there are too many. Those that are being read are kept: they are to be read
// once.
func (t *tables) makeRoom() {
	if len(t.known) < maxTables {
		return
	}
	for key, e := range t.known {
		select {
		case <-e.done:
			delete(t.known, key)
			return
		default:
		}
	}
}

func (t *tables) read(e *table, p tree.Place, disk string) {
	e.parts, e.err = t.look(p, disk)
	e.at = t.now()
	close(e.done)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reading--
	t.checkIdle()
}

func (t *tables) look(p tree.Place, disk string) ([]partition.Partition, error) {
	select {
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
	case <-t.ctx.Done():
		return nil, errUnmounted
	}
	fields := diskFields(p, disk)
	what := fmt.Sprintf("point %s/%s: disk %s", p.Guest, p.Point, disk)
	open, err := t.disks.acquire(p, disk)
	if err != nil {
		if !passes(err) {
			t.log.warn(fields, fmt.Sprintf("%s: its partitions are not shown: %v", what, err))
		}
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer t.disks.release(open)
	parts, err := partition.Find(t.ctx, open, open.Size())
	switch {
	case err == nil || errors.Is(err, partition.ErrNone):
	case errors.Is(err, partition.ErrDamaged):
		t.log.warn(fields, fmt.Sprintf("%s: partitions may be missing: %v", what, err))
	case t.ctx.Err() != nil:
		return nil, errUnmounted
	default:
		t.log.warn(fields, fmt.Sprintf("%s: its partitions are not shown: %v", what, err))
		return nil, fmt.Errorf("%s: partition table: %w", what, err)
	}
	return parts, nil
}

// end stops the reading and waits for it. It reports whether it has ended in time: a read that hangs is not stopped.
func (t *tables) end(limit time.Duration) bool {
	t.mu.Lock()
	t.cancel()
	t.checkIdle()
	t.mu.Unlock()
	select {
	case <-t.idle:
		return true
	case <-time.After(limit):
		return false
	}
}

// checkIdle says so when nothing is being read any more. The caller holds the lock.
func (t *tables) checkIdle() {
	if t.reading > 0 || t.ctx.Err() == nil {
		return
	}
	select {
	case <-t.idle:
	default:
		close(t.idle)
	}
}
