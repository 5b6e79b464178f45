package qmp

import "context"

// BlockInfo is one guest device with a block backend, from query-block.
type BlockInfo struct {
	Device    string           `json:"device"` // name of the backend (-drive id=); empty with -blockdev
	QDev      string           `json:"qdev"`   // QOM path or id of the device; empty without one
	Type      string           `json:"type"`   // always "unknown"
	Removable bool             `json:"removable"`
	Locked    bool             `json:"locked"`
	TrayOpen  bool             `json:"tray_open"`
	IOStatus  string           `json:"io-status"`
	Inserted  *BlockDeviceInfo `json:"inserted"` // nil: no medium
}

// BlockDeviceInfo is one block node, from query-named-block-nodes, or the node at the top of a device, from
// query-block.
type BlockDeviceInfo struct {
	NodeName         string        `json:"node-name"`
	Driver           string        `json:"drv"`
	ReadOnly         bool          `json:"ro"`
	File             string        `json:"file"` // a file name, or json:{...} where that can't tell it all
	BackingFile      string        `json:"backing_file"`
	BackingFileDepth int           `json:"backing_file_depth"`
	DetectZeroes     string        `json:"detect_zeroes"` // off, on, unmap
	Cache            CacheInfo     `json:"cache"`
	Encrypted        bool          `json:"encrypted"`
	Image            ImageInfo     `json:"image"`
	DirtyBitmaps     []DirtyBitmap `json:"dirty-bitmaps"`
}

// CacheInfo is the cache mode of a node.
type CacheInfo struct {
	Writeback bool `json:"writeback"`
	Direct    bool `json:"direct"`
	NoFlush   bool `json:"no-flush"`
}

// ImageInfo describes the image behind a node. Sizes are in bytes.
type ImageInfo struct {
	Filename       string          `json:"filename"`
	Format         string          `json:"format"` // the node's driver
	VirtualSize    int64           `json:"virtual-size"`
	ActualSize     int64           `json:"actual-size"`
	ClusterSize    int64           `json:"cluster-size"` // 0: the format has none
	Encrypted      bool            `json:"encrypted"`
	BackingFile    string          `json:"backing-filename"`
	FormatSpecific *FormatSpecific `json:"format-specific"`
	BackingImage   *ImageInfo      `json:"backing-image"` // of a filter: the node below; only in QueryBlock
}

// FormatSpecific is what a format alone has to say. The fields of Data are those of qcow2.
type FormatSpecific struct {
	Type string `json:"type"`
	Data struct {
		Compat     string        `json:"compat"`    // 0.10 (version 2) or 1.1 (version 3)
		DataFile   string        `json:"data-file"` // external data file; empty without one
		ExtendedL2 bool          `json:"extended-l2"`
		Corrupt    bool          `json:"corrupt"`
		Bitmaps    []QCOW2Bitmap `json:"bitmaps"`
	} `json:"data"`
}

// QCOW2Bitmap is a bitmap that is stored in a qcow2 image, as of when it was opened.
type QCOW2Bitmap struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"` // bytes
	Flags       []string `json:"flags"`       // in-use, auto
}

// DirtyBitmap is a dirty bitmap on a node.
type DirtyBitmap struct {
	Name         string `json:"name"`        // empty: made by a QEMU job, or by somebody careless
	Count        int64  `json:"count"`       // dirty bytes
	Granularity  int64  `json:"granularity"` // bytes
	Recording    bool   `json:"recording"`
	Busy         bool   `json:"busy"` // in use by a job
	Persistent   bool   `json:"persistent"`
	Inconsistent bool   `json:"inconsistent"` // fit for removal only
}

// QueryBlock lists the guest's block devices.
func (c *Client) QueryBlock(ctx context.Context) ([]BlockInfo, error) {
	return query[[]BlockInfo](ctx, c, "query-block", nil)
}

// QueryNamedBlockNodes lists all block nodes, without the images of their backing chains (flat).
func (c *Client) QueryNamedBlockNodes(ctx context.Context) ([]BlockDeviceInfo, error) {
	return query[[]BlockDeviceInfo](ctx, c, "query-named-block-nodes", struct {
		Flat bool `json:"flat"`
	}{true})
}

// BlockGraph is QEMU's block graph: which node sits on which.
type BlockGraph struct {
	Nodes []GraphNode `json:"nodes"`
	Edges []GraphEdge `json:"edges"`
}

// GraphNode is a node of the graph.
type GraphNode struct {
	ID   uint64 `json:"id"`
	Type string `json:"type"` // block-driver, block-backend, block-job
	Name string `json:"name"` // node name, backend name or QOM path, job id
}

// GraphEdge says that Parent uses Child.
type GraphEdge struct {
	Parent uint64 `json:"parent"`
	Child  uint64 `json:"child"`
	Name   string `json:"name"` // the role: file, backing, target, root, ...
}

// Child returns the node that the block node uses in the role, such as "file".
func (g BlockGraph) Child(node, role string) (GraphNode, bool) {
	id, ok := g.blockNode(node)
	if !ok {
		return GraphNode{}, false
	}
	for _, e := range g.Edges {
		if e.Parent == id && e.Name == role {
			return g.byID(e.Child)
		}
	}
	return GraphNode{}, false
}

// Parents returns all that use the block node: nodes, backends and jobs.
func (g BlockGraph) Parents(node string) []GraphNode {
	id, ok := g.blockNode(node)
	if !ok {
		return nil
	}
	var parents []GraphNode
	for _, e := range g.Edges {
		if e.Child == id {
			if p, ok := g.byID(e.Parent); ok {
				parents = append(parents, p)
			}
		}
	}
	return parents
}

// blockNode finds a block node by its name: backends and jobs can bear the same one.
func (g BlockGraph) blockNode(name string) (id uint64, ok bool) {
	for _, n := range g.Nodes {
		if n.Type == "block-driver" && n.Name == name {
			return n.ID, true
		}
	}
	return 0, false
}

func (g BlockGraph) byID(id uint64) (GraphNode, bool) {
	for _, n := range g.Nodes {
		if n.ID == id {
			return n, true
		}
	}
	return GraphNode{}, false
}

// BlockGraph runs x-debug-query-block-graph. Its form has no promise of stability, but it is the only
// query that names the children of a filter on QEMU before 11.
func (c *Client) BlockGraph(ctx context.Context) (BlockGraph, error) {
	return query[BlockGraph](ctx, c, "x-debug-query-block-graph", nil)
}

// BlockdevAdd adds a node; the options are those of blockdev-add ("driver", "node-name", ...).
func (c *Client) BlockdevAdd(ctx context.Context, options any) error {
	return c.Execute(ctx, "blockdev-add", options, nil)
}

// BlockdevDel deletes a node that nothing uses.
func (c *Client) BlockdevDel(ctx context.Context, node string) error {
	return c.Execute(ctx, "blockdev-del", struct {
		NodeName string `json:"node-name"`
	}{node}, nil)
}

// BlockdevReopen changes the options of nodes, all of them together or none. An option that is left out
// goes back to its default, detect-zeroes and cache among them.
func (c *Client) BlockdevReopen(ctx context.Context, options ...any) error {
	return c.Execute(ctx, "blockdev-reopen", struct {
		Options []any `json:"options"`
	}{options}, nil)
}
