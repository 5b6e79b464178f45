package backup

import (
	"context"
	"errors"
	"strings"

	"qmchain/qmp"
)

// servedByIOThread reports whether an iothread serves a device's disk. QMP shows it nowhere but in the properties of the
// device itself (virtio-blk) or of the controller that it sits on (virtio-scsi); no other kind of device has the property.
func servedByIOThread(ctx context.Context, c *qmp.Client, device string) (bool, error) {
	var threads []struct{}
	if err := c.Execute(ctx, "query-iothreads", nil, &threads); err != nil || len(threads) == 0 {
		return false, err
	}
	for path := device; path != "" && path != "/machine"; {
		thread, err := qomGet(ctx, c, path, "iothread")
		var refused *qmp.Error
		switch {
		case err == nil:
			return thread != "", nil
		case !errors.As(err, &refused):
			return false, err
		}
		// No such property here: an ide-hd or a scsi-hd. Its bus belongs to the controller.
		bus, err := qomGet(ctx, c, path, "parent_bus")
		switch {
		case err == nil && bus != "":
			path = bus[:max(strings.LastIndexByte(bus, '/'), 0)]
		case err == nil:
			return false, nil // the end of the line, without an iothread on it
		case errors.As(err, &refused):
			path = path[:max(strings.LastIndexByte(path, '/'), 0)]
		default:
			return false, err
		}
	}
	return false, nil
}

func qomGet(ctx context.Context, c *qmp.Client, path, property string) (string, error) {
	var value string
	err := c.Execute(ctx, "qom-get", map[string]any{"path": path, "property": property}, &value)
	return value, err
}
