package standard

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/internal/durable"
)

// Command is what is made.
type Command string

// See the package's comment.
const (
	Rebase    Command = "rebase"
	Commit    Command = "commit"
	Snapshots Command = "snapshots"
)

var (
	// ErrForeign is wrapped where a set that can't be changed in place was to be.
	ErrForeign = errors.New("only sets of qmpbackup are changed in place")
	// ErrBusy is wrapped where somebody writes to the set or the output, or has an image open.
	ErrBusy = errors.New("in use")
	// ErrExists is wrapped where the output is not empty.
	ErrExists = errors.New("not an empty folder")
	// ErrInside is wrapped where the output is in the set.
	ErrInside = errors.New("nothing is written into the set")
	// ErrNoSpace is wrapped where there may be too little space.
	ErrNoSpace = errors.New("not enough space")
	// ErrUnfinished is wrapped where a change in place was begun and not ended: by an error or a signal now, or before.
	ErrUnfinished = errors.New("a change in place is not finished")
	// ErrCannot is wrapped where an image can't be changed in place, though it can be read.
	ErrCannot = errors.New("it can't be changed in place")
)

// Request is what is asked for.
type Request struct {
	Command Command
	Set     source.Set
	Guest   string
	// Until is the point: latest, an id, or its beginning; with or without "GUEST/". Empty is the newest that is not only of
	// copies, which are outside of any chain.
	Until string
	// Disks are those of the point's that are wanted; none is all.
	Disks []string
	// Output is a folder that is empty, or not there in one that is. Empty: in place.
	Output string
	// DryRun is for who only wants to see the plan: nothing is locked.
	DryRun bool
	// RateLimit bounds reading for an output, and merging in place, in bytes per second; 0: no limit.
	RateLimit int64
	// LockWait is how long to wait for who removes points from the repository just now.
	LockWait time.Duration

	FS  durable.FS // is told of all changes
	Log logrus.FieldLogger
	// Progress, if not nil, is called once for each disk, and what it returns with how many bytes of how many are done.
	Progress func(disk string, total int64) func(done, total int64)
	// QemuImg and QemuNBD are programs; empty: qemu-img, qemu-nbd.
	QemuImg, QemuNBD string
}

// Action is what a step does.
type Action string

// The actions.
const (
	Copy     Action = "copy"     // File is made as a copy of From
	Write    Action = "write"    // File is written with what From, a point or what differs from the one before, holds
	Backing  Action = "backing"  // the header of File gets From as the name of its backing file; empty: none
	Repair   Action = "repair"   // what a call that was cut off has left in File is taken away
	Merge    Action = "merge"    // what From holds is written into File, its full, and compared
	Snapshot Action = "snapshot" // File gets an internal snapshot called From
	Mark     Action = "mark"     // the header of File gets the mark that the names of snapshots are of UTC
	Remove   Action = "remove"   // File goes
	Link     Action = "link"     // File becomes a symbolic link to From
)

// Step is one change.
type Step struct {
	Action Action `json:"action"`
	Disk   string `json:"disk"`
	File   string `json:"file"`
	From   string `json:"from"`
	Bytes  int64  `json:"bytes"` // that are read or written; 0 where that is little
}

// Result is what there is of a disk in the end.
type Result struct {
	Disk  string   `json:"disk"`
	Point chain.ID `json:"point"`
	// File is the path of the image, or of the symbolic link to it.
	File string `json:"file"`
}

// Plan is what is to be done.
type Plan struct {
	Guest   string   `json:"guest"`
	Until   chain.ID `json:"until"`
	InPlace bool     `json:"in_place"`
	Steps   []Step   `json:"steps"`
	Results []Result `json:"results"`
	// Doubts speak against disks being what the guest had, though they can be read.
	Doubts []error `json:"-"`
	// Damage is what verify has found of disks that can be read all the same. Each wraps chain.ErrDamaged.
	Damage []error `json:"-"`
}

// Job is a request that can be carried out. It is not for concurrent use.
type Job struct {
	Plan Plan

	req     Request
	guest   source.Guest
	points  *source.Points
	damaged repo.Damaged // what verify has found
	pool    *image.Pool
	disks   []*disk
	steps   []step
	limit   limiter
	states  map[string]fileState // of the set's files, when they were looked at
	release []func()

	out   *output  // nil: in place
	place *inPlace // nil: to an output
}

// step is a Step and how it is done. progress is told of bytes.
type step struct {
	Step
	do func(ctx context.Context, progress func(int64)) error
}

// Open looks at what is asked for and makes the plan. The job must be closed. Errors are those of this package,
// chain.ErrNoPoint, chain.ErrDamaged and repo.ErrLocked.
func Open(ctx context.Context, req Request) (_ *Job, err error) {
	if req.QemuImg == "" {
		req.QemuImg = "qemu-img"
	}
	if req.QemuNBD == "" {
		req.QemuNBD = "qemu-nbd"
	}
	// Everything is read about once: there is little to keep.
	j := &Job{req: req, pool: image.NewPool(image.PoolOptions{MaxMeta: 32 << 20, MaxClusters: 16 << 20}), limit: limiter{rate: req.RateLimit}, states: map[string]fileState{}}
	defer func() {
		if err != nil {
			j.Close()
		}
	}()
	if j.guest, err = req.Set.Guest(req.Guest); err != nil {
		return nil, err
	}
	if req.Output == "" {
		err = j.openInPlace(ctx)
	} else {
		err = j.openOutput(ctx)
	}
	if err != nil {
		return nil, err
	}
	j.Plan.Steps = []Step{}
	for _, s := range j.steps {
		j.Plan.Steps = append(j.Plan.Steps, s.Step)
	}
	return j, nil
}

// Close gives up what the job holds. It changes nothing.
func (j *Job) Close() {
	for i := len(j.release) - 1; i >= 0; i-- {
		j.release[i]()
	}
	j.release = nil
}

// Run carries the plan out. After an error an output is as it was, and what is in place is as it was or to be gone on with:
// then the error wraps ErrUnfinished.
func (j *Job) Run(ctx context.Context) error {
	if j.out != nil {
		return j.runOutput(ctx)
	}
	return j.runInPlace(ctx)
}

// runSteps takes the steps, and tells how far each disk is.
func (j *Job) runSteps(ctx context.Context) error {
	meters := map[string]*meter{}
	for _, s := range j.steps {
		if meters[s.Disk] == nil {
			meters[s.Disk] = &meter{}
		}
		meters[s.Disk].total += s.Bytes
	}
	for _, s := range j.steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		m := meters[s.Disk]
		if m.tell == nil && j.req.Progress != nil {
			m.tell = j.req.Progress(s.Disk, m.total)
		}
		m.most = m.done + s.Bytes
		if err := s.do(ctx, m.add); err != nil {
			return fmt.Errorf("disk %s: %s %s: %w", s.Disk, s.Action, filepath.Base(s.File), err)
		}
		m.add(s.Bytes)
	}
	return nil
}

// meter adds up what is done of a disk.
type meter struct {
	total int64
	tell  func(done, total int64)

	mu   sync.Mutex
	done int64
	most int64 // at the end of the step
}

// add is called by many goroutines. What is more than the step was thought to be does not count.
func (m *meter) add(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done = min(m.done+n, m.most)
	if m.tell != nil {
		m.tell(m.done, m.total)
	}
}

// increments makes a function that is told of sums out of one that is told of what is added to them.
func increments(add func(int64)) func(done, total int64) {
	var mu sync.Mutex
	var last int64
	return func(done, _ int64) {
		mu.Lock()
		defer mu.Unlock()
		if done > last {
			add(done - last)
			last = done
		}
	}
}

func (j *Job) add(s Step, do func(ctx context.Context, progress func(int64)) error) {
	j.steps = append(j.steps, step{s, do})
}
