package main

import (
	"qmchain/chain/image"
	"qmchain/cmd/internal/points"
)

// point is a point whose disks can be opened, and with what was saved beside them.
type point struct{ *points.Point }

// openPoint finds a point. The point is to be closed.
func openPoint(dir, name string) (*point, error) {
	// One run reads everything once: there is little to keep, but the files of a long chain are better left open.
	p, err := points.Open(dir, name, image.PoolOptions{MaxMeta: 32 << 20, MaxClusters: 16 << 20})
	if err != nil {
		return nil, err
	}
	return &point{p}, nil
}
