package qmp

import "context"

// Action is one action of a transaction.
type Action struct {
	Type string `json:"type"`
	Data any    `json:"data"`
}

// Transaction runs the actions as one: where one fails, those before it are rolled back. All jobs and
// bitmaps that it starts begin at the same instant.
func (c *Client) Transaction(ctx context.Context, actions ...Action) error {
	return c.Execute(ctx, "transaction", struct {
		Actions []Action `json:"actions"`
	}{actions}, nil)
}

// BitmapRef names a bitmap by its node.
type BitmapRef struct {
	Node string `json:"node"`
	Name string `json:"name"`
}

// BitmapAdd adds a dirty bitmap to a node. A persistent one is stored in the image when the node closes; a
// disabled one does not record.
func BitmapAdd(node, name string, persistent, disabled bool) Action {
	return Action{"block-dirty-bitmap-add", struct {
		BitmapRef
		Persistent bool `json:"persistent"`
		Disabled   bool `json:"disabled"`
	}{BitmapRef{node, name}, persistent, disabled}}
}

// BitmapMerge adds what is dirty in the sources to the bitmap target of a node.
func BitmapMerge(node, target string, sources ...BitmapRef) Action {
	return Action{"block-dirty-bitmap-merge", struct {
		Node    string      `json:"node"`
		Target  string      `json:"target"`
		Bitmaps []BitmapRef `json:"bitmaps"`
	}{node, target, sources}}
}

// BitmapRemove removes a bitmap from a node, and from the image if it is stored there.
func BitmapRemove(node, name string) Action {
	return Action{"block-dirty-bitmap-remove", BitmapRef{node, name}}
}

// BackupOptions are the arguments of blockdev-backup. Strings and numbers that are empty are not sent.
type BackupOptions struct {
	JobID  string `json:"job-id"` // unique in the QEMU process's life
	Device string `json:"device"` // node to copy
	Target string `json:"target"` // node to copy to
	Sync   string `json:"sync"`   // full, top, bitmap, none

	Bitmap     string `json:"bitmap,omitempty"`
	BitmapMode string `json:"bitmap-mode,omitempty"` // never, on-success, always

	Compress bool   `json:"compress,omitempty"`
	Speed    int64  `json:"speed,omitempty"` // bytes per second; 0: no limit
	XPerf    *XPerf `json:"x-perf,omitempty"`

	// OnCBWError is what a failing target does to a guest's write: break-guest-write (the default) fails
	// it, break-snapshot fails the job. QEMU 11.1 and later; an error on earlier ones.
	OnCBWError string `json:"on-cbw-error,omitempty"`

	// DiscardSource discards what is copied on the node that it is copied from. QEMU 9.1 and later.
	DiscardSource bool `json:"discard-source,omitempty"`

	// Both are always sent. WaitJob needs a job that finalizes itself and is not dismissed: true, false.
	AutoFinalize bool `json:"auto-finalize"`
	AutoDismiss  bool `json:"auto-dismiss"`
}

// XPerf are the performance options of a backup job.
type XPerf struct {
	MaxChunk   int64 `json:"max-chunk,omitempty"`   // largest copy at once, in bytes
	MaxWorkers int   `json:"max-workers,omitempty"` // copies under way at the same time; QEMU's default is 64
}

// BlockdevBackup starts a backup job.
func BlockdevBackup(o BackupOptions) Action { return Action{"blockdev-backup", o} }
