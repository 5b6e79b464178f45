package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/verify"
	"qmchain/internal/ui"
)

// Of a long chain whose images are all gone, with the base of a point that was removed, the record stays small, and tells the same.
func TestVerifiedPoints(t *testing.T) {
	t.Parallel()
	const n = 400
	began := time.Date(2026, 11, 21, 3, 0, 0, 987_654_321, time.UTC)
	disks := []string{"scsi0", "scsi1"}
	var points chain.Points
	below := map[string][]chain.ImageRef{}
	report := &verify.Guest{Guest: "110", State: verify.Damaged}
	for i := range n {
		m := &chain.Manifest{ID: chain.ID(fmt.Sprintf("20261120T%02d%02d00Z-0001", i/60, i%60)), UUID: fmt.Sprintf("%032x", i), Base: i == 0}
		p := verify.Point{ID: string(m.ID), State: verify.Damaged}
		for _, name := range disks {
			d := chain.Disk{Name: name}
			if i > 0 {
				parent := points[i-1].Ref(name)
				d.Parent = &parent
			}
			m.Disks = append(m.Disks, d)
			below[name] = append([]chain.ImageRef{m.Ref(name)}, below[name]...)
			bad := verify.Disk{Name: name, State: verify.Damaged, Images: below[name]}
			for _, image := range below[name] {
				bad.Files = append(bad.Files, "110/images/"+string(image.Point)+"."+name+".qcow2")
			}
			p.Disks = append(p.Disks, bad)
		}
		points = append(points, m)
		if !m.Base {
			report.Points = append(report.Points, p)
		}
	}
	found := verifiedPoints(verify.Checker{QemuImg: "qemu-img", Deep: true}, began, report)
	images := 0
	for _, v := range found {
		if v.Good || v.Tables || v.Deep || !v.Time.Equal(began.Truncate(time.Millisecond)) || len(v.Disks) != len(disks) {
			t.Fatalf("%.1000v", v)
		}
		for _, d := range v.Disks {
			images += len(d.Images)
			if !slices.ContainsFunc(d.Images, func(r chain.ImageRef) bool { return r.Point == v.Point }) || !slices.Contains(d.Images, points[0].Ref(d.Name)) {
				t.Errorf("%s: %s: %v", v.Point, d.Name, d.Images)
			}
		}
	}
	if len(found) != n-1 || images != 2*2*(n-1) {
		t.Errorf("%d points, %d images", len(found), images)
	}
	if damaged := (&repo.Checked{Verified: found}).Damaged(points); len(damaged) != n*len(disks) {
		t.Errorf("%d disks are known to be damaged", len(damaged))
	}

	// As it is written.
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", began)
	for _, m := range points {
		if err := os.MkdirAll(g.PointDir(m.ID), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.NoteChecked(t.Context(), repo.Checked{Verified: found}); err != nil {
		t.Fatal(err)
	}
	if c, err := g.Checked(); err != nil || len(c.Verified) != n-1 {
		t.Errorf("%d points on record, %v", len(c.Verified), err)
	}
	if info, err := os.Stat(filepath.Join(g.Dir, ".checked.json")); err != nil || info.Size() > 2<<20 {
		t.Errorf("%d bytes, %v", info.Size(), err)
	}
}

// A record says how far damage was looked for only where that has found it; what is good keeps what was done.
func TestVerifiedThoroughness(t *testing.T) {
	t.Parallel()
	const id = "20261120T101500Z-0001"
	disk := func(state verify.State, tables, deep bool) verify.Disk {
		return verify.Disk{Name: "scsi0", State: state, Tables: tables, Deep: deep}
	}
	all := verify.Checker{QemuImg: "qemu-img", Deep: true}
	for _, test := range []struct {
		check        verify.Checker
		disks        []verify.Disk
		tables, deep bool
	}{
		{all, []verify.Disk{disk(verify.Good, false, false)}, true, true},
		{verify.Checker{}, []verify.Disk{disk(verify.Good, false, false)}, false, false},
		{all, []verify.Disk{disk(verify.Damaged, false, false)}, false, false},
		{all, []verify.Disk{disk(verify.Damaged, true, false)}, true, false},
		{all, []verify.Disk{disk(verify.Damaged, false, false), disk(verify.Damaged, false, true)}, false, true},
		{all, nil, false, false}, // it can't be read
	} {
		p := verify.Point{ID: id, State: verify.Damaged, Disks: test.disks}
		if len(test.disks) > 0 && test.disks[0].State == verify.Good {
			p.State = verify.Good
		}
		v := verifiedPoints(test.check, time.Now(), &verify.Guest{Guest: "110", Points: []verify.Point{p}})
		if len(v) != 1 || v[0].Tables != test.tables || v[0].Deep != test.deep {
			t.Errorf("%+v: %+v", test, v)
		}
	}
}

// What a look would have found again, and has not, does not count; what it does not look at does.
func TestDamageCovered(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	began := time.Date(2026, 11, 21, 3, 0, 0, 0, time.UTC)
	g := repotest.NewGuest(t, repotest.New(t, dir), "110", began.Add(-time.Hour))
	m := g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	note := func(after time.Duration, tables bool) {
		t.Helper()
		_ = os.Remove(filepath.Join(g.Dir, ".checked.json"))
		v := repo.Verified{Point: m.ID, Time: began.Add(after), Tables: tables, Why: "scsi0"}
		if err := g.NoteChecked(t.Context(), repo.Checked{Verified: []repo.Verified{v}}); err != nil {
			t.Fatal(err)
		}
	}
	p, err := openPoint(dir, "110/latest")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	u, err := ui.New(io.Discard, t.Output(), func(string) string { return "" }, ui.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	damage := func(tables bool) error {
		looks := []repo.Verified{{Point: m.ID, Time: began, Tables: tables, Good: true}}
		return p.damage(u, []string{"scsi0"}, looks...)["scsi0"]
	}
	note(0, false)
	if err := damage(false); err != nil {
		t.Errorf("seen again: %v", err)
	}
	note(0, true)
	if err := damage(true); err != nil {
		t.Errorf("seen again: %v", err)
	}
	if err := damage(false); !errors.Is(err, chain.ErrDamaged) || !strings.Contains(err.Error(), "disk scsi0") {
		t.Errorf("a look without qemu-img: %v", err)
	}
	note(time.Minute, false)
	if err := damage(true); err == nil {
		t.Error("what was found later is forgotten")
	}
}
