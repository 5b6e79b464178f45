package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/qmp"
)

// ErrNeedsDoctor is wrapped where something of ours is in the guest in a way that can't be undone safely.
var ErrNeedsDoctor = errors.New("needs a look by hand")

// A step is one QMP command.
type step struct {
	command string
	args    map[string]any
}

func del(node string) step { return step{"blockdev-del", map[string]any{"node-name": node}} }

// clean resumes and thaws the guest, where that is for us to do, and takes all nodes and jobs of ours out of it: those of the
// run that has just ended, well or not, and those that a killed run left. The guest goes on meanwhile. It returns what the guest looks like without them.
func (s *session) clean(ctx context.Context) (*view, error) {
	// First of all, as the guest waits for it; where it can't be done, the rest is all the more needed.
	releaseErr := s.release(ctx)
	v, err := s.cleanNodes(ctx)
	return v, errors.Join(releaseErr, err)
}

// cleanNodes takes all nodes and jobs of ours out of the guest. Where another job uses a filter of ours, that filter stays on
// top of its disk, with a warning: it passes everything through and does no harm; all that is below it goes.
func (s *session) cleanNodes(ctx context.Context) (*view, error) {
	if err := s.cancelJobs(ctx); err != nil {
		return nil, err
	}
	v, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	steps, stays := teardown(v)
	for _, text := range stays {
		s.warnf("%s", text)
	}
	if len(steps) == 0 {
		return v, nil
	}
	for _, st := range steps {
		if err := s.qmp.Execute(ctx, st.command, st.args, nil); err != nil {
			return nil, fmt.Errorf("take our nodes out of the guest: %w", err)
		}
	}
	if v, err = s.look(ctx); err != nil {
		return nil, err
	}
	for name := range v.nodes {
		if strings.HasPrefix(name, ourPrefix) && !strings.HasPrefix(name, topPrefix) {
			return nil, fmt.Errorf("node %s is still in the guest: %w", name, ErrNeedsDoctor)
		}
	}
	return v, nil
}

// cancelJobs ends the jobs of ours and waits until they are gone.
func (s *session) cancelJobs(ctx context.Context) error {
	for {
		jobs, err := s.qmp.QueryJobs(ctx)
		if err != nil {
			return err
		}
		jobs = slices.DeleteFunc(jobs, func(j qmp.Job) bool { return !strings.HasPrefix(j.ID, ourPrefix) })
		if len(jobs) == 0 {
			return nil
		}
		for _, j := range jobs {
			end := s.qmp.JobCancel
			if j.Status == "concluded" {
				end = s.qmp.JobDismiss
			}
			// It may have ended, or be on its way to its end, since it was asked for; the next look tells.
			var refused *qmp.Error
			if err := end(ctx, j.ID); err != nil && !errors.As(err, &refused) {
				return fmt.Errorf("cancel job %s: %w", j.ID, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cancel job %s: %w", jobs[0].ID, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// teardown returns the steps that take our nodes out of the guest, in an order in which each is allowed and the guest's
// own requests always have a way. A node of ours that somebody else has come to use stays, with all that it needs; stays says
// which and why.
func teardown(v *view) (steps []step, stays []string) {
	nodes := make(map[string][]*node)
	for _, prefix := range []string{snapshotPrefix, cbwPrefix, topPrefix, fleecePrefix, targetPrefix, keepPrefix} {
		for name, n := range v.nodes {
			if strings.HasPrefix(name, prefix) && !strings.HasSuffix(name, fileSuffix) {
				nodes[prefix] = append(nodes[prefix], n)
			}
		}
		slices.SortFunc(nodes[prefix], func(a, b *node) int { return strings.Compare(a.name, b.name) })
	}
	kept := make(map[string]bool)
	keep := func(n *node, p parent) {
		kept[n.name] = true
		stays = append(stays, fmt.Sprintf("node %s stays in the guest, as %s %q uses it", n.name, p.kind, p.name))
	}

	for _, n := range nodes[snapshotPrefix] {
		steps = append(steps, del(n.name))
	}

	// All disks are switched back at once, as they were switched over.
	var reopen []map[string]any
	for _, cbw := range nodes[cbwPrefix] {
		for _, p := range cbw.parents {
			if p.kind == graphNode && strings.HasPrefix(p.name, snapshotPrefix) {
				continue
			}
			options, err := reopenOnto(v.nodes[p.name], cbw.children["file"])
			if p.kind != graphNode || err != nil {
				keep(cbw, p)
				kept[cbw.children["target"]] = true
				continue
			}
			reopen = append(reopen, options)
		}
	}
	if len(reopen) > 0 {
		steps = append(steps, step{"blockdev-reopen", map[string]any{"options": reopen}})
	}
	for _, n := range nodes[cbwPrefix] {
		if !kept[n.name] {
			steps = append(steps, del(n.name))
		}
	}

	for _, top := range nodes[topPrefix] {
		back := top.children["file"]
		if file := v.nodes[back]; file != nil && strings.HasPrefix(back, cbwPrefix) {
			back = file.children["file"] // as it is after the reopen
		}
		dev := v.deviceOn(top.name)
		for _, p := range top.parents {
			if p.kind != graphBackend || dev == nil {
				keep(top, p)
			}
		}
		if kept[top.name] {
			continue
		}
		if len(top.parents) > 0 {
			steps = append(steps, setDrive(qomPath(dev.QDev), back))
		}
		steps = append(steps, del(top.name))
	}

	for _, prefix := range []string{fleecePrefix, targetPrefix, keepPrefix} {
		for _, n := range nodes[prefix] {
			if !kept[n.name] {
				steps = append(steps, del(n.name))
			}
		}
	}
	return steps, stays
}

// deviceOn returns the device whose top node has that name, or nil.
func (v *view) deviceOn(top string) *qmp.BlockInfo {
	for i := range v.devices {
		if dev := &v.devices[i]; dev.Inserted != nil && dev.Inserted.NodeName == top && dev.QDev != "" {
			return dev
		}
	}
	return nil
}

func setDrive(device, node string) step {
	return step{"qom-set", map[string]any{"path": device, "property": "drive", "value": node}}
}

// reopenOnto are the options for blockdev-reopen that put a filter on top of a disk onto another child and leave the rest
// as it is. blockdev-reopen resets what it is not given: detect-zeroes and cache can be asked for; discard can't, but that
// is kept. Only two kinds of filters are ever switched: throttle filters of the guest's own, and those that addTop adds.
func reopenOnto(n *node, file string) (map[string]any, error) {
	if n == nil {
		return nil, fmt.Errorf("filter %s has no node above it: %w", file, ErrNeedsDoctor)
	}
	if strings.HasPrefix(n.name, topPrefix) {
		return topFilter(n.name, file), nil
	}
	if n.driver != "throttle" {
		return nil, fmt.Errorf("filter %s below a node of driver %s, %s: %w", file, n.driver, n.name, ErrNeedsDoctor)
	}
	group, err := throttleGroup(n.filename)
	if err != nil {
		return nil, fmt.Errorf("filter %s: %w", n.name, err)
	}
	return map[string]any{
		"driver":         "throttle",
		"node-name":      n.name,
		"throttle-group": group,
		"detect-zeroes":  n.info.DetectZeroes,
		"cache":          map[string]any{"direct": n.info.Cache.Direct, "no-flush": n.info.Cache.NoFlush},
		"read-only":      false,
		"file":           file,
	}, nil
}

// topFilter are the options of the filter that a disk gets which has no throttle filter on top: a raw node without offset
// and size passes everything through, and blockdev-reopen can change what it sits on. A throttle filter would do it too,
// but QEMU 10.0 crashes when one is added onto a disk with an iothread.
func topFilter(name, file string) map[string]any {
	return map[string]any{"driver": "raw", "node-name": name, "file": file, "discard": "unmap"}
}

// bitmap names a bitmap and the node that it is on.
type bitmap struct{ node, name string }

// uselessBitmaps returns the bitmaps of this repository that nothing will ever be built on: those that an unfinished point
// began, and those that tracking has moved on from. All others, also ones that can't be explained, are left alone.
func uselessBitmaps(v *view, repo string, points chain.Points, partials []chain.ID) []bitmap {
	var useless []bitmap
	for _, n := range v.nodes {
		if n.info.ReadOnly {
			continue // a backing image: its bitmaps can't be changed, and do no harm
		}
		var newest chain.ID // the newest point that a bitmap on this node tracks
		for _, b := range n.info.DirtyBitmaps {
			name, ok := chain.ParseBitmapName(b.Name)
			if layer, _ := points.Tracked(name); ok && name.Repo == repo && layer != nil && b.Recording && !b.Inconsistent {
				newest = max(newest, name.Point)
			}
		}
		for _, b := range n.info.DirtyBitmaps {
			if b.Name == freshBitmap && !b.Busy {
				useless = append(useless, bitmap{n.name, b.Name}) // of a merging back that was cut off
			}
			name, ok := chain.ParseBitmapName(b.Name)
			if !ok || name.Repo != repo || b.Busy {
				continue
			}
			unfinished := slices.Contains(partials, name.Point) && points.Find(name.Point) == nil
			// A point that was removed is not there; one that is newer than all of them is another state of the repository's.
			passed := name.Point < newest || points.Find(name.Point) != nil && points.Superseded(name)
			if unfinished || passed {
				useless = append(useless, bitmap{n.name, b.Name})
			}
		}
	}
	slices.SortFunc(useless, func(a, b bitmap) int { return strings.Compare(a.node+a.name, b.node+b.name) })
	return useless
}

// dropBitmaps removes the useless bitmaps from the guest.
func (s *session) dropBitmaps(ctx context.Context, v *view, points chain.Points, partials []chain.ID) error {
	return s.drop(ctx, uselessBitmaps(v, s.repo.ShortID(), points, partials))
}

// drop removes bitmaps from the guest, all of them or none.
func (s *session) drop(ctx context.Context, bitmaps []bitmap) error {
	if len(bitmaps) == 0 {
		return nil
	}
	var actions []qmp.Action
	for _, b := range bitmaps {
		actions = append(actions, qmp.BitmapRemove(b.node, b.name))
	}
	if err := s.qmp.Transaction(ctx, actions...); err != nil {
		return fmt.Errorf("remove bitmaps that are of no more use: %w", err)
	}
	return nil
}
