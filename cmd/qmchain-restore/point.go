package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/verify"
	"qmchain/cmd/internal/points"
	"qmchain/internal/ui"
)

// point is a point whose disks can be opened, and with what was saved beside them.
type point struct{ *points.Point }

// openPoint finds a point. The point is to be closed.
func openPoint(dir, name string) (*point, error) {
	// One run reads everything once: there is little to keep, but the files of a long chain are better left open.
	p, err := points.Open(dir, name, image.PoolOptions{MaxMeta: 32 << 20, MaxClusters: 16 << 20})
	if err != nil {
		return nil, err
	}
	return &point{p}, nil
}

// damage warns of what verify has found of disks, and returns it by their names: without what looks would have found again, which
// have found the disks good. Those may not be on record, as of a repository that is read-only.
func (p *point) damage(u *ui.UI, names []string, looks ...repo.Verified) map[string]error {
	found, err := p.Damage(names)
	if err != nil {
		u.Log.Warnf("what verify has found is not known: %v", err)
	}
	damage := map[string]error{}
	for _, name := range names {
		v, known := found[name]
		if !known || slices.ContainsFunc(looks, func(look repo.Verified) bool { return look.Clears(v) }) {
			continue
		}
		damage[name] = fmt.Errorf("disk %s: %w", name, v.Err())
		u.Log.Warn(damage[name])
	}
	return damage
}

// damageNow is damage; if asked to compare, after the check sums of the disks were found good. An error says that they were not, or
// could not be compared.
func (p *point) damageNow(ctx context.Context, u *ui.UI, names []string, compare bool) (map[string]error, error) {
	if !compare {
		return p.damage(u, names), nil
	}
	look, err := p.checkSums(ctx, u, names)
	if err != nil {
		return nil, err
	}
	return p.damage(u, names, look), nil
}

// notReplaced refuses to write what is known to be damaged over something that may be good.
func (p *point) notReplaced(damage error, over, hint string) error {
	err := fmt.Errorf("%s: nothing is restored: %s is not replaced with what is known to be damaged: %w", p.Name(), over, damage)
	return ui.Exit(ui.ExitDamaged, ui.Hint(err, hint+"; `qmchain-restore verify` names the points that are still good"))
}

// restoredDamaged is the error at the end of a restore from images that are known to be damaged. Nothing in what was written
// tells where it is wrong.
func restoredDamaged(p *point, damage map[string]error) error {
	first := slices.Min(slices.Collect(maps.Keys(damage)))
	err := fmt.Errorf("%s is restored as its images are now, which is not what the guest had: %w", p.Name(), damage[first])
	return ui.Exit(ui.ExitDamaged, ui.Hint(err, "`qmchain-restore verify` names the points that are still good; --verify keeps damage from being restored"))
}

// checkSums compares the image files that disks are read from with their check sums, as verify does, and refuses damage and what
// can't be told from it. What it returns is that they are good, and how far that was looked at.
func (p *point) checkSums(ctx context.Context, u *ui.UI, names []string) (look repo.Verified, err error) {
	check := verify.Checker{Set: p.Set, Disks: names}
	if check.QemuImg, err = exec.LookPath("qemu-img"); err != nil {
		check.QemuImg = ""
		u.Log.Warn("qemu-img is not installed: whether the tables of the images contradict one another is not looked at")
	}
	bars := u.NewProgress("checked")
	check.Progress = bars.Bar("check sums", 0).Set
	began := time.Now()
	g, err := check.Guest(ctx, p.Guest.Name, string(p.ID))
	bars.Done()
	if err != nil {
		return look, err
	}
	if len(names) == len(p.Disks) { // else the point's other disks would count as good
		noteVerified(ctx, u, check, began, g)
	}
	var wrong []string
	for _, f := range g.Findings {
		text := strings.TrimPrefix(f.File+": "+f.Text, ": ")
		switch f.Kind {
		case verify.Damage, verify.Unreadable, verify.BeingMerged:
			wrong = append(wrong, text)
		case verify.NoSums:
			u.Log.Warn(text)
		}
	}
	what := fmt.Sprintf("%s: nothing is restored: %s", p.Name(), strings.Join(wrong, "; "))
	switch g.State {
	case verify.Damaged:
		err := fmt.Errorf("%s: %w", what, chain.ErrDamaged)
		return look, ui.Exit(ui.ExitDamaged, ui.Hint(err, "`qmchain-restore verify` names the points that are still good; without --verify what is left of this one is restored"))
	case verify.Unknown:
		return look, ui.Exit(ui.ExitFailed, errors.New(what))
	case verify.Merging:
		return look, ui.Exit(ui.ExitBusy, ui.Hint(errors.New(what), "wait for the merge to end, or leave out --verify; one that was cut off is ended by `qmchain-backup prune --keep-all`"))
	}
	return repo.Verified{Point: p.ID, Time: stamp(began), Tables: check.QemuImg != "", Good: true}, nil
}
