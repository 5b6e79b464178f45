package qmp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// query runs a command that returns a T.
func query[T any](ctx context.Context, c *Client, name string, args any) (T, error) {
	var result T
	err := c.Execute(ctx, name, args, &result)
	return result, err
}

// StatusInfo is what query-status returns.
type StatusInfo struct {
	Status  string `json:"status"` // a RunState: running, paused, prelaunch, shutdown, ...
	Running bool   `json:"running"`
}

// QueryStatus returns the guest's run state.
func (c *Client) QueryStatus(ctx context.Context) (StatusInfo, error) {
	return query[StatusInfo](ctx, c, "query-status", nil)
}

// Version is QEMU's version.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distribution's suffix, for people
}

// AtLeast reports whether this is version major.minor or later.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

func (v Version) String() string {
	return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
}

// QueryVersion returns QEMU's version.
func (c *Client) QueryVersion(ctx context.Context) (Version, error) {
	info, err := query[versionInfo](ctx, c, "query-version", nil)
	return info.version(), err
}

// versionInfo is a VersionInfo on the wire: in the greeting and in the answer to query-version.
type versionInfo struct {
	QEMU struct {
		Major int `json:"major"`
		Minor int `json:"minor"`
		Micro int `json:"micro"`
	} `json:"qemu"`
	Package string `json:"package"`
}

func (v versionInfo) version() Version {
	return Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, v.Package}
}

// QueryUUID returns the guest's SMBIOS UUID, all zeroes when none was set.
func (c *Client) QueryUUID(ctx context.Context) (string, error) {
	info, err := query[struct{ UUID string }](ctx, c, "query-uuid", nil)
	return info.UUID, err
}

// QueryName returns the guest's name (-name), empty when it has none.
func (c *Client) QueryName(ctx context.Context) (string, error) {
	info, err := query[struct{ Name string }](ctx, c, "query-name", nil)
	return info.Name, err
}

// QueryVMGenerationID returns the GUID of the guest's vmgenid device, empty when it has no such device or
// this QEMU knows none.
func (c *Client) QueryVMGenerationID(ctx context.Context) (string, error) {
	info, err := query[struct{ GUID string }](ctx, c, "query-vm-generation-id", nil)
	if e := new(Error); errors.As(err, &e) {
		// All are GenericErrors: the text alone tells them from a real failure.
		if e.Class == ClassCommandNotFound || strings.Contains(e.Desc, "not found") || strings.Contains(e.Desc, "not currently supported") {
			return "", nil
		}
	}
	return info.GUID, err
}

// Stop pauses the guest. In a guest that was not running it also makes a later Cont start it.
func (c *Client) Stop(ctx context.Context) error { return c.Execute(ctx, "stop", nil, nil) }

// Cont resumes the guest, and starts it if it never ran.
func (c *Client) Cont(ctx context.Context) error { return c.Execute(ctx, "cont", nil, nil) }

// QOMProperty is one property of a QOM object.
type QOMProperty struct {
	Name string `json:"name"`
	Type string `json:"type"` // a child object's is child<ITS TYPE>
}

// QOMList lists the properties of the QOM object at path. An unknown path is an Error of
// ClassDeviceNotFound.
func (c *Client) QOMList(ctx context.Context, path string) ([]QOMProperty, error) {
	return query[[]QOMProperty](ctx, c, "qom-list", struct {
		Path string `json:"path"`
	}{path})
}

// Objects lists the objects of the user's (-object, object-add) by their ids. QEMU makes their container
// together with the first of them: without it there are none.
func (c *Client) Objects(ctx context.Context) ([]string, error) {
	properties, err := c.QOMList(ctx, "/objects")
	if e := new(Error); errors.As(err, &e) && e.Class == ClassDeviceNotFound {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, p := range properties {
		if strings.HasPrefix(p.Type, "child<") {
			ids = append(ids, p.Name)
		}
	}
	slices.Sort(ids) // QEMU's own order is that of a hash table
	return ids, nil
}

// QOMSet sets a property of the object at path. The path should be absolute: a bare device id does not work
// for every device.
func (c *Client) QOMSet(ctx context.Context, path, property string, value any) error {
	return c.Execute(ctx, "qom-set", struct {
		Path     string `json:"path"`
		Property string `json:"property"`
		Value    any    `json:"value"`
	}{path, property, value}, nil)
}

// ObjectAdd adds an object; the options are those of object-add ("qom-type", "id", ...).
func (c *Client) ObjectAdd(ctx context.Context, options any) error {
	return c.Execute(ctx, "object-add", options, nil)
}

// ObjectAddThrottleGroup adds a throttle group without limits. One that nothing uses is a mark on the
// QEMU process that lives exactly as long as the process does.
func (c *Client) ObjectAddThrottleGroup(ctx context.Context, id string) error {
	return c.ObjectAdd(ctx, struct {
		QOMType string `json:"qom-type"`
		ID      string `json:"id"`
	}{"throttle-group", id})
}

// ObjectDel deletes an object.
func (c *Client) ObjectDel(ctx context.Context, id string) error {
	return c.Execute(ctx, "object-del", idArgs{id}, nil)
}

type idArgs struct {
	ID string `json:"id"`
}
