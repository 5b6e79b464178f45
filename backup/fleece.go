package backup

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/sirupsen/logrus"

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

// slowFileSystems are the magic numbers (statfs(2)) of file systems that fleece images should not be on: the network's, and
// those in memory.
var slowFileSystems = map[int64]string{
	0x6969: "NFS", 0xff534d42: "CIFS", 0xfe534d42: "SMB", 0x00c36400: "CephFS", 0x65735546: "FUSE", 0x01021994: "tmpfs", 0x858458f6: "ramfs",
}

// describe logs where fleece images go, and what may be wrong with that. Most guests overwrite little of their disks during a
// run; a tenth is taken for the most that is to be expected.
func (f Fleecing) describe(log logrus.FieldLogger, disks []PlannedDisk) {
	if f.Off {
		log.Warn("no fleecing: a slow or failing repository slows or fails the guest's own writes")
		return
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(f.Dir, &fs); err != nil {
		return // making the images will tell
	}
	var size int64
	for _, d := range disks {
		size += d.Size
	}
	free := int64(fs.Bavail) * fs.Bsize
	log.Infof("fleece images go to %s, which has %s free", f.Dir, humanize.IBytes(uint64(free)))
	if kind := slowFileSystems[fs.Type&0xffffffff]; kind != "" {
		log.Warnf("%s is on %s: fleece images should be on a fast local disk", f.Dir, kind)
	}
	if free < size/10 {
		log.Warnf("%s has little space: if the guest overwrites more than that of its %s during the run, the backup fails", f.Dir, humanize.IBytes(uint64(size)))
	}
}

// fleece is the image that saves what the guest overwrites on one disk during a run.
type fleece struct {
	path string   // "": QEMU has it open, and its name is gone
	file *os.File // open, to see how much it holds
	peak int64    // the most that it was seen to hold, in bytes
}

// used returns how much of the host's disk the image takes, in bytes.
func (f *fleece) used() int64 {
	var st syscall.Stat_t
	if f.file == nil || syscall.Fstat(int(f.file.Fd()), &st) != nil {
		return 0 // it is for people only
	}
	used := st.Blocks * 512
	f.peak = max(f.peak, used)
	return used
}

// makeFleece makes the fleece image of a disk.
func (s *session) makeFleece(ctx context.Context, i int, d PlannedDisk) error {
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
	s.fleeces[i] = fleece{path: path, file: f}
	if _, err := child.Run(ctx, time.Minute, s.repo.QemuImg, "create", "-q", "-f", "qcow2", path, fmt.Sprint(d.Size)); err != nil {
		return fmt.Errorf("disk %s: make its fleece image: %w", d.Name, err)
	}
	if limit := s.cfg.Fleecing.Limit; limit > 0 {
		if err := f.Truncate(limit); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	return nil
}

// addFleece has QEMU open a fleece image. Its name goes as soon as that is done, so that no crash leaves it behind.
func (s *session) addFleece(ctx context.Context, i int, d PlannedDisk) error {
	f := &s.fleeces[i]
	file := map[string]any{"driver": "file", "filename": f.path, "discard": "unmap", "cache": map[string]any{"no-flush": true}}
	if limit := s.cfg.Fleecing.Limit; limit > 0 {
		// A window on a file of that size, as if it were a block device: what does not fit fails.
		file = map[string]any{"driver": "raw", "size": limit, "discard": "unmap", "file": file}
	}
	if err := s.addImage(ctx, nodeName(fleecePrefix, i), file, d.Name); err != nil {
		return fmt.Errorf("%w: can QEMU's user open files in %s?", err, s.cfg.Fleecing.Dir)
	}
	if err := os.Remove(f.path); err != nil {
		return fmt.Errorf("disk %s: fleece image: %w", d.Name, err)
	}
	path := f.path
	f.path = ""
	return s.repo.FS.Step("remove", path)
}

// reportFleece logs how much the fleece images held.
func (s *session) reportFleece() {
	if s.cfg.Fleecing.Off {
		return
	}
	var peak int64
	for i := range s.fleeces {
		s.fleeces[i].used()
		peak += s.fleeces[i].peak
	}
	s.log.Infof("fleece images held %s", humanize.IBytes(uint64(peak)))
}

// dropFleece lets go of the fleece images, and removes those that QEMU did not open.
func (s *session) dropFleece() {
	for _, f := range s.fleeces {
		if f.path != "" {
			_ = os.Remove(f.path)
		}
		if f.file != nil {
			_ = f.file.Close()
		}
	}
}
