package backup

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"qmchain/chain"
	"qmchain/qmp"
)

// Names of our nodes, objects and jobs in a guest. QEMU takes node names of at most 31 characters.
const (
	ourPrefix      = "qmchain-"
	topPrefix      = "qmchain-top"
	cbwPrefix      = "qmchain-cbw"
	snapshotPrefix = "qmchain-snap"
	fleecePrefix   = "qmchain-fleece"
	targetPrefix   = "qmchain-tgt"
	fileSuffix     = "-file" // of the node below an image's
)

// view is what one look at a guest has shown.
type view struct {
	version qmp.Version
	status  string
	guest   chain.GuestIdentity // without the name that the user gave it
	devices []qmp.BlockInfo
	// passthrough tells the devices that hand the guest's SCSI commands to the host's device: QEMU does not see what they write.
	passthrough map[string]bool
	// snapshots tells the nodes whose images have internal snapshots.
	snapshots map[string]bool
	nodes     map[string]*node
	jobs      []qmp.Job
	// images are the disks of a stopped guest, in the order of their nodes imageNode(0), imageNode(1), …
	images []OfflineImage
}

// Kinds of the block graph's nodes.
const (
	graphNode    = "block-driver"
	graphBackend = "block-backend"
)

// node is one node of the block graph.
type node struct {
	name     string
	driver   string
	filename string
	size     int64 // virtual size in bytes
	info     *qmp.BlockDeviceInfo
	children map[string]string // edge name ("file", "backing", …) to node name
	parents  []parent
}

// parent is who uses a node: another node, a block backend (a guest's device) or a job.
type parent struct {
	kind string // graphNode, graphBackend, or a job's
	name string
	edge string
}

// look asks a guest for all that planning and recovery need to know. Nothing is changed.
func look(ctx context.Context, c *qmp.Client) (*view, error) {
	v, err := lookBlock(ctx, c)
	if err != nil {
		return nil, err
	}
	status, err := c.QueryStatus(ctx)
	if err != nil {
		return nil, err
	}
	v.status = status.Status
	if v.guest, err = lookIdentity(ctx, c); err != nil {
		return nil, err
	}
	if v.devices, err = c.QueryBlock(ctx); err != nil {
		return nil, err
	}
	if v.snapshots, err = lookSnapshots(ctx, c); err != nil {
		return nil, err
	}
	v.passthrough = make(map[string]bool)
	for _, dev := range v.devices {
		if dev.Inserted == nil || dev.QDev == "" {
			continue
		}
		kind, err := qomGet(ctx, c, qomPath(dev.QDev), "type")
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", dev.QDev, err)
		}
		v.passthrough[dev.QDev] = kind == "scsi-block" || kind == "scsi-generic"
	}
	return v, nil
}

// lookBlock looks at the block layer, which qemu-storage-daemon has as well.
func lookBlock(ctx context.Context, c *qmp.Client) (*view, error) {
	v := &view{version: c.Version(), nodes: make(map[string]*node)}
	named, err := c.QueryNamedBlockNodes(ctx)
	if err != nil {
		return nil, err
	}
	graph, err := c.BlockGraph(ctx)
	if err != nil {
		return nil, err
	}
	if v.jobs, err = c.QueryJobs(ctx); err != nil {
		return nil, err
	}
	for i := range named {
		info := &named[i]
		v.nodes[info.NodeName] = &node{
			name: info.NodeName, driver: info.Driver, filename: info.Image.Filename, size: info.Image.VirtualSize,
			info: info, children: make(map[string]string),
		}
	}
	byID := make(map[uint64]qmp.GraphNode)
	for _, n := range graph.Nodes {
		byID[n.ID] = n
	}
	for _, e := range graph.Edges {
		from, to := byID[e.Parent], byID[e.Child]
		if child := v.nodes[to.Name]; child != nil {
			child.parents = append(child.parents, parent{from.Type, from.Name, e.Name})
		}
		if p := v.nodes[from.Name]; p != nil && from.Type == graphNode {
			p.children[e.Name] = to.Name
		}
	}
	return v, nil
}

// lookSnapshots finds the nodes whose images have internal snapshots.
func lookSnapshots(ctx context.Context, c *qmp.Client) (map[string]bool, error) {
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Snapshots []struct{} `json:"snapshots"`
		} `json:"image"`
	}
	if err := c.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	have := make(map[string]bool)
	for _, n := range nodes {
		have[n.Name] = len(n.Image.Snapshots) > 0
	}
	return have, nil
}

func lookIdentity(ctx context.Context, c *qmp.Client) (chain.GuestIdentity, error) {
	var id chain.GuestIdentity
	uuid, err := c.QueryUUID(ctx)
	if err != nil {
		return id, err
	}
	// QEMU's answer for a guest without a UUID.
	if strings.Trim(uuid, "0-") != "" {
		id.UUID = strings.ToLower(uuid)
	}
	if id.VMName, err = c.QueryName(ctx); err != nil {
		return id, err
	}
	if id.VMGenID, err = c.QueryVMGenerationID(ctx); err != nil {
		return id, err
	}
	return id, nil
}

// Disk is a guest's disk as QEMU has it.
type Disk struct {
	Name   string `json:"name"`
	Size   int64  `json:"virtual_size"` // bytes, as the guest sees it
	Driver string `json:"format"`       // of the guest's image: "qcow2", "raw", …
	File   string `json:"file"`         // as QEMU names it; for people only
	// Left says why the disk can't or shall not be backed up; empty: it can.
	Left string `json:"left_out,omitempty"`

	device      string // absolute QOM path of the frontend, whose "drive" property names the top node
	top         string // the node that the device uses
	below       string // the node that the copy-before-write filter goes onto
	format      string // the node of the guest's image, which has the bitmaps
	bitmaps     []qmp.DirtyBitmap
	allocated   int64  // bytes that the guest's image takes in its storage
	snapshots   bool   // the image has internal snapshots
	compat      string // of a qcow2 image: "0.10" can't store bitmaps
	unsupported bool   // Left says something that the user may not expect
	busy        error  // why it can't be backed up now
	// switchable is set where the top node is a throttle filter of the guest's own, which blockdev-reopen can switch.
	switchable bool
}

// filters are the drivers that pass their child through, so that the guest's image is found below them. zeroinit and
// alloc-track are Proxmox's.
var filters = map[string]bool{
	"throttle": true, "copy-on-read": true, "zeroinit": true, "alloc-track": true, "preallocate": true, "compress": true,
}

// disks returns the guest's disks, those that are left out too. A node of ours on top means that recovery has not run.
func (v *view) disks() ([]Disk, error) {
	var disks []Disk
	if v.images != nil {
		return v.offlineDisks()
	}
	names := make(map[string]string)
	for i := range v.devices {
		dev := &v.devices[i]
		if dev.Inserted == nil {
			continue // an empty drive
		}
		d, err := v.disk(dev)
		if err != nil {
			return nil, err
		}
		if other, ok := names[d.Name]; ok && d.Left == "" {
			d.busy = fmt.Errorf("two disks of the guest have this name: %s and %s", other, d.File)
		}
		names[d.Name] = d.File
		disks = append(disks, d)
	}
	return disks, nil
}

func (v *view) disk(dev *qmp.BlockInfo) (Disk, error) {
	top := v.nodes[dev.Inserted.NodeName]
	if top == nil {
		return Disk{}, fmt.Errorf("device %q: its node %q is not among the named nodes", dev.Device+dev.QDev, dev.Inserted.NodeName)
	}
	d := Disk{
		Name: diskName(dev), Size: dev.Inserted.Image.VirtualSize,
		device: qomPath(dev.QDev), top: top.name, below: top.name,
	}
	image := top
	for depth := 0; filters[image.driver] || strings.HasPrefix(image.name, ourPrefix); depth++ {
		next := v.nodes[image.children["file"]]
		if next == nil || depth > len(v.nodes) { // a ring has no end either
			return Disk{}, fmt.Errorf("disk %s: nothing below the filter %q", d.Name, image.name)
		}
		image = next
	}
	d.format, d.Driver, d.File = image.name, image.driver, image.filename
	d.allocated = min(image.info.Image.ActualSize, d.Size)
	d.bitmaps, d.compat = image.info.DirtyBitmaps, compatOf(image.info)
	d.snapshots = v.snapshots[image.name]
	if top.driver == "throttle" {
		d.switchable = true
		d.below = top.children["file"]
	}
	if protocols[d.Driver] {
		d.Driver = "raw" // without a raw node on top of it
	}
	switch err := chain.CheckDiskName(d.Name); {
	case err != nil:
		d.leave("no usable name (%v): give the device an id", err)
	case dev.Removable:
		d.Left = "removable medium"
	case dev.Inserted.ReadOnly:
		d.Left = "read-only"
	case d.device == "":
		d.Left = "no device uses it"
	case v.passthrough[dev.QDev]:
		d.leave("its device passes the guest's SCSI commands through, which neither bitmaps nor filters see")
	case dev.Inserted.Encrypted:
		d.leave("encrypted by QEMU")
	case image.driver == "copy-before-write" || image.driver == "backup-top" || strings.HasSuffix(image.driver, "_top"):
		d.busy = fmt.Errorf("another job is under way (filter %s on it): %w", image.name, ErrBusy)
	case d.Driver != "qcow2" && d.Driver != "raw":
		d.leave("format %s is not supported", image.driver)
	case d.Size == 0:
		d.leave("it has no bytes")
	case image.size != d.Size:
		d.busy = fmt.Errorf("the guest sees %d bytes, its image %s has %d", d.Size, image.name, image.size)
	case strings.HasPrefix(top.name, ourPrefix):
		d.busy = fmt.Errorf("filter %s of an earlier run is still on it; does another job use it? %w", top.name, ErrBusy)
	default:
		d.busy = top.checkUsers()
	}
	return d, nil
}

// leave says why a disk can't be backed up though the user may expect it.
func (d *Disk) leave(format string, args ...any) {
	d.Left, d.unsupported = fmt.Sprintf(format, args...), true
}

// protocols are the drivers that a disk's bytes can be read from without a format.
var protocols = map[string]bool{
	"file": true, "host_device": true, "rbd": true, "nbd": true, "iscsi": true, "nvme": true, "blkio": true, "io_uring": true,
}

// checkUsers makes sure that a disk's top node has no users but its device and nodes of ours. Block jobs put filters on top of
// a node that query-block does not show; a qom-set would then take the job's filter out of the guest's way, and with it the
// guest's writes out of the job's sight.
func (n *node) checkUsers() error {
	for _, p := range n.parents {
		if p.kind == graphNode && !strings.HasPrefix(p.name, ourPrefix) {
			return fmt.Errorf("another job is under way (%s uses its node %s): %w", p.name, n.name, ErrBusy)
		}
	}
	return nil
}

// diskName is the drive's id without "drive-", else the device's id, else the node's name. Names that QEMU has made up
// begin with "#" and are never used.
func diskName(dev *qmp.BlockInfo) string {
	for _, id := range []string{dev.Device, dev.Inserted.NodeName} {
		if name, ok := strings.CutPrefix(id, "drive-"); ok && name != "" {
			return name
		}
	}
	if dev.Device != "" {
		return dev.Device
	}
	path := strings.TrimPrefix(dev.QDev, "/machine/peripheral/")
	if id, _, _ := strings.Cut(path, "/"); id != "" {
		return id
	}
	// A device without an id, such as /machine/peripheral-anon/device[1]/virtio-backend.
	if !strings.HasPrefix(dev.Inserted.NodeName, "#") {
		return dev.Inserted.NodeName
	}
	return ""
}

// qomPath is the absolute path of a device: query-block gives some as bare ids, which qom-set does not always find.
func qomPath(qdev string) string {
	if qdev == "" || strings.HasPrefix(qdev, "/") {
		return qdev
	}
	return "/machine/peripheral/" + qdev
}

// throttleGroup finds the group of a throttle filter, which QEMU shows nowhere but in the node's file name.
func throttleGroup(filename string) (string, error) {
	text, ok := strings.CutPrefix(filename, "json:")
	if !ok {
		return "", fmt.Errorf("no throttle group in %q", filename)
	}
	var options struct {
		Group string `json:"throttle-group"`
	}
	if err := json.Unmarshal([]byte(text), &options); err != nil || options.Group == "" {
		return "", fmt.Errorf("no throttle group in %q", filename)
	}
	return options.Group, nil
}

// compatOf is "0.10" or "1.1" for a qcow2 image, the format's version 2 or 3, and "" for others.
func compatOf(info *qmp.BlockDeviceInfo) string {
	if info.Image.FormatSpecific == nil {
		return ""
	}
	return info.Image.FormatSpecific.Data.Compat
}
