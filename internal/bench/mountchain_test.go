package bench

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
)

const mountGuest, mountDisk = "web", "scsi0"

// diskCluster is the cluster size of images that backups make, in bytes.
const diskCluster = 64 << 10

// mountChain is a repository with one guest of one disk.
type mountChain struct {
	b      *testing.B
	guest  *repo.Guest
	points []*chain.Manifest
}

func newMountChain(b *testing.B, dir string) *mountChain {
	b.Helper()
	g, err := repotest.New(b, dir).Guest(mountGuest)
	if err != nil {
		b.Fatal(err)
	}
	return &mountChain{b: b, guest: g}
}

func (c *mountChain) dir() string { return c.guest.Repo.Dir }

// image is the path of the image of point n.
func (c *mountChain) image(n int) string { return c.guest.ImagePath(c.points[n].ID, mountDisk) }

// images are the paths of all images up to that of point n.
func (c *mountChain) images(n int) (paths []string) {
	for i := range n + 1 {
		paths = append(paths, c.image(i))
	}
	return paths
}

// full makes a point of a raw file.
func (c *mountChain) full(raw string, compression string) {
	c.b.Helper()
	info, err := os.Stat(raw)
	if err != nil {
		c.b.Fatal(err)
	}
	c.add(chain.Full, info.Size(), repo.ImageOptions{Compression: compression}, func(ctx context.Context, path string) error {
		args := []string{"convert", "-n", "-f", "raw", "-O", "qcow2", raw, path}
		if compression != "" {
			args = append([]string{"convert", "-c"}, args[1:]...)
		}
		out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("qemu-img: %w: %s", err, out)
		}
		return nil
	})
}

// increment makes a point of writes, commands of qemu-io, of whole clusters. As a backup does, it writes without a look at
// what is below, so that a long chain takes no longer to lengthen than a short one.
func (c *mountChain) increment(writes []string) {
	c.b.Helper()
	size := c.points[0].Disks[0].VirtualSize
	c.add(chain.Inc, size, repo.ImageOptions{}, func(ctx context.Context, path string) error {
		cmd := exec.CommandContext(ctx, "qemu-io", "json:"+fmt.Sprintf(`{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":%q}}`, path))
		cmd.Stdin = strings.NewReader(strings.Join(writes, "\n") + "\n")
		out, err := cmd.CombinedOutput()
		if n := bytes.Count(out, []byte("wrote ")); err == nil && n != len(writes) {
			err = fmt.Errorf("%d of %d writes", n, len(writes))
		}
		if err != nil {
			return fmt.Errorf("qemu-io: %w: %s", err, out)
		}
		return nil
	})
}

func (c *mountChain) add(level chain.Level, size int64, opts repo.ImageOptions, fill func(ctx context.Context, path string) error) {
	c.b.Helper()
	if err := c.try(level, size, opts, fill); err != nil {
		c.b.Fatal(err)
	}
}

func (c *mountChain) try(level chain.Level, size int64, opts repo.ImageOptions, fill func(ctx context.Context, path string) error) error {
	ctx := c.b.Context()
	lock, err := c.guest.Lock(ctx, 0)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(len(c.points)) * time.Hour)
	d := chain.Disk{Name: mountDisk, Level: level, SourceFormat: "raw", VirtualSize: size}
	var tip chain.ID
	if n := len(c.points); n > 0 {
		ref := c.points[n-1].Ref(mountDisk)
		tip, d.Parent = c.points[n-1].ID, &ref
	}
	p, err := c.guest.Begin(chain.NewID(now, tip, uint16(len(c.points))))
	if err != nil {
		return err
	}
	defer p.Close()
	d.File = chain.ImageFile(p.ID, mountDisk)
	path, err := p.CreateImage(ctx, mountDisk, size, d.Parent, opts)
	if err != nil {
		return err
	}
	if err := fill(ctx, path); err != nil {
		return err
	}
	if d.Bytes, d.Sums, err = p.Finish(ctx, mountDisk); err != nil {
		return err
	}
	m := &chain.Manifest{
		Format: chain.FormatVersion, ID: p.ID, UUID: p.UUID, Time: now, Consistency: chain.Instant, QEMU: "bench",
		Guest: chain.GuestIdentity{Name: mountGuest}, Disks: []chain.Disk{d},
	}
	if err := p.Commit(lock, tip, m); err != nil {
		return err
	}
	c.points = append(c.points, m)
	return nil
}

// lengthen adds points until there are length, each of which writes something new to a hundredth of the disk's clusters.
func (c *mountChain) lengthen(length int) {
	c.b.Helper()
	clusters := c.points[0].Disks[0].VirtualSize / diskCluster
	rnd := rand.New(rand.NewPCG(1, 1))
	for n := len(c.points); n < length; n++ {
		var writes []string
		for range clusters / 100 {
			writes = append(writes, fmt.Sprintf("write -P %d %d %d", 1+n%255, rnd.Int64N(clusters)*diskCluster, diskCluster))
		}
		c.increment(writes)
	}
}

// rewrite adds points until there are length, each of which writes a hundredth of the disk's clusters again, with what is
// in them: the disk stays what it was.
func (c *mountChain) rewrite(length int, raw string) {
	c.b.Helper()
	f, err := os.Open(raw)
	if err != nil {
		c.b.Fatal(err)
	}
	defer f.Close()
	clusters := c.points[0].Disks[0].VirtualSize / diskCluster
	dir := c.b.TempDir()
	rnd := rand.New(rand.NewPCG(2, 1))
	buf := make([]byte, diskCluster)
	for len(c.points) < length {
		var writes []string
		for i := range clusters / 100 {
			off := rnd.Int64N(clusters) * diskCluster
			if _, err := f.ReadAt(buf, off); err != nil {
				c.b.Fatal(err)
			}
			piece := filepath.Join(dir, fmt.Sprint(i))
			if err := os.WriteFile(piece, buf, 0o600); err != nil {
				c.b.Fatal(err)
			}
			writes = append(writes, fmt.Sprintf("write -s %s %d %d", piece, off, diskCluster))
		}
		c.increment(writes)
	}
}

// words makes a file of text, which compresses to about a third.
func words(b *testing.B, path string, size int) {
	b.Helper()
	rnd := rand.New(rand.NewPCG(3, 1))
	var list [4096][]byte
	for i := range list {
		word := make([]byte, 3+rnd.IntN(8))
		for j := range word {
			word[j] = byte('a' + rnd.IntN(26))
		}
		list[i] = append(word, ' ')
	}
	text := make([]byte, 0, size+16)
	for len(text) < size {
		text = append(text, list[rnd.IntN(len(list))]...)
	}
	if err := os.WriteFile(path, text[:size], 0o600); err != nil {
		b.Fatal(err)
	}
}

// hugeSet makes a set as qmpbackup does, of one point with a disk of 1 TiB and 200,000 clusters here and there, whose data
// are holes in the image. It returns the path of the disk in a mount, as a pattern, and that of the image.
func hugeSet(b *testing.B, dir string) (pattern, image string) {
	b.Helper()
	const size, clusters = 1 << 40, 200_000
	rnd := rand.New(rand.NewPCG(1, 1))
	seen := make(map[int64]bool, clusters)
	guest := make([]int64, 0, clusters)
	for len(guest) < clusters {
		if g := rnd.Int64N(size / diskCluster); !seen[g] {
			seen[g] = true
			guest = append(guest, g)
		}
	}
	folder := filepath.Join(dir, mountDisk)
	if err := os.Mkdir(folder, 0o700); err != nil {
		b.Fatal(err)
	}
	for name, text := range map[string]string{
		"uuid":                "0d6ea2a5-9c5b-4c8e-9c4f-6a1f9d8a7b10",
		mountDisk + ".config": `{"format": "qcow2"}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	image = filepath.Join(folder, "FULL-1700000000-"+mountDisk)
	imagetest.Build(b, image, 16, size, guest, func(int) []byte { return nil })
	return filepath.Join("*", "2*", mountDisk+".raw"), image
}
