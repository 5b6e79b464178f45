package repotest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
)

// Many is a repository with many points, made in a fraction of the time that Guest takes: nothing is synced, and images
// are copies of two that qemu-img has made, a full and an increment without data, with their own identities and backing
// files. All else is as a backup makes it: manifests are sealed, sums are those of the images, and each point carries a
// configuration file.
type Many struct {
	Guests, Points int                // how many guests, and how many points each of them has: a full and increments
	Disks          int                // of each point
	Size           int64              // of each disk, in bytes; the smaller, the quicker
	Name           func(i int) string // of each guest
	Start          time.Time          // of each guest's first point
	Every          time.Duration      // from one point to the next
}

// Make makes the repository in dir, which must be empty.
func (m Many) Make(tb TB, dir string) *repo.Repo {
	tb.Helper()
	r := New(tb, dir)
	templates, err := m.templates()
	if err != nil {
		tb.Fatalf("repotest: %v", err)
	}
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i := range m.Guests {
		group.Go(func() error {
			g, err := r.Guest(m.Name(i))
			if err != nil {
				return err
			}
			return m.guest(g, i, templates)
		})
	}
	if err := group.Wait(); err != nil {
		tb.Fatalf("repotest: %v", err)
	}
	return r
}

// The parts of a template that each image has its own of, of the same length in all.
const (
	templateUUID    = "00112233445566778899aabbccddeeff"
	templateID      = chain.ID("20010101T000000Z-0000")
	templateParent  = chain.ID("20000101T000000Z-0000")
	templateCluster = 4096 // and page: an image without data is of few pages then, of which each must be summed up
	templateTimeout = time.Minute
)

// template is an image without data, by the name of its disk.
type templates map[string]struct{ full, inc []byte }

func diskName(i int) string { return fmt.Sprint("scsi", i) }

// templates has the images made as a backup does it.
func (m Many) templates() (templates, error) {
	dir, err := os.MkdirTemp("", "qmchain-repotest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	r, err := repo.OpenOrCreate(dir, durable.FS{})
	if err != nil {
		return nil, err
	}
	g, err := r.Guest("1")
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(g.Dir, 0o700); err != nil {
		return nil, err
	}
	p, err := g.Begin(templateID)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(context.Background(), templateTimeout)
	defer cancel()
	image := func(name string, parent *chain.ImageRef) ([]byte, error) {
		path, err := p.CreateImage(ctx, name, m.Size, parent, repo.ImageOptions{ClusterSize: templateCluster})
		if err != nil {
			return nil, err
		}
		defer os.Remove(path)
		text, err := os.ReadFile(path)
		return bytes.ReplaceAll(text, []byte(p.UUID), []byte(templateUUID)), err
	}
	made := templates{}
	for i := range m.Disks {
		t := made[diskName(i)]
		if t.full, err = image(diskName(i), nil); err != nil {
			return nil, err
		}
		if t.inc, err = image(diskName(i), &chain.ImageRef{Point: templateParent, Disk: diskName(i)}); err != nil {
			return nil, err
		}
		made[diskName(i)] = t
	}
	return made, nil
}

// guest makes the points of the guest that is number n.
func (m Many) guest(g *repo.Guest, n int, from templates) error {
	if err := os.MkdirAll(g.ImagesDir(), 0o700); err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(uint64(n), 1))
	identity := chain.GuestIdentity{
		Name: g.Name, VMName: "vm" + g.Name,
		UUID:    fmt.Sprintf("4c4c4544-0000-1000-8000-%012x", n),
		VMGenID: fmt.Sprintf("5d5d5544-0000-1000-8000-%012x", n),
	}
	var last *chain.Manifest
	for i := range m.Points {
		now := m.Start.Add(time.Duration(i) * m.Every).UTC()
		p := &chain.Manifest{
			Format: chain.FormatVersion, ID: chain.NewID(now, "", uint16(random.Uint32())), UUID: fmt.Sprintf("%016x%016x", random.Uint64(), random.Uint64()),
			Time: now, Guest: identity, Consistency: chain.Frozen, QEMU: "10.1.2",
		}
		dir := g.PointDir(p.ID)
		if err := os.MkdirAll(filepath.Join(dir, "guest"), 0o700); err != nil {
			return err
		}
		for j := range m.Disks {
			d, err := m.disk(g, p, last, diskName(j), from)
			if err != nil {
				return err
			}
			p.Disks = append(p.Disks, *d)
		}
		text, err := p.Encode()
		if err != nil {
			return err
		}
		for name, text := range map[string][]byte{
			chain.ManifestFile: text, ".lock": nil, filepath.Join("guest", g.Name+".conf"): []byte("memory: 4096\nname: " + identity.VMName + "\n"),
		} {
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				return err
			}
		}
		last = p
	}
	return nil
}

// disk makes the image of a disk, an increment on the one in the point last if there is one, and its sums.
func (m Many) disk(g *repo.Guest, p, last *chain.Manifest, name string, from templates) (*chain.Disk, error) {
	d := &chain.Disk{
		Name: name, Level: chain.Full, SourceFormat: "raw", VirtualSize: m.Size, File: chain.ImageFile(p.ID, name),
		Tracking: &chain.Tracking{Kind: chain.KindMemory, Bitmap: chain.BitmapName{Repo: g.Repo.ShortID(), Point: p.ID, Disk: name}.String()},
	}
	image := bytes.Clone(from[name].full)
	if last != nil {
		ref := last.Ref(name)
		d.Level, d.Parent = chain.Inc, &ref
		image = bytes.Clone(from[name].inc)
	}
	head := image[:templateCluster]
	head = bytes.ReplaceAll(head, []byte(templateUUID), []byte(p.UUID))
	if last != nil {
		head = bytes.ReplaceAll(head, []byte(templateParent), []byte(last.ID))
	}
	copy(image, head)
	d.Bytes = int64(len(image))
	sums, err := repo.ComputeSums(context.Background(), bytes.NewReader(image), d.Bytes, nil, nil)
	if err != nil {
		return nil, err
	}
	text := sums.Text()
	digest := sha256.Sum256(text)
	d.Sums = chain.Sums{File: chain.SumsFile(name, 0), SHA256: hex.EncodeToString(digest[:])}
	if err := os.WriteFile(filepath.Join(g.PointDir(p.ID), d.Sums.File), text, 0o600); err != nil {
		return nil, err
	}
	return d, writeSparse(g.ImagePath(p.ID, name), image)
}

// writeSparse writes a file without its pages of zeroes.
func writeSparse(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for off := 0; off < len(data); off += templateCluster {
		page := data[off:min(off+templateCluster, len(data))]
		if len(bytes.TrimLeft(page, "\x00")) == 0 {
			continue
		}
		if _, err := f.WriteAt(page, int64(off)); err != nil {
			return err
		}
	}
	if err := f.Truncate(int64(len(data))); err != nil {
		return err
	}
	return f.Close()
}
