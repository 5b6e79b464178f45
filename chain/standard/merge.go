package standard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
)

// mergeStep adds the step that merges an increment into its full.
func (p *inPlace) mergeStep(m *merging, l link) {
	j := p.job
	base, top := p.path(m.base.file.Name), p.path(l.file.Name)
	s := Step{Action: Merge, Disk: m.disk, File: base, From: l.file.Name, Bytes: l.bytes}
	j.add(s, func(ctx context.Context, _ func(int64)) error {
		// Open from before until the sync, so that no error of writing back is missed.
		f, err := os.OpenFile(base, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := j.req.FS.Step("merge", base); err != nil {
			return err
		}
		// Both are told: no header is followed, and that of the increment need not name the full.
		chained := node(top)
		chained["backing"] = node(base)
		limit := toolLimit + time.Duration(l.Disk.VirtualSize/slowest)*time.Second
		args := []string{"commit", "-q", "-d"}
		if rate := j.req.RateLimit; rate > 0 {
			args = append(args, "-r", strconv.FormatInt(rate, 10))
			limit += time.Duration(min(2*(l.Disk.VirtualSize/rate), maxSeconds)) * time.Second
		}
		if err := j.qemuImg(ctx, limit, append(args, named(chained))...); err != nil {
			return err
		}
		if err := p.compare(ctx, base, l); err != nil {
			return err
		}
		// Not its old time, which would hide from rsync that it has changed, but still before those of later increments.
		return p.sync(f, l.Point.Time)
	})
}

// repairStep adds the step that takes away what a program that was killed in the midst of changing a full has left: clusters
// of no use, and counts that are too high (those of a snapshot that was about to be made; seen). What it holds is not hurt.
func (p *inPlace) repairStep(m *merging) {
	j, base := p.job, p.path(m.base.file.Name)
	j.add(Step{Action: Repair, Disk: m.disk, File: base}, func(ctx context.Context, _ func(int64)) error {
		if err := j.req.FS.Step("check", base); err != nil {
			return err
		}
		limit := toolLimit + time.Duration(m.base.stamp.size/(100*slowest))*time.Second
		err := j.qemuImg(ctx, limit, "check", "-q", "-r", "leaks", named(node(base)))
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return fmt.Errorf("%w: %w", chain.ErrDamaged, err)
		}
		return err
	})
}

// compare makes sure that a full reads as it does with an increment on it, where that holds something.
func (p *inPlace) compare(ctx context.Context, base string, l link) error {
	j := p.job
	below := image.Layer{Path: base, Name: base, Format: image.Qcow2, Bytes: -1}
	pool := image.NewPool(image.PoolOptions{MaxMeta: 32 << 20, MaxClusters: 16 << 20})
	merged, err := pool.Open(l.Disk.VirtualSize, below)
	if err != nil {
		return err
	}
	defer merged.Close()
	above := l.file
	above.Check, above.Bytes = nil, -1 // its header may have been changed by us
	want, err := pool.Open(l.Disk.VirtualSize, below, above)
	if err != nil {
		return err
	}
	defer want.Close()
	where, err := j.held(ctx, l)
	if err != nil {
		return err
	}
	a, b := make([]byte, piece), make([]byte, piece)
	for _, s := range where {
		for off := s.off; off < min(s.end, want.Size()); off += piece {
			n := min(piece, s.end-off, want.Size()-off)
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := readFull(merged, a[:n], off); err != nil {
				return err
			}
			if err := readFull(want, b[:n], off); err != nil {
				return err
			}
			if !bytes.Equal(a[:n], b[:n]) {
				return fmt.Errorf("%w: from byte %d on it does not read as %s does", chain.ErrDamaged, off, l.file.Name)
			}
		}
	}
	return nil
}

// snapshotStep adds the step that makes an internal snapshot.
func (p *inPlace) snapshotStep(m *merging, name string) {
	j, base := p.job, p.path(m.base.file.Name)
	j.add(Step{Action: Snapshot, Disk: m.disk, File: base, From: name}, func(ctx context.Context, _ func(int64)) error {
		info, err := os.Lstat(base)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(base, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := j.req.FS.Step("snapshot", base); err != nil {
			return err
		}
		if err := j.snapshot(ctx, base, name); err != nil {
			return err
		}
		return p.sync(f, info.ModTime())
	})
}

// mark writes into a full's header that its snapshots are called by UTC.
func (p *inPlace) mark(base string) error {
	info, err := os.Lstat(base)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(base, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.job.req.FS.Step("write", base); err != nil {
		return err
	}
	if err := qcow2.SetIdentity(f, []byte(foreign.UTCSnapshots)); err != nil {
		return err
	}
	return p.sync(f, info.ModTime())
}

// removeStep adds the step that does away with an increment that was merged.
func (p *inPlace) removeStep(m *merging, l link) {
	file, base := p.path(l.file.Name), p.path(m.base.file.Name)
	p.job.add(Step{Action: Remove, Disk: m.disk, File: file}, func(context.Context, func(int64)) error {
		// An earlier call may have died before its sync.
		f, err := os.OpenFile(base, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Sync(); err != nil {
			return err
		}
		return p.job.req.FS.Remove(file)
	})
}
