package export

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"qmchain/chain/image"
	"qmchain/chain/nbd"
	"qmchain/internal/child"
)

// qcow2File is a qcow2 file that qemu-img writes, from an NBD export of ours.
type qcow2File struct{ *staged }

func startQcow2(ctx context.Context, p *Plan) (output, error) {
	s, err := stage(p)
	if err != nil {
		return nil, err
	}
	options := "compat=1.1,cluster_size=65536,lazy_refcounts=off"
	if p.opts.Compress {
		options += ",compression_type=zstd"
	}
	_, err = child.Run(ctx, time.Minute, p.opts.QemuImg, "create", "-q", "-f", "qcow2", "-o", options, s.path, strconv.FormatInt(p.Size, 10))
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return qcow2File{s}, nil
}

func (f qcow2File) write(ctx context.Context, progress func(int64)) error {
	if err := f.plan.opts.FS.Step("write", f.path); err != nil {
		return err
	}
	// The socket's folder is closed to others, and short: a socket's path can't be long.
	dir, err := os.MkdirTemp("", "qmchain-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	serveCtx, stop := context.WithCancel(ctx)
	defer stop()
	l, err := nbd.Listen(serveCtx, "unix:"+filepath.Join(dir, "nbd"))
	if err != nil {
		return err
	}
	var first firstError
	server := nbd.Server{Exports: []nbd.Export{{Name: "disk", Image: counted{f.plan.img, progress}}}, Problem: first.set}
	served := make(chan error, 1)
	go func() { served <- server.Serve(serveCtx, l) }()

	args := []string{"convert", "-n", "--target-is-zero", "-m", strconv.Itoa(convertJobs)}
	if f.plan.opts.Compress {
		args = append(args, "-c", "-W") // compressed data has no order to keep
	}
	args = append(args, "-f", "raw", "-O", "qcow2", nbd.URI(l.Addr(), "disk"), f.path)
	_, err = child.Run(ctx, convertLimit(f.plan.Size), f.plan.opts.QemuImg, args...)
	stop()
	serveErr := <-served
	if err != nil {
		// What keeps the image from being read is only an I/O error for qemu-img, also where that is our being interrupted.
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if cause := first.get(); cause != nil {
			return fmt.Errorf("%w (%w)", cause, err)
		}
		return err
	}
	if serveErr != nil {
		return serveErr
	}
	return f.sync()
}

// convertJobs is how many requests qemu-img has under way: the most that it can.
const convertJobs = 16

// convertLimit is how long a conversion may take: one that does not get through a MiB a second hangs.
func convertLimit(size int64) time.Duration { return time.Hour + time.Duration(size>>20)*time.Second }

func (f qcow2File) reader(context.Context) (image.Image, error) {
	dropCache(f.file)
	return image.NewPool(image.PoolOptions{}).Open(-1, image.Layer{Path: f.path, Name: f.path, Format: image.Qcow2, Bytes: -1})
}

// counted tells of what is read.
type counted struct {
	image.Image
	progress func(int64)
}

func (c counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Image.ReadAt(p, off)
	c.progress(int64(n))
	return n, err
}

// firstError keeps the first of the errors that it is told.
type firstError struct {
	mu  sync.Mutex
	err error
}

func (f *firstError) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

func (f *firstError) get() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}
