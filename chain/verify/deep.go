package verify

import (
	"context"
	"reflect"
	"strings"

	"golang.org/x/sync/errgroup"

	"qmchain/chain"
	"qmchain/chain/image"
)

// deepPiece is what is read of a disk at a time, in bytes.
const deepPiece = 4 << 20

// readDisks reads all disks that were asked for and have no fault so far.
func (r *run) readDisks(ctx context.Context, v *view) error {
	pool := image.NewPool(image.PoolOptions{})
	for _, m := range v.asked {
		for i := range m.Disks {
			t := v.targets[ref{m.UUID, m.Disks[i].Name}]
			end := r.done + t.Disk.VirtualSize
			lineage := t.lineage()
			if !t.broken() && !reflect.DeepEqual(r.deep[t.ref], lineage) {
				err := r.readDisk(ctx, v, pool, t)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err == nil {
					r.deep[t.ref] = lineage
				} else {
					at := t.named(err)
					r.foundBy(&at.deep, at, fault{kindOf(err), at.at.Name, reason(err, at.at.Name)})
				}
			}
			r.upTo(end)
		}
	}
	return nil
}

// lineage are the manifests of the images that a disk is read through.
func (t *target) lineage() (points chain.Points) {
	for ; t != nil; t = t.parent {
		points = append(points, t.Point)
	}
	return points
}

// named is the image, of those that t is read through, whose file an error names: t itself if it names none.
func (t *target) named(err error) *target {
	text := err.Error()
	for at := t; at != nil; at = at.parent {
		if strings.Contains(text, at.at.Name+": ") {
			return at
		}
	}
	return t
}

// readDisk reads all data of a disk, several pieces at a time.
func (r *run) readDisk(ctx context.Context, v *view, pool *image.Pool, t *target) error {
	img, err := v.points.OpenDisk(pool, t.Point, t.Disk.Name)
	if err != nil {
		return err
	}
	defer img.Close()
	g, ctx := errgroup.WithContext(ctx)
	pieces := make(chan image.Extent)
	g.Go(func() error {
		defer close(pieces)
		for e, err := range image.Walk(img, 0, img.Size()) {
			if err != nil {
				return err
			}
			if e.Zero {
				r.progress(e.Len)
				continue
			}
			for off := e.Off; off < e.End(); off += deepPiece {
				select {
				case pieces <- image.Extent{Off: off, Len: min(deepPiece, e.End()-off)}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		return nil
	})
	for range r.jobs {
		g.Go(func() error {
			buf := make([]byte, deepPiece)
			for e := range pieces {
				if err := readFull(img, buf[:e.Len], e.Off); err != nil {
					return err
				}
				r.progress(e.Len)
			}
			return nil
		})
	}
	return g.Wait()
}
