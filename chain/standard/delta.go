package standard

import (
	"bytes"
	"cmp"
	"context"
	"slices"

	"qmchain/chain/image"
	"qmchain/chain/qcow2"
)

// cluster is the size of those of the images that are made, in bytes.
const cluster = 64 << 10

// span is a range of a disk, in bytes.
type span struct{ off, end int64 }

// spans are ranges in order, that neither overlap nor touch.
type spans []span

// join brings ranges of whole clusters in order.
func join(all spans) spans {
	for i := range all {
		all[i].off &^= cluster - 1
		all[i].end = (all[i].end + cluster - 1) &^ (cluster - 1)
	}
	slices.SortFunc(all, func(a, b span) int { return cmp.Compare(a.off, b.off) })
	out := all[:0]
	for _, s := range all {
		if n := len(out); n > 0 && s.off <= out[n-1].end {
			out[n-1].end = max(out[n-1].end, s.end)
			continue
		}
		if s.off < s.end {
			out = append(out, s)
		}
	}
	return out
}

// held returns where a link's own file holds something, in whole clusters.
func (j *Job) held(ctx context.Context, l link) (spans, error) {
	var all spans
	err := j.runs(ctx, l, func(r qcow2.Run) error {
		if n := len(all); n > 0 && r.Off <= all[n-1].end {
			all[n-1].end = max(all[n-1].end, r.Off+r.Len)
			return nil
		}
		all = append(all, span{r.Off, r.Off + r.Len})
		return nil
	})
	return join(all), err
}

// differ returns where a disk that is read through links may hold something else than one that is read through others:
// where one of the links has something that they have not in common, or ends and so hides what is below it.
func (j *Job) differ(ctx context.Context, one, other []link) (spans, error) {
	common := 0
	same := func(a, b link) bool { return a.file.Name == b.file.Name && a.file.Snapshot == b.file.Snapshot }
	for common < min(len(one), len(other)) && same(one[common], other[common]) {
		common++
	}
	var all spans
	var least, most int64 = 1<<63 - 1, 0
	for _, l := range slices.Concat(one[common:], other[common:]) {
		held, err := j.held(ctx, l)
		if err != nil {
			return nil, err
		}
		all = append(all, held...)
		least = min(least, l.Disk.VirtualSize)
	}
	for _, links := range [][]link{one, other} {
		size := links[len(links)-1].Disk.VirtualSize
		least, most = min(least, size), max(most, size)
	}
	return join(append(all, span{least, most})), nil
}

// apply writes where within the ranges a disk differs from what the image that w writes to reads as, which is before; beyond
// its end there are zeroes.
func (j *Job) apply(ctx context.Context, w *writer, before, disk image.Image, where spans, progress func(int64)) error {
	old, now := make([]byte, piece), make([]byte, piece)
	for _, s := range where {
		for off := s.off; off < min(s.end, disk.Size()); off += piece {
			n := min(piece, s.end-off, disk.Size()-off)
			progress(n)
			zero, err := bothZero(before, disk, off, n)
			if err != nil {
				return err
			}
			if zero {
				continue
			}
			if err := j.limit.wait(ctx, int(n)); err != nil {
				return err
			}
			if err := readFull(disk, now[:n], off); err != nil {
				return err
			}
			if err := readPadded(before, old[:n], off); err != nil {
				return err
			}
			if err := writeDifferent(ctx, w, old[:n], now[:n], off); err != nil {
				return err
			}
		}
	}
	return nil
}

// bothZero reports whether two disks are known to be zeroes, or at an end, in a range.
func bothZero(a, b image.Image, off, length int64) (bool, error) {
	for _, img := range []image.Image{a, b} {
		for e, err := range image.Walk(img, off, length) {
			if err != nil || !e.Zero {
				return false, err
			}
		}
	}
	return true, nil
}

// readPadded reads p; what lies behind the end of the disk is zeroes.
func readPadded(img image.Image, p []byte, off int64) error {
	n := min(int64(len(p)), max(0, img.Size()-off))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	return readFull(img, p[:n], off)
}

// writeDifferent writes the clusters that are not alike. What is written together is alike in being zeroes or not.
func writeDifferent(ctx context.Context, w *writer, old, now []byte, off int64) error {
	const same, data, zero = 0, 1, 2
	kind := func(at int) int {
		end := min(at+cluster, len(now))
		switch {
		case bytes.Equal(old[at:end], now[at:end]):
			return same
		case isZero(now[at:end]):
			return zero
		}
		return data
	}
	for at := 0; at < len(now); {
		k, end := kind(at), at+cluster
		for end < len(now) && kind(end) == k {
			end += cluster
		}
		end = min(end, len(now))
		var err error
		switch k {
		case data:
			err = w.write(ctx, now[at:end], off+int64(at))
		case zero:
			err = w.zero(ctx, off+int64(at), end-at)
		}
		if err != nil {
			return err
		}
		at = end
	}
	return nil
}

var zeroes [4096]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroes))
		if !bytes.Equal(p[:n], zeroes[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
