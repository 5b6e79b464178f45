package stream

import (
	"context"
	"io"
	"time"
)

// pumpBytes is how much a pump moves at a time.
const pumpBytes = 1 << 20

// pumpIn returns a reader of what r has, whose reads end when ctx does. Those of r may not: nobody calls a read of a pipe
// back, and the goroutine that is in one stays until it returns. While the caller works on what it has read, a little more
// is read.
func pumpIn(ctx context.Context, r io.Reader) (in io.Reader, stop func()) {
	pr, pw := io.Pipe()
	undo := context.AfterFunc(ctx, func() { _ = pr.CloseWithError(ctx.Err()); _ = pw.CloseWithError(ctx.Err()) })
	go func() {
		_, err := io.CopyBuffer(pw, onlyReader{r}, make([]byte, pumpBytes))
		_ = pw.CloseWithError(err)
	}()
	return pr, func() { undo(); _ = pr.Close() }
}

// pumpOut returns a writer to w, whose writes end when ctx does. finish waits until all is written, or ctx ends; given an
// error, it only waits a moment for what is under way, and returns that error.
func pumpOut(ctx context.Context, w io.Writer) (out io.Writer, finish func(error) error) {
	pr, pw := io.Pipe()
	undo := context.AfterFunc(ctx, func() { _ = pr.CloseWithError(ctx.Err()); _ = pw.CloseWithError(ctx.Err()) })
	done := make(chan struct{})
	var outErr error // to be read when done is closed
	go func() {
		_, outErr = io.CopyBuffer(onlyWriter{w}, pr, make([]byte, pumpBytes))
		_ = pr.CloseWithError(outErr)
		close(done)
	}()
	return pw, func(err error) error {
		defer undo()
		_ = pw.CloseWithError(err)
		if err != nil {
			select {
			case <-done:
			case <-time.After(time.Second):
			}
			return err
		}
		select {
		case <-done:
			return outErr
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// onlyReader and onlyWriter hide the methods that would let io.CopyBuffer pass its buffer by.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)
