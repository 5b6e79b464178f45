package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

type args = map[string]any

func TestQEMUHandshake(t *testing.T) {
	t.Parallel()
	pretty := filepath.Join(t.TempDir(), "p")
	q := qmptest.StartQEMU(t, "-name", "web", "-uuid", "0f3a1b5e-0000-4000-8000-00000000002a",
		"-chardev", "socket,id=p,path="+pretty+",server=on,wait=off", "-mon", "chardev=p,mode=control,pretty=on")
	ctx := t.Context()

	for _, addr := range []string{q.Sockets[0], "unix:" + pretty} {
		c := dial(t, addr)
		version, err := c.QueryVersion(ctx)
		if err != nil || version != c.Version() || !version.AtLeast(7, 2) {
			t.Errorf("version %+v, greeted with %+v, %v", version, c.Version(), err)
		}
		if got, err := c.QueryName(ctx); err != nil || got != "web" {
			t.Errorf("name %q, %v", got, err)
		}
		if got, err := c.QueryUUID(ctx); err != nil || got != "0f3a1b5e-0000-4000-8000-00000000002a" {
			t.Errorf("uuid %q, %v", got, err)
		}
		if got, err := c.QueryVMGenerationID(ctx); err != nil || got != "" {
			t.Errorf("vmgenid %q, %v", got, err)
		}
		if got, err := c.QueryStatus(ctx); err != nil || got != (qmp.StatusInfo{Status: "prelaunch"}) {
			t.Errorf("status %+v, %v", got, err)
		}
		if got, err := c.QueryBlock(ctx); err != nil || len(got) != 0 {
			t.Errorf("block devices %+v, %v", got, err)
		}

		// The largest answer there is.
		var schema []struct {
			Name     string `json:"name"`
			MetaType string `json:"meta-type"`
		}
		if err := c.Execute(ctx, "query-qmp-schema", nil, &schema); err != nil || len(schema) < 500 {
			t.Errorf("schema of %d entries, %v", len(schema), err)
		}
		_ = c.Close()
	}
}

func TestQEMUBatchOrder(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	c := dial(t, q.Sockets[0])
	add := qmp.Command{Name: "object-add", Args: args{"qom-type": "throttle-group", "id": "g"}}
	del := qmp.Command{Name: "object-del", Args: args{"id": "g"}}
	replies, err := c.Batch(t.Context(), del, add, add, qmp.Command{Name: "query-status"}, del, del)
	if err != nil {
		t.Fatal(err)
	}
	var failed []int
	for i, r := range replies {
		if r.Err != nil {
			failed = append(failed, i)
		}
	}
	if !cmp.Equal(failed, []int{0, 2, 5}) {
		t.Errorf("failed: %v", failed)
	}
	var status qmp.StatusInfo
	if err := replies[3].Decode(&status); err != nil || status.Status != "prelaunch" {
		t.Errorf("%+v, %v", status, err)
	}
}

func TestQEMUBusy(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	first := dial(t, q.Sockets[0])
	for range 4 { // the later ones find the queue of waiting clients full, which looks different
		within(t, "Dial", func() {
			_, err := qmp.Dial(t.Context(), q.Sockets[0], qmp.WithHandshakeTimeout(200*time.Millisecond))
			wantErrorIs(t, "Dial", err, qmp.ErrBusy)
		})
	}
	if err := first.Execute(t.Context(), "query-status", nil, nil); err != nil {
		t.Errorf("the first client: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, func() { first.Close() })
	second := dial(t, q.Sockets[0])
	if _, err := second.QueryStatus(t.Context()); err != nil {
		t.Errorf("the second client: %v", err)
	}
}

// nullNodes adds nodes that read as zeroes and swallow what is written.
func nullNodes(t *testing.T, c *qmp.Client, size int64, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := c.BlockdevAdd(t.Context(), args{"driver": "null-co", "node-name": name, "size": size, "read-zeroes": true}); err != nil {
			t.Fatal(err)
		}
	}
}

func backup(t *testing.T, c *qmp.Client, id, source, target string, speed int64) {
	t.Helper()
	err := c.Transaction(t.Context(), qmp.BlockdevBackup(qmp.BackupOptions{
		JobID: id, Device: source, Target: target, Sync: "full", Speed: speed, AutoFinalize: true,
	}))
	if err != nil {
		t.Fatal(err)
	}
}

// Many jobs at once, each with its own WaitJob, among large replies, and an event reader that sleeps: every
// job ends as itself, and every event is there, in order.
func TestQEMUEventsUnderLoad(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	c := dial(t, q.Sockets[0])
	sleeper := c.Subscribe()
	defer sleeper.Close()

	const n = 20
	var wg sync.WaitGroup
	for i := range n {
		source, target := fmt.Sprintf("s%d", i), fmt.Sprintf("t%d", i)
		nullNodes(t, c, 1<<20, source, target)
	}
	for i := range n {
		id := fmt.Sprintf("job%d", i)
		wg.Go(func() {
			backup(t, c, id, fmt.Sprintf("s%d", i), fmt.Sprintf("t%d", i), 0)
			if err := c.WaitJob(t.Context(), id, nil); err != nil {
				t.Error(err)
			}
		})
	}
	for range 2 {
		wg.Go(func() {
			for range 4 {
				var schema []json.RawMessage
				if err := c.Execute(t.Context(), "query-qmp-schema", nil, &schema); err != nil {
					t.Error(err)
				}
			}
		})
	}
	within(t, "a WaitJob", wg.Wait)

	ends := map[string][]string{}
	for _, e := range sleeper.Pending() {
		var change struct{ ID, Status string }
		if e.Name != "JOB_STATUS_CHANGE" {
			continue
		}
		if err := json.Unmarshal(e.Data, &change); err != nil {
			t.Fatal(err)
		}
		switch change.Status {
		case "created", "waiting", "pending", "concluded", "null":
			ends[change.ID] = append(ends[change.ID], change.Status)
		}
	}
	for i := range n {
		want := []string{"created", "waiting", "pending", "concluded", "null"}
		if got := ends[fmt.Sprintf("job%d", i)]; !cmp.Equal(got, want) {
			t.Errorf("job%d: %v", i, got)
		}
	}
	if jobs, err := c.QueryJobs(t.Context()); err != nil || len(jobs) != 0 {
		t.Errorf("jobs left: %+v, %v", jobs, err)
	}
}

func run(t *testing.T, name string, arg ...string) {
	t.Helper()
	if out, err := exec.Command(name, arg...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, arg, err, out)
	}
}

// A backup with all that the runner uses around it: bitmaps, a transaction, the job's true end, and a
// target that really holds the data.
func TestQEMUBackup(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source.qcow2"), filepath.Join(dir, "target.raw")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", source, "8M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 3M", source)
	run(t, "qemu-img", "create", "-q", "-f", "raw", target, "8M")

	q := qmptest.StartQEMU(t)
	c := dial(t, q.Sockets[0])
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if objects, err := c.Objects(ctx); err != nil || len(objects) != 0 {
		t.Errorf("objects before the first: %v, %v", objects, err)
	}
	must(c.ObjectAddThrottleGroup(ctx, "group"))
	if objects, err := c.Objects(ctx); err != nil || !cmp.Equal(objects, []string{"group"}) {
		t.Errorf("objects: %v, %v", objects, err)
	}
	must(c.QOMSet(ctx, "/objects/group", "limits", args{"iops-total": 1000000}))
	must(c.BlockdevAdd(ctx, args{"driver": "qcow2", "node-name": "fmt", "file": args{"driver": "file", "filename": source}}))
	must(c.BlockdevAdd(ctx, args{"driver": "throttle", "node-name": "top", "throttle-group": "group", "file": "fmt", "detect-zeroes": "on"}))
	must(c.BlockdevAdd(ctx, args{"driver": "raw", "node-name": "target", "file": args{"driver": "file", "filename": target}}))
	if e := new(qmp.Error); !errors.As(c.ObjectDel(ctx, "group"), &e) {
		t.Error("a throttle group in use was deleted")
	}

	must(c.Transaction(ctx,
		qmp.BitmapAdd("fmt", "old", true, false),
		qmp.BitmapAdd("fmt", "todo", false, true),
		qmp.BitmapMerge("fmt", "todo", qmp.BitmapRef{Node: "fmt", Name: "old"})))
	err := c.Transaction(ctx, qmp.BitmapAdd("fmt", "lost", false, false), qmp.BitmapAdd("fmt", "old", false, false))
	if e := new(qmp.Error); !errors.As(err, &e) || e.Command != "transaction" {
		t.Errorf("a bitmap twice: %v", err)
	}
	must(c.Transaction(ctx, qmp.BitmapRemove("fmt", "todo")))

	nodes, err := c.QueryNamedBlockNodes(ctx)
	must(err)
	found := 0
	for _, n := range nodes {
		switch n.NodeName {
		case "fmt":
			found++
			want := []qmp.DirtyBitmap{{Name: "old", Granularity: 65536, Recording: true, Persistent: true}}
			if diff := cmp.Diff(want, n.DirtyBitmaps); diff != "" {
				t.Errorf("bitmaps of fmt (-want +got):\n%s", diff)
			}
			if n.Image.FormatSpecific == nil || n.Image.FormatSpecific.Data.Compat != "1.1" || n.Image.VirtualSize != 8<<20 {
				t.Errorf("fmt: %+v", n)
			}
		case "top":
			found++
			if n.DetectZeroes != "on" || n.Driver != "throttle" || n.Image.VirtualSize != 8<<20 {
				t.Errorf("top: %+v", n)
			}
		}
	}
	if found != 2 {
		t.Errorf("nodes: %+v", nodes)
	}

	// Left-out options go back to their defaults, which is why they have to be given.
	must(c.BlockdevReopen(ctx,
		args{"driver": "throttle", "node-name": "top", "throttle-group": "group", "file": "fmt"},
		args{"driver": "raw", "node-name": "target", "file": args{"driver": "file", "filename": target}}))

	graph, err := c.BlockGraph(ctx)
	must(err)
	if below, ok := graph.Child("top", "file"); !ok || below.Name != "fmt" {
		t.Errorf("below top: %+v", below)
	}
	if parents := graph.Parents("fmt"); len(parents) != 1 || parents[0].Name != "top" || parents[0].Type != "block-driver" {
		t.Errorf("above fmt: %+v", parents)
	}

	backup(t, c, "job", "fmt", "target", 0)
	var last qmp.Job
	must(c.WaitJob(ctx, "job", func(j qmp.Job) { last = j }))
	if last.Status != "concluded" || last.Type != "backup" || last.Current != last.Total || last.Total == 0 {
		t.Errorf("last progress %+v", last)
	}
	for _, node := range []string{"target", "top", "fmt"} {
		must(c.BlockdevDel(ctx, node))
	}
	must(c.ObjectDel(ctx, "group"))
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", source, target)
}

func TestQEMUJobFails(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	q := qmptest.StartQEMU(t)
	c := dial(t, q.Sockets[0])
	const size = 16 << 20
	nullNodes(t, c, size, "source", "target")
	err := c.BlockdevAdd(ctx, args{
		"driver": "blkdebug", "node-name": "full", "image": args{"driver": "null-co", "size": size},
		"inject-error": []args{{"event": "none", "errno": 28}},
	})
	if err != nil {
		t.Fatal(err)
	}

	t.Run("target full", func(t *testing.T) {
		backup(t, c, "full", "source", "full", 0)
		err := c.WaitJob(ctx, "full", nil)
		if e := new(qmp.JobError); !errors.As(err, &e) || *e != (qmp.JobError{ID: "full", Desc: "No space left on device"}) {
			t.Errorf("got %v", err)
		}
	})

	t.Run("cancelled", func(t *testing.T) {
		backup(t, c, "slow", "source", "target", 1<<20)
		if jobs, err := c.QueryBlockJobs(ctx); err != nil || len(jobs) != 1 || jobs[0].ID != "slow" || jobs[0].Speed != 1<<20 || jobs[0].Len != size {
			t.Errorf("block jobs %+v, %v", jobs, err)
		}
		seen := false
		err := c.WaitJob(ctx, "slow", func(qmp.Job) {
			if !seen {
				seen = true
				if err := c.JobCancel(ctx, "slow"); err != nil {
					t.Error(err)
				}
			}
		})
		if e := new(qmp.JobError); !errors.As(err, &e) || e.Desc != "Operation canceled" {
			t.Errorf("got %v", err)
		}
		if e := new(qmp.Error); !errors.As(c.JobCancel(ctx, "slow"), &e) {
			t.Error("a job that is gone was cancelled")
		}
	})

	t.Run("cancelled while paused", func(t *testing.T) {
		backup(t, c, "paused", "source", "target", 1<<20)
		for _, command := range []string{"job-pause", "job-cancel"} {
			if err := c.Execute(ctx, command, args{"id": "paused"}, nil); err != nil {
				t.Fatal(err)
			}
		}
		if e := new(qmp.JobError); !errors.As(c.WaitJob(ctx, "paused", nil), &e) {
			t.Error("no JobError")
		}
	})

	t.Run("vanished", func(t *testing.T) {
		err := c.Execute(ctx, "blockdev-backup", args{"job-id": "auto", "device": "source", "target": "target", "sync": "full"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if e := new(qmp.JobError); !errors.As(c.WaitJob(ctx, "auto", nil), &e) {
			t.Error("no JobError")
		}
	})

	if jobs, err := c.QueryJobs(ctx); err != nil || len(jobs) != 0 {
		t.Errorf("jobs left: %+v, %v", jobs, err)
	}
}

func TestQEMUEndsDuringJob(t *testing.T) {
	t.Parallel()
	ends := map[string]func(*testing.T, *qmptest.QEMU){
		"killed": func(_ *testing.T, q *qmptest.QEMU) { q.Kill() },
		"quits": func(t *testing.T, q *qmptest.QEMU) {
			other := dial(t, q.Sockets[1])
			if err := other.Execute(context.Background(), "quit", nil, nil); err != nil && !errors.Is(err, qmp.ErrDisconnected) {
				t.Error(err)
			}
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := qmptest.StartQEMU(t)
			c := dial(t, q.Sockets[0])
			nullNodes(t, c, 1<<30, "source", "target")
			backup(t, c, "job", "source", "target", 1<<20)
			began := make(chan struct{})
			var once sync.Once
			result := make(chan error, 1)
			go func() {
				result <- c.WaitJob(t.Context(), "job", func(qmp.Job) { once.Do(func() { close(began) }) })
			}()
			<-began
			end(t, q)
			within(t, "WaitJob", func() { wantErrorIs(t, "WaitJob", <-result, qmp.ErrDisconnected) })
			within(t, "QEMU's end", func() { <-q.Exited() })
			if _, err := qmp.Dial(t.Context(), q.Sockets[0]); err == nil || errors.Is(err, qmp.ErrBusy) {
				t.Errorf("Dial of a QEMU that is gone: %v", err)
			}
		})
	}
}

// A client that dies with answers under way must leave nothing behind for the next one.
func TestQEMUNextClient(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	for i := range 5 {
		c := dial(t, q.Sockets[0])
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*5*time.Millisecond)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { _ = c.Execute(ctx, "query-qmp-schema", nil, nil) })
		}
		wg.Wait()
		cancel()
		_ = c.Close()
	}
	c := dial(t, q.Sockets[0])
	if _, err := c.QueryStatus(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestQEMULeavesStaleSocket(t *testing.T) {
	t.Parallel()
	q := qmptest.StartQEMU(t)
	q.Kill()
	if _, err := os.Lstat(q.Sockets[0]); err != nil {
		t.Fatal(err)
	}
	_, err := qmp.Dial(t.Context(), q.Sockets[0])
	if err == nil || errors.Is(err, qmp.ErrBusy) {
		t.Errorf("got %v", err)
	}
}
