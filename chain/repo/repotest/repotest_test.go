package repotest_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"qmchain/chain/image"
	"qmchain/chain/repo/repotest"
)

// What the package expects must be what both readers see, or the tests that build on it test nothing.
func TestWant(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	r := repotest.New(t, t.TempDir())
	g := repotest.NewGuest(t, r, "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	g.SetFiles(map[string][]byte{"110.conf": []byte("memory: 512\n")})
	raw := filepath.Join(t.TempDir(), "seed.raw")
	if err := os.WriteFile(raw, bytes.Repeat([]byte("qmchain "), 3<<20/8), 0o600); err != nil {
		t.Fatal(err)
	}
	g.Add(
		repotest.Disk{Name: "scsi0", Size: size, Write: repotest.RandomWrites(1, 30, size, 10)},
		repotest.Disk{Name: "scsi1", Image: raw},
	)
	for i := range byte(4) {
		g.Add(
			repotest.Disk{Name: "scsi0", Write: repotest.RandomWrites(uint64(i)+2, 10, size, 20+10*i), Diff: i == 1},
			repotest.Disk{Name: "scsi1", Size: int64(i+4) << 20, Write: repotest.RandomWrites(uint64(i)+9, 3, 3<<20, 60+10*i)},
		)
	}
	points, problems, err := g.Guest.Points()
	if err != nil || len(problems) > 0 || len(points) != 5 {
		t.Fatalf("%d points, problems %v, error %v", len(points), problems, err)
	}
	pool := image.NewPool(image.PoolOptions{})
	for _, m := range points {
		for _, d := range m.Disks {
			want := g.Want(m.ID, d.Name)
			img, err := g.OpenDisk(pool, points, m, d.Name)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, img.Size())
			if _, err := img.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s/%s: what was read natively differs", m.ID, d.Name)
			}
			out := filepath.Join(t.TempDir(), "out.raw")
			repotest.Convert(t, g.ImagePath(m.ID, d.Name), out)
			if got, err = os.ReadFile(out); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s/%s: what qemu-img read differs", m.ID, d.Name)
			}
		}
	}
}

// QEMU's programs open a chain of a year of daily points, and more.
func TestLongChain(t *testing.T) {
	t.Parallel()
	const size, length = 1 << 20, 400
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	g.Add(repotest.Disk{Name: "scsi0", Size: size, Write: repotest.RandomWrites(1, 8, size, 10)})
	for range length - 2 {
		g.Add(repotest.Disk{Name: "scsi0"})
	}
	last := g.Add(repotest.Disk{Name: "scsi0", Write: repotest.RandomWrites(2, 8, size, 90)})
	out := filepath.Join(t.TempDir(), "out.raw")
	repotest.Convert(t, g.ImagePath(last.ID, "scsi0"), out)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, g.Want(last.ID, "scsi0")) {
		t.Error("what qemu-img read differs")
	}
}
