package stream

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"qmchain/chain"
	"qmchain/chain/repo"
)

// Reader takes a stream apart. It makes sure that the files are those of the format, in its order, and that a manifest is
// sound in itself and that of its folder; what is in the other files is for who reads them.
type Reader struct {
	in   io.Reader
	tar  *tar.Reader
	head head
	left int // points
	end  bool

	point *Point
	stage kind
	index int    // of the next disk
	file  string // the last of the guest's files
	files int
}

// Point is one point of a stream, or a base.
type Point struct {
	Guest    string
	Folder   repo.Folder
	Manifest *chain.Manifest
	Text     []byte // the manifest's
}

// kind is what a file is.
type kind int

const (
	kindSums kind = iota
	kindGuestFile
	kindImage
)

// Entry is one file of a point. What is not read of Body is passed over by the next call.
type Entry struct {
	Kind kind
	Disk *chain.Disk // of sums and images
	Name string      // of a guest's file
	Size int64       // bytes
	Body io.Reader
}

// NewReader reads the head of a stream. All errors of reading wrap ErrStream, but for those of in itself.
func NewReader(in io.Reader) (*Reader, error) {
	r := &Reader{in: in, tar: tar.NewReader(in)}
	h, err := r.next()
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: there is nothing in it; the sender says why", ErrStream)
	}
	if err != nil {
		return nil, err
	}
	if h.Name != headFile {
		return nil, fmt.Errorf("%w: it begins with %.200q, not with %s", ErrStream, h.Name, headFile)
	}
	text, err := r.text(h, maxHead)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &r.head); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrStream, headFile, err)
	}
	if r.head.Format != formatVersion {
		return nil, fmt.Errorf("%w of format %d: it has format %d", ErrStream, formatVersion, r.head.Format)
	}
	if r.head.Points < 0 || r.head.Bytes < 0 {
		return nil, fmt.Errorf("%w: %d points of %d bytes", ErrStream, r.head.Points, r.head.Bytes)
	}
	r.left = r.head.Points
	return r, nil
}

// Bytes is how large all images are together, as the sender says.
func (r *Reader) Bytes() int64 { return r.head.Bytes }

// Next returns the next point, passing over what was not read of the one before; io.EOF after the last one.
func (r *Reader) Next() (*Point, error) {
	for r.point != nil {
		if _, err := r.Entry(); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
	}
	if r.left == 0 {
		return nil, r.finish()
	}
	h, err := r.next()
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: %d of its %d points are missing", ErrStream, r.left, r.head.Points)
	}
	if err != nil {
		return nil, err
	}
	guest, folder, err := parseManifestPath(h.Name)
	if err != nil {
		return nil, err
	}
	text, err := r.text(h, chain.MaxManifest)
	if err != nil {
		return nil, err
	}
	m, err := chain.DecodeManifest(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", h.Name, ErrStream, err)
	}
	if m.ID != folder.ID || m.Guest.Name != guest {
		return nil, fmt.Errorf("%s: %w: %w: it is that of %s/%s", h.Name, ErrStream, chain.ErrDamaged, m.Guest.Name, m.ID)
	}
	if disk := unsettled(m); disk != "" {
		return nil, fmt.Errorf("%s: %w: disk %s is in the middle of a merge", h.Name, ErrStream, disk)
	}
	m.Base = folder.Base
	r.left--
	r.point = &Point{Guest: guest, Folder: folder, Manifest: m, Text: text}
	r.stage, r.index, r.file, r.files = kindSums, 0, "", 0
	return r.point, nil
}

// Entry returns the next file of the point that Next has returned; io.EOF after the last one.
func (r *Reader) Entry() (*Entry, error) {
	p := r.point
	if p == nil {
		return nil, io.EOF
	}
	if r.stage == kindImage && r.index == len(p.Manifest.Disks) {
		r.point = nil
		return nil, io.EOF
	}
	h, err := r.next()
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: it ends in the middle of %s", ErrStream, folderPath(p.Guest, p.Folder))
	}
	if err != nil {
		return nil, err
	}
	if r.stage == kindGuestFile {
		if name, ok := strings.CutPrefix(h.Name, guestFilesPath(p.Guest, p.Folder)); ok {
			return r.guestFile(h, name)
		}
		r.stage, r.index = kindImage, 0
	}
	d := &p.Manifest.Disks[r.index]
	e := &Entry{Kind: r.stage, Disk: d, Size: repo.SumsFileSize(d.Bytes), Body: body{r}}
	name := sumsPath(p.Guest, p.Folder, d)
	if r.stage == kindImage {
		e.Size, name = d.Bytes, imagePath(p.Guest, d)
	}
	if h.Name != name || h.Size != e.Size || r.stage == kindSums && e.Size > maxSums {
		return nil, fmt.Errorf("%w: %.200q of %d bytes instead of %s of %d", ErrStream, h.Name, h.Size, name, e.Size)
	}
	r.index++
	if r.stage == kindSums && r.index == len(p.Manifest.Disks) {
		r.stage = kindGuestFile
	}
	return e, nil
}

func (r *Reader) guestFile(h *tar.Header, name string) (*Entry, error) {
	if err := repo.CheckGuestFile(name); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStream, err)
	}
	if r.files++; name <= r.file || r.files > maxGuestFiles || h.Size > maxGuestFile {
		return nil, fmt.Errorf("%w: %s of %d bytes is out of order, too large, or one too many", ErrStream, h.Name, h.Size)
	}
	r.file = name
	return &Entry{Kind: kindGuestFile, Name: name, Size: h.Size, Body: body{r}}, nil
}

// next returns the header of the next file; io.EOF where the archive ends.
func (r *Reader) next() (*tar.Header, error) {
	h, err := r.tar.Next()
	if err != nil {
		return nil, cut(err)
	}
	if h.Typeflag != tar.TypeReg || h.Linkname != "" || h.Format&(tar.FormatUSTAR|tar.FormatPAX) == 0 {
		return nil, fmt.Errorf("%w: %.200q is no plain file (type %q)", ErrStream, h.Name, h.Typeflag)
	}
	for key := range h.PAXRecords {
		if key != "path" && key != "size" && key != "mtime" {
			return nil, fmt.Errorf("%w: %.200q has %.50q", ErrStream, h.Name, key)
		}
	}
	return h, nil
}

// text reads a file of at most limit bytes.
func (r *Reader) text(h *tar.Header, limit int64) ([]byte, error) {
	if h.Size > limit {
		return nil, fmt.Errorf("%w: %s has %d bytes, more than the %d that it can have", ErrStream, h.Name, h.Size, limit)
	}
	return io.ReadAll(body{r})
}

// finish makes sure that there is nothing behind the last point but what fills the last block of an archive.
func (r *Reader) finish() error {
	if r.end {
		return io.EOF
	}
	h, err := r.tar.Next()
	if err == nil {
		return fmt.Errorf("%w: %.200q behind its %d points", ErrStream, h.Name, r.head.Points)
	}
	if !errors.Is(err, io.EOF) {
		return cut(err)
	}
	// Programs that write archives fill them up to what a tape wants, 10 KiB for most.
	rest, err := io.ReadAll(io.LimitReader(r.in, 1<<20))
	if err != nil {
		return err
	}
	if len(rest) == 1<<20 || strings.Trim(string(rest), "\x00") != "" {
		return fmt.Errorf("%w: there is more behind its end", ErrStream)
	}
	r.end = true
	return io.EOF
}

// body reads the file that the tar reader is at.
type body struct{ r *Reader }

func (b body) Read(p []byte) (int, error) {
	n, err := b.r.tar.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = cut(err)
	}
	return n, err
}

// cut says of the errors of the tar reader what they mean here. Others are those of what it reads from.
func cut(err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: it was cut off", ErrStream)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong), errors.Is(err, tar.ErrInsecurePath):
		return fmt.Errorf("%w: %w", ErrStream, err)
	}
	return err
}
