package standard_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/standard"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

const (
	firstRun = 1795170000
	diskSize = 1 << 20
	// One has what QEMU takes for a protocol in its name.
	diskA, diskB = "a", "nbd:b c"
)

// newSet makes a set of qmpbackup with a full and increments of two disks, taken an hour after one another: n of one disk, n-1
// of the other. The last one of a is larger.
func newSet(t testing.TB, n int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "vm")
	put := func(rel, text string) {
		path := filepath.Join(dir, rel)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	put("uuid", "6a6e2b3c-0000-4000-8000-000000000001")
	for i, disk := range []string{diskA, diskB} {
		put(disk+".config", fmt.Sprintf(`{"virtual-size": %d, "format": "qcow2"}`, diskSize))
		for run := range n + 1 - i {
			name, size := fmt.Sprintf("INC-%d-%s", firstRun+3600*run, disk), diskSize
			if run == n {
				size += 5 << 16
			}
			if run == 0 {
				name = "FULL-" + name[len("INC-"):]
			}
			path := filepath.Join(dir, disk, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
			fill := 16*(run+1) + i
			writes := []string{fmt.Sprintf("write -P %d %dk 64k", fill, 64*run), fmt.Sprintf("write -P %d 640k 128k", fill)}
			switch {
			case run == 0:
				writes = []string{fmt.Sprintf("write -P %d 0 832k", fill)}
			case run%2 == 1:
				writes = append(writes, fmt.Sprintf("write -z %dk 64k", 64*(run+4)))
			default:
				writes = append(writes, fmt.Sprintf("write -c -P %d 896k 64k", fill+8))
			}
			if run == n {
				writes = append(writes, fmt.Sprintf("write -P %d %dk 64k", fill, size>>10-64))
			}
			imagetest.QemuIO(t, "qcow2", path, writes...)
			at := time.Unix(int64(firstRun+3600*run), 500)
			if err := os.Chtimes(path, at, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

func clone(t testing.TB, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), filepath.Base(dir))
	testenv.Output(t, "cp", "-a", dir, to)
	return to
}

// same fails unless all points are what they were.
func same(t testing.TB, what string, got, want points) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: %s", what, diff)
	}
}

// id is the point of a run.
func id(t testing.TB, all points, run int) string {
	t.Helper()
	at := time.Unix(int64(firstRun+3600*run), 0).UTC().Format("20060102T150405Z-")
	for name := range all {
		if strings.HasPrefix(name, at) {
			id, _, _ := strings.Cut(name, " ")
			return id
		}
	}
	t.Fatalf("no point %s: %v", at, all)
	return ""
}

// After a rebase in place the set is what it was, for us and for qmprestore, and QEMU opens the point by the link.
func TestRebaseInPlace(t *testing.T) {
	t.Parallel()
	dir := newSet(t, 4)
	all := read(t, dir)
	before := listed(t, dir)
	r := request(t, dir, standard.Rebase, "")
	r.Until = id(t, all, 2)[:13]
	must(t, r)
	same(t, "rebased", read(t, dir), all)
	for _, disk := range []string{diskA, diskB} {
		link := filepath.Join(dir, disk, "image")
		if got := converted(t, 0, link); got != all[id(t, all, 2)+" "+disk] {
			t.Errorf("disk %s is %s", disk, got)
		}
	}
	want := slices.Sorted(slices.Values(append(before, diskA+"/image", diskB+"/image")))
	if diff := cmp.Diff(want, listed(t, dir)); diff != "" {
		t.Error(diff)
	}
	for run := range 4 {
		path := filepath.Join(dir, diskA, fmt.Sprintf("INC-%d-%s", firstRun+3600*run, diskA))
		if info, err := os.Stat(path); run > 0 && (err != nil || info.ModTime() != time.Unix(int64(firstRun+3600*run), 500)) {
			t.Errorf("%s: %v, %v", path, info.ModTime(), err)
		}
	}
	// Once more changes nothing, and further ones only what is new.
	now := tree(t, dir)
	if plan := must(t, r); len(plan.Steps) > 0 {
		t.Errorf("again: %+v", plan.Steps)
	}
	if diff := cmp.Diff(now, tree(t, dir)); diff != "" {
		t.Error(diff)
	}
	plan := must(t, request(t, dir, standard.Rebase, ""))
	if len(plan.Steps) != 3 || plan.Steps[0].Action != standard.Backing || plan.Steps[2].Action != standard.Link {
		t.Errorf("up to the end: %+v", plan.Steps) // of a only, as b is not in the last point
	}
	same(t, "all rebased", read(t, dir), all)
	if got := converted(t, 0, filepath.Join(dir, diskA, "image")); got != all[id(t, all, 4)+" "+diskA] {
		t.Errorf("disk a is %s", got)
	}
}

// Several disks in one folder each have a link of their own.
func TestRebaseFlat(t *testing.T) {
	t.Parallel()
	const name = "qmpbackup/c-flat-nots"
	dir := filepath.Join(foreigntest.Unpack(t, name+"/"), name)
	all := read(t, dir)
	plan := must(t, request(t, dir, standard.Rebase, ""))
	same(t, "rebased", read(t, dir), all)
	for _, r := range plan.Results {
		if got := converted(t, 0, filepath.Join(dir, r.Disk+".image")); got != all[string(r.Point)+" "+r.Disk] {
			t.Errorf("disk %s is %s", r.Disk, got)
		}
	}
}

// A commit in place, up to every point: what comes after it is as it was, and the increments that are in the full are gone.
func TestCommitInPlace(t *testing.T) {
	t.Parallel()
	made := newSet(t, 4)
	all := read(t, made)
	for until := range 5 {
		for _, rebased := range [][]bool{{false}, {true}, {false, true}, {false}, {true}}[until] {
			dir := clone(t, made)
			if rebased {
				must(t, request(t, dir, standard.Rebase, ""))
				r := request(t, dir, standard.Rebase, "")
				r.Until = id(t, all, 3)
				must(t, r) // disk b, too; the links of a lead to what goes
			}
			r := request(t, dir, standard.Commit, "")
			r.Until = id(t, all, until)
			must(t, r)
			checkCommitted(t, dir, all, until)
			if rebased {
				if got := converted(t, 0, filepath.Join(dir, diskA, "image")); got != all[id(t, all, max(3, until))+" "+diskA] {
					t.Errorf("until %d: the link leads to %s", until, got)
				}
			}
		}
	}
}

// What contradicts itself before a commit does so after it.
func TestContradictionStays(t *testing.T) {
	t.Parallel()
	dir := newSet(t, 4)
	must(t, request(t, dir, standard.Rebase, ""))
	name := func(run int) string { return fmt.Sprintf("INC-%d-%s", firstRun+3600*run, diskA) }
	last := filepath.Join(dir, diskA, name(4))
	imagetest.QemuImg(t, "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name(1), last)
	all := read(t, dir)
	if _, _, p := open(t, dir); len(p.Problems) != 1 {
		t.Fatal(p.Problems)
	}
	for _, c := range []standard.Command{standard.Commit, standard.Snapshots} {
		set := clone(t, dir)
		r := request(t, set, c, "")
		r.Until = id(t, all, 2)
		must(t, r)
		if _, _, p := open(t, set); len(p.Problems) != 1 || !strings.Contains(p.Problems[0].Err.Error(), name(1)) {
			t.Errorf("%s: %v", c, p.Problems)
		}
		if got := read(t, set); got[id(t, all, 3)+" "+diskA] != all[id(t, all, 3)+" "+diskA] {
			t.Errorf("%s: %v", c, got)
		}
	}
}

// Fulls without a time stamp, several disks in a folder.
func TestCommitFlat(t *testing.T) {
	t.Parallel()
	const name = "qmpbackup/c-flat-nots"
	dir := filepath.Join(foreigntest.Unpack(t, name+"/"), name)
	all := read(t, dir)
	_, _, p := open(t, dir)
	must(t, request(t, dir, standard.Rebase, ""))
	r := request(t, dir, standard.Commit, "")
	r.Until = string(p.All[2].ID)
	plan := must(t, r)
	_, _, now := open(t, dir)
	if len(now.Problems)+len(now.Warnings) > 0 || len(now.All) != 2 {
		t.Error(now.Problems, now.Warnings, len(now.All))
	}
	got := read(t, dir)
	for _, res := range plan.Results {
		if c := converted(t, 0, res.File); c != all[string(res.Point)+" "+res.Disk] {
			t.Errorf("disk %s is %s", res.Disk, c)
		}
		last := string(p.All.Latest().ID) + " " + res.Disk
		if got[last] != all[last] || converted(t, 0, filepath.Join(dir, res.Disk+".image")) != all[last] {
			t.Errorf("%s is %s", last, got[last])
		}
	}
}

// checkCommitted looks at a set after a commit up to a run.
func checkCommitted(t *testing.T, dir string, all points, until int) {
	t.Helper()
	want, full := points{}, id(t, all, 0)
	for name, c := range all {
		switch at, disk, _ := strings.Cut(name, " "); {
		case at > id(t, all, until):
			want[name] = c
		case at == id(t, all, until):
			want[full+" "+disk] = c
		case at == full && until == 4 && disk == diskB:
			want[name] = c // not in that point
		case until == 4 && disk == diskB:
			want[name] = c
		}
	}
	same(t, fmt.Sprint("committed until ", until), read(t, dir), want)
	for rel := range tree(t, dir) {
		if strings.Contains(rel, "qmchain") {
			t.Errorf("until %d: left: %s", until, rel)
		}
	}
	for _, disk := range []string{diskA, diskB} {
		path := filepath.Join(dir, disk, fmt.Sprintf("FULL-%d-%s", firstRun, disk))
		testenv.Output(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
		files, err := filepath.Glob(filepath.Join(dir, disk, "[FI]*"))
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(files, func(a, b string) int {
			one, oneErr := os.Stat(a)
			two, twoErr := os.Stat(b)
			if oneErr != nil || twoErr != nil {
				t.Fatal(oneErr, twoErr)
			}
			return one.ModTime().Compare(two.ModTime())
		})
		if files[0] != path {
			t.Errorf("until %d: by time %s is first", until, files[0])
		}
	}
}

// Snapshots in place: every point stays, and is called as before.
func TestSnapshotsInPlace(t *testing.T) {
	t.Parallel()
	made := newSet(t, 4)
	all := read(t, made)
	for _, until := range []int{2, 4} {
		dir := clone(t, made)
		if until == 2 {
			must(t, request(t, dir, standard.Rebase, ""))
		}
		r := request(t, dir, standard.Snapshots, "")
		r.Until = id(t, all, until)
		must(t, r)
		same(t, fmt.Sprint("until ", until), read(t, dir), all)
		full := filepath.Join(dir, diskA, fmt.Sprintf("FULL-%d-%s", firstRun, diskA))
		names, holds := snapshots(t, full)
		expected := []string{"FULL-BACKUP"}
		for run := 1; run <= until; run++ {
			expected = append(expected, time.Unix(int64(firstRun+3600*run), 0).UTC().Format("2006-01-02-15:04:05"))
		}
		if !slices.Equal(names, expected) {
			t.Errorf("snapshots %v, not %v", names, expected)
		}
		for run, name := range expected {
			if holds[name] != all[id(t, all, run)+" "+diskA] {
				t.Errorf("snapshot %s: %s", name, holds[name])
			}
		}
		if left, _ := filepath.Glob(filepath.Join(dir, diskA, "INC-*")); len(left) != 4-until {
			t.Errorf("until %d: left %v", until, left)
		}
		testenv.Output(t, "qemu-img", "check", "-q", "-f", "qcow2", full)
		// It goes on: a backup after that, a rebase, and more snapshots.
		must(t, request(t, dir, standard.Rebase, ""))
		same(t, "rebased", read(t, dir), all)
		must(t, request(t, dir, standard.Snapshots, ""))
		same(t, "all merged", read(t, dir), all)
		if until == 2 {
			checkOutputs(t, dir)
		}
	}
}

// There is nothing to be done where there are no increments.
func TestNothingToDo(t *testing.T) {
	t.Parallel()
	const name = "qmpbackup/l-snapshotrebase"
	dir := filepath.Join(foreigntest.Unpack(t, name+"/"), name)
	before := tree(t, dir)
	for _, c := range []standard.Command{standard.Commit, standard.Snapshots} {
		plan := must(t, request(t, dir, c, ""))
		if len(plan.Steps) > 0 || len(plan.Results) != 1 {
			t.Errorf("%s: %+v", c, plan)
		}
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// What must not be changed in place is not, and nothing is changed on the way to find that out.
func TestInPlaceRefused(t *testing.T) {
	t.Parallel()
	made := newSet(t, 2)
	full := filepath.Join(diskA, fmt.Sprintf("FULL-%d-%s", firstRun, diskA))
	inc := func(run int) string { return filepath.Join(diskA, fmt.Sprintf("INC-%d-%s", firstRun+3600*run, diskA)) }
	unpack := func(name string) func(*testing.T) string {
		return func(t *testing.T) string { return filepath.Join(foreigntest.Unpack(t, name+"/"), name) }
	}
	changed := func(change func(t *testing.T, dir string)) func(*testing.T) string {
		return func(t *testing.T) string {
			dir := clone(t, made)
			change(t, dir)
			return dir
		}
	}
	check := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	all := []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots}
	for name, c := range map[string]struct {
		set      func(t *testing.T) string
		commands []standard.Command
		err      error
	}{
		"a repository":                   {func(t *testing.T) string { return newRepo(t).Repo.Dir }, all, standard.ErrForeign},
		"streams":                        {unpack("virtnbdbackup/v1-copy"), all, standard.ErrForeign},
		"a backup that is being written": {unpack("qmpbackup/h-partial"), all, standard.ErrBusy},
		"in the other layout":            {unpack("qmpbackup/i-nots-twice"), all, standard.ErrBusy},
		"a refused increment":            {unpack("qmpbackup/e-include-raw"), all, chain.ErrDamaged},
		"an increment that is no image": {changed(func(t *testing.T, dir string) {
			check(t, os.WriteFile(filepath.Join(dir, inc(1)), []byte("x"), 0o600))
		}), all, chain.ErrDamaged},
		"a gap that the headers tell": {changed(func(t *testing.T, dir string) {
			must(t, request(t, dir, standard.Rebase, ""))
			check(t, os.Remove(filepath.Join(dir, inc(1))))
		}), all, chain.ErrDamaged},
		"a gap without a full": {changed(func(t *testing.T, dir string) { check(t, os.Remove(filepath.Join(dir, full))) }), all, chain.ErrDamaged},
		"hard links to the full": {changed(func(t *testing.T, dir string) {
			check(t, os.Link(filepath.Join(dir, full), filepath.Join(t.TempDir(), "x")))
		}), all[1:], standard.ErrCannot},
		"hard links to an increment": {changed(func(t *testing.T, dir string) {
			check(t, os.Link(filepath.Join(dir, inc(1)), filepath.Join(t.TempDir(), "x")))
		}), all[:1], standard.ErrCannot},
		"a disk that shrinks": {changed(func(t *testing.T, dir string) {
			imagetest.QemuImg(t, "resize", "-q", "--shrink", "-f", "qcow2", filepath.Join(dir, inc(2)), "512k")
		}), all[1:], standard.ErrCannot},
		"a full without a time": {changed(func(t *testing.T, dir string) {
			check(t, os.Rename(filepath.Join(dir, full), filepath.Join(dir, diskA, diskA)))
		}), all[2:], standard.ErrCannot},
		"a full of version 2": {changed(func(t *testing.T, dir string) {
			imagetest.QemuImg(t, "amend", "-q", "-f", "qcow2", "-o", "compat=0.10", filepath.Join(dir, full))
		}), all[2:], standard.ErrCannot},
		"snapshots of another zone": {changed(func(t *testing.T, dir string) {
			imagetest.QemuImg(t, "snapshot", "-c", "FULL-BACKUP", filepath.Join(dir, full))
		}), all[1:], standard.ErrCannot},
		"nobody knows on what the increments were made": {unpack("qmpbackup/o-nots-copy"), all[1:], standard.ErrCannot},
		"something called as the link": {changed(func(t *testing.T, dir string) {
			check(t, os.WriteFile(filepath.Join(dir, diskA, "image"), nil, 0o600))
		}), all[:1], standard.ErrCannot},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := c.set(t)
			before := tree(t, dir)
			for _, command := range c.commands {
				if _, err := run(t.Context(), request(t, dir, command, "")); !errors.Is(err, c.err) {
					t.Errorf("%s: %v", command, err)
				}
			}
			if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A plan changes nothing.
func TestPlanInPlace(t *testing.T) {
	t.Parallel()
	dir := newSet(t, 2)
	before := tree(t, dir)
	for _, c := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
		r := request(t, dir, c, "")
		r.DryRun = true
		j, err := standard.Open(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if len(j.Plan.Steps) < 3 {
			t.Errorf("%s: %+v", c, j.Plan.Steps)
		}
		j.Close()
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// Somebody else is at work: another call, or a program that has an image open.
func TestInPlaceBusy(t *testing.T) {
	t.Parallel()
	dir := newSet(t, 2)
	all := read(t, dir)
	r := request(t, dir, standard.Commit, "")
	var other error
	r.FS.Before = func(op, _ string) error {
		if op == "merge" && other == nil {
			set := request(t, dir, standard.Commit, "")
			_, other = run(t.Context(), set)
		}
		return nil
	}
	must(t, r)
	if !errors.Is(other, standard.ErrBusy) {
		t.Errorf("two at once: %v", other)
	}
	if got := read(t, dir)[id(t, all, 0)+" "+diskA]; got != all[id(t, all, 2)+" "+diskA] {
		t.Errorf("disk a is %s", got)
	}

	dir = newSet(t, 2)
	before := tree(t, dir)
	full := filepath.Join(dir, diskA, fmt.Sprintf("FULL-%d-%s", firstRun, diskA))
	holding := make(chan error)
	release, err := hold(full, holding)
	if err != nil {
		t.Fatal(err)
	}
	_, err = run(t.Context(), request(t, dir, standard.Commit, ""))
	release()
	if err := <-holding; err != nil {
		t.Error(err)
	}
	if !errors.Is(err, standard.ErrBusy) || errors.Is(err, standard.ErrUnfinished) {
		t.Errorf("an image that is open: %v", err)
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// hold has an image open for writing until release is called.
func hold(path string, ended chan<- error) (release func(), err error) {
	cmd := exec.Command("qemu-io", "-f", "qcow2", path)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if _, err := stdout.Read(make([]byte, 1)); err != nil { // the prompt
		return nil, err
	}
	go func() {
		_, _ = io.Copy(io.Discard, stdout)
		ended <- cmd.Wait()
	}()
	return func() { _ = stdin.Close() }, nil
}

// Cut off in the midst of qemu-img's work: what is promised is there, others are refused, and the same call goes on.
func TestCutOffInPlace(t *testing.T) {
	t.Parallel()
	made := newSet(t, 2)
	all := read(t, made)
	for _, q := range testenv.QEMUs(t)[:2] {
		for _, c := range []standard.Command{standard.Commit, standard.Snapshots} {
			t.Run(q.Name+" "+string(c), func(t *testing.T) {
				t.Parallel()
				dir := clone(t, made)
				ask := func() standard.Request {
					r := request(t, dir, c, "")
					r.QemuImg, r.Until, r.Disks = q.Img, id(t, all, 1), []string{diskA}
					return r
				}
				r := ask()
				r.RateLimit = 64 << 10
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				r.FS.Before = func(op, _ string) error {
					if op == "merge" {
						time.AfterFunc(500*time.Millisecond, cancel)
					}
					return nil
				}
				if _, err := run(ctx, r); !errors.Is(err, standard.ErrUnfinished) || !errors.Is(err, context.Canceled) {
					t.Fatalf("not cut off: %v", err)
				}
				promised(t, "cut off", read(t, dir), all, c, 1)
				for name, other := range map[string]standard.Request{
					"a rebase":       request(t, dir, standard.Rebase, ""),
					"another point":  request(t, dir, c, ""),
					"of what is cut": request(t, dir, standard.Commit, filepath.Join(t.TempDir(), "out")),
				} {
					if _, err := run(t.Context(), other); !errors.Is(err, standard.ErrUnfinished) {
						t.Errorf("%s: %v", name, err)
					}
				}
				must(t, ask())
				promised(t, "gone on", read(t, dir), all, c, 1)
				for rel := range tree(t, dir) {
					if strings.Contains(rel, "qmchain") {
						t.Errorf("left: %s", rel)
					}
				}
				must(t, request(t, dir, standard.Rebase, filepath.Join(t.TempDir(), "out")))
			})
		}
	}
}

// A note that was tampered with leads to nothing but images of the set.
func TestForgedNote(t *testing.T) {
	t.Parallel()
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, note := range map[string]string{
		"no note":     "x",
		"a new one":   `{"format": 2, "command": "commit"}`,
		"no base":     `{"format": 1, "command": "commit", "asked": {}, "disks": [{"name": "a", "base": "../outside", "merge": []}]}`,
		"a removal":   `{"format": 1, "command": "commit", "asked": {}, "disks": [{"name": "a", "base": "a/FULL-1795170000-a", "merge": ["../outside"]}]}`,
		"another way": `{"format": 1, "command": "commit", "asked": {}, "disks": [{"name": "a", "base": "a/FULL-1795170000-a", "merge": ["a.config"]}]}`,
	} {
		dir := newSet(t, 1)
		if err := errors.Join(os.WriteFile(filepath.Join(dir, ".qmchain-unfinished.json"), []byte(note), 0o600), os.Rename(outside, filepath.Join(dir, "..", "outside"))); err != nil {
			t.Fatal(err)
		}
		before := tree(t, filepath.Dir(dir))
		if _, err := run(t.Context(), request(t, dir, standard.Commit, "")); err == nil {
			t.Errorf("%s: no error", name)
		}
		if diff := cmp.Diff(before, tree(t, filepath.Dir(dir))); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if err := os.Rename(filepath.Join(dir, "..", "outside"), outside); err != nil {
			t.Fatal(err)
		}
	}
}

// Too little space is told before anything is changed.
func TestNoSpaceInPlace(t *testing.T) {
	t.Parallel()
	small := t.TempDir()
	if err := unix.Mount("none", small, "tmpfs", 0, "size=6M"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(small, unix.MNT_DETACH) }()
	made := newSet(t, 2)
	dir := filepath.Join(small, "vm")
	testenv.Output(t, "cp", "-a", made, dir)
	before := tree(t, dir)
	for _, c := range []standard.Command{standard.Commit, standard.Snapshots} {
		if _, err := run(t.Context(), request(t, dir, c, "")); !errors.Is(err, standard.ErrNoSpace) {
			t.Errorf("%s: %v", c, err)
		}
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

var errDied = errors.New("died")

// dying lets a number of changes pass.
func dying(at int) (durable.FS, *int) {
	n := new(int)
	return durable.FS{Before: func(string, string) error {
		if *n++; *n >= at {
			return errDied
		}
		return nil
	}}, n
}

// A death before any change in place loses nothing that is promised, and the same call goes on.
func TestDeathInPlace(t *testing.T) {
	t.Parallel()
	made := newSet(t, 2)
	all := read(t, made)
	rebased := clone(t, made)
	must(t, request(t, rebased, standard.Rebase, ""))
	for _, c := range []standard.Command{standard.Rebase, standard.Commit, standard.Snapshots} {
		t.Run(string(c), func(t *testing.T) {
			t.Parallel()
			set, disks := rebased, []string(nil)
			switch c {
			case standard.Rebase:
				set = made
			case standard.Snapshots:
				disks = []string{diskA}
			}
			for at := 1; ; at++ {
				dir := clone(t, set)
				r := request(t, dir, c, "")
				r.Until, r.Disks = id(t, all, 1), disks
				var n *int
				r.FS, n = dying(at)
				_, err := run(t.Context(), r)
				if err == nil {
					if want := map[standard.Command]int{standard.Rebase: 8, standard.Commit: 19, standard.Snapshots: 20}[c]; *n < want {
						t.Errorf("only %d changes", *n)
					}
					break
				}
				if !errors.Is(err, errDied) {
					t.Fatalf("%d: %v", at, err)
				}
				promised(t, fmt.Sprintf("%s, dead before change %d", c, at), read(t, dir), all, c, 1)
				r = request(t, dir, c, "")
				r.Until, r.Disks = id(t, all, 1), disks
				_, err = run(t.Context(), r)
				if c == standard.Commit && errors.Is(err, chain.ErrNoPoint) {
					err = nil // all was done already
				}
				if err != nil {
					t.Fatalf("%d, again: %v", at, err)
				}
				what := fmt.Sprintf("%s, gone on after %d", c, at)
				if c == standard.Commit {
					checkCommitted(t, dir, all, 1)
				} else {
					same(t, what, read(t, dir), all)
				}
				for rel := range tree(t, dir) {
					if strings.Contains(rel, "qmchain") {
						t.Errorf("%s: left: %s", what, rel)
					}
				}
			}
		})
	}
}

// promised fails unless what a call must not lose is there.
func promised(t *testing.T, what string, got, all points, c standard.Command, until int) {
	t.Helper()
	for name, want := range all {
		at, disk, _ := strings.Cut(name, " ")
		if c == standard.Commit && at < id(t, all, until) {
			continue
		}
		now, ok := got[name]
		if !ok && c == standard.Commit && at == id(t, all, until) {
			now = got[id(t, all, 0)+" "+disk]
		}
		if now != want {
			t.Errorf("%s: %s is %s, not %s: %v", what, name, now, want, slices.Sorted(maps.Keys(got)))
		}
	}
}
