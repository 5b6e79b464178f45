package inside

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
)

// blockSize is the unit in which an overlay keeps what is written.
const blockSize = 4096

// maxOverlay is how much an overlay takes, in bytes. A replay writes no more than a file system's journal describes, which
// is far below.
const maxOverlay = 4 << 30

// overlay is a disk that can be written to. What is written goes to a file without a name and ends with the process. It is
// for one writer: what is read while it is written may be either, as on a disk.
type overlay struct {
	image.Image
	file *os.File // nil: read-only

	mu     sync.RWMutex
	blocks map[int64]int64 // by number: where in the file it is
}

// newOverlay makes one with its file in dir; read-only if dir is empty.
func newOverlay(img image.Image, dir string) (*overlay, error) {
	o := &overlay{Image: img, blocks: map[int64]int64{}}
	if dir == "" {
		return o, nil
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		o.file = os.NewFile(uintptr(fd), dir)
		return o, nil
	}
	// Not all file systems have that.
	f, err := os.CreateTemp(dir, "qmchain-overlay-")
	if err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("overlay: %w", err)
	}
	o.file = f
	return o, nil
}

func (o *overlay) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.Image.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	if len(o.blocks) == 0 {
		return n, err
	}
	for done := 0; done < n; {
		in, at := (off+int64(done))%blockSize, (off+int64(done))/blockSize
		end := min(n, done+int(blockSize-in))
		if where, ok := o.blocks[at]; ok {
			if _, err := o.file.ReadAt(p[done:end], where+in); err != nil {
				return done, fmt.Errorf("overlay: %w", err)
			}
		}
		done = end
	}
	return n, err
}

// WriteAt writes within the disk.
func (o *overlay) WriteAt(p []byte, off int64) (int, error) {
	if o.file == nil {
		return 0, os.ErrPermission
	}
	if off < 0 || off > o.Size()-int64(len(p)) {
		return 0, fmt.Errorf("overlay: %d bytes at %d are not on the disk: %w", len(p), off, unix.ENOSPC)
	}
	for done := 0; done < len(p); {
		in, at := (off+int64(done))%blockSize, (off+int64(done))/blockSize
		end := min(len(p), done+int(blockSize-in))
		if err := o.writeBlock(at, in, p[done:end]); err != nil {
			return done, err
		}
		done = end
	}
	return len(p), nil
}

// writeBlock writes a piece of one block.
func (o *overlay) writeBlock(number, in int64, p []byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	where, ok := o.blocks[number]
	if ok {
		_, err := o.file.WriteAt(p, where+in)
		return err
	}
	if where = int64(len(o.blocks)) * blockSize; where >= maxOverlay {
		return fmt.Errorf("overlay: more than %d bytes: %w", int64(maxOverlay), unix.ENOSPC)
	}
	block := make([]byte, blockSize)
	if _, err := o.Image.ReadAt(block, number*blockSize); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	copy(block[in:], p)
	if _, err := o.file.WriteAt(block, where); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	o.blocks[number] = where
	return nil
}

func (o *overlay) Close() error {
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}
