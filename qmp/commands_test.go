package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

// What the methods send, as QEMU's schema wants it.
func TestCommandsOnTheWire(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	c := dial(t, f.Addr())
	type m = map[string]any
	tests := []struct {
		run           func(context.Context) error
		command, args string // JSON; empty: no arguments
		returns       any
	}{
		{run: c.Stop, command: "stop"},
		{run: c.Cont, command: "cont"},
		{
			run:     func(ctx context.Context) error { return c.ObjectAddThrottleGroup(ctx, "qmchain-paused") },
			command: "object-add", args: `{"qom-type":"throttle-group","id":"qmchain-paused"}`,
		},
		{
			run:     func(ctx context.Context) error { return c.ObjectDel(ctx, "qmchain-paused") },
			command: "object-del", args: `{"id":"qmchain-paused"}`,
		},
		{
			run: func(ctx context.Context) error {
				return c.BlockdevAdd(ctx, m{"driver": "qcow2", "node-name": "n", "backing": nil})
			},
			command: "blockdev-add", args: `{"backing":null,"driver":"qcow2","node-name":"n"}`,
		},
		{
			run:     func(ctx context.Context) error { return c.BlockdevDel(ctx, "n") },
			command: "blockdev-del", args: `{"node-name":"n"}`,
		},
		{
			run: func(ctx context.Context) error {
				return c.BlockdevReopen(ctx, m{"node-name": "a"}, m{"node-name": "b"})
			},
			command: "blockdev-reopen", args: `{"options":[{"node-name":"a"},{"node-name":"b"}]}`,
		},
		{
			run: func(ctx context.Context) error {
				return c.QOMSet(ctx, "/machine/peripheral/scsi0", "drive", "qmchain-cbw0")
			},
			command: "qom-set", args: `{"path":"/machine/peripheral/scsi0","property":"drive","value":"qmchain-cbw0"}`,
		},
		{
			run:     func(ctx context.Context) error { _, err := c.QOMList(ctx, "/objects"); return err },
			command: "qom-list", args: `{"path":"/objects"}`, returns: []m{{"name": "x", "type": "y"}},
		},
		{
			run:     func(ctx context.Context) error { _, err := c.QueryNamedBlockNodes(ctx); return err },
			command: "query-named-block-nodes", args: `{"flat":true}`, returns: []m{},
		},
		{
			run:     func(ctx context.Context) error { return c.JobCancel(ctx, "j") },
			command: "job-cancel", args: `{"id":"j"}`,
		},
		{
			run:     func(ctx context.Context) error { return c.JobDismiss(ctx, "j") },
			command: "job-dismiss", args: `{"id":"j"}`,
		},
		{
			run: func(ctx context.Context) error {
				return c.Transaction(ctx,
					qmp.BitmapAdd("f0", "new", true, false),
					qmp.BitmapAdd("s0", "todo", false, true),
					qmp.BitmapMerge("s0", "todo", qmp.BitmapRef{Node: "f0", Name: "old"}, qmp.BitmapRef{Node: "f1", Name: "x"}),
					qmp.BitmapRemove("f0", "old"),
					qmp.BlockdevBackup(qmp.BackupOptions{JobID: "j1", Device: "s0", Target: "t0", Sync: "full", AutoFinalize: true}),
					qmp.BlockdevBackup(qmp.BackupOptions{
						JobID: "j2", Device: "s0", Target: "t0", Sync: "bitmap", Bitmap: "todo", BitmapMode: "never",
						Compress: true, Speed: 1000, XPerf: &qmp.XPerf{MaxChunk: 65536}, OnCBWError: "break-snapshot",
						AutoFinalize: false, AutoDismiss: true,
					}),
				)
			},
			command: "transaction",
			args: `{"actions":[` +
				`{"type":"block-dirty-bitmap-add","data":{"node":"f0","name":"new","persistent":true,"disabled":false}},` +
				`{"type":"block-dirty-bitmap-add","data":{"node":"s0","name":"todo","persistent":false,"disabled":true}},` +
				`{"type":"block-dirty-bitmap-merge","data":{"node":"s0","target":"todo","bitmaps":[{"node":"f0","name":"old"},{"node":"f1","name":"x"}]}},` +
				`{"type":"block-dirty-bitmap-remove","data":{"node":"f0","name":"old"}},` +
				`{"type":"blockdev-backup","data":{"job-id":"j1","device":"s0","target":"t0","sync":"full","auto-finalize":true,"auto-dismiss":false}},` +
				`{"type":"blockdev-backup","data":{"job-id":"j2","device":"s0","target":"t0","sync":"bitmap","bitmap":"todo","bitmap-mode":"never",` +
				`"compress":true,"speed":1000,"x-perf":{"max-chunk":65536},"on-cbw-error":"break-snapshot","auto-finalize":false,"auto-dismiss":true}}]}`,
		},
	}
	for _, tt := range tests {
		f.HandleValue(tt.command, tt.returns)
		if err := tt.run(t.Context()); err != nil {
			t.Errorf("%s: %v", tt.command, err)
			continue
		}
		sent := f.Commands()
		got := sent[len(sent)-1]
		if got.Name != tt.command || string(got.Args) != tt.args {
			t.Errorf("sent %s %s\nwant %s %s", got.Name, got.Args, tt.command, tt.args)
		}
	}
}

func TestSmallQueries(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	c := dial(t, f.Addr())
	ctx := t.Context()
	answer := func(command, value string) { f.HandleValue(command, json.RawMessage(value)) }

	answer("query-status", `{"status": "io-error", "running": false, "new-field": {}}`)
	if got, err := c.QueryStatus(ctx); err != nil || got != (qmp.StatusInfo{Status: "io-error"}) {
		t.Errorf("status %+v, %v", got, err)
	}
	answer("query-version", `{"qemu": {"micro": 2, "minor": 1, "major": 11}, "package": "p"}`)
	if got, err := c.QueryVersion(ctx); err != nil || got != (qmp.Version{Major: 11, Minor: 1, Micro: 2, Package: "p"}) || got.String() != "11.1.2" {
		t.Errorf("version %v, %v", got, err)
	}
	answer("query-uuid", `{"UUID": "0f3a"}`)
	if got, err := c.QueryUUID(ctx); err != nil || got != "0f3a" {
		t.Errorf("uuid %q, %v", got, err)
	}
	answer("query-name", `{}`)
	if got, err := c.QueryName(ctx); err != nil || got != "" {
		t.Errorf("name %q, %v", got, err)
	}
	answer("query-block-jobs", `[{"device": "j", "len": 10, "offset": 5, "io-status": "nospace", "type": "backup", "status": "running", "paused": true, "busy": true, "speed": 7}]`)
	want := []qmp.BlockJob{{ID: "j", Type: "backup", Status: "running", IOStatus: "nospace", Paused: true, Busy: true, Speed: 7, Offset: 5, Len: 10}}
	if got, err := c.QueryBlockJobs(ctx); err != nil || !cmp.Equal(got, want) {
		t.Errorf("block jobs %+v, %v", got, err)
	}
	if got, err := c.QueryJobs(ctx); err == nil {
		t.Errorf("an unknown command: %v", got)
	}
}

func TestAtLeast(t *testing.T) {
	t.Parallel()
	v := qmp.Version{Major: 9, Minor: 1}
	for _, tt := range []struct {
		major, minor int
		want         bool
	}{{9, 1, true}, {9, 0, true}, {8, 2, true}, {9, 2, false}, {10, 0, false}} {
		if got := v.AtLeast(tt.major, tt.minor); got != tt.want {
			t.Errorf("AtLeast(%d, %d) = %v", tt.major, tt.minor, got)
		}
	}
}

func TestQueryVMGenerationID(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	c := dial(t, f.Addr())
	ctx := t.Context()

	if got, err := c.QueryVMGenerationID(ctx); got != "" || err != nil {
		t.Errorf("command unknown: %q, %v", got, err)
	}
	f.HandleValue("query-vm-generation-id", map[string]string{"guid": "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"})
	if got, err := c.QueryVMGenerationID(ctx); got != "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	for desc, none := range map[string]bool{
		"VM Generation ID device not found":                  true,
		"this feature or command is not currently supported": true,
		"something else": false,
	} {
		f.Handle("query-vm-generation-id", func(json.RawMessage) (any, error) { return nil, errors.New(desc) })
		if got, err := c.QueryVMGenerationID(ctx); got != "" || (err == nil) != none {
			t.Errorf("%s: %q, %v", desc, got, err)
		}
	}
	f.Inject(qmptest.Fault{Cut: qmptest.CutBeforeReply})
	_, err := c.QueryVMGenerationID(ctx)
	wantErrorIs(t, "cut", err, qmp.ErrDisconnected)
}

func TestObjects(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	c := dial(t, f.Addr())
	f.HandleValue("qom-list", json.RawMessage(`[{"name": "type", "type": "string"}, {"name": "g", "type": "child<throttle-group>"}]`))
	if got, err := c.Objects(t.Context()); err != nil || !cmp.Equal(got, []string{"g"}) {
		t.Errorf("%v, %v", got, err)
	}
	f.Handle("qom-list", func(json.RawMessage) (any, error) {
		return nil, &qmp.Error{Class: "DeviceNotFound", Desc: "Device '/objects' not found"}
	})
	if got, err := c.Objects(t.Context()); err != nil || got != nil {
		t.Errorf("no container: %v, %v", got, err)
	}
	f.Handle("qom-list", func(json.RawMessage) (any, error) { return nil, errors.New("no") })
	if _, err := c.Objects(t.Context()); err == nil {
		t.Error("an error was hidden")
	}
}

func TestBlockGraphLinks(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.HandleValue("x-debug-query-block-graph", json.RawMessage(`{
		"nodes": [
			{"id": 1, "type": "block-backend", "name": "cbw"},
			{"id": 2, "type": "block-driver", "name": "cbw"},
			{"id": 3, "type": "block-driver", "name": "fmt"},
			{"id": 18446744073709551615, "type": "block-driver", "name": "fleece"},
			{"id": 5, "type": "block-job", "name": "job"}],
		"edges": [
			{"parent": 1, "child": 2, "name": "root", "perm": ["write"], "shared-perm": []},
			{"parent": 2, "child": 3, "name": "file", "perm": [], "shared-perm": []},
			{"parent": 2, "child": 18446744073709551615, "name": "target", "perm": [], "shared-perm": []},
			{"parent": 5, "child": 2, "name": "main node", "perm": [], "shared-perm": []},
			{"parent": 99, "child": 3, "name": "file", "perm": [], "shared-perm": []},
			{"parent": 3, "child": 98, "name": "file", "perm": [], "shared-perm": []}]}`))
	c := dial(t, f.Addr())
	g, err := c.BlockGraph(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ node, role, want string }{
		{"cbw", "file", "fmt"},
		{"cbw", "target", "fleece"},
		{"cbw", "backing", ""},
		{"none", "file", ""},
		{"job", "main node", ""}, // no block node
		{"fmt", "file", ""},      // an edge to nowhere
	} {
		if got, ok := g.Child(tt.node, tt.role); got.Name != tt.want || ok != (tt.want != "") {
			t.Errorf("Child(%s, %s) = %+v, %v", tt.node, tt.role, got, ok)
		}
	}
	want := []qmp.GraphNode{{ID: 1, Type: "block-backend", Name: "cbw"}, {ID: 5, Type: "block-job", Name: "job"}}
	if got := g.Parents("cbw"); !cmp.Equal(got, want) {
		t.Errorf("Parents(cbw) = %+v", got)
	}
	if got := g.Parents("fmt"); len(got) != 1 || got[0].ID != 2 {
		t.Errorf("Parents(fmt) = %+v", got)
	}
	if got := g.Parents("none"); got != nil {
		t.Errorf("Parents(none) = %+v", got)
	}
}

// recorded makes a client whose QEMU answers as a real one did: testdata/VERSION-COMMAND.json.
func recorded(t *testing.T, version string) *qmp.Client {
	t.Helper()
	f := qmptest.NewFake(t)
	for _, command := range []string{"query-block", "query-named-block-nodes", "query-name", "query-status", "query-version"} {
		data, err := os.ReadFile(filepath.Join("testdata", version+"-"+command+".json"))
		if err != nil {
			t.Fatal(err)
		}
		var reply struct{ Return json.RawMessage }
		if err := json.Unmarshal(data, &reply); err != nil {
			t.Fatal(err)
		}
		f.HandleValue(command, reply.Return)
	}
	return dial(t, f.Addr())
}

func TestRecordedSmall(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"pve8", "pve9"} {
		c := recorded(t, version)
		if got, err := c.QueryName(t.Context()); err != nil || got != "web" {
			t.Errorf("%s: name %q, %v", version, got, err)
		}
		if got, err := c.QueryStatus(t.Context()); err != nil || got != (qmp.StatusInfo{Status: "running", Running: true}) {
			t.Errorf("%s: status %+v, %v", version, got, err)
		}
		want := qmp.Version{Major: 10, Minor: 0, Micro: 13, Package: "Debian 1:10.0.13+ds-0+deb13u1"}
		if got, err := c.QueryVersion(t.Context()); err != nil || got != want {
			t.Errorf("%s: version %+v, %v", version, got, err)
		}
	}
}

func TestRecordedQueryBlock(t *testing.T) {
	t.Parallel()
	byDevice := func(t *testing.T, version string, n int) map[string]qmp.BlockInfo {
		t.Helper()
		blocks, err := recorded(t, version).QueryBlock(t.Context())
		if err != nil || len(blocks) != n {
			t.Fatalf("%d devices, %v", len(blocks), err)
		}
		found := map[string]qmp.BlockInfo{}
		for _, b := range blocks {
			found[b.QDev] = b
		}
		return found
	}

	t.Run("pve8", func(t *testing.T) {
		blocks := byDevice(t, "pve8", 6)
		scsi0 := qmp.BlockInfo{
			Device: "drive-scsi0", QDev: "scsi0", Type: "unknown", IOStatus: "ok",
			Inserted: &qmp.BlockDeviceInfo{
				NodeName: "#block530", Driver: "qcow2", File: "/var/lib/vz/images/120/vm-120-disk-0.qcow2",
				DetectZeroes: "unmap", Cache: qmp.CacheInfo{Writeback: true, Direct: true},
				Image: qmp.ImageInfo{
					Filename: "/var/lib/vz/images/120/vm-120-disk-0.qcow2", Format: "qcow2",
					VirtualSize: 67108864, ActualSize: 266240, ClusterSize: 65536,
					FormatSpecific: &qmp.FormatSpecific{Type: "qcow2"},
				},
			},
		}
		scsi0.Inserted.Image.FormatSpecific.Data.Compat = "1.1"
		if diff := cmp.Diff(scsi0, blocks["scsi0"]); diff != "" {
			t.Errorf("scsi0 (-want +got):\n%s", diff)
		}
		if cd := blocks["ide0"]; !cd.Removable || cd.Inserted != nil {
			t.Errorf("the empty CD-ROM: %+v", cd)
		}
		if fw := blocks["/machine/system.flash0"]; fw.Inserted == nil || !fw.Inserted.ReadOnly || fw.IOStatus != "" {
			t.Errorf("the firmware: %+v", fw)
		}
		if raw := blocks["/machine/peripheral/virtio1/virtio-backend"]; raw.Inserted == nil ||
			raw.Inserted.Driver != "raw" || raw.Inserted.Image.ClusterSize != 0 || raw.Inserted.Image.FormatSpecific != nil {
			t.Errorf("the raw disk: %+v", raw)
		}
	})

	t.Run("pve9", func(t *testing.T) {
		scsi0 := byDevice(t, "pve9", 6)["scsi0"]
		in := scsi0.Inserted
		if scsi0.Device != "" || in == nil || in.NodeName != "drive-scsi0" || in.Driver != "throttle" || in.DetectZeroes != "unmap" {
			t.Fatalf("scsi0: %+v", scsi0)
		}
		below := in.Image.BackingImage
		if below == nil || below.Format != "qcow2" || below.Filename != "/var/lib/vz/images/120/vm-120-disk-0.qcow2" || below.VirtualSize != 67108864 {
			t.Errorf("the image below scsi0: %+v", below)
		}
	})
}

func TestRecordedNodes(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]map[string]int{
		"pve8": {"qcow2": 3, "raw": 2, "file": 5},
		"pve9": {"throttle": 4, "qcow2": 3, "raw": 2, "file": 5},
	} {
		nodes, err := recorded(t, version).QueryNamedBlockNodes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]int{}
		for _, n := range nodes {
			got[n.Driver]++
			if n.NodeName == "" || n.File == "" || n.Image.VirtualSize == 0 || n.DetectZeroes == "" || !n.Cache.Writeback {
				t.Errorf("%s: incomplete node %+v", version, n)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: drivers (-want +got):\n%s", version, diff)
		}
	}
}
