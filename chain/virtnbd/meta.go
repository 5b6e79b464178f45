// Package virtnbd reads one stream file of virtnbdbackup (vda.full.data,
// vda.inc.virtnbdbackup.1.data, ...): what it says of itself, and where in the
// file each byte of its virtual disk is.
//
// The words:
//
//   - frame: a header of 40 bytes and what belongs to it. The first one is the
//     metadata, a JSON object; then come data and zero frames, in the order of
//     the disk, and a stop frame.
//   - pack: the bytes of a data frame in a compressed stream are one LZ4 frame,
//     or several in a row if the frame is larger than what one NBD request
//     reads. Each of them is called a pack here, to tell it from frames.
//   - trailer: the list of the packs' sizes behind the stop frame of a
//     compressed stream, by which its frames are found without decompressing.
//   - piece: a stretch of a pack's decompressed bytes, the unit in which it is
//     read. LZ4's blocks need the 64 KiB before them, so that a piece is made
//     from the one before it.
//
// The format is that of streamVersion 2, which virtnbdbackup 1.9 and 2.x write.
//
// Like package qcow2, this one neither opens files nor caches what it read, and
// trusts nothing: every size is bounded before memory is taken for it, every
// offset is checked against the file. A stream's index takes a few bytes for
// each 64 MiB of the disk, however many frames there are.
package virtnbd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

var (
	// ErrNotStream means that the file doesn't begin with a stream's metadata.
	ErrNotStream = errors.New("not a virtnbdbackup stream")
	// ErrCorrupt means that the file contradicts the format, or ends too early.
	ErrCorrupt = errors.New("corrupt virtnbdbackup stream")
	// ErrUnsupported means a version or a compression that is not known here.
	ErrUnsupported = errors.New("unsupported virtnbdbackup stream")
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrCorrupt}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrUnsupported}, args...)...)
}

// Meta is what a stream says of itself.
type Meta struct {
	VirtualSize int64 // bytes
	DataSize    int64 // bytes in data frames, before compression

	Disk       string // libvirt's name of it, as "vda"
	DiskFormat string // of the guest's image

	// Checkpoint is the name of the libvirt checkpoint that the run made, Parent
	// the one that it was made against. A diff names a checkpoint that it did not
	// make, and a copy that of a full: which of them a stream is, only the name of
	// its file tells.
	Checkpoint, Parent string
	// Incremental is true of an increment or a diff: what is in no frame is as in
	// the parent. Otherwise the frames cover all of the disk.
	Incremental bool

	Compressed bool

	// Date is when the stream was begun, by the clock of the host that wrote it.
	// Zoned tells whether the zone is known; if not, Date has UTC for it.
	Date  time.Time
	Zoned bool
}

const (
	streamVersion = 2

	maxMeta = 1 << 20
	// maxSize bounds the disk: its index takes 1 bit for each 64 MiB.
	maxSize = 1 << 50
)

// ReadMeta reads the metadata of the stream file r, which is fileSize bytes long.
// Errors: ErrNotStream, ErrCorrupt, ErrUnsupported, or r's.
func ReadMeta(r io.ReaderAt, fileSize int64) (*Meta, error) {
	_, text, err := readMeta(r, fileSize)
	if err != nil {
		return nil, err
	}
	return parseMeta(text)
}

// readMeta returns the first frame, whole, and the JSON in it.
func readMeta(r io.ReaderAt, fileSize int64) (whole, text []byte, err error) {
	head := make([]byte, min(fileSize, headerLen))
	if err := readFull(r, head, 0); err != nil {
		return nil, nil, fmt.Errorf("metadata: %w", err)
	}
	h, err := parseHeader(head)
	if err != nil || h.kind != kindMeta {
		return nil, nil, ErrNotStream
	}
	if h.off != 0 || h.len > maxMeta || h.len > fileSize-headerLen-2 {
		return nil, nil, corrupt("metadata of %d bytes", h.len)
	}
	whole = make([]byte, headerLen+h.len+2)
	if err := readFull(r, whole, 0); err != nil {
		return nil, nil, fmt.Errorf("metadata: %w", err)
	}
	text, ok := bytes.CutSuffix(whole[headerLen:], crlf)
	if !ok {
		return nil, nil, corrupt("metadata does not end where it should")
	}
	return whole, text, nil
}

func parseMeta(text []byte) (*Meta, error) {
	var j struct {
		VirtualSize       int64  `json:"virtualSize"`
		DataSize          int64  `json:"dataSize"`
		Date              string `json:"date"`
		DiskName          string `json:"diskName"`
		DiskFormat        string `json:"diskFormat"`
		CheckpointName    string `json:"checkpointName"`
		ParentCheckpoint  string `json:"parentCheckpoint"`
		Incremental       bool   `json:"incremental"`
		Compressed        any    `json:"compressed"` // false, or the level of LZ4
		CompressionMethod string `json:"compressionMethod"`
		StreamVersion     *int   `json:"streamVersion"`
		OldVersion        *int   `json:"stream-version"`
	}
	if err := json.Unmarshal(text, &j); err != nil {
		return nil, corrupt("metadata: %v", err)
	}
	version := j.StreamVersion
	if version == nil {
		version = j.OldVersion
	}
	switch {
	case version == nil:
		return nil, unsupported("it does not say its version")
	case *version != streamVersion:
		return nil, unsupported("version %d", *version)
	case j.VirtualSize <= 0 || j.VirtualSize > maxSize:
		return nil, corrupt("virtual size %d", j.VirtualSize)
	case j.DataSize < 0 || j.DataSize > j.VirtualSize:
		return nil, corrupt("%d bytes of data for a disk of %d", j.DataSize, j.VirtualSize)
	}
	m := &Meta{
		VirtualSize: j.VirtualSize, DataSize: j.DataSize,
		Disk: j.DiskName, DiskFormat: j.DiskFormat,
		Checkpoint: j.CheckpointName, Parent: j.ParentCheckpoint, Incremental: j.Incremental,
	}
	switch c := j.Compressed.(type) {
	case nil:
	case bool:
		m.Compressed = c
	case float64:
		m.Compressed = true
	default:
		return nil, corrupt("metadata: compressed is %v", c)
	}
	if m.Compressed && j.CompressionMethod != "lz4" {
		return nil, unsupported("compression method %q", j.CompressionMethod)
	}
	var err error
	// Python's isoformat: without a fraction where that is 0.
	if m.Date, err = time.Parse("2006-01-02T15:04:05", j.Date); err != nil {
		if m.Date, err = time.Parse(time.RFC3339, j.Date); err != nil {
			return nil, corrupt("metadata: date is %q", j.Date)
		}
		m.Zoned = true
	}
	m.Date = m.Date.UTC()
	if y := m.Date.Year(); y < 1970 || y > 9999 {
		return nil, corrupt("metadata: date is %q", j.Date)
	}
	return m, nil
}

// readFull fills p from offset off of r; the end of the file in between is
// ErrCorrupt.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return corrupt("the file ends at %d", off+int64(n))
	}
	return err
}
