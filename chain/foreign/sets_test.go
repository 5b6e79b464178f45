package foreign_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
)

func open(t testing.TB, dir string) (*foreign.Set, *foreign.Points) {
	t.Helper()
	set, err := foreign.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = set.Close() })
	points, err := set.Points()
	if err != nil {
		t.Fatal(err)
	}
	return set, points
}

// sum reads a disk and returns its digest, or the error that says why it is refused.
func sum(t testing.TB, points *foreign.Points, m *chain.Manifest, disk string) (string, error) {
	t.Helper()
	img, err := points.OpenDisk(image.NewPool(image.PoolOptions{}), m, disk)
	if err != nil {
		return "", err
	}
	defer img.Close()
	if img.Size() != m.Disk(disk).VirtualSize {
		t.Errorf("%s: disk %s has %d bytes, its manifest says %d", m.ID, disk, img.Size(), m.Disk(disk).VirtualSize)
	}
	h := sha256.New()
	if _, err := io.CopyBuffer(h, io.NewSectionReader(img, 0, img.Size()), make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func about(problems []chain.Problem, m *chain.Manifest, disk string) (errs []error) {
	for _, p := range problems {
		if p.Point == string(m.ID) && p.Disk == disk {
			errs = append(errs, p.Err)
		}
	}
	return errs
}

// Every point of every real set is read as it must be, or refused or warned of as it must be,
// and nothing else is taken for a point.
func TestSets(t *testing.T) {
	t.Parallel()
	root := map[string]string{}
	for _, tool := range []string{"qmpbackup", "virtnbdbackup"} {
		root[tool] = foreigntest.Unpack(t, tool)
	}
	for _, c := range foreigntest.Cases(t) {
		t.Run(c.Path(), func(t *testing.T) {
			t.Parallel()
			set, points := open(t, filepath.Join(root[c.Tool], c.Path()))
			guest := c.Name
			if c.Tool == "virtnbdbackup" {
				guest = "lab-" + c.Name
			}
			if string(set.Kind()) != c.Tool || set.Guest() != guest {
				t.Errorf("%s of %s", set.Kind(), set.Guest())
			}
			files := map[string]bool{}
			for _, w := range c.Points {
				files[w.File] = true
				checkPoint(t, c, w, points)
			}
			if c.Name != "l-snapshotrebase" && len(listed(points)) != len(files) {
				t.Errorf("%d disks in all points, %d expected: %v", len(listed(points)), len(files), listed(points))
			}
		})
	}
}

func checkPoint(t *testing.T, c foreigntest.Case, w foreigntest.Point, points *foreign.Points) {
	t.Helper()
	var m *chain.Manifest
	for _, p := range points.All {
		if d := p.Disk(w.Disk); d != nil && d.File == w.File {
			m = p // the newest: of a file with snapshots that is what it says itself
		}
	}
	if m == nil {
		t.Errorf("%s is in no point", w.File)
		return
	}
	if epoch := regexp.MustCompile(`-([0-9]{10})-|diff\.([0-9]{10})`).FindStringSubmatch(w.File); epoch != nil && c.Name != "l-snapshotrebase" {
		n, err := strconv.ParseInt(epoch[1]+epoch[2], 10, 64)
		if err != nil || !m.ID.Time().Equal(time.Unix(n, 0)) || !m.Time.Equal(m.ID.Time()) {
			t.Errorf("%s: point %s of %s", w.File, m.ID, m.Time)
		}
	}
	got, err := sum(t, points, m, w.Disk)
	if w.Refuse {
		if !errors.Is(err, chain.ErrDamaged) || len(about(points.Problems, m, w.Disk)) != 1 {
			t.Errorf("%s: not refused: %v, problems %v", w.File, err, points.Problems)
		}
		return
	}
	if err != nil || len(about(points.Problems, m, w.Disk)) > 0 {
		t.Errorf("%s: %v, problems %v", w.File, err, points.Problems)
	} else if got != w.SHA256 && !w.RefuseOrWarn {
		t.Errorf("%s: other content", w.File)
	}
	sums := foreign.ErrNoSum
	if c.Tool == "virtnbdbackup" && c.Name[:2] != "v1" {
		sums = nil
	}
	if err := points.CheckSums(t.Context(), m, w.Disk); !errors.Is(err, sums) {
		t.Errorf("%s: check sum: %v", w.File, err)
	}
	var want error
	switch {
	case w.Warn, slices.ContainsFunc(c.Points, func(o foreigntest.Point) bool { return o.RefuseOrWarn && o.File == w.File }):
		want = foreign.ErrOrder
	// Of those of version 2, not even the ones that are stale can be told from others.
	case c.Tool == "virtnbdbackup" && c.Name[:2] != "v1" && m.Disk(w.Disk).Level.Overlay():
		want = foreign.ErrZeroes
	case w.Stale && c.Name != "n-lost-inc": // which nothing shows
		t.Errorf("%s: it is stale, and nothing warns of it", w.File)
	}
	warnings := about(points.Warnings, m, w.Disk)
	if want == nil && len(warnings) > 0 || want != nil && !slices.ContainsFunc(warnings, func(err error) bool { return errors.Is(err, want) }) {
		t.Errorf("%s: warnings %v", w.File, warnings)
	}
}

// What was merged into snapshots is still all there: the same writes as in another set.
func TestRealSnapshots(t *testing.T) {
	t.Parallel()
	dir := foreigntest.Unpack(t, "qmpbackup/")
	_, merged := open(t, filepath.Join(dir, "qmpbackup/l-snapshotrebase"))
	_, other := open(t, filepath.Join(dir, "qmpbackup/k-rebased"))
	if len(merged.All) != 3 {
		t.Fatal(listed(merged))
	}
	for i, m := range merged.All {
		got, err := sum(t, merged, m, "disk-a.qcow2")
		want, otherErr := sum(t, other, other.All[i], "disk-a.qcow2")
		if err != nil || otherErr != nil || got != want {
			t.Errorf("%s: other content: %v, %v", m.ID, err, otherErr)
		}
		if when := []string{"20261120T112022Z", "20261120T112024Z", "20261120T112026Z"}[i]; !strings.HasPrefix(string(m.ID), when) {
			t.Errorf("point %s, not of %s", m.ID, when)
		}
	}
}
