package stream

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/repo"
)

// Want says what is to be sent of one guest.
type Want struct {
	Guest  string
	Points []string // as chain.Points.Resolve takes them
	All    bool     // all points that are not removed
}

// Sending is what is to be sent, and is held. Close must be called in the end.
type Sending struct {
	repo    *repo.Repo
	guests  []sending
	release []func()
	// Problems are points that can't be read where all were wanted: they are left out.
	Problems []repo.Problem
}

// sending is what is to be sent of one guest, parents before their children.
type sending struct {
	guest  *repo.Guest
	points []*chain.Manifest
}

// maxTries bounds how often points are chosen anew because some have come or gone meanwhile.
const maxTries = 5

// Prepare chooses the points to send and holds them. What a have has is left out; nil has nothing. It waits for at most
// wait for somebody who merges what is needed just now, and wraps repo.ErrLocked then.
func Prepare(ctx context.Context, r *repo.Repo, wants []Want, have *Have, wait time.Duration) (*Sending, error) {
	s := &Sending{repo: r}
	for _, w := range wants {
		g, err := r.Guest(w.Guest)
		if err == nil {
			err = s.prepare(ctx, g, w, have, wait)
		}
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("guest %s: %w", w.Guest, err)
		}
	}
	return s, nil
}

func (s *Sending) prepare(ctx context.Context, g *repo.Guest, w Want, have *Have, wait time.Duration) error {
	var found *choice
	for range maxTries {
		points, problems, err := g.Points()
		if err != nil {
			return err
		}
		c, err := choose(points, problems, w, have)
		if err != nil {
			return err
		}
		if found != nil && reflect.DeepEqual(c.send, found.send) {
			return s.add(g, c, problems, w)
		}
		// Not held yet, or something has changed before it was: look again once all is held.
		if found, err = c, s.hold(ctx, g, c.hold, wait); err != nil && !errors.Is(err, chain.ErrNoPoint) {
			return err
		} else if err != nil {
			found = nil
		}
	}
	return fmt.Errorf("its points change again and again: %w", repo.ErrLocked)
}

func (s *Sending) add(g *repo.Guest, c *choice, problems []repo.Problem, w Want) error {
	for _, m := range c.send {
		if err := trim(g, m, c.needed); err != nil {
			return err
		}
	}
	if w.All {
		s.Problems = append(s.Problems, problems...)
	}
	s.guests = append(s.guests, sending{g, c.send})
	return nil
}

// trim takes those disks from a base whose images are gone: nobody needs them any more, or they are merged. The one that is
// in the middle of a merge goes too, if it is not needed.
func trim(g *repo.Guest, m *chain.Manifest, needed map[chain.ImageRef]bool) error {
	if !m.Base {
		return nil
	}
	var disks []chain.Disk
	for _, d := range m.Disks {
		_, err := os.Lstat(g.ImagePath(m.ID, d.Name))
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err
		case err == nil && d.Merging == nil:
			disks = append(disks, d)
		case !needed[m.Ref(d.Name)]:
		case d.Merging != nil:
			return fmt.Errorf("disk %s of removed point %s is needed: %w", d.Name, m.ID, ErrUnsettled)
		default:
			return fmt.Errorf("disk %s of removed point %s is needed: %w", d.Name, m.ID, damage(err))
		}
	}
	m.Disks = disks
	return nil
}

func (s *Sending) hold(ctx context.Context, g *repo.Guest, folders []repo.Folder, wait time.Duration) error {
	for _, f := range folders {
		release, err := g.Hold(ctx, f, wait)
		if err != nil {
			return err
		}
		s.release = append(s.release, release)
	}
	return nil
}

// choice is what is to be sent, and what is to be held meanwhile: also parents that the receiver has, as a merge of them
// would change the images of their children.
type choice struct {
	send   []*chain.Manifest
	needed map[chain.ImageRef]bool // images that others are read through
	hold   []repo.Folder
}

func choose(points chain.Points, problems []repo.Problem, w Want, have *Have) (*choice, error) {
	asked, err := ask(points, problems, w)
	if err != nil {
		return nil, err
	}
	c := &choice{needed: map[chain.ImageRef]bool{}}
	seen, held := map[chain.ID]bool{}, map[chain.ID]bool{}
	hold := func(m *chain.Manifest) {
		if !held[m.ID] {
			held[m.ID] = true
			c.hold = append(c.hold, repo.FolderOf(m))
		}
	}
	for len(asked) > 0 {
		m := asked[0]
		asked = asked[1:]
		if seen[m.ID] {
			continue
		}
		seen[m.ID] = true
		switch have.uuid(w.Guest, m.ID) {
		case m.UUID:
			continue
		case "":
		default:
			return nil, fmt.Errorf("point %s: %w in the receiver's repository", m.ID, ErrOtherPoint)
		}
		c.send = append(c.send, m)
		hold(m)
		for _, d := range m.Disks {
			if d.Parent == nil {
				continue
			}
			if p := points.Find(d.Parent.Point); p != nil && p.UUID == d.Parent.UUID {
				hold(p)
				c.needed[*d.Parent] = true
				asked = append(asked, p)
			} else if have.uuid(w.Guest, d.Parent.Point) != d.Parent.UUID {
				return nil, missing(points, problems, m, d)
			}
		}
	}
	slices.SortFunc(c.send, func(a, b *chain.Manifest) int { return cmp.Compare(a.ID, b.ID) })
	return c, nil
}

// missing says why the parent of a disk is not there.
func missing(points chain.Points, problems []repo.Problem, m *chain.Manifest, d chain.Disk) error {
	_, err := points.Layers(m, d.Name)
	for _, p := range problems {
		if strings.Contains(p.Point, string(d.Parent.Point)) {
			return fmt.Errorf("%w: %w", err, p.Err)
		}
	}
	return err
}

// ask finds the points that are wanted.
func ask(points chain.Points, problems []repo.Problem, w Want) (asked []*chain.Manifest, err error) {
	if w.All {
		if asked = points.Kept(); len(asked)+len(problems) == 0 {
			return nil, fmt.Errorf("it has no point: %w", chain.ErrNoPoint)
		}
		return slices.Clone(asked), nil
	}
	for _, name := range w.Points {
		m, err := points.Resolve(name)
		for _, p := range problems {
			// Silently taking the one before for the latest would send old data.
			if name == "latest" && (m == nil || p.Point > string(m.ID)) || strings.HasPrefix(p.Point, name) {
				return nil, fmt.Errorf("%s: that is a point that can't be read: %w", name, p.Err)
			}
		}
		if err != nil {
			return nil, err
		}
		asked = append(asked, m)
	}
	return asked, nil
}

// Points returns how many points are sent, bases among them.
func (s *Sending) Points() (n int) {
	for _, g := range s.guests {
		n += len(g.points)
	}
	return n
}

// Bytes returns the size of all their images.
func (s *Sending) Bytes() (n int64) {
	for _, g := range s.guests {
		for _, m := range g.points {
			n += size(m)
		}
	}
	return n
}

// Close gives up what is held.
func (s *Sending) Close() {
	for _, release := range s.release {
		release()
	}
	s.release = nil
}

// Send writes the stream. progress, if not nil, is told how many bytes of images are done. What differs from its check sums
// is not sent, and wraps chain.ErrDamaged.
func (s *Sending) Send(ctx context.Context, w io.Writer, progress func(done int64)) error {
	out, finish := pumpOut(ctx, w)
	err := s.send(ctx, &writer{tar: tar.NewWriter(out), progress: progress})
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return finish(err)
}

func (s *Sending) send(ctx context.Context, w *writer) error {
	text, err := json.Marshal(head{Format: formatVersion, Repository: s.repo.ID, Points: s.Points(), Bytes: s.Bytes()})
	if err != nil {
		return err
	}
	if err := w.file(headFile, time.Time{}, append(text, '\n')); err != nil {
		return err
	}
	for _, g := range s.guests {
		for _, m := range g.points {
			if err := w.point(ctx, g.guest, m); err != nil {
				return err
			}
		}
	}
	return w.tar.Close()
}

// writer writes the files of a stream.
type writer struct {
	tar      *tar.Writer
	progress func(done int64)
	done     int64
	buf      []byte
}

func (w *writer) header(name string, at time.Time, size int64) error {
	// What is outside of the years that every tar knows is no use either.
	if at.Unix() < 0 || at.Unix() >= 1<<33 {
		at = time.Time{}
	}
	return w.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: at})
}

func (w *writer) file(name string, at time.Time, data []byte) error {
	if err := w.header(name, at, int64(len(data))); err != nil {
		return err
	}
	_, err := w.tar.Write(data)
	return err
}

func (w *writer) point(ctx context.Context, g *repo.Guest, m *chain.Manifest) error {
	text, err := m.Encode()
	if err != nil {
		return fmt.Errorf("%s/%s: %w", g.Name, m.ID, err)
	}
	folder := repo.FolderOf(m)
	if err := w.file(manifestPath(g.Name, folder), m.Time, text); err != nil {
		return err
	}
	sums := make([]*repo.Sums, len(m.Disks))
	for i := range m.Disks {
		d := &m.Disks[i]
		err := inFolder(g, m, func(f repo.Folder) (err error) {
			sums[i], err = g.ReadSums(ctx, f, d)
			return err
		})
		if err != nil {
			return err
		}
		if err := w.file(sumsPath(g.Name, folder, d), m.Time, sums[i].Text()); err != nil {
			return err
		}
	}
	if err := w.guestFiles(g, m); err != nil {
		return err
	}
	for i := range m.Disks {
		if err := w.image(ctx, g, m, &m.Disks[i], sums[i]); err != nil {
			return fmt.Errorf("%s/%s: disk %s: %w", g.Name, m.ID, m.Disks[i].Name, err)
		}
	}
	return nil
}

// inFolder calls f with a point's folder, and again if the point was removed meanwhile: as it is held, it is a base then.
func inFolder(g *repo.Guest, m *chain.Manifest, f func(repo.Folder) error) error {
	folder := repo.FolderOf(m)
	err := f(folder)
	if errors.Is(err, fs.ErrNotExist) && !folder.Base {
		if _, statErr := os.Lstat(g.FolderDir(folder)); errors.Is(statErr, fs.ErrNotExist) {
			return f(repo.FolderOf(&chain.Manifest{ID: m.ID, Base: true}))
		}
	}
	return err
}

func (w *writer) guestFiles(g *repo.Guest, m *chain.Manifest) error {
	var names []string
	err := inFolder(g, m, func(f repo.Folder) (err error) {
		names, err = g.GuestFiles(f)
		return err
	})
	if err != nil {
		return err
	}
	if len(names) > maxGuestFiles {
		return fmt.Errorf("%s/%s: %d files of the guest, more than %d", g.Name, m.ID, len(names), maxGuestFiles)
	}
	for _, name := range names {
		if err := repo.CheckGuestFile(name); err != nil {
			return fmt.Errorf("%s/%s: %w", g.Name, m.ID, err)
		}
		var data []byte
		err := inFolder(g, m, func(f repo.Folder) (err error) {
			data, err = g.ReadGuestFile(f, name, maxGuestFile)
			return err
		})
		if err != nil {
			return err
		}
		if err := w.file(guestFilesPath(g.Name, repo.FolderOf(m))+name, m.Time, data); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) image(ctx context.Context, g *repo.Guest, m *chain.Manifest, d *chain.Disk, sums *repo.Sums) error {
	f, err := os.OpenFile(g.ImagePath(m.ID, d.Name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return damage(err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%w: %s is not a regular file", chain.ErrDamaged, f.Name())
	case info.Size() != d.Bytes || sums.Size != d.Bytes:
		return fmt.Errorf("%w: %s has %d bytes, not %d", chain.ErrDamaged, f.Name(), info.Size(), d.Bytes)
	}
	if err := w.header(imagePath(g.Name, d), m.Time, d.Bytes); err != nil {
		return err
	}
	if w.buf == nil {
		w.buf = make([]byte, repo.SumsBlock)
	}
	for i, want := range sums.Blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := int64(i) * repo.SumsBlock
		b := w.buf[:min(d.Bytes-off, repo.SumsBlock)]
		if _, err := io.ReadFull(f, b); err != nil {
			return fmt.Errorf("%s at %d: %w", f.Name(), off, err)
		}
		if sha256.Sum256(b) != want {
			return fmt.Errorf("%w: %s: bytes %d to %d were changed", chain.ErrDamaged, f.Name(), off, off+int64(len(b)))
		}
		if _, err := w.tar.Write(b); err != nil {
			return err
		}
		w.done += int64(len(b))
		if w.progress != nil {
			w.progress(w.done)
		}
	}
	return nil
}

// damage wraps chain.ErrDamaged around the errors of opening an image that say that it is not what it was.
func damage(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%w: %w", chain.ErrDamaged, err)
	}
	return err
}
