package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain"
	"qmchain/chain/repo"
)

// Receiver receives streams.
type Receiver struct {
	// Open opens the repository, or makes it. It is called once the stream is known to be one.
	Open     func() (*repo.Repo, error)
	Adopt    bool          // another guest's points may come to those that are there
	LockWait time.Duration // how long to wait for those who make or remove points of a guest
	Log      logrus.FieldLogger
	// Progress, if not nil, is told how many bytes of images have come, and of how many the sender spoke.
	Progress func(done, total int64)
}

// Received is a point that came.
type Received struct {
	Guest string
	ID    chain.ID
	Base  bool // it is not a point here, but points are read through it
	There bool // it was there already
	// Removed: it was there already, but as a base: it had been removed here, and stays so.
	Removed bool
}

// Receive makes points of a stream. It returns those that are in place, also with an error: each stands for itself. What
// had been begun when it failed is undone.
func (r *Receiver) Receive(ctx context.Context, in io.Reader) ([]Received, error) {
	in, stop := pumpIn(ctx, in)
	defer stop()
	s := &receiving{Receiver: r}
	defer s.leave()
	err := s.run(ctx, in)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return s.received, err
}

// receiving is one call of Receive.
type receiving struct {
	*Receiver
	stream   *Reader
	repo     *repo.Repo
	received []Received
	done     int64 // bytes

	// Of the guest whose points come just now; nil: none.
	guest  *repo.Guest
	locks  []*repo.Lock
	points chain.Points
	known  bool                    // that it is the guest that is meant
	sound  map[chain.ImageRef]bool // images that can be read
}

func (s *receiving) run(ctx context.Context, in io.Reader) (err error) {
	if s.stream, err = NewReader(in); err != nil {
		return err
	}
	if s.repo, err = s.Open(); err != nil {
		return err
	}
	s.report(0)
	for {
		p, err := s.stream.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.point(ctx, p); err != nil {
			return fmt.Errorf("%s/%s: %w", p.Guest, p.Manifest.ID, err)
		}
	}
}

func (s *receiving) report(bytes int64) {
	s.done += bytes
	if s.Progress != nil {
		s.Progress(s.done, s.stream.Bytes())
	}
}

// point makes a point, or reads past it.
func (s *receiving) point(ctx context.Context, p *Point) error {
	if s.guest == nil || s.guest.Name != p.Guest {
		s.leave()
		if err := s.enter(ctx, p.Guest); err != nil {
			return err
		}
	}
	m := p.Manifest
	done := Received{Guest: p.Guest, ID: m.ID, Base: m.Base}
	if there := s.points.Find(m.ID); there != nil {
		if err := same(there, m); err != nil {
			return err
		}
		s.known = true
		done.Base, done.There, done.Removed = there.Base, true, there.Base && !m.Base
		s.received = append(s.received, done)
		s.Log.Debugf("%s/%s is there already", p.Guest, m.ID)
		s.report(size(m))
		return nil
	}
	// One point that both have proves that it is the guest that is meant.
	if !s.known && !s.Adopt {
		if err := repo.CheckGuest(s.points, m); err != nil {
			return err
		}
	}
	if err := s.checkParents(m); err != nil {
		return err
	}
	if err := s.store(ctx, p); err != nil {
		return err
	}
	for _, d := range m.Disks {
		s.sound[m.Ref(d.Name)] = true
	}
	s.known = true
	s.points = append(s.points, m)
	s.points.Sort()
	s.received = append(s.received, done)
	s.Log.Debugf("%s/%s is in place", p.Guest, m.ID)
	return nil
}

// enter takes a guest's locks and looks at what is there.
func (s *receiving) enter(ctx context.Context, name string) error {
	g, err := s.repo.Guest(name)
	if err != nil {
		return err
	}
	for _, take := range []func(context.Context, time.Duration) (*repo.Lock, error){g.Lock, g.LockPrune} {
		lock, err := take(ctx, s.LockWait)
		if err != nil {
			return err
		}
		s.locks = append(s.locks, lock)
	}
	// A rename by one that died right after it may not be on disk yet.
	if err := g.Sync(); err != nil {
		return err
	}
	if err := g.RemoveIncoming(); err != nil {
		return err
	}
	points, problems, err := g.Points()
	if err != nil {
		return err
	}
	for _, p := range problems {
		if !errors.Is(p.Err, chain.ErrDamaged) {
			return p.Err // it can't be read just now
		}
		s.Log.Warnf("point left out: %v", p.Err)
	}
	s.guest, s.points, s.known, s.sound = g, points, false, map[chain.ImageRef]bool{}
	return nil
}

// leave gives the locks back.
func (s *receiving) leave() {
	for _, l := range s.locks {
		l.Unlock()
	}
	s.locks, s.guest = nil, nil
}

// same makes sure that a point that is there is the one that comes. After a merge its images are others; a base can have
// lost some.
func same(there, m *chain.Manifest) error {
	if there.UUID != m.UUID {
		return ErrOtherPoint
	}
	for _, d := range m.Disks {
		t := there.Disk(d.Name)
		if t == nil && there.Base {
			continue
		}
		if t == nil || t.VirtualSize != d.VirtualSize || t.Generation == 0 && d.Generation == 0 && t.Sums != d.Sums {
			return fmt.Errorf("%w: its disk %s is another one", ErrOtherPoint, d.Name)
		}
	}
	return nil
}

// checkParents makes sure that what a point is read from is there, and can be read.
func (s *receiving) checkParents(m *chain.Manifest) error {
	with := append(chain.Points{m}, s.points...)
	with.Sort()
	for _, d := range m.Disks {
		if d.Parent == nil {
			continue
		}
		if p := s.points.Find(d.Parent.Point); p != nil && p.UUID == d.Parent.UUID && p.Base && !s.sound[*d.Parent] && s.lost(p, d.Parent.Disk) {
			return fmt.Errorf("disk %s: its parent %s was removed here, and merged into another point: %w", d.Name, p.ID, ErrUnsettled)
		}
		layers, err := with.Layers(m, d.Name)
		if err != nil {
			return err
		}
		parent, ref := layers[len(layers)-2], *d.Parent
		// No backup is smaller than what it was made on, and a merge could not cope.
		if d.VirtualSize < parent.Disk.VirtualSize {
			return fmt.Errorf("disk %s: %w: it has %d bytes, less than the %d of its parent", d.Name, chain.ErrDamaged, d.VirtualSize, parent.Disk.VirtualSize)
		}
		if !s.sound[ref] {
			if err := s.guest.CheckImages(s.points, parent.Point, parent.Disk.Name); err != nil {
				return err
			}
			s.sound[ref] = true
		}
	}
	return nil
}

// lost reports whether a base no longer has a disk, or not for long.
func (s *receiving) lost(base *chain.Manifest, disk string) bool {
	d := base.Disk(disk)
	if d == nil || d.Merging != nil {
		return true
	}
	_, err := os.Lstat(s.guest.ImagePath(base.ID, disk))
	return errors.Is(err, fs.ErrNotExist)
}

// store makes a point of what comes.
func (s *receiving) store(ctx context.Context, p *Point) error {
	in, err := s.guest.BeginIncoming(p.Folder, p.Manifest.UUID)
	if err != nil {
		return err
	}
	err = s.fill(ctx, p, in)
	if err == nil {
		err = in.Commit(s.locks[0], p.Manifest, p.Text)
	}
	if err != nil {
		return errors.Join(err, in.Abort())
	}
	in.Close()
	return nil
}

func (s *receiving) fill(ctx context.Context, p *Point, in *repo.Incoming) error {
	sums := map[string]*repo.Sums{}
	for {
		e, err := s.stream.Entry()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch e.Kind {
		case kindSums:
			text, err := io.ReadAll(e.Body)
			if err != nil {
				return err
			}
			if sums[e.Disk.Name], err = in.ReceiveSums(e.Disk, text); err != nil {
				return err
			}
		case kindGuestFile:
			data, err := io.ReadAll(e.Body)
			if err != nil {
				return err
			}
			if err := in.WriteGuestFile(e.Name, data); err != nil {
				return err
			}
		case kindImage:
			err := in.ReceiveImage(ctx, p.Manifest, e.Disk, sums[e.Disk.Name], counting{e.Body, s.report})
			if errors.Is(err, fs.ErrExist) {
				err = fmt.Errorf("%w: it belongs to no point: was a point's folder removed by hand? Should nothing need it, remove it", err)
			}
			if err != nil {
				return err
			}
		}
	}
}

// counting tells how much is read.
type counting struct {
	io.Reader
	report func(bytes int64)
}

func (c counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.report(int64(n))
	return n, err
}
