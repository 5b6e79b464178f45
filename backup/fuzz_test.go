package backup

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/internal/durable"
	"qmchain/qmp"
)

// answering serves one client of QMP for good, and returns a function that says what queries are to be answered.
func answering(f *testing.F) (client *qmp.Client, set func(map[string]json.RawMessage)) {
	f.Helper()
	path := filepath.Join(f.TempDir(), "qmp")
	l, err := net.Listen("unix", path)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = l.Close() })
	var answers atomic.Pointer[map[string]json.RawMessage]
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintln(conn, `{"QMP": {"version": {"qemu": {"micro": 13, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}`)
		in := json.NewDecoder(bufio.NewReader(conn))
		for {
			var command struct {
				Execute string `json:"execute"`
				ID      any    `json:"id"`
			}
			if in.Decode(&command) != nil {
				return
			}
			answer := json.RawMessage("{}")
			if all := answers.Load(); all != nil && (*all)[command.Execute] != nil {
				answer = (*all)[command.Execute]
			}
			text, err := json.Marshal(map[string]any{"return": answer, "id": command.ID})
			if err != nil {
				return
			}
			if _, err := conn.Write(append(text, "\r\n"...)); err != nil {
				return
			}
		}
	}()
	client, err = qmp.Dial(context.Background(), "unix:"+path)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = client.Close() })
	return client, func(all map[string]json.RawMessage) { answers.Store(&all) }
}

// FuzzGuest looks at a guest with any block devices, nodes, graph and jobs. Whatever QEMU says of itself: what is planned is for disks that
// are whole, an increment has a bitmap that records since its parent, and nothing is taken out of the guest but what is ours.
func FuzzGuest(f *testing.F) {
	const (
		image  = `"image": {"filename": "a", "format": "qcow2", "virtual-size": 1048576, "format-specific": {"type": "qcow2", "data": {"compat": "1.1"}}}`
		device = `[{"device": "", "qdev": "scsi0", "type": "unknown", "inserted": {"node-name": "drive-scsi0", "drv": "throttle", "ro": false, ` + image + `}}]`
		mark   = `{"name": "qmchain:01234567:20261120T130000Z-0002:scsi0", "recording": true, "persistent": true, "count": 65536, "granularity": 65536}`
		nodes  = `[{"node-name": "drive-scsi0", "drv": "throttle", ` + image + `}, {"node-name": "f1", "drv": "qcow2", "dirty-bitmaps": [` + mark + `], ` + image + `}, {"node-name": "e1", "drv": "file", ` + image + `}]`
		graph  = `{"nodes": [{"id": 1, "type": "block-backend", "name": ""}, {"id": 2, "type": "block-driver", "name": "drive-scsi0"}, {"id": 3, "type": "block-driver", "name": "f1"}, {"id": 4, "type": "block-driver", "name": "e1"}], "edges": [{"name": "root", "parent": 1, "child": 2}, {"name": "file", "parent": 2, "child": 3}, {"name": "file", "parent": 3, "child": 4}]}`

		loops = `{"nodes": [{"id": 2, "type": "block-driver", "name": "drive-scsi0"}], "edges": [{"name": "file", "parent": 2, "child": 2}]}`
		ours  = `{"nodes": [{"id": 1, "type": "block-backend", "name": ""}, {"id": 2, "type": "block-driver", "name": "drive-scsi0"}, {"id": 3, "type": "block-driver", "name": "qmchain-cbw0"}, {"id": 4, "type": "block-driver", "name": "f1"}, {"id": 5, "type": "block-driver", "name": "qmchain-fleece0"}], "edges": [{"name": "root", "parent": 1, "child": 2}, {"name": "file", "parent": 2, "child": 3}, {"name": "file", "parent": 3, "child": 4}, {"name": "target", "parent": 3, "child": 5}]}`
	)
	left := strings.Replace(nodes, `[{`, `[{"node-name": "qmchain-cbw0", "drv": "copy-before-write"}, {"node-name": "qmchain-fleece0", "drv": "qcow2"}, {"node-name": "qmchain-top0", "drv": "raw"}, {`, 1)
	left = strings.Replace(left, `"filename": "a"`, `"filename": "json:{\"throttle-group\": \"throttle-drive-scsi0\"}"`, 1)
	f.Add([]byte(device), []byte(nodes), []byte(graph), []byte("[]"), []byte("[]"))
	f.Add([]byte(device), []byte(nodes), []byte(loops), []byte("[]"), []byte("[]"))
	f.Add([]byte(device), []byte(left), []byte(ours), []byte(`[{"id": "qmchain-job0", "type": "backup", "status": "running"}]`), []byte(`[{"name": "qmchain-frozen", "type": "child<throttle-group>"}]`))
	for _, version := range []string{"pve8", "pve9"} {
		var recorded [2][]byte
		for i, query := range []string{"query-block", "query-named-block-nodes"} {
			text, err := os.ReadFile("../qmp/testdata/" + version + "-" + query + ".json")
			if err != nil {
				f.Fatal(err)
			}
			var reply struct{ Return json.RawMessage }
			if err := json.Unmarshal(text, &reply); err != nil {
				f.Fatal(err)
			}
			var short bytes.Buffer
			if err := json.Compact(&short, reply.Return); err != nil {
				f.Fatal(err)
			}
			recorded[i] = short.Bytes()
		}
		f.Add(recorded[0], recorded[1], []byte(graph), []byte("[]"), []byte("[]"))
	}
	client, set := answering(f)
	f.Fuzz(func(t *testing.T, devices, named, edges, jobs, objects []byte) {
		for _, text := range [][]byte{devices, named, edges, jobs, objects} {
			if !json.Valid(text) {
				return // for the client's own target
			}
		}
		set(map[string]json.RawMessage{
			"query-block": devices, "query-named-block-nodes": named, "x-debug-query-block-graph": edges, "query-jobs": jobs, "qom-list": objects,
			"query-uuid": json.RawMessage(`{"UUID": "00000000-0000-0000-0000-000000000000"}`), "query-status": json.RawMessage(`{"status": "running"}`),
			"qom-get": json.RawMessage(`"scsi-hd"`),
		})
		v, err := look(t.Context(), client)
		if err != nil {
			return
		}
		p1 := testPoint(id1, testImage("scsi0", nil, ""), testImage("scsi1", nil, ""))
		points := chain.Points{p1, testPoint(id2, testImage("scsi0", p1, "scsi0"))}
		p := planner{repo: repoID, points: points, guest: points[1].Guest, now: time.Unix(0, 0), memory: true, sound: func(chain.Layer) error { return nil }}
		checkSteps(t, v)
		for _, b := range slices.Concat(uselessBitmaps(v, repoID, points, []chain.ID{idNew}), unusable(v, repoID, points)) {
			if name, ok := chain.ParseBitmapName(b.name); (!ok || name.Repo != repoID) && b.name != freshBitmap {
				t.Errorf("bitmap %q is somebody else's", b.name)
			}
		}
		if ids, err := client.Objects(t.Context()); err == nil {
			v.findings(ids, repoID, points, nil)
		}

		disks, err := v.disks()
		if err != nil {
			return
		}
		for _, d := range disks {
			if d.Left != "" || d.busy != nil {
				continue
			}
			if chain.CheckDiskName(d.Name) != nil || d.Size <= 0 || v.nodes[d.top] == nil || v.nodes[d.format] == nil || !strings.HasPrefix(d.device, "/") || d.Driver != "qcow2" && d.Driver != "raw" {
				t.Errorf("disk %+v", d)
			}
		}
		plan, err := p.plan(idNew, disks, Request{Level: Auto})
		if err != nil {
			return
		}
		for _, d := range plan.Disks {
			if !d.Level.Overlay() {
				continue
			}
			i := slices.IndexFunc(d.bitmaps, func(b qmp.DirtyBitmap) bool { return b.Name == d.Old && b.Recording && !b.Inconsistent && !b.Busy })
			name, ok := chain.ParseBitmapName(d.Old)
			if i < 0 || !ok || d.Parent == nil || name.Repo != repoID || name.Point != d.Parent.Point.ID || name.Disk != d.Parent.Disk.Name || d.Size < d.Parent.Disk.VirtualSize {
				t.Errorf("an increment of %+v", d)
			}
		}
	})
}

// checkSteps makes sure that only what is ours goes, and that the rest is given what it had.
func checkSteps(t *testing.T, v *view) {
	steps, _ := teardown(v)
	gone := map[any]bool{}
	for _, s := range steps {
		switch s.command {
		case "blockdev-del":
			name, _ := s.args["node-name"].(string)
			if !strings.HasPrefix(name, ourPrefix) || v.nodes[name] == nil || gone[name] {
				t.Errorf("node %q is to go", name)
			}
			gone[name] = true
		case "blockdev-reopen":
			list, _ := s.args["options"].([]map[string]any)
			for _, o := range list {
				name, _ := o["node-name"].(string)
				if n := v.nodes[name]; n == nil || n.driver != "throttle" && !strings.HasPrefix(name, topPrefix) {
					t.Errorf("node %q is to be changed", name)
				}
			}
		case "qom-set":
			if path, _ := s.args["path"].(string); !strings.HasPrefix(path, "/") || s.args["property"] != "drive" {
				t.Errorf("%+v", s)
			}
		default:
			t.Errorf("%+v", s)
		}
	}
}

// FuzzKept reads any text as what was saved when a guest stopped, with a seal that fits: what is read names no file outside of its folder.
func FuzzKept(f *testing.F) {
	kept := Kept{Dir: f.TempDir(), FS: durable.FS{}}
	saved := savedGuest{
		Time: time.Unix(1e9, 0).UTC(), Guest: chain.GuestIdentity{Name: "web"},
		Disks: []savedDisk{{Node: "f1", Driver: "qcow2", Size: 1 << 20, Volumes: []volume{{Path: "/a.qcow2"}}, Sidecar: "0.qcow2", Bitmaps: []savedBitmap{{"b", 65536, 1}}}},
	}
	if err := kept.folder("web"); err != nil {
		f.Fatal(err)
	}
	if err := kept.write("web", saved); err != nil {
		f.Fatal(err)
	}
	path := kept.path("web", savedFile)
	text, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text, []byte(`{"b": "why"}`))
	f.Add(bytes.Replace(text, []byte("0.qcow2"), []byte("../0.qcow2"), 1), []byte("null"))
	f.Add(bytes.Replace(text, []byte(`"disks"`), []byte(`"later": 1, "disks"`), 1), []byte("{}"))
	f.Fuzz(func(t *testing.T, text, refused []byte) {
		var g savedGuest
		if json.Unmarshal(text, &g) == nil && kept.write("web", g) == nil {
			sealed, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			read, err := kept.read("web", savedFile)
			switch {
			case errors.Is(err, chain.ErrDamaged):
			case err != nil:
				t.Fatalf("unexpected kind of error: %v", err)
			default:
				for _, d := range read.Disks {
					if filepath.Base(d.Sidecar) != d.Sidecar || filepath.Ext(d.Sidecar) != sidecarExt || strings.HasPrefix(d.Sidecar, ".") {
						t.Errorf("sidecar %q", d.Sidecar)
					}
					_ = d.path()
				}
				if err := kept.write("web", *read); err != nil {
					t.Fatal(err)
				}
				if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, sealed) {
					t.Errorf("%s became %s, %v", sealed, again, err)
				}
			}
		}
		for name, b := range map[string][]byte{savedFile: text, refusedFile: refused} {
			if err := os.WriteFile(kept.path("web", name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if g, err := kept.read("web", savedFile); err == nil && g.Format != keptFormat || err != nil && !errors.Is(err, chain.ErrDamaged) {
			t.Errorf("%+v, %v", g, err)
		}
		if r := kept.refusals("web"); r == nil {
			t.Error("nothing to add a refusal to")
		}
		kept.findings("web", true)
	})
}
