// Package repotest builds repositories for tests, out of real images and with known content.
//
// A guest gets one point after the other. Each disk of a point is a full image or an increment on the disk of that name
// in the point before, made as a backup makes it: by repo's Begin, CreateImage, Finish and Commit, with the data written
// by qemu-io or, for whole disks, qemu-img. What a disk must read as is worked out from the writes alone, without any
// qcow2: see Guest.Want.
package repotest

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
)

// TB is what the package needs of a test.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
}

// toolLimit bounds one run of a program of QEMU's.
const toolLimit = 5 * time.Minute

// New makes a repository in dir, which must be empty.
func New(tb TB, dir string) *repo.Repo {
	tb.Helper()
	r, err := repo.OpenOrCreate(dir, durable.FS{})
	if err != nil {
		tb.Fatalf("repotest: %v", err)
	}
	return r
}

// Write is one write to a disk. Off and Len are multiples of 512.
type Write struct {
	Off, Len int64
	Fill     byte // every byte's value
	Zero     bool // a zero cluster (write -z) instead
	Compress bool // a compressed cluster: whole clusters of 64 KiB only
}

// Disk is a disk of a point that is to be made.
type Disk struct {
	Name  string
	Size  int64  // of the full; an increment may be larger than its parent; 0: as before
	Full  bool   // a new full; the first image of a disk is one anyway
	Image string // path of a raw file that a full starts as; Size is then that of the file
	// Compress has the clusters of Image compressed.
	Compress    bool
	ClusterSize int64 // of the image, in bytes; 0: the default
	Diff        bool  // level diff instead of inc: the next point's parent stays the same
	Write       []Write
}

// Guest is a guest whose points are made.
type Guest struct {
	*repo.Guest
	// Points are those made so far, oldest first.
	Points chain.Points

	tb    TB
	now   time.Time
	made  map[string]made // by image, see key
	tip   map[string]chain.ImageRef
	files map[string][]byte
}

// made is how an image came to be.
type made struct {
	Disk
	parent *chain.ImageRef
}

// NewGuest begins a guest. Its first point is made at the time start.
func NewGuest(tb TB, r *repo.Repo, name string, start time.Time) *Guest {
	tb.Helper()
	g, err := r.Guest(name)
	if err != nil {
		tb.Fatalf("repotest: %v", err)
	}
	return &Guest{Guest: g, tb: tb, now: start, made: map[string]made{}, tip: map[string]chain.ImageRef{}}
}

// SetFiles sets the files that the points to come carry in their folder guest/.
func (g *Guest) SetFiles(files map[string][]byte) { g.files = files }

func key(id chain.ID, disk string) string { return string(id) + "/" + disk }

// Add makes a point with these disks, an hour after the one before.
func (g *Guest) Add(disks ...Disk) *chain.Manifest {
	g.tb.Helper()
	m, err := g.add(disks)
	if err != nil {
		g.tb.Fatalf("repotest: guest %s: %v", g.Name, err)
	}
	return m
}

func (g *Guest) add(disks []Disk) (*chain.Manifest, error) {
	ctx, cancel := context.WithTimeout(context.Background(), toolLimit)
	defer cancel()
	lock, err := g.Lock(ctx, 0)
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	var tip chain.ID
	if last := g.Points.Latest(); last != nil {
		tip = last.ID
	}
	id := chain.NewID(g.now, tip, uint16(rand.Uint32()))
	p, err := g.Begin(id)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	m := &chain.Manifest{
		Format:      chain.FormatVersion,
		ID:          id,
		UUID:        p.UUID,
		Time:        g.now.UTC(),
		Guest:       chain.GuestIdentity{Name: g.Name, UUID: "4c4c4544-0000-1000-8000-000000000001"},
		Consistency: chain.Instant,
		QEMU:        "repotest",
	}
	for _, d := range disks {
		stored, err := g.store(ctx, p, d)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		}
		m.Disks = append(m.Disks, *stored)
	}
	if len(g.files) > 0 {
		if err := os.Mkdir(filepath.Join(p.Dir, "guest"), 0o700); err != nil {
			return nil, err
		}
		for name, data := range g.files {
			if err := os.WriteFile(filepath.Join(p.Dir, "guest", name), data, 0o600); err != nil {
				return nil, err
			}
		}
	}
	if err := p.Commit(lock, tip, m); err != nil {
		return nil, err
	}
	for _, d := range m.Disks {
		if d.Level.Tracked() {
			g.tip[d.Name] = m.Ref(d.Name)
		}
	}
	g.Points = append(g.Points, m)
	g.now = g.now.Add(time.Hour)
	return m, nil
}

// store makes the image of one disk.
func (g *Guest) store(ctx context.Context, p *repo.Partial, d Disk) (*chain.Disk, error) {
	out := &chain.Disk{Name: d.Name, Level: chain.Full, SourceFormat: "raw", File: chain.ImageFile(p.ID, d.Name)}
	from := made{Disk: d}
	if parent, ok := g.tip[d.Name]; ok && !d.Full {
		from.parent, out.Parent, out.Level = &parent, &parent, chain.Inc
		if d.Diff {
			out.Level = chain.Diff
		}
		if d.Size == 0 {
			from.Size = g.made[key(parent.Point, parent.Disk)].Size
		}
	}
	if d.Image != "" {
		info, err := os.Stat(d.Image)
		if err != nil {
			return nil, err
		}
		from.Size = info.Size()
	}
	path, err := p.CreateImage(ctx, d.Name, from.Size, from.parent, repo.ImageOptions{ClusterSize: d.ClusterSize})
	if err != nil {
		return nil, err
	}
	if d.Image != "" {
		args := []string{"convert", "-n", "-f", "raw", "-O", "qcow2", d.Image, path}
		if d.Compress {
			args = slices.Insert(args, 1, "-c")
		}
		if err := tool(ctx, "", "qemu-img", args...); err != nil {
			return nil, err
		}
	}
	if err := g.write(ctx, p, path, from); err != nil {
		return nil, err
	}
	bytes, sums, err := p.Finish(ctx, d.Name)
	if err != nil {
		return nil, err
	}
	out.VirtualSize, out.Bytes, out.Sums = from.Size, bytes, sums
	g.made[key(p.ID, d.Name)] = from
	return out, nil
}

// write does the writes of one image by one run of qemu-io. The image is opened with its parents: a write of a part
// of a cluster copies the rest of it from them.
func (g *Guest) write(ctx context.Context, p *repo.Partial, path string, from made) error {
	var script strings.Builder
	for _, w := range from.Write {
		switch {
		case w.Zero:
			fmt.Fprintf(&script, "write -z %d %d\n", w.Off, w.Len)
		case w.Compress:
			fmt.Fprintf(&script, "write -c -P %d %d %d\n", w.Fill, w.Off, w.Len)
		default:
			fmt.Fprintf(&script, "write -P %d %d %d\n", w.Fill, w.Off, w.Len)
		}
	}
	if script.Len() == 0 {
		return nil
	}
	return tool(ctx, script.String(), "qemu-io", "-f", "qcow2", path)
}

func tool(ctx context.Context, stdin, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	text := string(out)
	// qemu-io goes on when a command on its standard input fails.
	if err == nil && name == "qemu-io" {
		if n := strings.Count(text, "wrote "); n != strings.Count(stdin, "\n") {
			err = fmt.Errorf("%d of %d writes done", n, strings.Count(stdin, "\n"))
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(text))
	}
	return nil
}

// Want is what a disk of a point must read as, every byte of it.
func (g *Guest) Want(id chain.ID, disk string) []byte {
	g.tb.Helper()
	data := make([]byte, g.made[key(id, disk)].Size)
	if err := g.fill(data, chain.ImageRef{Point: id, Disk: disk}); err != nil {
		g.tb.Fatalf("repotest: %v", err)
	}
	return data
}

// fill does to data, which is zeroes, what was done to make an image and those that it is based on.
func (g *Guest) fill(data []byte, ref chain.ImageRef) error {
	from, ok := g.made[key(ref.Point, ref.Disk)]
	if !ok {
		return fmt.Errorf("no disk %s in point %s", ref.Disk, ref.Point)
	}
	data = data[:min(int64(len(data)), from.Size)]
	switch {
	case from.parent != nil:
		if err := g.fill(data, *from.parent); err != nil {
			return err
		}
	case from.Image != "":
		f, err := os.ReadFile(from.Image)
		if err != nil {
			return err
		}
		copy(data, f)
	}
	for _, w := range from.Write {
		if w.Off >= int64(len(data)) {
			continue
		}
		part := data[w.Off:min(w.Off+w.Len, int64(len(data)))]
		if w.Zero {
			clear(part)
			continue
		}
		copy(part, bytes.Repeat([]byte{w.Fill}, len(part)))
	}
	return nil
}

// RandomWrites returns n writes to a disk of size bytes, of whole sectors and of whole clusters, with zeroes and
// compressed clusters among them. The same seed gives the same writes; fill is the value of most of the bytes, so that
// each layer of a chain can have content of its own.
func RandomWrites(seed uint64, n int, size int64, fill byte) []Write {
	const cluster = 64 << 10
	r := rand.New(rand.NewPCG(seed, 1))
	writes := make([]Write, 0, n)
	touched := map[int64]bool{} // clusters; true: compressed
	// QEMU 7.2 goes on filling a host cluster with compressed ones after those in it were overwritten and it was given to
	// somebody else: such an image is corrupt.
	compress := true
	for i := range n {
		w := Write{Fill: fill + byte(i%3)}
		switch r.IntN(6) {
		case 0:
			w.Zero = true
			w.Off, w.Len = r.Int64N(size/cluster)*cluster, cluster
		case 1:
			w.Off, w.Len = r.Int64N(size/cluster)*cluster, cluster
			_, there := touched[w.Off/cluster]
			w.Compress = compress && !there // QEMU compresses only into clusters that are not there yet
		case 2:
			w.Off, w.Len = r.Int64N(size/512)*512, 512*(1+r.Int64N(40))
		default:
			w.Off, w.Len = r.Int64N(size/cluster)*cluster, cluster*(1+r.Int64N(4))
		}
		w.Len = min(w.Len, size-w.Off)
		for c := w.Off / cluster; c*cluster < w.Off+w.Len; c++ {
			if touched[c] {
				compress = false
			}
			touched[c] = w.Compress
		}
		writes = append(writes, w)
	}
	return writes
}

// Convert reads a disk of a point with qemu-img into a raw file: the other way to see what it holds.
func Convert(tb TB, image, raw string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), toolLimit)
	defer cancel()
	if err := tool(ctx, "", "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw); err != nil {
		tb.Fatalf("repotest: %v", err)
	}
}

// Flip inverts one byte of a file.
func Flip(tb TB, path string, off int64) {
	tb.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		tb.Fatalf("repotest: %v", err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		tb.Fatalf("repotest: %s at %s: %v", path, strconv.FormatInt(off, 10), err)
	}
	b[0] ^= 0xff
	if _, err := f.WriteAt(b, off); err != nil {
		tb.Fatalf("repotest: %v", err)
	}
}
