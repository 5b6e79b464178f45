package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/chain/verify"
	"qmchain/internal/ui"
)

// noteVerified keeps what was found of a guest's points, for reports.
func noteVerified(ctx context.Context, u *ui.UI, check verify.Checker, g *verify.Guest) {
	var found repo.Checked
	for _, p := range g.Points {
		id, err := chain.ParseID(p.ID)
		if err != nil || p.State != verify.Good && p.State != verify.Damaged {
			continue
		}
		found.Verified = append(found.Verified, repo.Verified{
			Point: id, Time: time.Now().UTC().Truncate(time.Second), Tables: check.QemuImg != "", Deep: check.Deep,
			Good: p.State == verify.Good, Why: whyDamaged(p), Disks: damagedDisks(p),
		})
	}
	note(ctx, u, check.Set, g.Guest, found)
}

// damagedDisks are those of a point; none if that can't be read.
func damagedDisks(p verify.Point) (damaged []repo.DamagedDisk) {
	for _, d := range p.Disks {
		if d.State == verify.Damaged {
			damaged = append(damaged, repo.DamagedDisk{Name: d.Name, Images: d.Images})
		}
	}
	return damaged
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
		u.Log.Warnf("what was found is not kept for reports: %v", err)
	}
}
