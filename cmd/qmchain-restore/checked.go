package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/chain/verify"
	"qmchain/internal/ui"
)

// stamp is the time of a look in the record. Two looks one after the other must not have the same.
func stamp(began time.Time) time.Time { return began.UTC().Truncate(time.Millisecond) }

// noteVerified keeps what was found of a guest's points by a look that began then, for reports and for what builds on them.
func noteVerified(ctx context.Context, u *ui.UI, check verify.Checker, began time.Time, g *verify.Guest) {
	note(ctx, u, check.Set, g.Guest, repo.Checked{Verified: verifiedPoints(check, began, g)})
}

// verifiedPoints is what is recorded of points. Each damaged image is named once: with its own point, if that is among them.
func verifiedPoints(check verify.Checker, began time.Time, g *verify.Guest) (found []repo.Verified) {
	type image struct{ point, disk string }
	own := map[image]bool{}
	for _, p := range g.Points {
		for _, d := range p.Disks {
			own[image{p.ID, d.Name}] = slices.ContainsFunc(d.Images, func(i chain.ImageRef) bool { return string(i.Point) == p.ID && i.Disk == d.Name })
		}
	}
	for _, p := range g.Points {
		id, err := chain.ParseID(p.ID)
		if err != nil || p.State != verify.Good && p.State != verify.Damaged {
			continue
		}
		v := repo.Verified{Point: id, Time: stamp(began), Good: p.State == verify.Good, Why: whyDamaged(p)}
		v.Tables, v.Deep = v.Good && check.QemuImg != "", v.Good && check.Deep
		for _, d := range p.Disks {
			if d.State != verify.Damaged {
				continue
			}
			v.Tables, v.Deep = v.Tables || d.Tables, v.Deep || d.Deep
			images := slices.DeleteFunc(slices.Clone(d.Images), func(i chain.ImageRef) bool {
				return string(i.Point) != p.ID && own[image{string(i.Point), i.Disk}]
			})
			v.Disks = append(v.Disks, repo.DamagedDisk{Name: d.Name, Images: images})
		}
		found = append(found, v)
	}
	return found
}

// whyDamaged names the disks of a point that are damaged, and the files that are the reason.
func whyDamaged(p verify.Point) string {
	if p.State != verify.Damaged {
		return ""
	}
	var disks []string
	for _, d := range p.Disks {
		if d.State == verify.Damaged {
			disks = append(disks, fmt.Sprintf("%s (%s)", d.Name, strings.Join(d.Files, ", ")))
		}
	}
	if len(disks) == 0 {
		return "it can't be read"
	}
	return strings.Join(disks, "; ")
}

// note writes what was found into the repository. Where it can't be written, as it is read-only, what was found counts all the
// same. Nothing of ours is written to others' sets.
func note(ctx context.Context, u *ui.UI, set source.Set, guest string, found repo.Checked) {
	r := source.Repository(set)
	if r == nil {
		return
	}
	g, err := r.Guest(guest)
	if err == nil {
		err = g.NoteChecked(ctx, found)
	}
	if err != nil && ctx.Err() == nil {
		what := "reports do not tell of it"
		if slices.ContainsFunc(found.Verified, func(v repo.Verified) bool { return !v.Good }) {
			what = "the next run may build on what is damaged, and nothing warns of it"
		}
		u.Log.Warnf("what was found is not kept: %s: %v", what, err)
	}
}
