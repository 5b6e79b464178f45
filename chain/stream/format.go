package stream

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"qmchain/chain"
	"qmchain/chain/repo"
)

const (
	formatVersion = 1

	headFile = "qmchain-stream.json"
	maxHead  = 64 << 10

	maxSums = 1 << 30 // of an image of 64 TiB

	// Of the files of a guest that one point can carry: how many, and the size of each in bytes.
	maxGuestFiles = 256
	maxGuestFile  = 16 << 20
)

var (
	// ErrStream is wrapped where what is received is not a stream, or one that was cut off.
	ErrStream = errors.New("not a whole stream of points")
	// ErrOtherPoint is wrapped where a receiver has another point under the id of one that is to be sent to it.
	ErrOtherPoint = errors.New("another point is there under this id")
	// ErrUnsettled is wrapped where a base that is needed is in the middle of a merge that was cut off, or merged away while it
	// is still there for other disks.
	ErrUnsettled = errors.New("the removal of a point must come to its end first")
)

// head is the first file.
type head struct {
	Format     int    `json:"format"`
	Repository string `json:"repository"`
	Points     int    `json:"points"`
	Bytes      int64  `json:"bytes"`
}

// The names of files in a stream.

func folderPath(guest string, f repo.Folder) string { return guest + "/" + f.Name }

func manifestPath(guest string, f repo.Folder) string {
	return folderPath(guest, f) + "/" + chain.ManifestFile
}

func sumsPath(guest string, f repo.Folder, d *chain.Disk) string {
	return folderPath(guest, f) + "/" + d.Sums.File
}

func guestFilesPath(guest string, f repo.Folder) string {
	return folderPath(guest, f) + "/" + repo.GuestFilesFolder + "/"
}

func imagePath(guest string, d *chain.Disk) string {
	return guest + "/" + repo.ImagesFolder + "/" + d.File
}

// parseManifestPath is the inverse of manifestPath.
func parseManifestPath(name string) (guest string, f repo.Folder, err error) {
	parts := strings.Split(name, "/")
	if len(parts) == 3 && parts[2] == chain.ManifestFile && chain.CheckGuestName(parts[0]) == nil {
		if f, ok := repo.ParseFolder(parts[1]); ok {
			return parts[0], f, nil
		}
	}
	return "", repo.Folder{}, fmt.Errorf("%w: %.200q instead of a point's %s", ErrStream, name, path.Base(chain.ManifestFile))
}

// settled says which of a point's disks is in the middle of a merge, "" if none is.
func unsettled(m *chain.Manifest) (disk string) {
	for _, d := range m.Disks {
		if d.Next != nil || d.Merging != nil {
			return d.Name
		}
	}
	return ""
}

// size is that of all of a point's images, in bytes. A manifest can be made up, so it does not overflow.
func size(m *chain.Manifest) int64 {
	var sum int64
	for _, d := range m.Disks {
		if sum += d.Bytes; sum < 0 {
			return 1<<63 - 1
		}
	}
	return sum
}
