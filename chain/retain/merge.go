package retain

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/qcow2"
	"qmchain/chain/repo"
	"qmchain/internal/child"
)

const (
	// slowest is the rate at which an image is expected to be written at least, in bytes per second.
	slowest = 1 << 20

	toolLimit = 10 * time.Minute
)

// merge is that of a base's image with its only child's.
type merge struct {
	guest    *repo.Guest
	log      logrus.FieldLogger
	rate     int64
	base     repo.Folder
	baseDisk *chain.Disk // as in the manifest
	child    chain.Layer
}

// run merges; why says what is in the way.
func (m *merge) run(ctx context.Context, points chain.Points) (why string, err error) {
	g := m.guest
	// qemu-img finds the base by the child's header: it must be the one that the manifests name.
	if err := g.CheckImages(points, m.child.Point, m.child.Disk.Name); err != nil {
		return "", err
	}
	folder := repo.FolderOf(m.child.Point)
	basePath := g.ImagePath(m.base.ID, m.baseDisk.Name)
	f, err := os.OpenFile(basePath, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if links, err := linksOf(f); err != nil || links > 1 {
		return "its image has another name (a hard link), and what has that would change with it", err
	}
	src, err := os.Open(g.ImagePath(m.child.Point.ID, m.child.Disk.Name))
	if err != nil {
		return "", err
	}
	defer src.Close()
	above, err := openImage(src)
	if err != nil {
		return "", fmt.Errorf("%s: %w", src.Name(), err)
	}
	before, err := openImage(f)
	if err != nil {
		return "", fmt.Errorf("%s: %w", basePath, err)
	}
	if before.Size() > above.Size() {
		return "", fmt.Errorf("its disk of %d bytes is larger than the next, of %d", before.Size(), above.Size())
	}
	release := func() {}
	defer func() { release() }()
	// What is written of a larger cluster moves the rest of it too, which the child does not hide.
	larger, grown := above.Header().ClusterSize() < before.Header().ClusterSize(), before.Size() < above.Size()
	if larger || grown {
		reason := map[bool]string{false: "its disk has grown", true: "its image has larger clusters than the next"}[larger]
		r, why, err := m.alone(points, reason)
		if why != "" || err != nil {
			return why, err
		}
		release = r
	}
	touched, why, err := m.begin(ctx, f, before, above)
	if why != "" || err != nil {
		return why, err
	}
	if grown {
		if why, err := m.grow(ctx, basePath, above.Size()); why != "" || err != nil {
			return why, err
		}
	}
	if !larger {
		release()
		release = func() {}
	}
	m.log.Infof("merge disk %s of %s into %s", m.baseDisk.Name, m.base.ID, m.child.Point.ID)
	err = m.commit(ctx, f, above, touched)
	if why, ok := inUse(err); ok {
		return why, nil
	}
	if err != nil {
		return "", err
	}
	next, err := m.next(ctx, f, touched, folder)
	if err != nil {
		return "", err
	}
	err = g.Rewrite(folder, func(point *chain.Manifest) error {
		point.Disk(m.child.Disk.Name).Next = next
		return nil
	})
	if err != nil {
		return "", err
	}
	// What is damaged in blocks that nothing was written to stays so. It is the child's from here on: after the rename a crash
	// would leave nothing that says whose it was, and so would who cancels.
	if err := g.MergedChecked(context.WithoutCancel(ctx), chain.ImageRef{Point: m.base.ID, UUID: m.child.Disk.Parent.UUID, Disk: m.baseDisk.Name}, m.child.Point.Ref(m.child.Disk.Name)); err != nil {
		m.log.Warnf("what verify has found of disk %s of %s is not kept for %s: %v", m.baseDisk.Name, m.base.ID, m.child.Point.ID, err)
	}
	if err := g.Repo.FS.Rename(basePath, g.ImagePath(m.child.Point.ID, m.child.Disk.Name)); err != nil {
		return "", err
	}
	return "", settle(g, folder)
}

// linksOf is how many names a file has.
func linksOf(f *os.File) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return uint64(st.Nlink), err //nolint:unconvert // of another type on arm64
}

// begin makes sure that what is about to be merged is sound, and has the base's manifest say that it is being merged. It
// returns the blocks of the base's file whose check sums will be made anew: what is damaged in them, or in the child's image,
// must not be sealed as sound. They are remembered, as after a crash nobody could tell what was written to.
func (m *merge) begin(ctx context.Context, f *os.File, before, above *qcow2.Image) (touched map[int64]bool, why string, err error) {
	g := m.guest
	if err := g.CheckSums(ctx, m.child.Point, m.child.Disk.Name); err != nil {
		return nil, "", err
	}
	touched = make(map[int64]bool)
	if m.baseDisk.Merging != nil {
		if err := g.ReadTouched(m.base, m.baseDisk.Name, touched); err != nil {
			return nil, "", err
		}
	}
	split, err := note(touched, before, above)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", f.Name(), err)
	}
	if split {
		// QEMU gives the place of such a cluster to others before the table says where its rest has gone: a kill in between
		// would lose that.
		return nil, "its compressed clusters are larger than the clusters of the next", nil
	}
	if m.baseDisk.Merging == nil {
		sums, err := g.ReadSums(ctx, m.base, m.baseDisk)
		if err != nil {
			return nil, "", err
		}
		if err := repo.CompareBlocks(ctx, f, sums, touched); err != nil {
			return nil, "", fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	if err := g.WriteTouched(m.base, m.baseDisk.Name, touched); err != nil {
		return nil, "", err
	}
	ref := m.child.Point.Ref(m.child.Disk.Name)
	if m.baseDisk.Merging != nil && *m.baseDisk.Merging == ref {
		return touched, "", nil
	}
	return touched, "", g.Rewrite(m.base, func(base *chain.Manifest) error {
		base.Disk(m.baseDisk.Name).Merging = &ref
		return nil
	})
}

func openImage(f *os.File) (*qcow2.Image, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return qcow2.Open(f, info.Size(), qcow2.Options{ZeroHosts: true})
}

// alone makes sure that nobody reads what descends from the base until release is called, for what can't be done below
// readers; why says who does.
func (m *merge) alone(points chain.Points, reason string) (release func(), why string, err error) {
	var held []func()
	release = func() {
		for _, r := range held {
			r()
		}
	}
	claimed := map[chain.ID]bool{}
	descends := map[chain.ImageRef]bool{{Point: m.base.ID, UUID: m.child.Disk.Parent.UUID, Disk: m.baseDisk.Name}: true}
	for _, p := range points {
		for i := range p.Disks {
			if d := &p.Disks[i]; d.Parent == nil || !descends[*d.Parent] {
				continue
			}
			descends[p.Ref(p.Disks[i].Name)] = true
			if claimed[p.ID] {
				continue
			}
			claimed[p.ID] = true
			r, err := m.guest.Claim(repo.FolderOf(p))
			if err == nil {
				held = append(held, r)
				continue
			}
			release()
			if errors.Is(err, repo.ErrLocked) {
				return nil, fmt.Sprintf("%s, and %s is being read", reason, p.ID), nil
			}
			return nil, "", err
		}
	}
	return release, "", nil
}

// grow makes the base's disk as large as its child's. That moves a table which those who have the image open know the place
// of, so nobody may have.
func (m *merge) grow(ctx context.Context, path string, size int64) (why string, err error) {
	if err := m.guest.Repo.FS.Step("resize", path); err != nil {
		return "", err
	}
	_, err = child.Run(ctx, toolLimit, m.guest.Repo.QemuImg, "resize", "-q", "-f", "qcow2", path, strconv.FormatInt(size, 10))
	why, ok := inUse(err)
	if ok {
		return why, nil
	}
	return "", err
}

// inUse says whether a program of QEMU's failed because another one has an image open.
func inUse(err error) (why string, ok bool) {
	if err != nil && strings.Contains(err.Error(), "lock") && strings.Contains(err.Error(), "Failed to get") {
		return "another program has an image open: " + err.Error(), true
	}
	return "", false
}

// commit writes what the child's image holds into the base's, f, and adds to the blocks that can have changed those where
// things are now. The file is on disk then, with the child's identity.
func (m *merge) commit(ctx context.Context, f *os.File, above *qcow2.Image, touched map[int64]bool) error {
	g := m.guest
	if m.baseDisk.Merging != nil {
		// What was cut off can have left clusters that are of no use.
		if err := g.Repo.FS.Step("check", f.Name()); err != nil {
			return err
		}
		if _, err := child.Run(ctx, checkLimit(f), g.Repo.QemuImg, "check", "-q", "-f", "qcow2", "-r", "leaks", f.Name()); err != nil {
			return err
		}
	}
	if err := g.Repo.FS.Step("commit", f.Name()); err != nil {
		return err
	}
	args := []string{"commit", "-q", "-f", "qcow2", "-d"}
	if m.rate > 0 {
		args = append(args, "-r", strconv.FormatInt(m.rate, 10))
	}
	if _, err := child.Run(ctx, m.limit(), g.Repo.QemuImg, append(args, g.ImagePath(m.child.Point.ID, m.child.Disk.Name))...); err != nil {
		return err
	}
	if err := g.Repo.FS.Step("write", f.Name()); err != nil {
		return err
	}
	if err := repo.SetIdentity(f, m.child.Point.Ref(m.child.Disk.Name)); err != nil {
		return err
	}
	if err := g.Repo.FS.Step("sync", f.Name()); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	after, err := openImage(f)
	if err == nil {
		_, err = note(touched, after, above)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return nil
}

// limit bounds a commit: what is rated slower than the slowest disk gets more time.
func (m *merge) limit() time.Duration {
	rate := int64(slowest)
	if m.rate > 0 {
		rate = min(rate, m.rate/2+1)
	}
	return toolLimit + time.Duration(m.child.Disk.Bytes/rate)*time.Second
}

func checkLimit(f *os.File) time.Duration {
	info, err := f.Stat()
	if err != nil {
		return toolLimit
	}
	return toolLimit + time.Duration(info.Size()/(100*slowest))*time.Second
}

// note notes the blocks of an image's file that writing there what above holds can change: those with tables, and those with
// data at the places where above has something. split says that above has parts of clusters that are compressed there.
func note(touched map[int64]bool, img, above *qcow2.Image) (split bool, err error) {
	if img.Header().Incompatible&qcow2.ExtendedL2 != 0 {
		return false, errors.New("its table entries are extended ones, as no image of ours has")
	}
	mark := func(off, length int64) {
		for b := off / repo.SumsBlock; b*repo.SumsBlock < off+length; b++ {
			touched[b] = true
		}
	}
	if err := img.Metadata(mark); err != nil {
		return false, err
	}
	span := max(above.Span(), img.Span())
	cluster := img.Header().ClusterSize()
	var mine, its []qcow2.Run
	for off := above.Next(0); off < above.Size(); off = above.Next(off) {
		end := min((off/span+1)*span, above.Size())
		if its, err = above.Map(off, end-off, its[:0]); err != nil {
			return false, err
		}
		off = end
		for _, r := range its {
			if r.Kind == qcow2.Unallocated || r.Off >= img.Size() {
				continue
			}
			// A write of a part of a cluster of the image changes all of it.
			from := r.Off &^ (cluster - 1)
			to := min((r.Off+r.Len+cluster-1)&^(cluster-1), img.Size())
			if mine, err = img.Map(from, to-from, mine[:0]); err != nil {
				return false, err
			}
			for _, h := range mine {
				switch h.Kind {
				case qcow2.Data:
					mark(h.Host, h.Len)
				case qcow2.Compressed:
					mark(h.Host, int64(h.Bytes))
					split = split || above.Header().ClusterSize() < cluster
				case qcow2.Zero:
					if h.Host > 0 {
						mark(h.Host, h.Len)
					}
				}
			}
		}
	}
	return split, nil
}

// next makes the check sums of the merged image and says what its manifest is to say.
func (m *merge) next(ctx context.Context, f *os.File, touched map[int64]bool, folder repo.Folder) (*chain.Next, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	old, err := m.guest.ReadSums(ctx, m.base, m.baseDisk)
	if err != nil {
		return nil, err
	}
	sums, err := repo.ComputeSums(ctx, f, info.Size(), old, func(block int64) bool { return !touched[block] })
	if err != nil {
		return nil, fmt.Errorf("%s: check sums: %w", f.Name(), err)
	}
	written, err := m.guest.WriteSums(folder, m.child.Disk.Name, m.child.Disk.Generation+1, sums.Text())
	if err != nil {
		return nil, err
	}
	return &chain.Next{Level: mergedLevel(m.baseDisk.Level, m.child.Disk.Level), Parent: m.baseDisk.Parent, Bytes: info.Size(), Sums: written}, nil
}

// mergedLevel is the level of an image on what the base's was on. A diff, which nothing goes on from, stays such.
func mergedLevel(base, child chain.Level) chain.Level {
	switch {
	case base.Overlay():
		return child
	case child == chain.Diff:
		return chain.Copy
	}
	return chain.Full
}

// settle makes a manifest say which generations of its images are there, after a merge or a crash in one.
func settle(g *repo.Guest, folder repo.Folder) error {
	now, err := g.Read(folder) // which fails where it can't tell
	if err != nil {
		return err
	}
	old := make(map[string]int) // disks, and generations of sums
	err = g.Rewrite(folder, func(m *chain.Manifest) error {
		for i := range m.Disks {
			d := &m.Disks[i]
			if d.Next == nil {
				continue
			}
			if now.Disks[i].Generation == d.Generation {
				old[d.Name] = d.Generation + 1
				d.Next = nil
				continue
			}
			old[d.Name] = d.Generation
			d.Advance()
		}
		return nil
	})
	if err != nil {
		return err
	}
	for disk, generation := range old {
		if err := g.DropSums(folder, disk, generation); err != nil {
			return err
		}
	}
	return nil
}
