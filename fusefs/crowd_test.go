package fusefs_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/retain"
)

// crowd is a guest with a disk of random content, of which each piece of each point is known by its check sum.
type crowd struct {
	dir   string
	guest *repo.Guest
	disk  []byte // as it is in the newest point

	mu     sync.Mutex
	points []*chain.Manifest
	sums   map[chain.ID][]sum // of each piece
	gone   map[chain.ID]bool
}

type sum = [sha256.Size]byte

const (
	crowdSize  = 8 << 20
	crowdPiece = 4 << 10
	// crowdPeriod is how long the readers read, at least.
	crowdPeriod = 4 * time.Second
)

func newCrowd(t *testing.T) *crowd {
	t.Helper()
	g, err := repotest.New(t, t.TempDir()).Guest("110")
	if err != nil {
		t.Fatal(err)
	}
	return &crowd{dir: t.TempDir(), guest: g, disk: make([]byte, crowdSize), sums: map[chain.ID][]sum{}, gone: map[chain.ID]bool{}}
}

// add makes a point: in a full, half of all units are written, in an increment a twentieth. A few are zeroed, a few compressed.
func (c *crowd) add(r *rand.Rand) error {
	lock, err := c.guest.Lock(context.Background(), 0)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	n := len(c.points)
	d := chain.Disk{Name: "scsi0", Level: chain.Full, SourceFormat: "raw", VirtualSize: crowdSize}
	writes := crowdSize / unit / 2
	var tip chain.ID
	if n > 0 {
		ref := c.points[n-1].Ref("scsi0")
		tip, d.Level, d.Parent = c.points[n-1].ID, chain.Inc, &ref
		writes = crowdSize / unit / 20
	}
	p, err := c.guest.Begin(chain.NewID(start.Add(time.Duration(n)*time.Hour), tip, uint16(n)))
	if err != nil {
		return err
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	d.File = chain.ImageFile(p.ID, "scsi0")
	path, err := p.CreateImage(ctx, "scsi0", crowdSize, d.Parent, repo.ImageOptions{})
	if err != nil {
		return err
	}
	if err := c.write(ctx, path, writes, r); err != nil {
		return err
	}
	if d.Bytes, d.Sums, err = p.Finish(ctx, "scsi0"); err != nil {
		return err
	}
	sums := make([]sum, crowdSize/crowdPiece)
	for i := range sums {
		sums[i] = sha256.Sum256(c.disk[i*crowdPiece:][:crowdPiece])
	}
	m := &chain.Manifest{
		Format: chain.FormatVersion, ID: p.ID, UUID: p.UUID, Time: start.Add(time.Duration(n) * time.Hour), Consistency: chain.Instant,
		QEMU: "test", Guest: chain.GuestIdentity{Name: c.guest.Name}, Disks: []chain.Disk{d},
	}
	if err := p.Commit(lock, tip, m); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.points = append(c.points, m)
	c.sums[m.ID] = sums
	return nil
}

// write writes that many units of an image at random, and of the disk, as a backup does: without a look at what is below.
func (c *crowd) write(ctx context.Context, path string, count int, r *rand.Rand) error {
	var script strings.Builder
	for i, at := range r.Perm(crowdSize / unit)[:count] {
		content := c.disk[at*unit:][:unit]
		if i%8 == 7 {
			clear(content)
			fmt.Fprintf(&script, "write -z %d %d\n", at*unit, unit)
			continue
		}
		compress := ""
		for j := range content {
			content[j] = byte(r.Uint32())
			if i%8 == 0 {
				content[j] &= 7
				compress = "-c "
			}
		}
		piece := filepath.Join(c.dir, fmt.Sprint(i))
		if err := os.WriteFile(piece, content, 0o600); err != nil {
			return err
		}
		fmt.Fprintf(&script, "write %s-s %s %d %d\n", compress, piece, at*unit, unit)
	}
	cmd := exec.CommandContext(ctx, "qemu-io", "json:"+fmt.Sprintf(`{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":%q}}`, path))
	cmd.Stdin = strings.NewReader(script.String())
	if out, err := cmd.CombinedOutput(); err != nil || strings.Count(string(out), "wrote ") != count {
		return fmt.Errorf("qemu-io: %w: %s", err, out)
	}
	return nil
}

// remove removes a point, but not the newest, and does away with what is not needed for others.
func (c *crowd) remove(ctx context.Context, r *rand.Rand) error {
	lock, err := c.guest.LockPrune(ctx, time.Second)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	points, problems, err := c.guest.Points()
	if err != nil || len(problems) > 0 {
		return fmt.Errorf("points: %w, %v", err, problems)
	}
	kept := points.Kept()
	id := kept[r.IntN(len(kept)-1)].ID
	c.mu.Lock()
	c.gone[id] = true
	c.mu.Unlock()
	remover := &retain.Remover{Guest: c.guest, Log: (&logBuffer{}).logger()}
	if err := remover.Remove(points, false, id); err != nil {
		return err
	}
	_, err = remover.Sweep(ctx)
	return err
}

// pick returns a point that is not being removed.
func (c *crowd) pick(r *rand.Rand) (chain.ID, []sum) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if id := c.points[r.IntN(len(c.points))].ID; !c.gone[id] {
			return id, c.sums[id]
		}
	}
}

func (c *crowd) isGone(id chain.ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone[id]
}

// reader reads points at random and returns how many pieces it has checked.
func (c *crowd) reader(m *mount, r *rand.Rand, until time.Time) (checked int, err error) {
	buf, err := unix.Mmap(-1, 0, 64*crowdPiece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(buf)) }()
	for checked == 0 || time.Now().Before(until) {
		id, sums := c.pick(r)
		flags := unix.O_RDONLY
		if r.IntN(4) > 0 {
			flags |= unix.O_DIRECT // past the kernel's cache, which would hide what goes wrong
		}
		f, err := os.OpenFile(m.path("110", string(id), rawName("scsi0")), flags, 0)
		if err != nil {
			if c.isGone(id) && (errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESTALE)) {
				continue
			}
			return checked, err
		}
		for range 20 {
			first := r.IntN(len(sums))
			count := min(1+r.IntN(1<<r.IntN(7)), len(sums)-first)
			p := buf[:count*crowdPiece]
			if _, err := f.ReadAt(p, int64(first)*crowdPiece); err != nil && err != io.EOF {
				return checked, fmt.Errorf("%s: %w", id, errors.Join(err, f.Close()))
			}
			for i := range count {
				if sha256.Sum256(p[i*crowdPiece:][:crowdPiece]) != sums[first+i] {
					return checked, errors.Join(fmt.Errorf("%s: other content at %d", id, (first+i)*crowdPiece), f.Close())
				}
				checked++
			}
		}
		if err := f.Close(); err != nil {
			return checked, err
		}
	}
	return checked, nil
}

// 64 readers read all points at random, some of which are removed and merged meanwhile while others come. Every piece has the
// check sum that it must have, and nobody gets an error.
func TestCrowd(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(11, 1))
	c := newCrowd(t)
	for range 8 {
		if err := c.add(r); err != nil {
			t.Fatal(err)
		}
	}
	// Room for hardly anything: what is read is found, decompressed and opened again and again.
	m := mountSet(t, c.guest.Repo.Dir, image.PoolOptions{MaxFiles: 4, MaxMeta: 4 << 10, MaxClusters: 256 << 10})
	until := time.Now().Add(crowdPeriod)
	var readers, changes sync.WaitGroup
	checked := make([]int, 64)
	for i := range checked {
		readers.Go(func() {
			var err error
			if checked[i], err = c.reader(m, rand.New(rand.NewPCG(uint64(i), 12)), until); err != nil {
				t.Error(err)
			}
		})
	}
	changes.Go(func() {
		for i := 0; i < 6 && !t.Failed(); i++ {
			if err := c.add(r); err != nil {
				t.Error(err)
			}
		}
	})
	other := rand.New(rand.NewPCG(13, 1))
	for i := 0; i < 6 && !t.Failed(); i++ {
		if err := c.remove(t.Context(), other); err != nil {
			t.Error(err)
		}
	}
	changes.Wait()
	readers.Wait()
	total := 0
	for _, n := range checked {
		if n == 0 {
			t.Error("a reader has read nothing")
		}
		total += n
	}
	t.Logf("%d pieces checked", total)
}
