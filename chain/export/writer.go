package export

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"qmchain/chain/image"
)

var (
	// ErrDiffers is wrapped where what was written reads as something else.
	ErrDiffers = errors.New("it reads as something else than what was written")
	// ErrUnfinished is wrapped by errors that leave a device with a part of the disk.
	ErrUnfinished = errors.New("the device now holds a part of the disk, and looks empty")
)

// Progress is told how many bytes of how many are done, by many goroutines.
type Progress func(done, total int64)

// Writer is a plan that is being carried out. Its methods are called one after the other: Write, Verify if that is wanted,
// Commit; and Close in any case. Verify and Commit must not be called after an error.
type Writer struct {
	plan *Plan
	out  output
	// verified: what Commit still writes is to be verified too.
	verified bool
}

// output is one kind of output that is being written. The methods are those of Writer.
type output interface {
	write(ctx context.Context, progress func(bytes int64)) error
	// reader is what is on the disk, past the page cache.
	reader(ctx context.Context) (image.Image, error)
	commit(ctx context.Context, verify bool) error
	close() error
	// from is the offset before which nothing is written until the commit.
	from() int64
	// unfinished: the output is no longer what it was, and not yet what it is to be.
	unfinished() bool
}

// Start begins to carry out a plan. Nothing stands under the output's name until the commit, or it looks empty.
func (p *Plan) Start(ctx context.Context) (*Writer, error) {
	start := startFile
	switch {
	case p.Device:
		start = startDevice
	case p.opts.Format == Qcow2:
		start = startQcow2
	}
	out, err := start(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("output %s: %w", p.Output, err)
	}
	return &Writer{plan: p, out: out}, nil
}

// Write writes the disk and brings it to stable storage.
func (w *Writer) Write(ctx context.Context, progress Progress) error {
	return w.named(w.out.write(ctx, counter(progress, w.plan.Work())))
}

// Verify compares what is on the disk, not what is in memory, with the image. A difference is an error that wraps
// ErrDiffers.
func (w *Writer) Verify(ctx context.Context, progress Progress) error {
	w.verified = true
	r, err := w.out.reader(ctx)
	if err != nil {
		return w.named(err)
	}
	defer r.Close()
	return w.named(w.plan.compare(ctx, r, w.out.from(), w.plan.Size, counter(progress, w.plan.Size)))
}

// Commit gives a file its name, or a device its head. When it returns, that is on stable storage.
func (w *Writer) Commit(ctx context.Context) error { return w.named(w.out.commit(ctx, w.verified)) }

// Close frees what the writer holds. Without a commit a file is removed; a device stays without its head.
func (w *Writer) Close() error { return w.named(w.out.close()) }

func (w *Writer) named(err error) error {
	if err == nil {
		return nil
	}
	if w.out.unfinished() && !errors.Is(err, ErrUnfinished) {
		err = fmt.Errorf("%w: %w", err, ErrUnfinished)
	}
	return fmt.Errorf("output %s: %w", w.plan.Output, err)
}

// counter adds up what it is called with.
func counter(progress Progress, total int64) func(bytes int64) {
	if progress == nil {
		return func(int64) {}
	}
	var done atomic.Int64
	progress(0, total)
	return func(bytes int64) { progress(done.Add(bytes), total) }
}
