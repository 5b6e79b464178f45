package backup

import (
	"context"

	"qmchain/chain"
)

// Info is what a guest shows of itself.
type Info struct {
	Guest  chain.GuestIdentity `json:"guest"`
	QEMU   string              `json:"qemu"`
	Status string              `json:"status"`
	Disks  []InfoDisk          `json:"disks"`
	// Jobs are the block jobs that run, ours or others'.
	Jobs []string `json:"jobs"`
}

// InfoDisk is a disk with the tracking bitmaps of all repositories on it.
type InfoDisk struct {
	Disk
	Bitmaps []InfoBitmap `json:"bitmaps"`
}

// InfoBitmap is a tracking bitmap of ours.
type InfoBitmap struct {
	Repo         string   `json:"repo"`  // the first 8 hex digits of the repository's id
	Point        chain.ID `json:"point"` // that it records from
	Disk         string   `json:"disk"`  // the disk's name in that point
	Persistent   bool     `json:"persistent"`
	Recording    bool     `json:"recording"`
	Inconsistent bool     `json:"inconsistent"`
	Dirty        int64    `json:"dirty"` // bytes changed since that point
}

// Inspect asks a guest about itself and its disks. Nothing is changed.
func Inspect(ctx context.Context, addr string, guard Guard) (*Info, error) {
	c, err := connect(ctx, addr, guard)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	v, err := look(ctx, c)
	if err != nil {
		return nil, err
	}
	disks, err := v.disks()
	if err != nil {
		return nil, err
	}
	info := &Info{Guest: v.guest, QEMU: v.version.String(), Status: v.status, Disks: []InfoDisk{}, Jobs: []string{}}
	for _, j := range v.jobs {
		info.Jobs = append(info.Jobs, j.ID)
	}
	for _, d := range disks {
		id := InfoDisk{Disk: d, Bitmaps: []InfoBitmap{}}
		for _, b := range d.bitmaps {
			name, ok := chain.ParseBitmapName(b.Name)
			if !ok {
				continue
			}
			id.Bitmaps = append(id.Bitmaps, InfoBitmap{
				Repo: name.Repo, Point: name.Point, Disk: name.Disk,
				Persistent: b.Persistent, Recording: b.Recording, Inconsistent: b.Inconsistent, Dirty: b.Count,
			})
		}
		info.Disks = append(info.Disks, id)
	}
	return info, nil
}
