package backup

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"qmchain/internal/child"
)

// Fleecing says how the guest's writes are kept away from the target.
type Fleecing struct {
	// Off copies directly to the target: its slowness and its failures are then the guest's. Never a default.
	Off bool
	// Dir is the folder for fleece images, which QEMU must be able to open.
	Dir string
	// Limit is the most that one disk's fleece image may hold, in bytes; 0: no limit. When it is reached the backup fails.
	Limit int64
	// Timeout is how long a guest's write may wait until what it overwrites is saved; then the backup fails. Whole seconds;
	// 0: 15 s. Linux guests reset a SCSI disk that has not answered for 30 s.
	Timeout time.Duration
}

const (
	fleeceSuffix = ".fleece"

	defaultCBWTimeout = 15 * time.Second
)

func (f Fleecing) timeout() time.Duration {
	if f.Timeout == 0 {
		return defaultCBWTimeout
	}
	return f.Timeout
}

// path names a fleece image after the run that it belongs to.
func (f Fleecing) path(lock string, i int) string {
	return filepath.Join(f.Dir, fmt.Sprintf("%s.%d%s", lock, i, fleeceSuffix))
}

// sweep removes the fleece images of dead runs. A run leaves one only when it is killed between making it and QEMU's opening
// it.
func (f Fleecing) sweep() error {
	if f.Off || f.Dir == "" {
		return nil
	}
	stale, err := f.stale()
	if err != nil {
		return err
	}
	for _, path := range stale {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("fleece image of a run that did not end: %w", err)
		}
	}
	return nil
}

// stale returns the fleece images of dead runs.
func (f Fleecing) stale() (paths []string, err error) {
	entries, err := os.ReadDir(f.Dir)
	if err != nil {
		return nil, fmt.Errorf("folder for fleece images: %w", err)
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), fleeceSuffix)
		if !ok {
			continue
		}
		lock, _, _ := strings.Cut(name, ".")
		if o, ok := lockOwner(lock); ok && o.dead() {
			paths = append(paths, filepath.Join(f.Dir, e.Name()))
		}
	}
	return paths, nil
}

// addFleece makes the image that saves what the guest overwrites. Its name goes as soon as QEMU has opened it, so that no
// crash leaves it behind.
func (s *session) addFleece(ctx context.Context, i int, d PlannedDisk) error {
	path, err := filepath.Abs(s.cfg.Fleecing.path(s.mutex.id, i))
	if err != nil {
		return err
	}
	if err := s.repo.FS.Step("create", path); err != nil {
		return err
	}
	// It must not exist, and nobody else may ever read what the guest had there: qemu-img's own file mode is too open.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("disk %s: make its fleece image: %w", d.Name, err)
	}
	_ = f.Close()
	defer os.Remove(path)
	if _, err := child.Run(ctx, time.Minute, s.repo.QemuImg, "create", "-q", "-f", "qcow2", path, fmt.Sprint(d.Size)); err != nil {
		return fmt.Errorf("disk %s: make its fleece image: %w", d.Name, err)
	}
	file := map[string]any{"driver": "file", "filename": path, "discard": "unmap", "cache": map[string]any{"no-flush": true}}
	if limit := s.cfg.Fleecing.Limit; limit > 0 {
		// A window on a file of that size, as if it were a block device: what does not fit fails.
		if err := os.Truncate(path, limit); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		file = map[string]any{"driver": "raw", "size": limit, "discard": "unmap", "file": file}
	}
	if err := s.addImage(ctx, nodeName(fleecePrefix, i), file, d.Name); err != nil {
		return fmt.Errorf("%w: can QEMU's user open files in %s?", err, s.cfg.Fleecing.Dir)
	}
	return s.repo.FS.Step("remove", path)
}
