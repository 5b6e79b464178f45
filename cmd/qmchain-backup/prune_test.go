package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
)

// pruneRepo has two guests with points an hour apart.
func pruneRepo(t *testing.T) (dir string, web, db *repotest.Guest) {
	t.Helper()
	dir = t.TempDir()
	r := repotest.New(t, dir)
	start := time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)
	web, db = repotest.NewGuest(t, r, "web", start), repotest.NewGuest(t, r, "110", start)
	for i := range byte(5) {
		web.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20, Write: []repotest.Write{{Off: int64(i) << 16, Len: 1 << 16, Fill: i + 1}}})
	}
	db.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	db.Add(repotest.Disk{Name: "scsi0"})
	return dir, web, db
}

// listedIDs are the points that list shows.
func listedIDs(t *testing.T, dir string) []string {
	t.Helper()
	code, stdout, stderr := call(t, "list", "--repo", dir, "--json")
	var points []struct{ Guest, ID string }
	if err := json.Unmarshal([]byte(stdout), &points); code != 0 || err != nil {
		t.Fatalf("exit code %d: %v: %s%s", code, err, stdout, stderr)
	}
	var ids []string
	for _, p := range points {
		ids = append(ids, p.Guest+"/"+p.ID)
	}
	return ids
}

func TestPrune(t *testing.T) {
	t.Parallel()
	dir, web, db := pruneRepo(t)
	before := tree(t, dir)
	code, stdout, stderr := call(t, "prune", "--repo", dir, "--keep-last", "2", "--dry-run", "web")
	if code != 0 || strings.Count(stdout, "remove") != 3 || strings.Count(stdout, "keep-last") != 2 || strings.Contains(stdout, "110/") {
		t.Errorf("dry run: exit code %d: %s%s", code, stdout, stderr)
	}
	if tree(t, dir) != before {
		t.Error("a dry run has changed something")
	}
	if code, _, stderr := call(t, "protect", "--repo", dir, "web/"+string(web.Points[1].ID)); code != 0 {
		t.Errorf("protect: exit code %d: %s", code, stderr)
	}
	var pruned []prunedPoint
	code, stdout, stderr = call(t, "prune", "--repo", dir, "--keep-last", "1", "--keep-hourly", "1", "--json")
	if err := json.Unmarshal([]byte(stdout), &pruned); code != 0 || err != nil || len(pruned) != 7 {
		t.Fatalf("exit code %d: %v: %s%s", code, err, stdout, stderr)
	}
	want := []string{
		"110/" + string(db.Points[0].ID), "110/" + string(db.Points[1].ID),
		"web/" + string(web.Points[1].ID), "web/" + string(web.Points[3].ID), "web/" + string(web.Points[4].ID),
	}
	if got := listedIDs(t, dir); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("left are %q, want %q", got, want)
	}
	for _, i := range []int{1, 3, 4} {
		m := web.Points[i]
		out := filepath.Join(t.TempDir(), "raw")
		repotest.Convert(t, web.ImagePath(m.ID, "scsi0"), out)
		if got, err := os.ReadFile(out); err != nil || string(got) != string(web.Want(m.ID, "scsi0")) {
			t.Errorf("point %d reads as something else: %v", i, err)
		}
	}
	if code, _, stderr := call(t, "unprotect", "--repo", dir, "web/"+string(web.Points[1].ID)); code != 0 {
		t.Errorf("unprotect: exit code %d: %s", code, stderr)
	}
	if code, _, stderr := call(t, "remove", "--repo", dir, "web/"+string(web.Points[1].ID), "web/"+string(web.Points[1].ID)[:18]); code != 0 {
		t.Errorf("remove: exit code %d: %s", code, stderr)
	}
	if code, _, stderr := call(t, "remove", "--repo", dir, "--force", "web/latest"); code != 0 {
		t.Errorf("remove the latest: exit code %d: %s", code, stderr)
	}
	if got := listedIDs(t, dir); len(got) != 3 {
		t.Errorf("left are %q", got)
	}
	if images, err := os.ReadDir(web.ImagesDir()); err != nil || len(images) != 1 {
		t.Errorf("images: %v, %v", images, err)
	}
	if code, _, stderr := call(t, "remove", "--repo", dir, "--force", "web/latest"); code != 0 {
		t.Errorf("remove the last: exit code %d: %s", code, stderr)
	}
	if code, stdout, stderr := call(t, "prune", "--repo", dir, "--keep-last=1", "web"); code != 0 || stdout != "" {
		t.Errorf("prune where nothing is left: exit code %d: %s%s", code, stdout, stderr)
	}
}

func TestPruneRefuses(t *testing.T) {
	t.Parallel()
	dir, web, db := pruneRepo(t)
	if other, err := db.LockPrune(t.Context(), 0); err != nil { // makes the file
		t.Fatal(err)
	} else {
		other.Unlock()
	}
	if code, _, stderr := call(t, "protect", "--repo", dir, "web/"+string(web.Points[0].ID)); code != 0 {
		t.Fatal(stderr)
	}
	lock, err := web.LockPrune(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	before := tree(t, dir)
	for _, test := range []struct {
		code int
		says string
		args []string
	}{
		{80, "what to keep", []string{"prune", "--repo", dir}},
		{80, "negative", []string{"prune", "--repo", dir, "--keep-last=-1"}},
		{80, "no other", []string{"prune", "--repo", dir, "--keep-last=1", "--keep-all"}},
		{80, "guest's name", []string{"prune", "--repo", dir, "--keep-last=1", "../web"}},
		{80, "not a size", []string{"prune", "--repo", dir, "--keep-last=1", "--rate-limit=much", "110"}},
		{2, "no point", []string{"prune", "--repo", dir, "--keep-last=1", "mail"}},
		{3, "locked", []string{"prune", "--repo", dir, "--keep-last=1", "--lock-wait=0s", "web"}},
		{2, "not a qmchain repository", []string{"prune", "--repo", t.TempDir(), "--keep-last=1"}},
		{80, "does not name a point", []string{"remove", "--repo", dir, "web"}},
		{2, "no point", []string{"remove", "--repo", dir, "110/2020"}},
		{1, "increments of scsi0 go on", []string{"remove", "--repo", dir, "110/latest"}},
		{2, "no point", []string{"protect", "--repo", dir, "mail/latest"}},
	} {
		code, stdout, stderr := call(t, test.args...)
		if code != test.code || !strings.Contains(stderr, test.says) {
			t.Errorf("%q: exit code %d, not %d: %s%s", test.args, code, test.code, stdout, stderr)
		}
	}
	if tree(t, dir) != before {
		t.Error("something was changed")
	}
	lock.Unlock()
	code, _, stderr := call(t, "remove", "--repo", dir, "web/"+string(web.Points[0].ID))
	if code != 1 || !strings.Contains(stderr, "protected") {
		t.Errorf("a protected point: exit code %d: %s", code, stderr)
	}
	if ids := listedIDs(t, dir); len(ids) != 7 {
		t.Errorf("left are %q", ids)
	}
}

// A run that is under way may build on the newest point, and does not on a diff.
func TestRemoveDuringARun(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	g := repotest.NewGuest(t, repotest.New(t, dir), "web", time.Now())
	g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	g.Add(repotest.Disk{Name: "scsi0"})
	g.Add(repotest.Disk{Name: "scsi0", Diff: true})
	g.Add(repotest.Disk{Name: "scsi0"})
	// The last one is still being made.
	made, hidden := g.PointDir(g.Points[3].ID), filepath.Join(t.TempDir(), "hidden")
	if err := os.Rename(made, hidden); err != nil {
		t.Fatal(err)
	}
	run, err := g.Lock(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer run.Unlock()
	if code, _, stderr := call(t, "remove", "--repo", dir, "web/latest"); code != 0 || len(listedIDs(t, dir)) != 2 {
		t.Errorf("a diff: exit code %d: %s", code, stderr)
	}
	before := tree(t, dir)
	if code, _, stderr := call(t, "remove", "--repo", dir, "web/latest"); code != 1 || !strings.Contains(stderr, "go on from it") {
		t.Errorf("the newest: exit code %d: %s", code, stderr)
	}
	if code, _, stderr := call(t, "remove", "--repo", dir, "--force", "--lock-wait=0s", "web/latest"); code != 3 || !strings.Contains(stderr, "a run may be under way") {
		t.Errorf("by force: exit code %d: %s", code, stderr)
	}
	if tree(t, dir) != before {
		t.Error("something was changed")
	}
	time.AfterFunc(300*time.Millisecond, func() {
		if err := os.Rename(hidden, made); err != nil {
			t.Error(err)
		}
		run.Unlock()
	})
	code, _, stderr := call(t, "remove", "--repo", dir, "--force", "web/latest")
	want := []string{"web/" + string(g.Points[0].ID), "web/" + string(g.Points[3].ID)}
	if got := listedIDs(t, dir); code != 0 || !slices.Equal(got, want) {
		t.Errorf("by force, once the run has ended: exit code %d: %s, left are %q, want %q", code, stderr, got, want)
	}
}

// What a killed prune leaves is no damage, and doctor ends it.
func TestDoctorAfterKilledPrune(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for at := 4; at < 30; at += 5 {
		dir, web, _ := pruneRepo(t)
		cmd := exec.Command(self, "prune", "--repo", dir, "--keep-last", "2", "web")
		cmd.Env = append(os.Environ(), killAt+"="+strconv.Itoa(at))
		if err := cmd.Run(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != -1 {
			t.Fatalf("step %d: not killed: %v", at, err)
		}
		args := []string{"doctor", "--name", "web", "--repo", dir, "--fleece-dir", t.TempDir()}
		code, stdout, stderr := call(t, args...)
		switch code {
		case 0:
		case 6:
			found++
		default:
			t.Fatalf("step %d: exit code %d: %s%s", at, code, stdout, stderr)
		}
		if code, stdout, stderr := call(t, append(args, "--fix")...); code != 0 || stdout != "all is well\n" {
			t.Errorf("step %d: exit code %d: %s%s", at, code, stdout, stderr)
		}
		for _, id := range listedIDs(t, dir) {
			guest, id, _ := strings.Cut(id, "/")
			if guest != "web" {
				continue
			}
			out := filepath.Join(t.TempDir(), "raw")
			repotest.Convert(t, web.ImagePath(chain.ID(id), "scsi0"), out)
			if got, err := os.ReadFile(out); err != nil || string(got) != string(web.Want(chain.ID(id), "scsi0")) {
				t.Errorf("step %d: point %s reads as something else: %v", at, id, err)
			}
		}
	}
	if found == 0 {
		t.Error("nothing was ever found")
	}
}
