// Package foreigntest has sets that qmpbackup and virtnbdbackup have written, for tests,
// and what is known of them.
//
// They were made of guests without an operating system: every write came from the test
// that made the set, so every byte is known. Versions: qmpbackup 0.67 on QEMU 7.2 and
// 10.0; virtnbdbackup 1.9.15 (its cases are v1-...), 2.28 (v2-...) and 2.53 (v3-...). But
// for the programs' logs, which nothing reads, the sets are complete.
package foreigntest

import (
	"archive/tar"
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

var (
	//go:embed testdata/qmpbackup.tar.zst
	qmpbackup []byte
	//go:embed testdata/virtnbdbackup.tar.zst
	virtnbdbackup []byte
	//go:embed testdata/truth.json
	truth []byte
)

// Case is a set.
type Case struct {
	Tool   string  `json:"tool"`
	Name   string  `json:"case"`
	Points []Point `json:"points"`
}

// Path is the case's folder in the archive.
func (c Case) Path() string { return c.Tool + "/" + c.Name }

// Point is one disk of one run, as it must be read.
type Point struct {
	Run   int      `json:"run"`
	Level string   `json:"level"`
	Disk  string   `json:"disk"`
	File  string   `json:"file"`  // relative to the set
	Files []string `json:"files"` // all that it is made of, the base first
	Size  int64    `json:"size"`  // bytes

	SHA256       string `json:"sha256"`         // of the disk, as it can be read from the files
	Stale        bool   `json:"stale"`          // it is not what the guest had: the program lost it
	Warn         bool   `json:"warn"`           // it must be warned of
	Refuse       bool   `json:"refuse"`         // it must be refused
	RefuseOrWarn bool   `json:"refuse_or_warn"` // one of the two
}

// Cases returns all sets, those of one program after those of the other.
func Cases(t testing.TB) []Case {
	t.Helper()
	var cases []Case
	if err := json.Unmarshal(truth, &cases); err != nil {
		t.Fatal(err)
	}
	return cases
}

// Unpack unpacks the sets whose paths begin with prefix, which begins with that of a tool,
// into folders of that path in a temporary folder, which it returns. Links are there as they
// were, and dangle; files have the time stamps that the program left them with, and holes.
func Unpack(t testing.TB, prefix string) string {
	t.Helper()
	dir := t.TempDir()
	archive := qmpbackup
	if strings.HasPrefix(prefix, "virtnbdbackup") {
		archive = virtnbdbackup
	}
	if err := unpack(archive, dir, prefix); err != nil {
		t.Fatal(err)
	}
	return dir
}

func unpack(archive []byte, dir, prefix string) error {
	z, err := zstd.NewReader(bytes.NewReader(archive), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return err
	}
	defer z.Close()
	type stamped struct {
		path string
		head *tar.Header
	}
	var found []stamped
	for in := tar.NewReader(z); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if !strings.HasPrefix(h.Name, prefix) {
			continue
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o700)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, path)
		case tar.TypeReg:
			found = append(found, stamped{path, h})
			err = writeSparse(path, in, h.Size)
		default:
			err = fmt.Errorf("%s: type %q", h.Name, h.Typeflag)
		}
		if err != nil {
			return err
		}
	}
	if len(found) == 0 {
		return fmt.Errorf("no set %q", prefix)
	}
	for _, s := range found {
		if err := os.Chtimes(s.path, s.head.ModTime, s.head.ModTime); err != nil {
			return err
		}
	}
	return nil
}

// writeSparse writes a file, without the blocks that are zeroes.
func writeSparse(path string, in io.Reader, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	block, zeroes := make([]byte, 4096), make([]byte, 4096)
	for off := int64(0); off < size; off += int64(len(block)) {
		b := block[:min(size-off, int64(len(block)))]
		if _, err := io.ReadFull(in, b); err != nil {
			return err
		}
		if bytes.Equal(b, zeroes[:len(b)]) {
			continue
		}
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
	}
	return f.Truncate(size)
}
