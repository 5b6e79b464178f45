package proxmox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"qmchain/internal/child"
)

// ErrVolume is wrapped where a volume can't be read on this host without PVE: it is no file and no block device, it is not
// there now, or its format is not certain.
var ErrVolume = errors.New("not to be read")

// ErrInactive is wrapped, with ErrVolume, where PVE may have deactivated the volume of a VM that does not run.
var ErrInactive = errors.New("not active on this node")

// Volume is where a drive's data is.
type Volume struct {
	Path   string // of a file or block device
	Format string // "qcow2" or "raw"
}

// volumeLimit bounds a call of pvesm, which asks the storage for nothing but a name.
const volumeLimit = time.Minute

// rawStorages are the types of storages that hold nothing but raw volumes, without a format in their names.
var rawStorages = map[string]bool{
	"lvm": true, "lvmthin": true, "zfspool": true, "zfs": true, "rbd": true, "iscsi": true, "iscsidirect": true,
}

// activated are the types of storages whose volumes are devices of the host only while their VM runs: PVE deactivates them when
// it has stopped. For rbd that is so with krbd; without it there never is a device.
var activated = map[string]bool{"lvm": true, "lvmthin": true, "rbd": true}

// Volume finds a drive's volume, by `pvesm path`. The format is what PVE's names say, as PVE takes it from there: data is
// never looked at for it, as a guest can write another format's header into its raw disk. The error is ErrVolume, with
// ErrInactive or without, or pvesm's.
func (h Host) Volume(ctx context.Context, d Drive) (Volume, error) {
	v := Volume{Path: d.Volume}
	storage, name, named := strings.Cut(d.Volume, ":")
	if !filepath.IsAbs(d.Volume) {
		if !named {
			return Volume{}, fmt.Errorf("%s: %q is no volume: %w", d.ID, d.Volume, ErrVolume)
		}
		text, err := h.pvesm(ctx, "path", d.Volume)
		if err != nil {
			return Volume{}, fmt.Errorf("%s: %w", d.ID, err)
		}
		v.Path = strings.TrimSpace(text)
	} else {
		name = d.Volume
	}
	switch {
	case d.Options["format"] != "":
		v.Format = d.Options["format"]
	case strings.HasSuffix(name, ".qcow2"):
		v.Format = "qcow2"
	case strings.HasSuffix(name, ".raw") || strings.HasPrefix(name, "/dev/"):
		v.Format = "raw"
	case filepath.Ext(name) == "" && named && rawStorages[h.storageType(storage)]:
		v.Format = "raw"
	default:
		return Volume{}, fmt.Errorf("%s: the format of %s is not certain: %w", d.ID, d.Volume, ErrVolume)
	}
	if v.Format != "qcow2" && v.Format != "raw" {
		return Volume{}, fmt.Errorf("%s: %s is of format %s: %w", d.ID, d.Volume, v.Format, ErrVolume)
	}
	fi, err := os.Stat(v.Path)
	switch {
	case !filepath.IsAbs(v.Path):
		return Volume{}, fmt.Errorf("%s: %s is neither a file nor a block device of this host: %w", d.ID, d.Volume, ErrVolume)
	case errors.Is(err, fs.ErrNotExist) && named && activated[h.storageType(storage)]:
		return Volume{}, fmt.Errorf("%s: %s is %w, or not there: Proxmox VE deactivates such volumes while their VM is stopped: %w: %w", d.ID, d.Volume, ErrInactive, ErrVolume, err)
	case err != nil:
		return Volume{}, fmt.Errorf("%s: %s is not there: %w: %w", d.ID, d.Volume, ErrVolume, err)
	case !fi.Mode().IsRegular() && fi.Mode()&os.ModeType != os.ModeDevice:
		return Volume{}, fmt.Errorf("%s: %s is neither a file nor a block device: %w", d.ID, v.Path, ErrVolume)
	}
	return v, nil
}

// storageType is the type of a storage, such as lvmthin, or "": a line "TYPE: NAME" begins its section in PVE's file.
func (h Host) storageType(name string) string {
	text, err := h.readFile(filepath.Join(h.Etc, "storage.cfg"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if kind, found := storageHead(line); found != "" && found == name {
			return kind
		}
	}
	return ""
}

// pvesm runs pvesm, which is where qm is.
func (h Host) pvesm(ctx context.Context, args ...string) (string, error) {
	qm, err := h.program()
	if err != nil {
		return "", err
	}
	out, err := child.Run(ctx, volumeLimit, filepath.Join(filepath.Dir(qm), "pvesm"), args...)
	if err != nil {
		return "", fmt.Errorf("pvesm %s: %w", strings.Join(args, " "), err)
	}
	return string(out), nil
}
