package fusefs

import (
	"errors"
	"testing"
	"time"

	"github.com/sirupsen/logrus/hooks/test"

	"qmchain/chain/image"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
	"qmchain/fusefs/tree"
)

// What is kept is bounded, what may pass is tried again, and after the end nothing is read.
func TestTables(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	m := g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	set, err := source.Open(g.Repo.Dir)
	if err != nil {
		t.Fatal(err)
	}
	log, _ := test.NewNullLogger()
	now := start
	clock := func() time.Time { return now }
	c := newCatalog(set, log, clock)
	d := newDisks(c, image.PoolOptions{})
	tables := newTables(d, newQuietLog(log, clock), clock)
	place := tree.Place{Guest: "110", Point: m.ID, UUID: m.UUID}
	ask := func(disk string) found { return tables.of(t.Context(), place, []string{disk})[disk] }

	for range 3 {
		if f := ask("scsi0"); f.err != nil || f.parts != nil {
			t.Errorf("a disk without a table: %+v", f)
		}
	}
	for range 3 {
		if f := ask("scsi9"); !errors.Is(f.err, errGone) {
			t.Errorf("no such disk: %v", f.err)
		}
	}
	if n := tables.reads.Load(); n != 2 {
		t.Errorf("%d tables were read", n)
	}
	now = now.Add(tableAgain + time.Second)
	ask("scsi0")
	ask("scsi9")
	if n := tables.reads.Load(); n != 3 {
		t.Errorf("%d tables were read, after the time for errors", n)
	}

	for i := range maxTables + 10 {
		done := make(chan struct{})
		close(done)
		tables.mu.Lock()
		tables.makeRoom()
		tables.known[diskKey{"110", "another", string(rune(i))}] = &table{done: done}
		tables.mu.Unlock()
	}
	if n := len(tables.known); n > maxTables {
		t.Errorf("%d are kept", n)
	}

	if !tables.end(time.Second) {
		t.Error("does not end")
	}
	if f := tables.of(t.Context(), tree.Place{Guest: "110", Point: m.ID, UUID: "other"}, []string{"scsi0"})["scsi0"]; !errors.Is(f.err, errUnmounted) {
		t.Errorf("after the end: %v", f.err)
	}
	if n := d.count(); n != 0 {
		t.Errorf("%d disks are open", n)
	}
}
