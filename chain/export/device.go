package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// headBytes is the size of a device's head.
const headBytes = 1 << 20

// lookAtDevice makes sure that a device can be written to.
func (p *Plan) lookAtDevice(ctx context.Context) error {
	f, err := claim(ctx, p.Output, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	if p.Room, err = deviceSize(f); err != nil {
		return err
	}
	return p.checkDevice(f)
}

// checkDevice looks at size, right and content.
func (p *Plan) checkDevice(f *os.File) error {
	size, err := deviceSize(f)
	if err != nil {
		return err
	}
	if size < p.Size {
		return fmt.Errorf("%w: the device has %d bytes, the disk %d", ErrTooSmall, size, p.Size)
	}
	readOnly, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET)
	if err != nil {
		return fmt.Errorf("is it read-only: %w", err)
	}
	if readOnly != 0 {
		return fmt.Errorf("the device is read-only: %w", syscall.EROFS)
	}
	if p.opts.Force {
		return nil
	}
	head := make([]byte, min(headBytes, size))
	if err := readFull(f, head, 0); err != nil {
		return err
	}
	if !bytes.Equal(head, make([]byte, len(head))) {
		return fmt.Errorf("%w: the device is not empty", ErrExists)
	}
	return nil
}

func deviceSize(f *os.File) (int64, error) {
	size, err := f.Seek(0, 2)
	if err != nil {
		return 0, fmt.Errorf("size: %w", err)
	}
	return size, nil
}

// claimLimit is how long a device may be busy. Udev looks into every device that somebody has written to.
const claimLimit = 2 * time.Second

// claim opens a device that nobody else uses: it is not mounted, not part of another device and no swap space, which the
// kernel knows (O_EXCL); and no other process has it open, as a QEMU whose guest's disk it is.
func claim(ctx context.Context, path string, flag int) (*os.File, error) {
	until := time.Now().Add(claimLimit)
	for {
		f, err := tryClaim(path, flag)
		if !errors.Is(err, ErrInUse) || time.Now().After(until) {
			return f, err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func tryClaim(path string, flag int) (*os.File, error) {
	f, err := os.OpenFile(path, flag|unix.O_EXCL|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%w%s", ErrInUse, user(path))
	}
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		_ = f.Close()
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		_ = f.Close()
		return nil, fmt.Errorf("%w: it is no block device any more", ErrKind)
	}
	if who := openDevice(st.Rdev); who != "" {
		_ = f.Close()
		return nil, fmt.Errorf("%w: %s has it open", ErrInUse, who)
	}
	return f, nil
}

// user says what the kernel uses a device for, as far as that is easy to find.
func user(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return ""
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if text, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 4 && fields[2] == number {
				return ": it is mounted at " + fields[4]
			}
		}
	}
	if holders, err := os.ReadDir("/sys/dev/block/" + number + "/holders"); err == nil && len(holders) > 0 {
		return ": it is part of " + holders[0].Name()
	}
	return ": it, or a part of it, is mounted, swap space, or part of another device"
}

// device is a block device that is being written to.
type device struct {
	plan *Plan
	file *os.File
	head int64 // bytes
	// begun is set when the device is no longer what it was; committed, when it is what it is to be.
	begun, committed bool
}

func startDevice(ctx context.Context, p *Plan) (output, error) {
	f, err := claim(ctx, p.Output, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	d := &device{plan: p, file: f, head: min(headBytes, p.Size)}
	if err := p.checkDevice(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := d.wipe(); err != nil {
		if d.unfinished() {
			err = fmt.Errorf("%w: %w", err, ErrUnfinished)
		}
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

// wipe takes the head away.
func (d *device) wipe() error {
	if err := d.plan.opts.FS.Step("wipe", d.plan.Output); err != nil {
		return err
	}
	d.begun = true
	if _, err := d.file.WriteAt(make([]byte, d.head), 0); err != nil {
		return err
	}
	return d.file.Sync()
}

func (d *device) unfinished() bool { return d.begun && !d.committed }

func (d *device) from() int64 { return d.head }

func (d *device) write(ctx context.Context, progress func(int64)) error {
	return d.copy(ctx, d.head, d.plan.Size, progress)
}

func (d *device) copy(ctx context.Context, from, to int64, progress func(int64)) error {
	c := copying{
		plan: d.plan, dst: newZeroing(d.file), progress: progress,
		before: func() error { return d.plan.opts.FS.Step("write", d.plan.Output) },
	}
	if err := c.run(ctx, from, to); err != nil {
		return err
	}
	if err := d.plan.opts.FS.Step("sync", d.plan.Output); err != nil {
		return err
	}
	return d.file.Sync()
}

func (d *device) reader(context.Context) (image.Image, error) {
	return readBack(d.plan.Output, d.plan.Size)
}

// commit writes the head, and of that the first page when all the rest is on the disk: a page is there or not. A head that
// does not come back as it was written goes again.
func (d *device) commit(ctx context.Context, verify bool) error {
	first := min(page, d.head)
	err := d.copy(ctx, first, d.head, func(int64) {})
	if err == nil {
		err = d.copy(ctx, 0, first, func(int64) {})
	}
	if err == nil && verify {
		err = d.verifyHead(ctx)
	}
	if err != nil {
		return errors.Join(err, d.wipe())
	}
	d.committed = true
	return nil
}

func (d *device) verifyHead(ctx context.Context) error {
	r, err := readBack(d.plan.Output, d.plan.Size)
	if err != nil {
		return err
	}
	defer r.Close()
	return d.plan.compare(ctx, r, 0, d.head, func(int64) {})
}

func (d *device) close() error { return d.file.Close() }
