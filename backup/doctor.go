package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/retain"
	"qmchain/internal/child"
)

// Finding is something that a crash of ours, of QEMU, of the host or of the storage has left.
type Finding struct {
	Where   string `json:"where"` // "guest", "repository", "fleece", or the path of an image
	What    string `json:"what"`
	Fixable bool   `json:"fixable"` // by Doctor with fix
}

// imageLimit bounds a qemu-img that reads or changes an image's header and bitmaps.
const imageLimit = 5 * time.Minute

// Doctor looks for all that crashes leave. With fix it puts right what can be put right, as the next run would, and also takes
// away bitmaps of this repository that no run could use, and what it returns is what is left then. Config.Addr may be empty:
// then only the repository, the fleece folder and the images of stopped guests are looked at.
//
// BreakLock names the lock of a run whose owner can't be judged from here, such as one of another host: the caller knows that
// it is dead.
func Doctor(ctx context.Context, cfg Config, images []string, fix bool, breakLock string) ([]Finding, error) {
	s := &session{cfg: cfg, log: cfg.Log, result: &Result{}}
	var err error
	if s.repo, err = cfg.Repo(); err != nil {
		return nil, err
	}
	if s.guest, err = s.repo.Guest(cfg.Guest); err != nil {
		return nil, err
	}
	if cfg.Addr != "" {
		client, err := s.connect(ctx)
		if err != nil {
			return nil, ofGuest(cfg.Guest, err)
		}
		s.qmp = client
		defer func() { _ = s.qmp.Close() }()
	}
	if breakLock != "" {
		if _, ok := lockOwner(breakLock); !ok || s.qmp == nil {
			return nil, fmt.Errorf("%q is no lock of a running guest: %w", breakLock, ErrNotFound)
		}
		if err := s.qmp.ObjectDel(ctx, breakLock); err != nil {
			return nil, fmt.Errorf("guest %s: break the lock: %w", cfg.Guest, err)
		}
	}
	if fix {
		if err := s.fix(ctx, images); err != nil {
			return nil, ofGuest(cfg.Guest, err)
		}
	}
	findings, err := s.examine(ctx, images)
	if err != nil {
		return nil, ofGuest(cfg.Guest, err)
	}
	return findings, nil
}

// finishMerges ends what a crash has cut off in the removal of points. It has a lock of its own, as that goes on beside runs.
func (s *session) finishMerges(ctx context.Context) error {
	unfinished, err := retain.Unfinished(s.guest)
	if err != nil || len(unfinished) == 0 {
		return err
	}
	lock, err := s.guest.LockPrune(ctx, s.cfg.LockWait)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	_, err = (&retain.Remover{Guest: s.guest, Log: s.log}).Sweep(ctx)
	return err
}

// cutOff says what a crash has cut off in the removal of points: not what another one is at just now.
func (s *session) cutOff(ctx context.Context) ([]string, error) {
	if unfinished, err := retain.Unfinished(s.guest); err != nil || len(unfinished) == 0 {
		return nil, err
	}
	lock, err := s.guest.LockPrune(ctx, 0)
	if errors.Is(err, repo.ErrLocked) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	return retain.Unfinished(s.guest)
}

// fix recovers as a run does.
func (s *session) fix(ctx context.Context, images []string) (err error) {
	if err := s.finishMerges(ctx); err != nil {
		return err
	}
	if s.lock, err = s.guest.Lock(ctx, s.cfg.LockWait); err != nil {
		return err
	}
	defer s.lock.Unlock()
	if s.qmp != nil {
		if s.mutex, err = newGuestLock(); err != nil {
			return err
		}
		err = s.mutex.take(ctx, s.qmp, s.cfg.LockWait)
		defer func() {
			err = errors.Join(err, s.mutex.release(context.WithoutCancel(ctx), s.qmp))
		}()
		if err != nil {
			return err
		}
		if err := s.restoreKept(ctx); err != nil {
			return err
		}
		v, err := s.recover(ctx)
		if err != nil {
			return err
		}
		if err := s.cfg.Kept.tidy(s.cfg.Guest); err != nil {
			return err
		}
		return s.drop(ctx, unusable(v, s.repo.ShortID(), s.points))
	}
	if err := s.readPoints(); err != nil {
		return err
	}
	if err := s.cfg.Kept.tidy(s.cfg.Guest); err != nil {
		return err
	}
	for _, path := range images {
		bitmaps, err := imageBitmaps(ctx, s.repo.QemuImg, path)
		if err != nil {
			return err
		}
		for _, b := range bitmaps {
			if s.imageFinding(b) != "" {
				if err := removeImageBitmap(ctx, s.repo.QemuImg, path, b.Name); err != nil {
					return err
				}
			}
		}
	}
	// Without a look into the guest its unfinished points must stay: they explain its bitmaps. With all of its images given,
	// those have just gone.
	if len(images) == 0 {
		return s.cfg.Fleecing.sweep()
	}
	partials, err := s.guest.Partials()
	if err != nil {
		return err
	}
	for _, id := range partials {
		if err := s.guest.RemovePartial(id); err != nil {
			return err
		}
	}
	return s.cfg.Fleecing.sweep()
}

// examine looks and changes nothing.
func (s *session) examine(ctx context.Context, images []string) ([]Finding, error) {
	findings := []Finding{}
	add := func(where string, fixable bool, format string, args ...any) {
		findings = append(findings, Finding{where, fmt.Sprintf(format, args...), fixable})
	}
	points, problems, err := s.guest.Points()
	if err != nil {
		return nil, err
	}
	s.points = points
	for _, p := range problems {
		add("repository", false, "%v", p.Err)
	}
	partials, err := s.guest.Partials()
	if err != nil {
		return nil, err
	}
	for _, id := range partials {
		add("repository", true, "unfinished point %s", id)
	}
	unfinished, err := s.cutOff(ctx)
	if err != nil {
		return nil, err
	}
	for _, text := range unfinished {
		add("repository", true, "%s", text)
	}
	strays, err := s.guest.Strays()
	if err != nil {
		return nil, err
	}
	for _, name := range strays {
		add("repository", false, "%s belongs to no point: was the point's folder removed by hand? Points that need it can't be read; if there are none, remove it",
			filepath.Join(s.guest.ImagesDir(), name))
	}
	if !s.cfg.Fleecing.Off && s.cfg.Fleecing.Dir != "" {
		stale, err := s.cfg.Fleecing.stale()
		if err != nil {
			return nil, err
		}
		for _, path := range stale {
			add("fleece", true, "fleece image of a run that did not end: %s", path)
		}
	}
	for _, path := range images {
		bitmaps, err := imageBitmaps(ctx, s.repo.QemuImg, path)
		if err != nil {
			return nil, err
		}
		for _, b := range bitmaps {
			if why := s.imageFinding(b); why != "" {
				add(path, true, "bitmap %s: %s", b.Name, why)
			}
		}
	}
	findings = append(findings, s.cfg.Kept.findings(s.cfg.Guest, s.qmp != nil)...)
	if s.qmp == nil {
		return findings, nil
	}
	v, err := look(ctx, s.qmp)
	if err != nil {
		return nil, err
	}
	objects, err := s.qmp.Objects(ctx)
	if err != nil {
		return nil, err
	}
	return append(findings, v.findings(objects, s.repo.ShortID(), points, partials)...), nil
}

// findings are what is of ours in a guest while no run of ours is under way there.
func (v *view) findings(objects []string, repo string, points chain.Points, partials []chain.ID) []Finding {
	var findings []Finding
	add := func(format string, args ...any) {
		findings = append(findings, Finding{"guest", fmt.Sprintf(format, args...), true})
	}
	for _, id := range objects {
		switch o, ok := lockOwner(id); {
		case ok && !o.dead():
			// A run is under way: all that is there belongs to it.
			return []Finding{{"guest", "a run is under way: " + describeOwner(id), false}}
		case ok:
			add("lock of a run that did not end: object %s", id)
		case id == frozenMark:
			add("a run has left the guest's file systems frozen")
		case id == pausedMark && v.status == "paused":
			add("a run has left the guest paused")
		case id == pausedMark:
			add("mark of a run that did not end: object %s", id)
		}
	}
	for _, j := range v.jobs {
		if strings.HasPrefix(j.ID, ourPrefix) {
			add("job %s", j.ID)
		}
	}
	for name := range v.nodes {
		if strings.HasPrefix(name, ourPrefix) {
			add("node %s", name)
		}
	}
	for _, b := range slices.Concat(uselessBitmaps(v, repo, points, partials), unusable(v, repo, points)) {
		add("bitmap %s on node %s is of no more use", b.name, b.node)
	}
	slices.SortFunc(findings, func(a, b Finding) int { return strings.Compare(a.What, b.What) })
	return slices.Compact(findings)
}

// unusable returns the bitmaps of this repository that no run can use: inconsistent ones, and those of points that are not in
// the repository. A run leaves the latter alone, as a share may come back with the point; the doctor takes them away.
func unusable(v *view, repo string, points chain.Points) []bitmap {
	var found []bitmap
	for _, n := range v.nodes {
		for _, b := range n.info.DirtyBitmaps {
			name, ok := chain.ParseBitmapName(b.Name)
			if ok && name.Repo == repo && !b.Busy && !n.info.ReadOnly && (b.Inconsistent || points.Find(name.Point) == nil) {
				found = append(found, bitmap{n.name, b.Name})
			}
		}
	}
	return found
}

// imageBitmap is a bitmap in the image of a stopped guest.
type imageBitmap struct {
	Name  string   `json:"name"`
	Flags []string `json:"flags"`
}

// imageFinding says what is wrong with a bitmap of ours in the image of a stopped guest, or "".
func (s *session) imageFinding(b imageBitmap) string {
	name, ok := chain.ParseBitmapName(b.Name)
	switch {
	case !ok || name.Repo != s.repo.ShortID():
		return ""
	case slices.Contains(b.Flags, "in-use"):
		return "inconsistent: QEMU did not end cleanly"
	case s.points.Find(name.Point) == nil:
		return "its point is not in the repository"
	case s.points.Superseded(name):
		return "a newer point tracks the disk"
	}
	return ""
}

// imageBitmaps lists the bitmaps in a qcow2 image.
func imageBitmaps(ctx context.Context, qemuImg, path string) ([]imageBitmap, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(abs); err != nil {
		return nil, err
	}
	out, err := child.Run(ctx, imageLimit, qemuImg, "info", "-f", "qcow2", "--output=json", abs)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	var info struct {
		FormatSpecific struct {
			Data struct {
				Bitmaps []imageBitmap `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	return info.FormatSpecific.Data.Bitmaps, nil
}

func removeImageBitmap(ctx context.Context, qemuImg, path, name string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if _, err := child.Run(ctx, imageLimit, qemuImg, "bitmap", "--remove", "-f", "qcow2", abs, name); err != nil {
		return fmt.Errorf("image %s: bitmap %s: %w", path, name, err)
	}
	return nil
}

// Cleanup removes bitmaps of ours from a running guest: all, or those of one repository (its short id). The next run of a
// repository whose bitmaps are gone takes a full. It returns their names.
func Cleanup(ctx context.Context, addr string, guard Guard, repo string, lockWait time.Duration) (removed []string, err error) {
	s := &session{}
	client, err := connect(ctx, addr, guard)
	if err != nil {
		return nil, err
	}
	s.qmp = client
	defer func() { _ = s.qmp.Close() }()
	if s.mutex, err = newGuestLock(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.mutex.release(context.WithoutCancel(ctx), s.qmp)) }()
	if err := s.mutex.take(ctx, s.qmp, lockWait); err != nil {
		return nil, err
	}
	v, err := look(ctx, s.qmp)
	if err != nil {
		return nil, err
	}
	var bitmaps []bitmap
	for _, n := range v.nodes {
		for _, b := range n.info.DirtyBitmaps {
			if name, ok := chain.ParseBitmapName(b.Name); ok && !n.info.ReadOnly && (repo == "" || name.Repo == repo) {
				bitmaps = append(bitmaps, bitmap{n.name, b.Name})
				removed = append(removed, b.Name)
			}
		}
	}
	slices.Sort(removed)
	return removed, s.drop(ctx, bitmaps)
}

// CleanupImages does what Cleanup does for the images of a stopped guest.
func CleanupImages(ctx context.Context, qemuImg string, images []string, repo string) (removed []string, err error) {
	for _, path := range images {
		bitmaps, err := imageBitmaps(ctx, qemuImg, path)
		if err != nil {
			return removed, err
		}
		for _, b := range bitmaps {
			name, ok := chain.ParseBitmapName(b.Name)
			if !ok || repo != "" && name.Repo != repo {
				continue
			}
			if err := removeImageBitmap(ctx, qemuImg, path, b.Name); err != nil {
				return removed, err
			}
			removed = append(removed, b.Name)
		}
	}
	return removed, nil
}
