package standard_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/standard"
	"qmchain/internal/testenv"
)

var start = time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC)

// newRepo makes a repository with a guest of 7 points: a disk that grows, shrinks and grows again, and diffs, one of them smaller.
func newRepo(t *testing.T) *repotest.Guest {
	t.Helper()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	const mib = 1 << 20
	for i, size := range []int64{2 * mib, 2*mib + 3*512, mib + 7*512, 2*mib + 512, mib, 2*mib + 512, 2*mib + 512} {
		g.Add(
			repotest.Disk{Name: "scsi0", Size: size, Diff: i == 4 || i == 5, Write: repotest.RandomWrites(uint64(i), 6, size&^(64<<10-1), byte(20*i+1))},
			repotest.Disk{Name: "virtio1", Size: mib, Full: i == 3, Write: repotest.RandomWrites(uint64(i)+50, 3, mib, byte(20*i+11))},
		)
	}
	return g
}

// Points of a repository: every link, all snapshots, and nothing of the repository is changed.
func TestRepositoryToOutput(t *testing.T) {
	t.Parallel()
	g := newRepo(t)
	dir := g.Repo.Dir
	all := read(t, dir)
	if _, err := os.Create(filepath.Join(g.Dir, ".prune.lock")); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	for i, m := range g.Points {
		if i == 0 || i%3 > 0 {
			continue // what is in between is in the others
		}
		for _, c := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
			out := filepath.Join(t.TempDir(), "out")
			r := request(t, dir, c, out)
			r.Until = "110/" + string(m.ID)
			for _, res := range must(t, r).Results {
				if got := converted(t, 0, res.File); got != all[string(m.ID)+" "+res.Disk] {
					t.Errorf("%s until %d: disk %s is %s", c, i, res.Disk, got)
				}
				if c != standard.Snapshots {
					continue
				}
				names, holds := snapshots(t, res.File)
				first := 0
				if res.Disk == "virtio1" && i >= 3 {
					first = 3 // the second full
				}
				if len(names) != i+1-first {
					t.Errorf("until %d: disk %s has %d snapshots", i, res.Disk, len(names))
				}
				for name, got := range holds {
					if got != all[name+" "+res.Disk] {
						t.Errorf("until %d: disk %s, snapshot %s is %s", i, res.Disk, name, got)
					}
				}
				testenv.Output(t, "qemu-img", "check", "-q", "-f", "qcow2", res.File)
			}
		}
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Errorf("the repository has changed: %s", diff)
	}
}

// While points are removed their images change: who reads files one by one waits. A repository that can't be written to is
// read without a lock.
func TestRepositoryLocks(t *testing.T) {
	t.Parallel()
	g := newRepo(t)
	lock, err := g.LockPrune(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for c, want := range map[standard.Command]error{standard.Rebase: repo.ErrLocked, standard.Snapshots: repo.ErrLocked, standard.Commit: nil} {
		r := request(t, g.Repo.Dir, c, filepath.Join(t.TempDir(), "out"))
		if _, err := run(t.Context(), r); !errors.Is(err, want) {
			t.Errorf("%s: %v", c, err)
		}
		r.DryRun = true
		if j, err := standard.Open(t.Context(), r); err != nil && want != nil {
			t.Errorf("%s: a plan: %v", c, err)
		} else if err == nil {
			j.Close()
		}
	}
	lock.Unlock()
	if err := os.Remove(filepath.Join(g.Dir, ".prune.lock")); err != nil {
		t.Fatal(err)
	}
	readOnly := t.TempDir()
	if err := unix.Mount(g.Repo.Dir, readOnly, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(readOnly, unix.MNT_DETACH) }()
	if err := unix.Mount("", readOnly, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	plan := must(t, request(t, readOnly, standard.Rebase, filepath.Join(t.TempDir(), "out")))
	if got, want := converted(t, 0, plan.Results[0].File), read(t, readOnly)[string(plan.Until)+" scsi0"]; got != want {
		t.Errorf("read-only: %s, not %s", got, want)
	}
	// Somebody else, there, can remove points.
	r := request(t, readOnly, standard.Rebase, filepath.Join(t.TempDir(), "out"))
	r.FS.Before = func(op, _ string) error {
		if op == "symlink" {
			now := time.Now()
			return os.Chtimes(g.ImagePath(g.Points[0].ID, "scsi0"), now, now)
		}
		return nil
	}
	if _, err := run(t.Context(), r); !errors.Is(err, standard.ErrBusy) {
		t.Errorf("changed meanwhile: %v", err)
	}
}

// A raw full, whose copy is raw, and refused increments on it, which are in the way.
func TestRawFull(t *testing.T) {
	t.Parallel()
	const name = "qmpbackup/e-include-raw"
	dir := filepath.Join(foreigntest.Unpack(t, name+"/"), name)
	_, _, p := open(t, dir)
	first := p.All[0]
	// One that ends with a hole.
	raw, err := os.OpenFile(filepath.Join(dir, first.Disk("disk-r.raw").File), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	size := first.Disk("disk-r.raw").VirtualSize
	err = errors.Join(unix.Fallocate(int(raw.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size/4, size), raw.Close())
	if err != nil {
		t.Fatal(err)
	}
	all := read(t, dir)
	for _, c := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
		r := request(t, dir, c, filepath.Join(t.TempDir(), "out"))
		r.Until, r.Disks = string(first.ID), []string{"disk-r.raw"}
		plan := must(t, r)
		if got := converted(t, 0, plan.Results[0].File); got != all[string(first.ID)+" disk-r.raw"] {
			t.Errorf("%s: %s", c, got)
		}
		for _, output := range []string{"", filepath.Join(t.TempDir(), "out")} {
			before := tree(t, dir)
			r = request(t, dir, c, output)
			if _, err := run(t.Context(), r); !errors.Is(err, chain.ErrDamaged) {
				t.Errorf("%s, to %q: %v", c, output, err)
			}
			if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
			if _, err := os.Lstat(output); output != "" && err == nil {
				t.Error("something was made")
			}
		}
	}
}

// As many links as QEMU can open: their names do not add up to a path.
func TestLongChain(t *testing.T) {
	t.Parallel()
	dir := newSet(t, 2)
	inc, err := os.ReadFile(filepath.Join(dir, diskA, fmt.Sprintf("INC-%d-%s", firstRun+3600, diskA)))
	if err != nil {
		t.Fatal(err)
	}
	const links = 80
	for run := 3; run < links; run++ {
		path := filepath.Join(dir, diskA, fmt.Sprintf("INC-%d-%s", firstRun+3600*run, diskA))
		if err := os.WriteFile(path, inc, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), strings.Repeat("long/", 10))
	if err := os.MkdirAll(out, 0o700); err != nil {
		t.Fatal(err)
	}
	r := request(t, dir, standard.Rebase, out)
	plan := must(t, r)
	// What it holds is as with the first increment on top.
	_, _, p := open(t, dir)
	if layers, err := p.All.Layers(p.All.Latest(), diskA); err != nil || len(layers) != links {
		t.Fatal(len(layers), err)
	}
	want := read(t, dir)[string(plan.Until)+" "+diskA]
	if got := converted(t, 0, plan.Results[0].File); got != want {
		t.Errorf("%s, not %s", got, want)
	}
}

// Copies share nothing with the originals that can be written to.
func TestNoHardLinks(t *testing.T) {
	t.Parallel()
	g := newRepo(t)
	out := filepath.Join(t.TempDir(), "out")
	must(t, request(t, g.Repo.Dir, standard.Rebase, out))
	entries, err := os.ReadDir(out)
	if err != nil || len(entries) == 0 {
		t.Fatal(err)
	}
	for _, e := range entries {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(out, e.Name()), &st); err != nil || st.Nlink != 1 {
			t.Errorf("%s: %d names, %v", e.Name(), st.Nlink, err)
		}
	}
}

// Where the file system can, copies share their blocks with the originals, and need no space.
func TestShared(t *testing.T) {
	t.Parallel()
	disk, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 320<<20)); err != nil {
		t.Fatal(err)
	}
	testenv.Output(t, "mkfs.xfs", "-q", "-m", "reflink=1", disk)
	testenv.Output(t, "mount", "-o", "loop", disk, dir)
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	set := filepath.Join(dir, "vm")
	testenv.Output(t, "cp", "-a", newSet(t, 2), set)
	all := read(t, set)
	testenv.Output(t, "sync", "-f", dir)
	r := request(t, set, standard.Rebase, filepath.Join(dir, "out"))
	r.RateLimit = 1 // a byte in a second: that no copying keeps
	plan := must(t, r)
	if got := converted(t, 0, plan.Results[0].File); got != all[string(plan.Until)+" "+plan.Results[0].Disk] {
		t.Errorf("%s", got)
	}
	if out := testenv.Output(t, "filefrag", "-v", plan.Steps[0].File); !strings.Contains(out, "shared") {
		t.Errorf("not shared: %s", out)
	}
}

// Whatever a dead call has left, nothing that looks finished is not, and the next one makes it right.
func TestDeathBeforeOutput(t *testing.T) {
	t.Parallel()
	set := newSet(t, 2)
	stream := filepath.Join(foreigntest.Unpack(t, "virtnbdbackup/v1-zeroes/"), "virtnbdbackup/v1-zeroes")
	for name, c := range map[string]struct {
		dir     string
		command standard.Command
		disks   []string
	}{
		"rebase":            {set, standard.Rebase, nil},
		"commit":            {set, standard.Commit, nil},
		"snapshots":         {set, standard.Snapshots, nil},
		"rebase of streams": {stream, standard.Rebase, []string{"sda"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := read(t, c.dir)
			for at := 1; ; at++ {
				out := filepath.Join(t.TempDir(), "out")
				r := request(t, c.dir, c.command, out)
				r.Disks = c.disks
				var n *int
				r.FS, n = dying(at)
				_, err := run(t.Context(), r)
				if err == nil {
					if *n < 15 {
						t.Errorf("only %d changes", *n)
					}
					return
				}
				if !errors.Is(err, errDied) {
					t.Fatalf("%d: %v", at, err)
				}
				finished := finishedFiles(t, out)
				r = request(t, c.dir, c.command, out)
				r.Disks = c.disks
				plan, err := run(t.Context(), r)
				if errors.Is(err, standard.ErrExists) && !slices.Contains(listed(t, out), ".qmchain-names") {
					// The last thing had been done, if not brought to the disk.
					plan, err = &standard.Plan{}, nil
					for _, name := range finished {
						d := strings.TrimSuffix(strings.TrimSuffix(name, ".qcow2"), ".image")
						if slices.ContainsFunc([]string{".image", ".qcow2"}, func(e string) bool { return name == d+e }) && !strings.HasPrefix(name, "2026") {
							_, _, p := open(t, c.dir)
							plan.Results = append(plan.Results, standard.Result{Disk: d, Point: p.All.Latest().ID, File: filepath.Join(out, name)})
						}
					}
				}
				if err != nil {
					t.Fatalf("%d, again: %v", at, err)
				}
				for _, res := range plan.Results {
					if got := converted(t, 0, res.File); got != all[string(res.Point)+" "+res.Disk] {
						t.Errorf("dead before change %d, again: disk %s is %s", at, res.Disk, got)
					}
				}
				if len(plan.Results) == 0 || strings.HasPrefix(listed(t, out)[0], ".") {
					t.Errorf("dead before change %d, again: %v, %v", at, plan.Results, listed(t, out))
				}
			}
		})
	}
}

// finishedFiles lists what is seen in an output.
func finishedFiles(t *testing.T, out string) (names []string) {
	t.Helper()
	if _, err := os.Lstat(out); err != nil {
		return nil
	}
	for _, name := range listed(t, out) {
		if !strings.HasPrefix(name, ".") {
			names = append(names, name)
		}
	}
	return names
}

// What is interrupted is undone, and a folder that was there stays.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	dir := newSet(t, 2)
	for _, c := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
		for at := 1; at < 12; at += 2 {
			parent := t.TempDir()
			out := filepath.Join(parent, "out")
			if at%4 == 1 {
				out = parent
			}
			r := request(t, dir, c, out)
			ctx, cancel := context.WithCancel(t.Context())
			n := 0
			r.FS.Before = func(op, _ string) error {
				if n++; n == at && op != "rename" {
					cancel()
				}
				return nil
			}
			_, err := run(ctx, r)
			cancel()
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s, %d: %v", c, at, err)
			}
			if left := listed(t, parent); err != nil && len(left) > 0 {
				t.Errorf("%s, %d: left: %v", c, at, left)
			}
		}
	}
}

// What is in the way of an output is found before anything is made.
func TestOutputRefused(t *testing.T) {
	t.Parallel()
	dir := newSet(t, 2)
	full, empty := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "INC"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	inside := filepath.Join(empty, "link")
	if err := os.Symlink(dir, inside); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		output, until string
		disk          []string
		err           error
	}{
		"not empty":       {output: full, err: standard.ErrExists},
		"a file":          {output: filepath.Join(full, "INC"), err: standard.ErrExists},
		"in a file":       {output: filepath.Join(full, "INC", "out"), err: unix.ENOTDIR},
		"no parent":       {output: filepath.Join(empty, "no", "out"), err: unix.ENOENT},
		"the set":         {output: dir, err: standard.ErrInside},
		"in the set":      {output: filepath.Join(inside, "a", "out"), err: standard.ErrInside},
		"no point":        {output: filepath.Join(empty, "out"), until: "2020", err: chain.ErrNoPoint},
		"no disk":         {output: filepath.Join(empty, "out"), disk: []string{"c"}, err: chain.ErrNoPoint},
		"another guest's": {output: filepath.Join(empty, "out"), until: "110/latest", err: chain.ErrNoPoint},
	} {
		for _, command := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
			r := request(t, dir, command, c.output)
			r.Until, r.Disks = c.until, c.disk
			if _, err := run(t.Context(), r); !errors.Is(err, c.err) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if left := listed(t, empty); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
	// Somebody else is at work there.
	r := request(t, dir, standard.Commit, filepath.Join(empty, "out"))
	var other error
	r.FS.Before = func(op, _ string) error {
		if op == "sync" && other == nil {
			_, other = run(t.Context(), request(t, dir, standard.Rebase, r.Output))
		}
		return nil
	}
	if _, err := run(t.Context(), r); err != nil || !errors.Is(other, standard.ErrBusy) {
		t.Errorf("two at once: %v, %v", err, other)
	}
	// A link that contradicts itself is found when it is copied.
	path := filepath.Join(dir, diskA, fmt.Sprintf("INC-%d-%s", firstRun+3600, diskA))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0, 0, 0, 0}, 2<<16); err != nil { // counts of the first clusters
		t.Fatal(err)
	}
	if _, err := run(t.Context(), request(t, dir, standard.Rebase, filepath.Join(empty, "bad"))); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("a damaged link: %v", err)
	}
	if _, err := run(t.Context(), request(t, dir, standard.Rebase, "")); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("a damaged link in place: %v", err)
	}
}

// A full file system is told before, and by qemu-nbd and qemu-img too.
func TestNoSpace(t *testing.T) {
	t.Parallel()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	for i := range byte(2) {
		g.Add(repotest.Disk{Name: "scsi0", Size: 8 << 20, Write: []repotest.Write{{Len: 8 << 20, Fill: i + 1}}})
	}
	for name, c := range map[string]struct {
		command   standard.Command
		size, low int // at the beginning, and in between
	}{
		"copies":    {standard.Rebase, 10 << 20, 4 << 20},
		"one image": {standard.Commit, 10 << 20, 4 << 20},
		"snapshots": {standard.Snapshots, 20 << 20, 12 << 20},
	} {
		small := t.TempDir()
		if err := unix.Mount("none", small, "tmpfs", 0, fmt.Sprintf("size=%d", c.size)); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Unmount(small, unix.MNT_DETACH) }()
		if _, err := run(t.Context(), request(t, g.Repo.Dir, c.command, small)); !errors.Is(err, standard.ErrNoSpace) {
			t.Errorf("%s: %v", name, err)
		}
		if left := listed(t, small); len(left) > 0 {
			t.Errorf("%s: left: %v", name, left)
		}
		// Others may fill it meanwhile.
		r := request(t, g.Repo.Dir, c.command, small)
		if err := unix.Mount("none", small, "tmpfs", unix.MS_REMOUNT, "size=40M"); err != nil {
			t.Fatal(err)
		}
		filled := false
		r.FS.Before = func(op, path string) error {
			if op == "write" || op == "create" && strings.HasSuffix(path, ".qcow2") {
				if c.command != standard.Snapshots || op == "write" && !strings.Contains(path, ".qmchain-partial/.") {
					filled = true
					return unix.Mount("none", small, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%d", c.low))
				}
			}
			return nil
		}
		if _, err := run(t.Context(), r); err == nil || !filled || !strings.Contains(strings.ToLower(err.Error()), "no space") {
			t.Errorf("%s, in between: %v", name, err)
		}
		if left := listed(t, small); len(left) > 0 {
			t.Errorf("%s, in between: left: %v", name, left)
		}
	}
}

// The rate is kept, and reading can be interrupted while it is.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Size: 4 << 20, Write: []repotest.Write{{Len: 4 << 20, Fill: 1}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Len: 4 << 20, Fill: 2}}})
	for _, c := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
		r := request(t, g.Repo.Dir, c, filepath.Join(t.TempDir(), "out"))
		r.RateLimit = 6 << 20
		began := time.Now()
		must(t, r)
		if took := time.Since(began); took < 400*time.Millisecond {
			t.Errorf("%s: %s", c, took)
		}
		r = request(t, g.Repo.Dir, c, filepath.Join(t.TempDir(), "out"))
		r.RateLimit = 1 << 10
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		if _, err := run(ctx, r); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", c, err)
		}
		cancel()
	}
}
