package repo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
)

// GuestFilesFolder is the folder in a point with the files that are needed to make the guest again.
const GuestFilesFolder = "guest"

const (
	// incomingMark is in the folder of an unfinished point that no run takes. What a killed run has left explains bitmaps in
	// its guest and is for the next run to remove; what has this mark is not.
	incomingMark = ".incoming"

	// holeSize is the least that is left out of an image's file where it holds zeroes. A merge gives back what guests trim.
	holeSize = 64 << 10
)

// ErrTaken is wrapped where there is something under the id of a point that is to be made.
var ErrTaken = errors.New("something is there under this id")

// ErrOtherGuest is wrapped where points of a guest are to come to those of another one that has the same name.
var ErrOtherGuest = errors.New("another guest has this name")

// CheckGuest makes sure that a point is not of another guest than those that are there, as far as SMBIOS UUIDs tell.
func CheckGuest(there chain.Points, m *chain.Manifest) error {
	other := ""
	for _, p := range there {
		switch p.Guest.UUID {
		case "":
		case m.Guest.UUID:
			return nil
		default:
			other = p.Guest.UUID
		}
	}
	if other == "" || m.Guest.UUID == "" {
		return nil
	}
	return fmt.Errorf("%w: it is of the guest with UUID %s, but those that are there are of %s", ErrOtherGuest, m.Guest.UUID, other)
}

// Incoming is a point, or a base, in the making that no run takes: it comes from another repository, or from another
// program's backups. It has got its id and its uuid there, and can be older than the guest's newest point.
//
// Who makes it holds the guest's lock and its prune lock, so that nobody else brings points or takes them away: a base
// would be gone before the point comes that needs it.
type Incoming struct {
	*Partial
	folder Folder
}

// BeginIncoming makes the folder of an incoming point. What a transfer of the same point that was cut off has left is
// removed first.
func (g *Guest) BeginIncoming(f Folder, uuid string) (*Incoming, error) {
	if err := g.checkFree(f.ID); err != nil {
		return nil, err
	}
	if err := g.RemovePartial(f.ID); err != nil {
		return nil, err
	}
	p, err := g.Begin(f.ID)
	if err == nil {
		err = g.Repo.FS.WriteFile(filepath.Join(p.Dir, incomingMark), nil, fileMode)
	}
	if err != nil {
		return nil, errors.Join(err, g.RemovePartial(f.ID))
	}
	p.UUID = uuid
	return &Incoming{p, f}, nil
}

func (g *Guest) checkFree(id chain.ID) error {
	for _, dir := range []string{g.PointDir(id), g.baseDir(id)} {
		if exists(dir) {
			return fmt.Errorf("%s/%s: %w: %s", g.Name, id, ErrTaken, dir)
		}
	}
	return nil
}

// RemoveIncoming removes incoming points that were cut off. The caller holds the guest's lock.
func (g *Guest) RemoveIncoming() error {
	ids, err := g.Partials()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if exists(filepath.Join(g.partialDir(id), incomingMark)) {
			if err := g.RemovePartial(id); err != nil {
				return err
			}
		}
	}
	return nil
}

// SumsFileSize is the size of the file with the check sums of an image of so many bytes, or less than 0 for more than any
// can have.
func SumsFileSize(bytes int64) int64 {
	return int64(len(fmt.Sprintf(sumsHead, SumsBlock, bytes))) + blocks(bytes)*(2*sha256.Size+1)
}

// ReceiveSums stores the check sums of a disk's image. They must be those that the manifest seals.
func (in *Incoming) ReceiveSums(d *chain.Disk, text []byte) (*Sums, error) {
	if digest(text) != d.Sums.SHA256 {
		return nil, fmt.Errorf("disk %s: %w: its check sums are not those of its manifest", d.Name, chain.ErrDamaged)
	}
	sums, err := parseSums(text)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w: %w", d.Name, chain.ErrDamaged, err)
	}
	if sums.Size != d.Bytes {
		return nil, fmt.Errorf("disk %s: %w: its check sums are of %d bytes, not of %d", d.Name, chain.ErrDamaged, sums.Size, d.Bytes)
	}
	if err := in.guest.Repo.FS.WriteFile(filepath.Join(in.Dir, d.Sums.File), text, fileMode); err != nil {
		return nil, fmt.Errorf("disk %s: %w", d.Name, err)
	}
	return sums, nil
}

// ReceiveImage stores the image of a disk of the point m: what comes from r, each block of which must have its check sum,
// with a header that says that it is this image and names no other file than its parent. It is on disk then.
func (in *Incoming) ReceiveImage(ctx context.Context, m *chain.Manifest, d *chain.Disk, sums *Sums, r io.Reader) error {
	if err := in.receiveImage(ctx, chain.Layer{Point: m, Disk: d}, sums, r); err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	return nil
}

func (in *Incoming) receiveImage(ctx context.Context, l chain.Layer, sums *Sums, r io.Reader) error {
	fsys, path := in.guest.Repo.FS, in.guest.ImagePath(in.ID, l.Disk.Name)
	if err := fsys.Step("create", path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, fileMode)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fsys.Step("write", path); err != nil {
		return err
	}
	if err := writeChecked(ctx, f, sums, r); err != nil {
		return err
	}
	if err := fsys.Step("sync", path); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	h, err := qcow2.ReadHeader(f, sums.Size)
	if err == nil {
		err = h.Supported() // data in a file of the image's choosing, for one
	}
	if err != nil {
		return damage(err)
	}
	return checkHeader(l, h)
}

// writeChecked writes what comes from r, block by block as its check sums are found right.
func writeChecked(ctx context.Context, f *os.File, sums *Sums, r io.Reader) error {
	buf := make([]byte, min(sums.Size, SumsBlock))
	for i, want := range sums.Blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := int64(i) * SumsBlock
		b := buf[:min(sums.Size-off, SumsBlock)]
		if _, err := io.ReadFull(r, b); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if sha256.Sum256(b) != want {
			return fmt.Errorf("%w: bytes %d to %d of its image are not those that its check sums are of", chain.ErrDamaged, off, off+int64(len(b)))
		}
		if err := writeSparse(f, b, off); err != nil {
			return err
		}
	}
	return f.Truncate(sums.Size)
}

// writeSparse writes p at off, but for holes.
func writeSparse(f *os.File, p []byte, off int64) error {
	data := 0 // where what is not yet written begins
	for at := 0; at <= len(p); at += holeSize {
		n := min(holeSize, len(p)-at)
		if n > 0 && !isZero(p[at:at+n]) {
			continue
		}
		if data < at {
			if _, err := f.WriteAt(p[data:at], off+int64(data)); err != nil {
				return err
			}
		}
		data = at + n
	}
	if data < len(p) {
		_, err := f.WriteAt(p[data:], off+int64(data))
		return err
	}
	return nil
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// WriteGuestFile stores a file that is needed to make the guest again.
func (p *Partial) WriteGuestFile(name string, data []byte) error {
	if err := CheckGuestFile(name); err != nil {
		return err
	}
	dir := filepath.Join(p.Dir, GuestFilesFolder)
	if !exists(dir) {
		if err := p.guest.Repo.FS.Mkdir(dir, dirMode); err != nil {
			return err
		}
	}
	return p.guest.Repo.FS.WriteFile(filepath.Join(dir, name), data, fileMode)
}

// CheckGuestFile says what is wrong with the name of a file in GuestFilesFolder.
func CheckGuestFile(name string) error {
	bad := func(r rune) bool { return r == '/' || !unicode.IsPrint(r) }
	if name == "" || len(name) > 200 || name[0] == '.' || !utf8.ValidString(name) || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("%.200q can't be the name of a guest's file", name)
	}
	return nil
}

// GuestFiles lists the files in a point's GuestFilesFolder, sorted.
func (g *Guest) GuestFiles(f Folder) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(g.FolderDir(f), GuestFilesFolder))
	if errors.Is(err, fs.ErrNotExist) && exists(g.FolderDir(f)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", g.Name, f.ID, err)
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// ReadGuestFile reads one of them, of at most limit bytes.
func (g *Guest) ReadGuestFile(f Folder, name string, limit int64) ([]byte, error) {
	data, err := readFile(filepath.Join(g.FolderDir(f), GuestFilesFolder, name), limit)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", g.Name, f.ID, err)
	}
	return data, nil
}

// OpenDisk opens a disk of the point m as it will be read once it is committed; points are those that it is read through.
func (in *Incoming) OpenDisk(pool *image.Pool, points chain.Points, m *chain.Manifest, disk string) (image.Image, error) {
	with := append(chain.Points{m}, points...)
	with.Sort()
	return in.guest.open(pool, with, m, disk)
}

// Commit writes the manifest m, whose text is given, and makes the folder what it is to be. When it fails nothing of the
// point counts, unless the error says otherwise.
func (in *Incoming) Commit(lock *Lock, m *chain.Manifest, text []byte) error {
	if m.ID != in.ID || m.UUID != in.UUID {
		return fmt.Errorf("manifest of %s does not belong to %s", m.ID, in.Dir)
	}
	g, fsys := in.guest, in.guest.Repo.FS
	named := func(err error) error { return fmt.Errorf("%s/%s: commit: %w", g.Name, in.ID, err) }
	if err := fsys.SyncDir(g.ImagesDir()); err != nil {
		return named(err)
	}
	if err := fsys.Remove(filepath.Join(in.Dir, incomingMark)); err != nil {
		return named(err)
	}
	if err := fsys.WriteFile(filepath.Join(in.Dir, chain.ManifestFile), text, fileMode); err != nil {
		return named(err)
	}
	if err := lock.Check(); err != nil {
		return named(err)
	}
	names, err := g.lockNames()
	if err != nil {
		return err
	}
	defer names.Unlock()
	if err := g.checkFree(in.ID); err != nil {
		return err
	}
	for _, d := range m.Disks {
		if d.Parent != nil && !exists(g.PointDir(d.Parent.Point)) && !exists(g.baseDir(d.Parent.Point)) {
			return named(fmt.Errorf("disk %s: its parent, point %s, was removed: %w", d.Name, d.Parent.Point, ErrMoved))
		}
	}
	err = fsys.Rename(in.Dir, g.FolderDir(in.folder))
	if err == nil {
		return nil
	}
	if !exists(g.FolderDir(in.folder)) {
		return named(err)
	}
	// Only the sync after the rename can have failed; without it a power loss could undo it.
	if g.Sync() != nil {
		return named(fmt.Errorf("it is in place, but may be gone after a power loss: %w", err))
	}
	return nil
}

// Abort removes the point, unless it has been committed.
func (in *Incoming) Abort() error {
	in.Close()
	return in.guest.RemovePartial(in.ID)
}
