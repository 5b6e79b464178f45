package fusefs_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/fusefs"
)

// manyPoints makes a guest with n points, a full and 99 increments in turn, whose images are empty files: what can't be
// opened can be listed.
func manyPoints(t testing.TB, n int) *repo.Guest {
	t.Helper()
	r := repotest.New(t, t.TempDir())
	g, err := r.Guest("110")
	if err != nil {
		t.Fatal(err)
	}
	mkdir(t, g.ImagesDir())
	var parent *chain.Manifest
	for i := range n {
		now := start.Add(time.Duration(i) * time.Hour)
		m := &chain.Manifest{
			Format: chain.FormatVersion, ID: chain.NewID(now, "", uint16(i)), UUID: strings.Repeat("0", 24) + strconv.Itoa(10000000+i),
			Time: now, Guest: chain.GuestIdentity{Name: "110"}, Consistency: chain.Instant, QEMU: "test",
		}
		for _, name := range []string{"efidisk0", "scsi0", "scsi1"} {
			d := chain.Disk{
				Name: name, Level: chain.Full, SourceFormat: "raw", VirtualSize: 1 << 30, File: chain.ImageFile(m.ID, name), Bytes: 1 << 20,
				Sums: chain.Sums{File: name + ".sums", SHA256: strings.Repeat("0", 64)},
			}
			if i%100 > 0 {
				ref := parent.Ref(name)
				d.Level, d.Parent = chain.Inc, &ref
			}
			m.Disks = append(m.Disks, d)
			if i < 100 {
				if err := os.WriteFile(filepath.Join(g.ImagesDir(), d.File), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		text, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		dir := mkdir(t, g.PointDir(m.ID))
		if err := os.WriteFile(filepath.Join(dir, chain.ManifestFile), text, 0o600); err != nil {
			t.Fatal(err)
		}
		parent = m
	}
	return g
}

// A guest with thousands of points is listed with all attributes, and nothing is asked for or opened that needs not be. See
// BenchmarkList for how long it takes.
func TestManyPoints(t *testing.T) {
	t.Parallel()
	const n = 1500
	g := manyPoints(t, n)
	m := mountRepo(t, g.Repo)
	for range 2 {
		if lines := strings.Count(run(t, "ls", "-l", m.path("110")), "\n"); lines != n+2 {
			t.Errorf("%d lines", lines)
		}
	}
	for name, most := range map[string]int{
		`qmchain_fuse_disks_opened_total{,how="first"`:                    0,
		`qmchain_fuse_requests_total{,op="getxattr"`:                      50,
		`qmchain_fuse_requests_total{,op="getattr"`:                       n, // those whose second was over
		`qmchain_fuse_requests_total{,op="lookup"`:                        n,
		`qmchain_fuse_cache_requests_total{,cache="points",result="miss"`: 20,
	} {
		if got := must(strconv.Atoi(counter(t, m, name)))(t); got > most {
			t.Errorf("%s is %d, more than %d", name, got, most)
		}
	}
}

// A guest of 10,000 points: ls -l right after the mount, when each manifest is read, and later, when each is looked at.
func BenchmarkList(b *testing.B) {
	g := manyPoints(b, 10000)
	var first, later time.Duration
	for b.Loop() {
		set := openSet(b, g.Repo.Dir)
		m, err := fusefs.Mount(b.Context(), fusefs.Options{Set: set, Dir: b.TempDir(), Log: (&logBuffer{}).logger()})
		if err != nil {
			b.Fatal(err)
		}
		for _, took := range []*time.Duration{&first, &later} {
			began := time.Now()
			if err := exec.Command("ls", "-l", filepath.Join(m.Dir(), "110")).Run(); err != nil {
				b.Error(err)
			}
			*took += time.Since(began)
			time.Sleep(1100 * time.Millisecond)
		}
		if err := errors.Join(m.Unmount(b.Context()), set.Close()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(first.Seconds()/float64(b.N), "s/first")
	b.ReportMetric(later.Seconds()/float64(b.N), "s/later")
	b.ReportMetric(0, "ns/op")
}
