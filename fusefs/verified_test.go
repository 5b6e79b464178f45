package fusefs_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
)

// A disk that verify has found damaged is shown and can be read, with a warning on it, and one in the log.
func TestVerifiedDamage(t *testing.T) {
	t.Parallel()
	g := smallGuest(t)
	full := g.Points[0]
	next := increment(g, 9)
	disk := full.Disks[0].Name
	paths := func(m *mount) []string {
		return []string{m.path(g.Name, string(full.ID), rawName(disk)), m.path(g.Name, string(next.ID), rawName(disk))}
	}
	warnings := func(m *mount, want bool) {
		t.Helper()
		for _, path := range paths(m) {
			if _, err := os.ReadFile(path); err != nil {
				t.Error(err)
			}
			if _, has := attributes(t, path)["user.qmchain.warning"]; has != want {
				t.Errorf("%s has a warning: %v, want %v", path, has, want)
			}
		}
	}
	note := func(v repo.Verified) {
		t.Helper()
		v.Point, v.Time = full.ID, time.Now()
		if err := g.NoteChecked(t.Context(), repo.Checked{Verified: []repo.Verified{v}}); err != nil {
			t.Fatal(err)
		}
	}

	before := mountRepo(t, g.Repo)
	warnings(before, false)
	note(repo.Verified{Why: "as a test has it", Disks: []repo.DamagedDisk{{Name: disk, Images: []chain.ImageRef{full.Ref(disk)}}}})
	warnings(before, true) // that is told of disks which are open, too
	m := mountRepo(t, g.Repo)
	warnings(m, true)
	warnings(m, true)
	for _, path := range paths(m) {
		if got := attributes(t, path)["user.qmchain.warning"]; !strings.Contains(got, "at "+string(full.ID)+": as a test has it") {
			t.Errorf("warning %q", got)
		}
		point := filepath.Base(filepath.Dir(path))
		if n := strings.Count(m.log.String(), "point "+g.Name+"/"+point+": disk "+disk+" may not be what the guest had: verify found"); n != 1 {
			t.Errorf("%s was logged %d times: %s", point, n, m.log)
		}
	}

	note(repo.Verified{Good: true})
	warnings(m, false)
	if err := os.WriteFile(filepath.Join(g.Dir, ".checked.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	unknown := mountRepo(t, g.Repo)
	warnings(unknown, false)
	if n := strings.Count(unknown.log.String(), "what verify has found is not known"); n != 1 {
		t.Errorf("that the record can't be read was logged %d times: %s", n, unknown.log)
	}
	if log := before.log.String(); strings.Contains(log, "verify") {
		t.Errorf("nothing was known when they were opened: %s", log)
	}
}
