package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
	"qmchain/chain/verify"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

// verifyAll verifies a guest and records what it finds, as qmchain-restore verify does.
func verifyAll(t *testing.T, dir, guest string) verify.State {
	t.Helper()
	set, err := source.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	found, err := (&verify.Checker{Set: set}).Guest(t.Context(), guest)
	if err != nil {
		t.Fatal(err)
	}
	var record repo.Checked
	for _, p := range found.Points {
		v := repo.Verified{Point: chain.ID(p.ID), Time: time.Now(), Good: p.State == verify.Good}
		for _, d := range p.Disks {
			if d.State == verify.Damaged {
				v.Why = d.Name + " (" + strings.Join(d.Files, ", ") + ")"
				v.Disks = append(v.Disks, repo.DamagedDisk{Name: d.Name, Images: d.Images})
			}
		}
		record.Verified = append(record.Verified, v)
	}
	r, err := repo.Open(dir, durable.FS{})
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Guest(guest)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.NoteChecked(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	return found.State
}

// expect runs the program, which must end with that code and say all that; what begins with a ! must not be said.
func expect(t *testing.T, code int, says []string, args ...string) {
	t.Helper()
	got, stdout, stderr := call(t, args...)
	if got != code {
		t.Errorf("%q: exit code %d, want %d: %s%s", args, got, code, stdout, stderr)
	}
	for _, text := range says {
		text, not := strings.CutPrefix(text, "!")
		if strings.Contains(stdout+stderr, text) == not {
			t.Errorf("%q: %q: said is %v, want %v: %s%s", args, text, not, !not, stdout, stderr)
		}
	}
}

// What verify has found damaged is not built on, and told by all that looks at it, until it is found good again.
func TestRecordedDamage(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Throttle)
	b.write(20)
	b.point(chain.Full)
	b.write(5)
	b.point(chain.Inc)
	found, err := filepath.Glob(filepath.Join(b.repo, "web", repo.ImagesFolder, "*.scsi0.qcow2"))
	if err != nil || len(found) != 2 {
		t.Fatal(found, err)
	}
	full := found[0]
	info, err := os.Stat(full)
	if err != nil {
		t.Fatal(err)
	}
	spoil := func() { repotest.Flip(t, full, info.Size()-1000) } // and another time puts it back
	run := b.args(b.vm.Socket)
	check := []string{"check", "--repo", b.repo}
	list := []string{"list", "--repo", b.repo}

	spoil()
	expect(t, 0, []string{"ok"}, check...) // nobody knows
	if state := verifyAll(t, b.repo, "web"); state != verify.Damaged {
		t.Fatalf("verify says %s", state)
	}
	expect(t, 5, []string{"DAMAGED", "disk scsi0", "verify found", filepath.Base(full)}, check...)
	expect(t, 5, []string{`"state": "damaged"`, `"error": "web/`}, append(check, "--json")...)
	expect(t, 0, []string{"DAMAGED (scsi0)"}, list...)
	expect(t, 0, []string{"; verify found"}, append(list, "--long")...)
	expect(t, 0, []string{`"damage": "verify found`}, append(list, "--json")...)
	expect(t, 1, []string{"an increment is not possible", filepath.Base(full)}, append(run, "--level", "inc")...)
	expect(t, 0, []string{"full", "inc"}, "estimate", "--socket", b.vm.Socket, "--name", "web", "--repo", b.repo)

	// It is put back, and found good: the chain goes on.
	spoil()
	if state := verifyAll(t, b.repo, "web"); state != verify.Good {
		t.Fatalf("verify says %s", state)
	}
	expect(t, 0, []string{"ok"}, check...)
	expect(t, 0, []string{"!DAMAGED"}, list...)
	b.write(5)
	b.point(chain.Inc)

	// Points that came after the look rest on the damage as well. Only that disk gets a full.
	spoil()
	if state := verifyAll(t, b.repo, "web"); state != verify.Damaged {
		t.Fatalf("verify says %s", state)
	}
	b.write(5)
	code, stdout, stderr := call(t, run...)
	if code != 4 || !strings.Contains(stderr, "disk scsi0: a full instead of an increment: its chain can't be built on: backup is damaged: verify found") {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	g := b.guest()
	m, err := g.Point(chain.ID(strings.TrimSpace(strings.TrimPrefix(stdout, "web/"))))
	if err != nil {
		t.Fatal(err)
	}
	if d, other := m.Disk("scsi0"), m.Disk("virtio1"); d.Level != chain.Full || !strings.Contains(d.Reason, "verify found") || other.Level != chain.Inc {
		t.Errorf("%+v, %+v", d, other)
	}
	b.write(5)
	b.point(chain.Inc) // which reads all of it
	expect(t, 0, []string{"ok", "!verify found"}, check...)
	if state := verifyAll(t, b.repo, "web"); state != verify.Damaged {
		t.Fatalf("verify says %s", state)
	}
	expect(t, 0, []string{"ok"}, check...) // the newest is whole all the same

	// A record that can't be understood keeps nobody from anything.
	if err := os.WriteFile(filepath.Join(b.repo, "web", ".checked.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.write(5)
	expect(t, 0, []string{"what verify has found is not known", "inc since"}, run...)
	expect(t, 0, []string{"what verify has found is not known", "ok"}, check...)
	expect(t, 0, []string{"what verify has found is not known"}, list...)
	b.after()
}

func (b *bench) guest() *repo.Guest {
	b.t.Helper()
	r, err := repo.Open(b.repo, durable.FS{})
	if err != nil {
		b.t.Fatal(err)
	}
	g, err := r.Guest("web")
	if err != nil {
		b.t.Fatal(err)
	}
	return g
}

// check looks at the images of the newest point, but at no data.
func TestCheckLooksAtImages(t *testing.T) {
	t.Parallel()
	dir, web, _ := pruneRepo(t)
	image := func(i int) string { return web.ImagePath(web.Points[i].ID, "scsi0") }
	check := []string{"check", "--repo", dir, "--max-age", "1000000h", "web"}
	expect(t, 0, []string{"ok"}, check...)
	for what, damage := range map[string]func(path string) error{
		"gone": os.Remove,
		"cut":  func(path string) error { return os.Truncate(path, 1<<16) },
		"long": func(path string) error { return os.Truncate(path, 1<<30) },
		"another one's": func(path string) error {
			data, err := os.ReadFile(image(2))
			if err != nil {
				return err
			}
			return os.WriteFile(path, data, 0o600)
		},
	} {
		for _, i := range []int{0, 4} {
			was, err := os.ReadFile(image(i))
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(image(i)); err != nil {
				t.Fatal(err)
			}
			if code, stdout, stderr := call(t, check...); code != 5 || !strings.Contains(stdout, "DAMAGED") || !strings.Contains(stdout, filepath.Base(image(i))) {
				t.Errorf("%s: exit code %d: %s%s", what, code, stdout, stderr)
			}
			if err := os.WriteFile(image(i), was, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect(t, 1, []string{"TOO OLD"}, "check", "--repo", dir, "--max-age", "1ns", "web")
	expect(t, 80, nil, append(check, "--all")...)
	expect(t, 80, nil, "check", "--repo", dir, "--all", "--tag", "x")
}

// On a Proxmox VE node check knows of the VMs that nobody has ever backed up.
func TestCheckFindsVMsWithoutPoints(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	for vmid, line := range map[int]string{110: "tags: prod", 111: "tags: prod", 112: "tags: test", 120: "template: 1"} {
		p.AddVM(vmid, line)
	}
	web := repotest.NewGuest(t, repotest.New(t, p.repo), "110", time.Now().Add(-time.Hour))
	web.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	// A VM can have another name in the repository.
	p.config = filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(p.config, []byte("[guest.112]\nname = \"mail\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	repotest.NewGuest(t, web.Repo, "mail", time.Now().Add(-time.Hour)).Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	for _, test := range []struct {
		args []string
		code int
		says []string // of the standard output, in its order
	}{
		{nil, 0, []string{"110 ok", "mail ok"}},
		{[]string{"--exclude", "112"}, 0, []string{"110 ok"}},
		{[]string{"--all"}, 2, []string{"110 ok", "111 no point", "mail ok"}},
		{[]string{"--all", "--exclude", "111", "--exclude", "112"}, 0, []string{"110 ok"}},
		{[]string{"--tag", "prod"}, 2, []string{"110 ok", "111 no point"}},
		{[]string{"--tag", "none"}, 2, nil},
		{[]string{"--pool", "none"}, 2, nil},
	} {
		code, stdout, stderr := p.call(append([]string{"check", "--repo", p.repo}, test.args...)...)
		var said []string
		for line := range strings.Lines(stdout) {
			before, _, _ := strings.Cut(line, ",")
			said = append(said, strings.Join(strings.Fields(before), " "))
		}
		if code != test.code || strings.Join(said, ";") != strings.Join(test.says, ";") {
			t.Errorf("check %q: exit code %d: %q%s", test.args, code, said, stderr)
		}
	}
}

// What is damaged is not merged into what is kept, and prune says what to do.
func TestPruneDamaged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	web := repotest.NewGuest(t, repotest.New(t, dir), "web", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	for i := range byte(3) {
		web.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20, Write: []repotest.Write{{Off: 0, Len: 1 << 19, Fill: i + 1}}})
	}
	image := web.ImagePath(web.Points[1].ID, "scsi0")
	info, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	repotest.Flip(t, image, info.Size()-1000)
	code, _, stderr := call(t, "prune", "--repo", dir, "--keep-last", "2")
	if code != 5 || strings.Count(stderr, filepath.Base(image)) != 1 || !strings.Contains(stderr, "`qmchain-backup run --level full`") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	before := tree(t, dir)
	if code, _, _ := call(t, "prune", "--repo", dir, "--keep-last", "2"); code != 5 || tree(t, dir) != before {
		t.Errorf("exit code %d, and the repository is another one: %v", code, tree(t, dir) != before)
	}
	// As it says: with a new chain, and nothing of the old one kept, all of it goes.
	web.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20, Full: true})
	if code, _, stderr := call(t, "prune", "--repo", dir, "--keep-last", "1"); code != 0 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if left, err := os.ReadDir(web.ImagesDir()); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}
