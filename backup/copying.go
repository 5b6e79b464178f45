package backup

import "qmchain/chain/repo"

// Copying says how disks are copied. The zero value is a good default.
type Copying struct {
	Compress    string // "zstd", "zlib", or "": not
	Speed       int64  // bytes per second and disk; 0: no limit
	Jobs        int    // how many disks at once; 0: all. Without fleecing it is always all
	ClusterSize int64  // of the images, in bytes; 0: 64 KiB. Larger ones make increments larger
	AIO         string // how QEMU writes the images: "threads", "native", "io_uring", or "": its default
	Direct      bool   // QEMU passes the host's page cache by
}

// image are the settings of a new image.
func (c Copying) image() repo.ImageOptions {
	return repo.ImageOptions{ClusterSize: c.ClusterSize, Compression: c.Compress}
}

// file are the options of the node that writes an image's file.
func (c Copying) file(name, path string) map[string]any {
	options := map[string]any{
		"driver": "file", "node-name": name, "filename": path, "discard": "unmap",
		"cache": map[string]any{"direct": c.Direct, "no-flush": true},
	}
	if c.AIO != "" {
		options["aio"] = c.AIO
	}
	return options
}
