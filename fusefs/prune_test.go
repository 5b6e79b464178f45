package fusefs_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

const unit = 64 << 10 // of what writes change

// life is a guest whose points come and go while others read them. Unlike repotest's, its increments are written as a
// backup writes them, without a look at what they are based on, so that a merge need not wait for that.
type life struct {
	t       *testing.T
	guest   *repo.Guest
	cluster func(point int) int64

	mu     sync.Mutex
	made   int
	newest *chain.Manifest
	units  map[chain.ID]map[string][]byte // what each unit of a disk is filled with
	gone   map[chain.ID]bool              // was removed, or is about to be
}

func newLife(t *testing.T, cluster func(point int) int64) *life {
	t.Helper()
	g, err := repotest.New(t, t.TempDir()).Guest("110")
	if err != nil {
		t.Fatal(err)
	}
	return &life{t: t, guest: g, cluster: cluster, units: map[chain.ID]map[string][]byte{}, gone: map[chain.ID]bool{}}
}

// add makes a point. Only one may at a time.
func (l *life) add(r *rand.Rand) error {
	lock, err := l.guest.Lock(context.Background(), 0)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	l.mu.Lock()
	n, parent := l.made, l.newest
	l.mu.Unlock()
	now := start.Add(time.Duration(n) * time.Hour)
	var tip chain.ID
	if parent != nil {
		tip = parent.ID
	}
	p, err := l.guest.Begin(chain.NewID(now, tip, uint16(n)))
	if err != nil {
		return err
	}
	defer p.Close()
	m := &chain.Manifest{
		Format: chain.FormatVersion, ID: p.ID, UUID: p.UUID, Time: now, Consistency: chain.Instant, QEMU: "test",
		Guest: chain.GuestIdentity{Name: l.guest.Name},
	}
	units := map[string][]byte{}
	// One of them grows, for which a merge needs all its readers to be gone.
	for disk, size := range map[string]int{"scsi0": 64, "scsi1": 24 + n/4} {
		d, content, err := l.store(p, parent, disk, size, n, r)
		if err != nil {
			return fmt.Errorf("disk %s: %w", disk, err)
		}
		m.Disks = append(m.Disks, *d)
		units[disk] = content
	}
	l.mu.Lock()
	l.units[m.ID] = units
	l.mu.Unlock()
	if err := p.Commit(lock, tip, m); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.made, l.newest = n+1, m
	return nil
}

func (l *life) store(p *repo.Partial, parent *chain.Manifest, disk string, size, n int, r *rand.Rand) (*chain.Disk, []byte, error) {
	d := &chain.Disk{Name: disk, Level: chain.Full, SourceFormat: "raw", File: chain.ImageFile(p.ID, disk), VirtualSize: int64(size) * unit}
	content := make([]byte, size)
	writes := size / 8
	if parent != nil {
		ref := parent.Ref(disk)
		d.Level, d.Parent = chain.Inc, &ref
		l.mu.Lock()
		copy(content, l.units[parent.ID][disk])
		l.mu.Unlock()
		writes = size / 4
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	path, err := p.CreateImage(ctx, disk, d.VirtualSize, d.Parent, repo.ImageOptions{ClusterSize: l.cluster(n)})
	if err != nil {
		return nil, nil, err
	}
	var script strings.Builder
	for range writes {
		at, fill := r.IntN(size), byte(r.IntN(250))
		content[at] = fill
		if fill == 0 {
			fmt.Fprintf(&script, "write -z %d %d\n", at*unit, unit)
		} else {
			fmt.Fprintf(&script, "write -P %d %d %d\n", fill, at*unit, unit)
		}
	}
	cmd := exec.CommandContext(ctx, "qemu-io", "json:"+fmt.Sprintf(`{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":%q}}`, path))
	cmd.Stdin = strings.NewReader(script.String())
	if out, err := cmd.CombinedOutput(); err != nil || strings.Count(string(out), "wrote ") != writes {
		return nil, nil, fmt.Errorf("qemu-io: %w: %s", err, out)
	}
	if d.Bytes, d.Sums, err = p.Finish(ctx, disk); err != nil {
		return nil, nil, err
	}
	return d, content, nil
}

// pick returns a point to read, any that is not being removed, and what its disk holds.
func (l *life) pick(r *rand.Rand) (id chain.ID, disk string, units []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var ids []chain.ID
	for id := range l.units {
		if id <= l.newest.ID && !l.gone[id] {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	id, disk = ids[r.IntN(len(ids))], []string{"scsi0", "scsi1"}[r.IntN(2)]
	return id, disk, l.units[id][disk]
}

func (l *life) isGone(id chain.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.gone[id]
}

// prune removes some points and does away with all that can be.
func (l *life) prune(ctx context.Context, choose func(chain.Points) []chain.ID) ([]retain.Left, error) {
	lock, err := l.guest.LockPrune(ctx, time.Second)
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	points, problems, err := l.guest.Points()
	if err != nil || len(problems) > 0 {
		return nil, fmt.Errorf("points: %w, %v", err, problems)
	}
	ids := choose(points)
	l.mu.Lock()
	for _, id := range ids {
		l.gone[id] = true
	}
	l.mu.Unlock()
	r := &retain.Remover{Guest: l.guest, Log: (&logBuffer{}).logger(), RateLimit: 8 << 20}
	if err := r.Remove(points, false, ids...); err != nil {
		return nil, err
	}
	return r.Sweep(ctx)
}

// compare compares a piece of an open disk with what it must hold.
func compare(f *os.File, units []byte, off, n int64) error {
	size := int64(len(units)) * unit
	got := make([]byte, n)
	k, err := f.ReadAt(got, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if want := min(n, size-off); int64(k) != want {
		return fmt.Errorf("%d bytes at %d, not %d", k, off, want)
	}
	for i, b := range got[:k] {
		if want := units[(off+int64(i))/unit]; b != want {
			return fmt.Errorf("byte %d is %#x, not %#x", off+int64(i), b, want)
		}
	}
	return nil
}

// reader reads points at random until stop is closed, each for a while.
func (l *life) reader(m *mount, r *rand.Rand, stop chan struct{}) error {
	for {
		id, disk, units := l.pick(r)
		flags := unix.O_RDONLY
		if r.IntN(4) > 0 {
			flags |= unix.O_DIRECT // past the kernel's cache, which would hide what goes wrong
		}
		f, err := os.OpenFile(m.path("110", string(id), rawName(disk)), flags, 0)
		if err != nil {
			if l.isGone(id) && (errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESTALE)) {
				continue
			}
			return err
		}
		for range 1 + r.IntN(120) {
			select {
			case <-stop:
				return f.Close()
			default:
			}
			size := int64(len(units)) * unit
			if err := compare(f, units, r.Int64N(size/4096)*4096, 4096*(1+r.Int64N(64))); err != nil {
				return fmt.Errorf("%s: disk %s: %w", id, disk, err)
			}
			if pos, err := unix.Seek(int(f.Fd()), r.Int64N(size), unix.SEEK_HOLE); err != nil || pos < size && units[pos/unit] != 0 {
				return fmt.Errorf("%s: disk %s: a hole at %d, %w", id, disk, pos, err)
			}
			time.Sleep(time.Duration(r.IntN(2000)) * time.Microsecond)
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
}

// Points are removed and merged, and others come, while eight readers read all that there are. Every byte is right, nobody
// gets an error, and when they are done nothing is left of what was removed.
func TestPruneWhileReading(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		pool    image.PoolOptions
		cluster func(point int) int64
	}{
		{"all files open", image.PoolOptions{}, func(int) int64 { return unit }},
		{"two files open", image.PoolOptions{MaxFiles: 2, MaxMeta: 1}, func(int) int64 { return unit }},
		{"a full of larger clusters", image.PoolOptions{MaxMeta: 1}, func(point int) int64 { return map[bool]int64{true: 8 * unit, false: unit}[point == 0] }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(1, uint64(len(test.name))))
			l := newLife(t, test.cluster)
			for range 5 {
				if err := l.add(r); err != nil {
					t.Fatal(err)
				}
			}
			m := mountSet(t, l.guest.Repo.Dir, test.pool)
			stop := make(chan struct{})
			var readers, adder sync.WaitGroup
			for i := range 8 {
				readers.Go(func() {
					if err := l.reader(m, rand.New(rand.NewPCG(uint64(i), 2)), stop); err != nil {
						t.Error(err)
					}
				})
			}
			adder.Go(func() {
				for range 5 {
					if err := l.add(r); err != nil {
						t.Error(err)
					}
				}
			})
			other := rand.New(rand.NewPCG(3, 3))
			busy := 0
			for range 4 {
				var open *os.File // of one that is removed
				var holds chain.ID
				left, err := l.prune(t.Context(), func(points chain.Points) (ids []chain.ID) {
					kept := points.Kept()
					for _, p := range kept[:len(kept)-1] { // the newest is the parent of the next
						if len(kept)-len(ids) > 3 && other.IntN(2) == 0 {
							ids = append(ids, p.ID)
						}
					}
					if len(ids) > 0 {
						holds = ids[other.IntN(len(ids))]
						open = must(os.Open(m.path("110", string(holds), "scsi0.raw")))(t)
					}
					return ids
				})
				if err != nil {
					t.Error(err)
				}
				if open != nil {
					if !slices.ContainsFunc(left, func(l retain.Left) bool { return l.ID == holds }) {
						t.Errorf("%s is open, and was done away with: %v", holds, left)
					}
					l.mu.Lock()
					units := l.units[holds]["scsi0"]
					l.mu.Unlock()
					if err := compare(open, units, 0, 64*unit); err != nil {
						t.Errorf("%s: %v", holds, err)
					}
					_ = open.Close()
					busy++
				}
				if t.Failed() {
					break
				}
			}
			adder.Wait()
			close(stop)
			readers.Wait()
			if t.Failed() {
				return
			}
			if busy == 0 {
				t.Error("nothing was removed")
			}
			l.settled(m)
		})
	}
}

// settled waits until nothing is left of removed points, and reads all the others.
func (l *life) settled(m *mount) {
	l.t.Helper()
	eventually(l.t, "the files are closed", func() bool { return openUnder(l.t, l.guest.Dir) == 0 })
	left, err := l.prune(l.t.Context(), func(chain.Points) []chain.ID { return nil })
	if err != nil || len(left) > 0 {
		l.t.Errorf("left: %v, %v", left, err)
	}
	points, problems, err := l.guest.Points()
	if err != nil || len(problems) > 0 || len(points) != len(points.Kept()) {
		l.t.Errorf("%d points, %d of them kept, %v, %v", len(points), len(points.Kept()), problems, err)
	}
	want := []string{}
	for _, p := range points {
		want = append(want, string(p.ID))
		for disk, units := range l.units[p.ID] {
			f := must(os.Open(m.path("110", string(p.ID), rawName(disk))))(l.t)
			if err := compare(f, units, 0, int64(len(units))*unit); err != nil {
				l.t.Errorf("%s: disk %s: %v", p.ID, disk, err)
			}
			_ = f.Close()
		}
	}
	for id := range l.units {
		if l.gone[id] == slices.Contains(want, string(id)) {
			l.t.Errorf("%s: removed is %v", id, l.gone[id])
		}
	}
	var got []string
	for _, e := range must(os.ReadDir(m.path("110")))(l.t) {
		if e.Name() != "latest" {
			got = append(got, e.Name())
		}
	}
	if !slices.Equal(got, want) {
		l.t.Errorf("listed: %v, not %v", got, want)
	}
	if images := must(os.ReadDir(l.guest.ImagesDir()))(l.t); len(images) != 2*len(points) {
		l.t.Errorf("%d images of %d points", len(images), len(points))
	}
	if hidden, _ := filepath.Glob(filepath.Join(l.guest.Dir, ".*.base")); len(hidden) > 0 {
		l.t.Errorf("left: %v", hidden)
	}
}

// A removed point vanishes from the list. Who has a disk of it open reads on, and when it is closed the point's space is
// free.
func TestRemovedWhileOpen(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 5))
	l := newLife(t, func(int) int64 { return unit })
	for range 5 {
		if err := l.add(r); err != nil {
			t.Fatal(err)
		}
	}
	points, _, err := l.guest.Points()
	if err != nil {
		t.Fatal(err)
	}
	m := mountSet(t, l.guest.Repo.Dir, image.PoolOptions{})
	id := points[1].ID
	path := m.path("110", string(id), "scsi0.raw")
	file := must(os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECT, 0))(t)
	defer file.Close()
	left, err := l.prune(t.Context(), func(chain.Points) []chain.ID { return []chain.ID{points[0].ID, id, points[2].ID} })
	if err != nil || !slices.ContainsFunc(left, func(l retain.Left) bool { return l.ID == id && strings.Contains(l.Why, "read") }) {
		t.Fatalf("left: %v, %v", left, err)
	}
	eventually(t, "it is not listed", func() bool {
		_, err := os.Stat(path)
		names := run(t, "ls", m.path("110"))
		return errors.Is(err, os.ErrNotExist) && !strings.Contains(names, string(id))
	})
	if _, err := os.Open(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("opened again: %v", err)
	}
	units := l.units[id]["scsi0"]
	if err := compare(file, units, 0, int64(len(units))*unit); err != nil {
		t.Error(err)
	}
	if err := file.Close(); err != nil {
		t.Error(err)
	}
	l.settled(m)
}
