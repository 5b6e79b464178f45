package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image/imagetest"
	"qmchain/chain/repo/repotest"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/jsondoc"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

// signalAt, as "SIGNAL STEP", makes the program send itself that signal before that step in the file system.
const signalAt = "QMCHAIN_TEST_SIGNAL_AT"

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"qmchain-restore": func() { cli.Main(program(signaller(os.Getenv(signalAt)), testHost(os.Getenv(testNode)))) }})
}

func signaller(when string) durable.FS {
	if when == "" {
		return durable.FS{}
	}
	var sig syscall.Signal
	var at, steps int32
	if _, err := fmt.Sscan(when, &sig, &at); err != nil {
		panic(err)
	}
	return durable.FS{Before: func(op, path string) error {
		if atomic.AddInt32(&steps, 1) != at {
			return nil
		}
		fmt.Fprintf(os.Stderr, "%s before %s %s\n", sig, op, path)
		arrived := make(chan os.Signal, 1)
		signal.Notify(arrived, sig)
		_ = syscall.Kill(os.Getpid(), sig)
		<-arrived                          // never, of SIGKILL
		time.Sleep(200 * time.Millisecond) // and with those whom it is for
		return nil
	}}
}

// The scripts run the real program; see each for what it guards. Beside testscript's own commands they have:
//
//	mkrepo DIR              make a repository with guest 110 of three points, $POINT1 to $POINT3, of two disks; what those of
//	                        the newest hold is in the files scsi0 and virtio1, what scsi0 held in the first is in old
//	mkforeign SET DIR       make the directory of a set of foreigntest's, as "virtnbdbackup/v1-chain"; $SUM_DISK is the SHA-256
//	                        of a disk of its last run
//	exits CODE PROGRAM...   run a program, which must end with that code
//	remember                keep what files there are, with all that is in them
//	unchanged               they must be the same still
//	$KERNEL, $INITRD        a Linux guest
//	$BARE                   a PATH with nothing but this program
//	mkloop FILE SIZE        make FILE of zeroes, and the block device $LOOP of it
//	mktmpfs DIR SIZE        mount a file system of so many bytes
//	readonly DIR            make DIR a mount of itself that can't be written to
//	flip FILE FROM          invert all bytes of a file from there on
//	waitfor FILE            wait until there is such a file
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Values["tree"] = new(string)
			kernel, initrd, err := testenv.GuestFiles()
			if err != nil {
				return err
			}
			env.Setenv("KERNEL", kernel)
			env.Setenv("INITRD", initrd)
			// A socket's path can't be long.
			dir, err := os.MkdirTemp("", "restore")
			env.Defer(func() { _ = os.RemoveAll(dir) })
			env.Setenv("SHORT", dir)
			bare, _, _ := strings.Cut(env.Getenv("PATH"), string(os.PathListSeparator))
			env.Setenv("BARE", bare)
			return err
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"mkrepo":    func(ts *testscript.TestScript, _ bool, args []string) { scriptRepo(ts, args[0]) },
			"mkforeign": func(ts *testscript.TestScript, _ bool, args []string) { mkForeign(t, ts, args[0], args[1]) },
			"exits":     exits,
			"remember":  func(ts *testscript.TestScript, _ bool, _ []string) { *ts.Value("tree").(*string) = tree(ts) },
			"unchanged": unchanged,
			"mkloop":    mkloop,
			"mktmpfs":   mktmpfs,
			"readonly":  readonly,
			"flip":      flip,
			"waitfor":   waitFor,
		},
	})
}

type tb struct{ ts *testscript.TestScript }

func (tb) Helper()                             {}
func (t tb) Fatalf(format string, args ...any) { t.ts.Fatalf(format, args...) }

// makeRepo makes a repository of three points with two disks.
func makeRepo(t repotest.TB, dir string) *repotest.Guest {
	g := repotest.NewGuest(t, repotest.New(t, dir), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	for i := range byte(3) {
		const size, other = 4 << 20, 2<<20 + 512
		g.Add(
			repotest.Disk{Name: "scsi0", Size: size, Write: repotest.RandomWrites(uint64(i), 10, size, 10+20*i)},
			repotest.Disk{Name: "virtio1", Size: other, Write: repotest.RandomWrites(uint64(i)+50, 5, other-512, 100+20*i)},
		)
	}
	return g
}

func scriptRepo(ts *testscript.TestScript, dir string) {
	dir = ts.MkAbs(dir)
	ts.Check(os.MkdirAll(dir, 0o700))
	g := makeRepo(tb{ts}, dir)
	for i, m := range g.Points {
		ts.Setenv(fmt.Sprint("POINT", i+1), string(m.ID))
	}
	for file, data := range map[string][]byte{
		"scsi0": g.Want(g.Points[2].ID, "scsi0"), "virtio1": g.Want(g.Points[2].ID, "virtio1"), "old": g.Want(g.Points[0].ID, "scsi0"),
	} {
		ts.Check(os.WriteFile(ts.MkAbs(file), data, 0o600))
	}
}

func mkForeign(t *testing.T, ts *testscript.TestScript, set, dir string) {
	ts.Check(os.Rename(filepath.Join(foreigntest.Unpack(t, set+"/"), set), ts.MkAbs(dir)))
	for _, c := range foreigntest.Cases(t) {
		if c.Path() != set {
			continue
		}
		for _, p := range c.Points { // the last run comes last
			ts.Setenv("SUM_"+strings.NewReplacer("-", "_", ".qcow2", "").Replace(p.Disk), p.SHA256)
		}
	}
}

func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	code := 0
	var exit *exec.ExitError
	switch err := ts.Exec(args[1], args[2:]...); {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
	if slices.Contains(args, "--json") {
		jsondoc.Load(scriptTB{ts}).Output(scriptTB{ts}, args[1]+" "+args[2], []byte(ts.ReadFile("stdout")))
	}
}

// scriptTB is a script as a test.
type scriptTB struct{ *testscript.TestScript }

func (scriptTB) Helper()                             {}
func (s scriptTB) Errorf(format string, args ...any) { s.Fatalf(format, args...) }

// tree lists all that is in the script's folder.
func tree(ts *testscript.TestScript) string {
	var b strings.Builder
	ts.Check(filepath.WalkDir(ts.Getenv("WORK"), func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if strings.HasPrefix(d.Name(), ".checked.") {
			return nil // what was found is recorded beside the points
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %s", path, info.Mode())
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %d %x %s", len(data), sha256.Sum256(data), info.ModTime())
		}
		b.WriteString("\n")
		return nil
	}))
	return b.String()
}

func unchanged(ts *testscript.TestScript, _ bool, _ []string) {
	if diff := cmp.Diff(*ts.Value("tree").(*string), tree(ts)); diff != "" {
		ts.Fatalf("changed: %s", diff)
	}
}

func mkloop(ts *testscript.TestScript, _ bool, args []string) {
	file := ts.MkAbs(args[0])
	size, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	ts.Check(errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size)))
	dev, detach, err := attach(file)
	ts.Check(err)
	ts.Defer(detach)
	ts.Setenv("LOOP", dev)
}

// attach makes a block device of a file.
func attach(file string) (dev string, detach func(), err error) {
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	dev = strings.TrimSpace(string(out))
	if err != nil {
		return "", nil, fmt.Errorf("losetup: %w: %s", err, dev)
	}
	return dev, func() { _ = exec.Command("losetup", "--detach", dev).Run() }, nil
}

func mktmpfs(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(unix.Mount("qmchain-test", dir, "tmpfs", 0, "size="+args[1]))
	ts.Defer(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

func readonly(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	ts.Defer(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	ts.Check(unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
}

func flip(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	from, err := strconv.Atoi(args[1])
	ts.Check(err)
	data, err := os.ReadFile(path)
	ts.Check(err)
	for i := from; i < len(data); i++ {
		data[i] ^= 0xff
	}
	ts.Check(os.WriteFile(path, data, 0o600))
}

func waitFor(ts *testscript.TestScript, _ bool, args []string) {
	for range 3000 {
		if _, err := os.Lstat(ts.MkAbs(args[0])); err == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	ts.Fatalf("no %s in time", args[0])
}

// rig is a repository, and the real program as a process of its own.
type rig struct {
	t    *testing.T
	repo string
	want map[string][]byte
	id   chain.ID
}

func newRig(t *testing.T) *rig {
	t.Helper()
	g := makeRepo(t, t.TempDir())
	r := &rig{t: t, repo: g.Repo.Dir, want: map[string][]byte{}, id: g.Points.Latest().ID}
	for _, disk := range []string{"scsi0", "virtio1"} {
		r.want[disk] = g.Want(r.id, disk)
	}
	return r
}

// run restores to output. Before that step the program gets that signal, if it is not 0.
func (r *rig) run(sig syscall.Signal, step int, output string, args ...string) (state *os.ProcessState, stderr string) {
	r.t.Helper()
	cmd := exec.CommandContext(r.t.Context(), "qmchain-restore", append([]string{"image", "--repo", r.repo, "110/latest", "--output", output}, args...)...)
	cmd.Env = os.Environ()
	if sig != 0 {
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d %d", signalAt, sig, step))
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return cmd.ProcessState, errs.String()
}

// must is run where all goes well.
func (r *rig) must(output string, args ...string) {
	r.t.Helper()
	if state, stderr := r.run(0, 0, output, args...); !state.Success() {
		r.t.Fatalf("%s: %s", state, stderr)
	}
}

// good fails unless a file holds a disk.
func (r *rig) good(disk, format, path string) {
	r.t.Helper()
	if !bytes.Equal(imagetest.Content(r.t, format, path), r.want[disk]) {
		r.t.Errorf("%s: wrong content", path)
	}
}

func killed(state *os.ProcessState) bool {
	return state.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
}

// Killed before every step, nothing looks finished that is not, and running it again gets everything right.
func TestKilledBeforeEveryStep(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for format, disks := range map[string][]string{"raw": {"scsi0", "virtio1"}, "qcow2": {"virtio1"}} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			r := &rig{t, r.repo, r.want, r.id}
			flags := []string{"--format", format}
			for _, d := range disks {
				flags = append(flags, "--disk", d)
			}
			for step := 1; ; step++ {
				dir := t.TempDir()
				state, stderr := r.run(syscall.SIGKILL, step, dir, flags...)
				if !killed(state) {
					if !state.Success() || step < 5 {
						t.Errorf("%s after %d steps: %s", state, step-1, stderr)
					}
					return
				}
				// Not all disks may be there, but those that are must be whole.
				found, err := filepath.Glob(filepath.Join(dir, "[^.]*"))
				if err != nil {
					t.Fatal(err)
				}
				for _, path := range found {
					r.good(strings.TrimSuffix(filepath.Base(path), "."+format), format, path)
				}
				args := slices.Clone(flags)
				if len(found) > 0 {
					args = append(args, "--force")
				}
				r.must(dir, args...)
				for _, disk := range disks {
					r.good(disk, format, filepath.Join(dir, disk+"."+format))
				}
				if entries, err := os.ReadDir(dir); err != nil || len(entries) != len(disks) {
					t.Errorf("step %d: left: %v, %v", step, entries, err)
				}
			}
		})
	}
}

func TestDeviceKilledBeforeEveryStep(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	size := len(r.want["scsi0"])
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, detach, err := attach(file)
	if err != nil {
		t.Fatal(err)
	}
	defer detach()
	for step := 1; ; step++ {
		if err := os.WriteFile(dev, bytes.Repeat([]byte{0x5a}, size), 0); err != nil {
			t.Fatal(err)
		}
		state, stderr := r.run(syscall.SIGKILL, step, dev, "--disk", "scsi0", "--force")
		if !killed(state) {
			if !state.Success() || step < 7 {
				t.Errorf("%s after %d steps: %s", state, step-1, stderr)
			}
			return
		}
		got, err := os.ReadFile(dev)
		if err != nil {
			t.Fatal(err)
		}
		args := []string{"--disk", "scsi0"}
		switch {
		case step == 1:
			args = append(args, "--force") // nothing has happened yet
		case bytes.Equal(got, r.want["scsi0"]):
			args = append(args, "--force") // all but the last sync had
		case !bytes.Equal(got[:4096], make([]byte, 4096)):
			t.Errorf("step %d: it looks finished: %x", step, got[:16])
		}
		r.must(dev, args...)
		r.good("scsi0", "raw", dev)
	}
}

// Told to end, the program undoes what it has begun and says so; a device it can't give back.
func TestTermination(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, len(r.want["scsi0"])), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, detach, err := attach(file)
	if err != nil {
		t.Fatal(err)
	}
	defer detach()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		for _, format := range []string{"raw", "qcow2"} {
			for step := 1; step <= 3; step++ {
				dir := t.TempDir()
				state, stderr := r.run(sig, step, dir, "--format", format)
				if entries, _ := os.ReadDir(dir); state.ExitCode() != 130 || len(entries) > 0 {
					t.Errorf("%s at step %d: %s, left %v: %s", sig, step, state, entries, stderr)
				}
			}
		}
		if state, stderr := r.run(sig, 2, dev, "--disk", "scsi0"); state.ExitCode() != 6 || !strings.Contains(stderr, "a part of the disk") {
			t.Errorf("%s: %s: %s", sig, state, stderr)
		}
	}
	r.must(dev, "--disk", "scsi0")
	r.good("scsi0", "raw", dev)
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--help"}, {"image", "--help"}, {"nbd", "--help"}, {"--version"}} {
		out, err := exec.CommandContext(t.Context(), "qmchain-restore", args...).Output()
		if err != nil || !strings.Contains(string(out), "qmchain-restore") {
			t.Errorf("%q: %v: %s", args, err, out)
		}
	}
}
