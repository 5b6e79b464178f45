package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain/repo/repotest"
)

// Damage that only check sums show keeps a VM from being made with --verify; without it the VM is made, and what is known is told.
func TestVMDamaged(t *testing.T) {
	t.Parallel()
	r := newVMRig(t, strings.Replace(fullConfig, "protection: 1\n", "", 1))
	before := r.state()
	full := r.guest.ImagePath(r.guest.Points[0].ID, "efidisk0")
	info, err := os.Stat(full)
	if err != nil {
		t.Fatal(err)
	}
	spoil := func() { repotest.Flip(t, full, info.Size()-1000) }

	spoil()
	r.fails(5, "nothing is restored: 110/images/"+filepath.Base(full), "--verify")
	r.fails(5, "nothing is restored", "--verify", "--staging", r.t.TempDir())
	r.unchanged("with --verify", before)
	if err := os.Remove(filepath.Join(r.guest.Dir, ".checked.json")); err != nil {
		t.Errorf("what was found is not kept: %v", err)
	}
	r.must("--vmid", "211") // nobody knows of it

	if code, _, stderr := inProcess(t, "verify", "--repo", r.repo); code != 5 {
		t.Fatalf("verify: exit code %d: %s", code, stderr)
	}
	code, out, stderr := r.run("--json", "--vmid", "212")
	var made struct{ Notes []string }
	if err := json.Unmarshal([]byte(out), &made); err != nil {
		t.Fatal(err)
	}
	notes := strings.Join(made.Notes, "\n")
	if code != 5 || !strings.Contains(notes, "disk efidisk0: backup is damaged: verify found") || !strings.Contains(stderr, "is restored as its images are now") {
		t.Errorf("exit code %d: %s%s", code, out, stderr)
	}
	r.holds(r.config(212), "scsi0", "virtio1")

	before = r.state()
	for _, more := range [][]string{nil, {"--dry-run"}, {"--staging", r.t.TempDir()}} {
		r.fails(5, "VM 212 is not replaced with what is known to be damaged", append([]string{"--vmid", "212", "--force"}, more...)...)
	}
	r.unchanged("with --force", before)
	r.must("--vmid", "212", "--force", "--disk", "scsi0")
	r.must("--vmid", "213", "--disk", "scsi0", "--disk", "virtio1", "--verify") // which it does not concern

	spoil()
	r.must("--vmid", "212", "--force", "--verify")
	r.must("--vmid", "214", "--verify")
	r.holds(r.config(214), "scsi0", "virtio1", "efidisk0")
}
