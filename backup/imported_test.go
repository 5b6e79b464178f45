package backup_test

import (
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

// importPoint makes a point of the guest's disks as an import does.
func (r *rig) importPoint(at time.Time) {
	r.t.Helper()
	if _, err := repo.OpenOrCreate(r.repo, durable.FS{}); err != nil {
		r.t.Fatal(err)
	}
	g := r.guest()
	lock, err := g.Lock(r.t.Context(), time.Second)
	if err != nil {
		r.t.Fatal(err)
	}
	defer lock.Unlock()
	m := &chain.Manifest{
		Format: chain.FormatVersion, ID: chain.NewID(at, "", 1), UUID: repo.NewUUID(), Time: at.UTC(), Guest: chain.GuestIdentity{Name: g.Name},
	}
	in, err := g.BeginIncoming(repo.FolderOf(m), m.UUID)
	if err != nil {
		r.t.Fatal(err)
	}
	defer in.Close()
	for _, name := range []string{"scsi0", "virtio1"} {
		d := chain.Disk{Name: name, Level: chain.Full, SourceFormat: "qcow2", VirtualSize: diskSize, File: chain.ImageFile(m.ID, name)}
		if _, err := in.CreateImage(r.t.Context(), name, diskSize, nil, repo.ImageOptions{}); err != nil {
			r.t.Fatal(err)
		}
		if d.Bytes, d.Sums, err = in.Finish(r.t.Context(), name); err != nil {
			r.t.Fatal(err)
		}
		m.Disks = append(m.Disks, d)
	}
	text, err := m.Encode()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := in.Commit(lock, m, text); err != nil {
		r.t.Fatal(err)
	}
}

// The first run after an import takes a full, as nothing else is to be expected; later ones go on from that, whatever older
// points are imported meanwhile.
func TestRunAfterImport(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	old := time.Now().Add(-48 * time.Hour)
	r.importPoint(old)
	r.write(10)
	result, err := r.runWith(func(*backup.Config) {})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range result.Plan.Disks {
		if d.Level != chain.Full || d.Unplanned {
			t.Errorf("disk %s: %s, unplanned: %v: %s", d.Name, d.Level, d.Unplanned, d.Reason)
		}
	}
	if len(result.Warnings) > 0 {
		t.Errorf("warnings: %q", result.Warnings)
	}
	r.check(result.Point, r.ledger.Now(), r.ledger.Now())
	r.importPoint(old.Add(time.Hour))
	r.write(5)
	r.run(chain.Inc)
	r.clean(1)
}
