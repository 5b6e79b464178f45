package proxmox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// ErrHung tells that the cluster's file system does not answer. The daemon that serves it (pve-cluster.service) hangs, or waits for others.
var ErrHung = errors.New("the cluster's file system does not answer")

const (
	// patience is how long a read may take. Usually the daemon has the answer in its memory.
	patience = 10 * time.Second
	// maxReads bounds how many reads are under way at a time: one that hangs holds a thread until it ends.
	maxReads = 64
)

// etcReads is what all copies of a Host have in common.
type etcReads struct {
	patience time.Duration
	slots    chan struct{}
}

func newEtcReads(patience time.Duration) *etcReads {
	return &etcReads{patience, make(chan struct{}, maxReads)}
}

// within calls f, which reads path on the cluster's file system, and waits no longer than it should for that: nothing can interrupt
// it. What f returns then is nobody's.
func within[T any](h Host, path string, f func(path string) (T, error)) (result T, err error) {
	reads := h.reads
	if reads == nil {
		reads = newEtcReads(patience)
	}
	limit := time.NewTimer(reads.patience)
	defer limit.Stop()
	hung := fmt.Errorf("%s: %w", path, ErrHung)
	select {
	case reads.slots <- struct{}{}:
	case <-limit.C:
		return result, hung
	}
	type answer struct {
		result T
		err    error
	}
	answers := make(chan answer, 1)
	go func() {
		defer func() { <-reads.slots }()
		result, err := f(path)
		answers <- answer{result, err}
	}()
	select {
	case a := <-answers:
		return a.result, a.err
	case <-limit.C:
		return result, hung
	}
}

func (h Host) readFile(path string) ([]byte, error)       { return within(h, path, os.ReadFile) }
func (h Host) readDir(path string) ([]fs.DirEntry, error) { return within(h, path, os.ReadDir) }
func (h Host) readlink(path string) (string, error)       { return within(h, path, os.Readlink) }
func (h Host) stat(path string) (fs.FileInfo, error)      { return within(h, path, os.Stat) }

// glob finds files; that its pattern is right is the caller's word.
func (h Host) glob(elem ...string) ([]string, error) {
	return within(h, filepath.Join(append([]string{h.Etc}, elem...)...), filepath.Glob)
}
