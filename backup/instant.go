package backup

import (
	"context"
	"fmt"
	"time"
)

// takeInstant puts the filters in and switches all disks at once.
func (s *session) takeInstant(ctx context.Context) error {
	// The plan is older than the making of the images: somebody may have begun something on a disk.
	v, err := s.look(ctx)
	if err != nil {
		return err
	}
	for _, d := range s.plan.Disks {
		now := v.nodes[d.top]
		if now == nil || v.deviceOn(d.top) == nil {
			return fmt.Errorf("disk %s: its node %s is not on top of it any more: %w", d.Name, d.top, ErrBusy)
		}
		if err := now.checkUsers(); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	for i, d := range s.plan.Disks {
		if !d.switchable {
			if err := s.addTop(ctx, i, d); err != nil {
				return err
			}
		}
		err := s.qmp.BlockdevAdd(ctx, map[string]any{
			"driver": "copy-before-write", "node-name": nodeName(cbwPrefix, i), "file": d.below,
			"target": nodeName(fleecePrefix, i), "on-cbw-error": "break-snapshot",
			"cbw-timeout": int64(s.cfg.Fleecing.timeout() / time.Second), "discard": "unmap",
		})
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}

	// The options of the guest's own filters are asked for again, as they are now.
	if v, err = s.look(ctx); err != nil {
		return err
	}
	var options []any
	for i, d := range s.plan.Disks {
		top := d.top
		if !d.switchable {
			top = nodeName(topPrefix, i)
		}
		n := v.nodes[top]
		if n == nil {
			return fmt.Errorf("disk %s: node %s is gone", d.Name, top)
		}
		o, err := reopenOnto(n, nodeName(cbwPrefix, i))
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		options = append(options, o)
		// The sizes must be those of the plan, whatever was resized since: a copy-before-write filter takes a smaller
		// fleece image without a word.
		for _, name := range []string{top, nodeName(cbwPrefix, i), nodeName(fleecePrefix, i), nodeName(targetPrefix, i)} {
			if n := v.nodes[name]; n == nil || n.size != d.Size {
				return fmt.Errorf("disk %s: node %s does not have the disk's size of %d bytes; was the disk resized?", d.Name, name, d.Size)
			}
		}
	}
	err = s.atInstant(ctx, func() error {
		s.instant = s.cfg.Now()
		if err := s.qmp.BlockdevReopen(ctx, options...); err != nil {
			return fmt.Errorf("switch the disks: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, d := range s.plan.Disks {
		err := s.qmp.BlockdevAdd(ctx, map[string]any{
			"driver": "snapshot-access", "node-name": nodeName(snapshotPrefix, i), "file": nodeName(cbwPrefix, i),
		})
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	return nil
}

// addTop puts a filter that passes everything through on top of a disk. blockdev-reopen can change what it sits on, which
// it can't do for a device.
func (s *session) addTop(ctx context.Context, i int, d PlannedDisk) error {
	name := nodeName(topPrefix, i)
	if err := s.qmp.BlockdevAdd(ctx, topFilter(name, d.top)); err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	st := setDrive(d.device, name)
	if err := s.qmp.Execute(ctx, st.command, st.args, nil); err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	return nil
}
