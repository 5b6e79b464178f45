// Package image gives the disk of one point, or any other disk made of image
// files, as a read-only Image.
//
// The words:
//
//   - layer: one image file, named by its path and format. The caller names all
//     of them, from the base to the top; paths in image headers are not followed
//     and formats are not guessed.
//   - chain: layers on one another. What a layer doesn't hold is read from the one
//     below, as QEMU does with backing files: beyond a layer's own size there are
//     zeroes, and nothing of the layers below it.
//   - extent: a range of the disk that is data or zeroes.
//   - group: a fixed range of the disk (64 MiB), the unit in which the layers are
//     resolved into one map, when it is first read.
//   - Pool: what many images share. Points of one chain share their lower layers,
//     and so the open files, the maps and the decompressed clusters.
//
// A read looks up its group's map (a binary search over extents), and does one
// pread for each piece of file it needs, however many layers there are. Of several
// pieces those that the kernel has in memory come first, while it gets the others from
// the disk all at once. What is compressed is decompressed whole, a cluster or a piece
// of a stream, by several goroutines where it is many, and kept for a while.
package image

import (
	"errors"
	"io"
	"io/fs"
	"iter"
	"os"

	"qmchain/chain/qcow2"
	"qmchain/chain/virtnbd"
)

// Image is a read-only disk image of fixed size. All methods may be called
// concurrently, Close too: it waits for reads in progress, and later calls
// return ErrClosed.
type Image interface {
	// ReadAt reads len(p) bytes; it reads less only at the end of the image (with
	// io.EOF) or on an error. On an error the bytes before n are good.
	io.ReaderAt

	// Size returns the size of the disk in bytes.
	Size() int64

	// Extents returns the extents from off on: in order, without gaps, no two
	// neighbours alike, clipped to [off, off+length) and to the image. A call does
	// a bounded piece of work and may return less than the length asked for, but at
	// least one extent if the range is not empty: go on at the end of the last one,
	// or use Walk. Data extents may hold zeroes; Zero ones hold nothing else.
	Extents(off, length int64) ([]Extent, error)

	Close() error
}

// Filer is an image that may be one raw file, byte for byte.
type Filer interface {
	// File returns that file, for the caller to close, or nil if the image is more or
	// less than one file. Who reads it himself does not learn that it has changed.
	File() (*os.File, error)
}

// Extent is a range of a disk, in bytes.
type Extent struct {
	Off, Len int64
	Zero     bool
}

// End returns the offset behind the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

var (
	// ErrClosed is returned by the methods of a closed image.
	ErrClosed = fs.ErrClosed
	// ErrChanged means that a layer's file is not the one that is expected: it has
	// another size, or it was replaced or written to since it was opened.
	ErrChanged = errors.New("image file has changed")
	// ErrNotRegular means that a layer's path is not a regular file: a symbolic
	// link, a device, a FIFO, a folder.
	ErrNotRegular = errors.New("not a regular file")
)

// Format is the format of a layer's file. It is always named, never probed.
type Format int

const (
	Raw    Format = iota + 1
	Qcow2         // see package qcow2
	Stream        // of virtnbdbackup, see package virtnbd; one that is no increment can only be the base
)

func (f Format) String() string {
	switch f {
	case Raw:
		return "raw"
	case Qcow2:
		return "qcow2"
	case Stream:
		return "virtnbdbackup stream"
	}
	return "unknown format"
}

// Layer names one file of a chain.
type Layer struct {
	Path   string // of a regular file; a symbolic link at its end is refused
	Name   string // how errors call it
	Format Format

	// Check, if set, is the caller's own check of a qcow2 file's header, called
	// whenever an image is opened with this layer. A file that is closed and opened
	// again in between must be the same file, with the same bytes in its header.
	Check func(*qcow2.Header) error

	// CheckStream is the same for a stream and its metadata.
	CheckStream func(*virtnbd.Meta) error

	// Bytes is the size of the file; -1 if it is not known. A file of any other
	// size is refused with ErrChanged: it was cut off, or has grown.
	Bytes int64

	// Changing says that the file is being written to meanwhile, where the layers
	// above hide it. When it is opened again it must still be the same file, but
	// its size, time and header need not be the same.
	Changing bool

	// Snapshot is the id or name of an internal snapshot of a qcow2 file; "" is
	// its active disk.
	Snapshot string
}

// Walk yields the extents of a range of img one after the other, clipped to the
// image. It ends after the first error. Neighbours may be alike.
func Walk(img Image, off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := img.Size()
		if length < end-off {
			end = off + length
		}
		for off < end {
			list, err := img.Extents(off, end-off)
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if len(list) == 0 {
				yield(Extent{}, io.ErrNoProgress)
				return
			}
			for _, e := range list {
				if !yield(e, nil) {
					return
				}
				off = e.End()
			}
		}
	}
}
