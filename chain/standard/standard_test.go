package standard_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
	"qmchain/chain/source"
	"qmchain/chain/standard"
	"qmchain/internal/testenv"
)

// content is a disk of a point: its size, and a digest.
type content string

// digest hashes the first bytes of a disk, without what is zeroes.
func digest(img image.Image, size int64) (content, error) {
	const block = 64 << 10
	h := sha256.New()
	buf, zeroes := make([]byte, 16*block), make([]byte, block)
	next := int64(0)
	for e, err := range image.Walk(img, 0, size) {
		if err != nil {
			return "", err
		}
		if e.Zero {
			continue
		}
		for off := max(next, e.Off/block*block); off < e.End(); off = next {
			b := buf[:min(int64(len(buf)), size-off, (e.End()-off+block-1)/block*block)]
			if n, err := img.ReadAt(b, off); n < len(b) {
				return "", err
			}
			next = off + int64(len(b))
			for at := 0; at < len(b); at += block {
				if part := b[at:min(at+block, len(b))]; !bytes.Equal(part, zeroes[:len(part)]) {
					fmt.Fprintf(h, "%d ", off+int64(at))
					h.Write(part)
				}
			}
		}
	}
	return content(fmt.Sprintf("%d %x", size, h.Sum(nil)[:8])), nil
}

// points are the disks of points, by "ID DISK".
type points map[string]content

func open(t testing.TB, dir string) (source.Set, string, *source.Points) {
	t.Helper()
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = set.Close() })
	guests, err := set.Guests()
	if err != nil || len(guests) != 1 {
		t.Fatal(guests, err)
	}
	guest, err := set.Guest(guests[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := guest.Points()
	if err != nil {
		t.Fatal(err)
	}
	return set, guests[0], p
}

// read reads all disks of all points of a set that can be read.
func read(t testing.TB, dir string) points {
	t.Helper()
	set, _, p := open(t, dir)
	defer set.Close()
	all := points{}
	pool := image.NewPool(image.PoolOptions{})
	for _, m := range p.All.Kept() {
		for _, d := range m.Disks {
			img, err := p.OpenDisk(pool, m, d.Name)
			if errors.Is(err, chain.ErrDamaged) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			c, err := digest(img, img.Size())
			if err != nil {
				t.Fatalf("%s %s: %v", m.ID, d.Name, err)
			}
			_ = img.Close()
			all[string(m.ID)+" "+d.Name] = c
		}
	}
	return all
}

// run carries a request out.
func run(ctx context.Context, r standard.Request) (*standard.Plan, error) {
	r.Log = logrus.New()
	j, err := standard.Open(ctx, r)
	if err != nil {
		return nil, err
	}
	defer j.Close()
	return &j.Plan, j.Run(ctx)
}

// request is for all of a set.
func request(t testing.TB, dir string, c standard.Command, output string) standard.Request {
	t.Helper()
	set, guest, _ := open(t, dir)
	return standard.Request{Command: c, Set: set, Guest: guest, Output: output}
}

func must(t testing.TB, r standard.Request) *standard.Plan {
	t.Helper()
	plan, err := run(t.Context(), r)
	if err != nil {
		t.Fatalf("%s: %v", r.Command, err)
	}
	return plan
}

// converted is what qemu-img reads, by what the header says. It is not more than size bytes.
func converted(t testing.TB, size int64, path string, args ...string) content {
	t.Helper()
	out := filepath.Join(t.TempDir(), "raw")
	format := "qcow2"
	if target, err := filepath.EvalSymlinks(path); err == nil && strings.HasSuffix(target, ".raw") {
		format = "raw"
	}
	testenv.Output(t, "qemu-img", slices.Concat([]string{"convert", "-f", format, "-O", "raw"}, args, []string{path, out})...)
	defer os.Remove(out)
	img, err := image.NewPool(image.PoolOptions{}).Open(-1, image.Layer{Path: out, Name: out, Format: image.Raw, Bytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if len(args) == 0 {
		size = img.Size()
	}
	c, err := digest(img, size)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// snapshots returns what the internal snapshots of an image are called, and what each holds.
func snapshots(t testing.TB, path string) (names []string, holds map[string]content) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	h, err := qcow2.ReadHeader(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	all, err := qcow2.ReadSnapshots(f, info.Size(), h)
	if err != nil {
		t.Fatal(err)
	}
	holds = map[string]content{}
	for _, s := range all {
		names = append(names, s.Name)
		img, err := image.NewPool(image.PoolOptions{}).Open(-1, image.Layer{Path: path, Name: path, Format: image.Qcow2, Bytes: -1, Snapshot: s.ID})
		if err != nil {
			t.Fatal(err)
		}
		if holds[s.Name], err = digest(img, img.Size()); err != nil {
			t.Fatal(err)
		}
		_ = img.Close()
		// Where it is larger, qemu-img gives a snapshot the size that the disk has now.
		if s.VirtualSize <= h.VirtualSize {
			if got := converted(t, s.VirtualSize, path, "-l", "snapshot.name="+s.Name); got != holds[s.Name] {
				t.Errorf("%s: snapshot %s: qemu-img reads %s, we %s", path, s.Name, got, holds[s.Name])
			}
		}
	}
	return names, holds
}

// tree lists all that is in a folder, with the content and the times of files.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			all[rel], err = os.Readlink(path)
		case d.IsDir():
			all[rel] = "folder"
		default:
			var data []byte
			data, err = os.ReadFile(path)
			all[rel] = fmt.Sprintf("%s %x %s", info.Mode(), sha256.Sum256(data), info.ModTime())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func listed(t testing.TB, dir string) []string { return slices.Sorted(maps.Keys(tree(t, dir))) }

// The real sets of both programs, to a folder: every link of every chain, every snapshot, and what was read stays as it was.
func TestSetsToOutput(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"qmpbackup/c-flat-nots", "qmpbackup/d-monthly-auto", "qmpbackup/g-copy-between", "qmpbackup/k-rebased", "qmpbackup/l-snapshotrebase",
		"virtnbdbackup/v1-zeroes", "virtnbdbackup/v3-compress", "virtnbdbackup/v2-copy",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(foreigntest.Unpack(t, name+"/"), name)
			checkOutputs(t, dir)
		})
	}
}

// checkOutputs makes everything of a set that can be made, and compares.
func checkOutputs(t *testing.T, dir string) {
	before, want := tree(t, dir), read(t, dir)
	_, _, p := open(t, dir)
	until := p.All.Latest() // of what is no copy
	for _, m := range slices.Backward(p.All.Kept()) {
		if m.Level() != chain.Copy || m == p.All.Kept()[0] {
			until = m
			break
		}
	}
	for _, c := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
		out := filepath.Join(t.TempDir(), "out")
		plan := must(t, request(t, dir, c, out))
		if plan.Until != until.ID || len(plan.Results) != len(until.Disks) {
			t.Fatalf("%s: %+v", c, plan)
		}
		for _, r := range plan.Results {
			last := want[string(r.Point)+" "+r.Disk]
			if got := converted(t, 0, r.File); got != last {
				t.Errorf("%s: disk %s is %s, not %s", c, r.Disk, got, last)
			}
			switch c {
			case standard.Rebase:
				links := 0
				for name, w := range want {
					id, disk, _ := strings.Cut(name, " ")
					for _, ext := range []string{".qcow2", ".raw"} {
						path := filepath.Join(out, id+"."+disk+ext)
						if _, err := os.Lstat(path); disk == r.Disk && err == nil {
							links++
							if got := converted(t, 0, path); got != w {
								t.Errorf("%s is %s, not %s", path, got, w)
							}
						}
					}
				}
				layers, err := p.All.Layers(until, r.Disk)
				if err != nil || links != len(layers) {
					t.Errorf("disk %s has %d links, not %d: %v", r.Disk, links, len(layers), err)
				}
			case standard.Snapshots:
				names, holds := snapshots(t, r.File)
				var expected []string
				for _, m := range p.All.Kept() {
					if d := m.Disk(r.Disk); d != nil && m.ID <= until.ID && (d.Level != chain.Copy || m == until) && want[string(m.ID)+" "+r.Disk] != "" {
						expected = append(expected, string(m.ID))
					}
				}
				if !slices.Equal(names, expected) {
					t.Errorf("disk %s has the snapshots %v, not %v", r.Disk, names, expected)
				}
				for name, got := range holds {
					if w := want[name+" "+r.Disk]; got != w {
						t.Errorf("disk %s: snapshot %s is %s, not %s", r.Disk, name, got, w)
					}
				}
				testenv.Output(t, "qemu-img", "check", "-q", "-f", "qcow2", r.File)
			}
		}
		for _, name := range listed(t, out) {
			if strings.HasPrefix(name, ".") {
				t.Errorf("%s: left: %s", c, name)
			}
		}
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Errorf("what was only to be read has changed: %s", diff)
	}
}
