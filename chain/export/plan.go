package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"qmchain/chain/image"
	"qmchain/internal/durable"
)

var (
	// ErrExists is wrapped where something is there already that is only written over by request.
	ErrExists = errors.New("it exists")
	// ErrInUse is wrapped where somebody uses the device, or writes the same file at this time.
	ErrInUse = errors.New("in use")
	// ErrTooSmall is wrapped where the disk does not fit on the device.
	ErrTooSmall = errors.New("too small")
	// ErrNoSpace is wrapped where a file system may not have the space that is needed.
	ErrNoSpace = errors.New("not enough space")
	// ErrInside is wrapped where an output lies in a folder in which nothing may be written.
	ErrInside = errors.New("nothing is restored into a repository")
	// ErrKind is wrapped where an output is neither a file nor a block device, or not one for this format.
	ErrKind = errors.New("can't hold a disk")
)

// Format is the format of an output.
type Format string

const (
	Raw   Format = "raw"
	Qcow2 Format = "qcow2"
)

// MaxJobs bounds Options.Jobs.
const MaxJobs = 64

// Options say how a disk is written.
type Options struct {
	Format   Format
	Compress bool // with zstd; Qcow2 only
	// Force is to replace an existing file, which stays until the new one is whole, and to write over a device that is not
	// empty.
	Force bool
	// Jobs is how many pieces are read and written at a time, MaxJobs at most; 0 is what fits the machine. Each takes half a
	// MiB of memory.
	Jobs int
	// Outside is a folder in which no output may lie: where the image is read from. Empty: none.
	Outside string
	// FS is told of all changes.
	FS durable.FS
	// QemuImg is the program that makes qcow2 files; empty: qemu-img.
	QemuImg string
}

// Plan is what is to be written where.
type Plan struct {
	// Output is the absolute path of the file or device, without symbolic links.
	Output string
	// Device tells a block device from a file.
	Device bool
	// Replaces tells that there is something that is written over.
	Replaces bool
	// Size is that of the disk in bytes, Room that of the device, 0 for a file.
	Size, Room int64
	// Data is how much of the disk is not known to be zeroes, in bytes.
	Data int64

	img  image.Image
	opts Options
	// holes tells of each unit of the disk whether all of it is known to be zeroes.
	holes []bool
}

// Look finds out what writing img to output takes, and whether it can be done, but for space (see CheckSpace). The folder
// of a file must be there.
func Look(ctx context.Context, img image.Image, output string, opts Options) (*Plan, error) {
	if opts.Jobs <= 0 {
		opts.Jobs = min(max(4, runtime.GOMAXPROCS(0)), 16) // storage answers several at once, even where there are few processors
	}
	opts.Jobs = min(opts.Jobs, MaxJobs)
	if opts.QemuImg == "" {
		opts.QemuImg = "qemu-img"
	}
	p := &Plan{Size: img.Size(), img: img, opts: opts}
	if err := p.find(output); err != nil {
		return nil, fmt.Errorf("output %s: %w", output, err)
	}
	if opts.Outside != "" {
		inside, err := within(filepath.Dir(p.Output), opts.Outside)
		if err != nil {
			return nil, fmt.Errorf("output %s: %w", output, err)
		}
		if inside {
			return nil, fmt.Errorf("output %s: %w (%s)", output, ErrInside, opts.Outside)
		}
	}
	if p.Device {
		if err := p.lookAtDevice(ctx); err != nil {
			return nil, fmt.Errorf("output %s: %w", output, err)
		}
	}
	if err := p.measure(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// measure finds out where there is data.
func (p *Plan) measure(ctx context.Context) error {
	p.holes = make([]bool, (p.Size+unit-1)/unit)
	for i := range p.holes {
		p.holes[i] = true
	}
	for e, err := range image.Walk(p.img, 0, p.Size) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if e.Zero {
			continue
		}
		p.Data += e.Len
		for n := e.Off / unit; n*unit < e.End(); n++ {
			p.holes[n] = false
		}
	}
	return nil
}

// find sets where the output is, and what is there.
func (p *Plan) find(output string) error {
	path, err := filepath.Abs(output)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return p.findNew(path)
	}
	if err != nil {
		return err
	}
	if p.Output, err = filepath.EvalSymlinks(path); err != nil {
		return err
	}
	p.Replaces = true
	switch mode := info.Mode(); {
	case mode.IsRegular():
		if !p.opts.Force {
			return ErrExists
		}
		// A guest whose disk it is would go on with the old file, and lose that at its end.
		if who := openFile(p.Output, info); who != "" {
			return fmt.Errorf("%w: %s has it open", ErrInUse, who)
		}
		return nil
	case mode.Type() == fs.ModeDevice:
		if p.opts.Format != Raw {
			return fmt.Errorf("%w in format %s: it is a device", ErrKind, p.opts.Format)
		}
		p.Device = true
		return nil
	}
	return fmt.Errorf("%w: it is neither a file nor a block device", ErrKind)
}

func (p *Plan) findNew(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%w, as a symbolic link that leads nowhere", ErrExists)
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return err
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return errors.Join(err, fmt.Errorf("%s: %w", dir, syscall.ENOTDIR))
	}
	p.Output = filepath.Join(dir, filepath.Base(path))
	if strings.HasPrefix(p.Output, "/dev/") && !strings.HasPrefix(p.Output, "/dev/shm/") {
		// A file in its place would fill the memory.
		return fmt.Errorf("no such device: %w", fs.ErrNotExist)
	}
	return nil
}

// within reports whether dir is the folder top or lies below it, by whatever names.
func within(dir, top string) (bool, error) {
	want, err := os.Stat(top)
	if err != nil {
		return false, err
	}
	for {
		info, err := os.Stat(dir)
		if err != nil {
			return false, err
		}
		if os.SameFile(info, want) {
			return true, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return false, nil
		}
		dir = up
	}
}

// Work is how many bytes there are to get through: what Writer.Write counts up to.
func (p *Plan) Work() int64 {
	if p.Device {
		return p.Size
	}
	return p.Data
}

// Space is the most that the output will take of its file system, in bytes; 0 where it takes none, and where that can't be
// told before, as of compressed data.
func (p *Plan) Space() int64 {
	switch {
	case p.Device, p.opts.Compress:
		return 0
	case p.opts.Format == Qcow2:
		const cluster = 64 << 10
		// Tables: eight bytes for each cluster of the disk at most, and two for each of the file.
		return p.Data + p.Data/cluster*2 + p.Size/cluster*8 + 16*cluster
	}
	return p.Data
}

// CheckSpace makes sure that the file systems of all outputs have the space for them together. What is only counted as
// data and holds zeroes counts too: with much of that there can be more space than this says.
func CheckSpace(plans []*Plan) error {
	type volume struct {
		dir        string
		need, free int64
	}
	volumes := map[uint64]*volume{}
	for _, p := range plans {
		if p.Device {
			continue
		}
		dir := filepath.Dir(p.Output)
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return fmt.Errorf("output %s: %w", p.Output, err)
		}
		v := volumes[st.Dev]
		if v == nil {
			var stat unix.Statfs_t
			if err := unix.Statfs(dir, &stat); err != nil {
				return fmt.Errorf("output %s: free space: %w", p.Output, err)
			}
			v = &volume{dir: dir, free: int64(stat.Bavail) * stat.Bsize}
			volumes[st.Dev] = v
		}
		v.need += p.Space()
		// What a dead run has left makes room.
		if err := unix.Lstat(staging(p.Output), &st); err == nil {
			v.free += st.Blocks * 512
		}
	}
	for _, v := range volumes {
		if v.need > v.free {
			return fmt.Errorf("%s: %w: up to %s (%d bytes) are needed, and %s (%d) are free", v.dir, ErrNoSpace,
				humanize.IBytes(uint64(v.need)), v.need, humanize.IBytes(uint64(v.free)), v.free)
		}
	}
	return nil
}

// staging is the path of the staging file of an output.
func staging(output string) string {
	return filepath.Join(filepath.Dir(output), "."+filepath.Base(output)+".qmchain-partial")
}
