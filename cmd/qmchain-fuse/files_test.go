package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"qmchain/chain/repo/repotest"
	"qmchain/fusefs/inside"
	"qmchain/internal/testenv"
)

// The scripts for the files in a point run the real program with real file systems, and an appliance where they don't say
// --kernel. Beside testscript's own commands they have:
//
//	mkguest DIR             make a repository with guest 110: scsi0 has a partition that is vfat, and one that is ext4, the root
//	                        of a Linux; scsi1 is ext4, and the root's fstab has it at /srv; $POINT is its point
//	exits CODE PROGRAM...   run a program, which must end with that code
//	hold FILE, release      open a file; close it
//	unmounted DIR           wait until no files are mounted there
//	killserver WHICH...     send SIGKILL to: keeper, worker, server, guestmount or qemu
//	termserver WHICH..., stopserver WHICH...
//	                        send SIGTERM, SIGSTOP
//	gone WHICH...           wait until there are none
//	clean                   wait until nothing is left: no process, mount, loop device or temporary file
//	mkshare DIR MNT         mount DIR at MNT, as a share is
//	share WHEN              have reads of images in it hang: now; or mounting: while there is a loop device on the point; or not
//	atloop                  wait until there is one
//
// $OPEN is a folder that every user can get to.
func TestFilesScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/files",
		Setup: func(env *testscript.Env) error {
			temp := filepath.Join(env.WorkDir, "a tmp")
			env.Vars = append(env.Vars, applianceEnv(t)...)
			env.Setenv("TMPDIR", temp)
			env.Setenv("QMCHAIN_REPO", filepath.Join(env.WorkDir, "repo"))
			env.Values["held"] = map[string]*os.File{}
			env.Values["share"] = &hangingShare{}
			open, err := os.MkdirTemp("", "qmchain-open-")
			if err != nil {
				return err
			}
			env.Setenv("OPEN", open)
			env.Defer(func() { _ = os.RemoveAll(open) })
			env.Defer(func() { cleanUpFiles(t, env.WorkDir) })
			return errors.Join(os.Chmod(open, 0o755), os.MkdirAll(temp, 0o700))
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"mkguest": mkGuest,
			"exits":   exits,
			"hold":    hold,
			"unmounted": func(ts *testscript.TestScript, _ bool, args []string) {
				eventually(ts, "unmounted", func() bool {
					ours, err := inside.Mounted(ts.MkAbs(args[0]))
					return err == nil && !ours
				})
			},
			"release":    release,
			"killserver": func(ts *testscript.TestScript, _ bool, args []string) { signalFiles(ts, unix.SIGKILL, args...) },
			"termserver": func(ts *testscript.TestScript, _ bool, args []string) { signalFiles(ts, unix.SIGTERM, args...) },
			"stopserver": func(ts *testscript.TestScript, _ bool, args []string) { signalFiles(ts, unix.SIGSTOP, args...) },
			"gone": func(ts *testscript.TestScript, _ bool, which []string) {
				eventually(ts, "gone", func() bool {
					all := filesProcesses(ts.Getenv("WORK"))
					return !slices.ContainsFunc(which, func(kind string) bool { return len(all[kind]) > 0 })
				})
			},
			"clean":   clean,
			"mkshare": mkShare,
			"share":   setShare,
			"atloop": func(ts *testscript.TestScript, _ bool, _ []string) {
				eventually(ts, "a loop device", func() bool { return hasLoop(ts.Getenv("POINT")) })
			},
		},
	})
}

// applianceEnv is the environment in which libguestfs finds a kernel, and starts its appliance without KVM.
func applianceEnv(t *testing.T) []string {
	env := []string{"LIBGUESTFS_BACKEND=direct", "LIBGUESTFS_BACKEND_SETTINGS=force_tcg", "LIBGUESTFS_CACHEDIR=/var/tmp"}
	if installed, _ := filepath.Glob("/boot/vmlinuz-*"); len(installed) > 0 {
		return env
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	kernels, _ := filepath.Glob(filepath.Join(cache, "appliance/boot/vmlinuz-*"))
	if len(kernels) != 1 {
		t.Fatalf("kernels in %s: %v (make setup)", cache, kernels)
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	return append(env, "SUPERMIN_KERNEL="+kernels[0], "SUPERMIN_KERNEL_VERSION="+version,
		"SUPERMIN_MODULES="+filepath.Join(cache, "appliance/lib/modules", version))
}

func mkGuest(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	work := ts.MkAbs("making")
	for _, d := range []string{"root/etc", "root/bin", "root/srv", "root/tree/sub", "data"} {
		ts.Check(os.MkdirAll(filepath.Join(work, d), 0o755))
	}
	big := append(append(bytes.Repeat([]byte("data"), 100_000), make([]byte, 1<<20)...), "end"...)
	for name, content := range map[string]string{
		"root/etc/fstab":         "LABEL=root / ext4 defaults 0 1\nLABEL=data /srv ext4 defaults 0 2\n",
		"root/etc/hostname":      "guest\n",
		"root/tree/a b":          "blank",
		"root/tree/it's \"it\"":  "quotes",
		"root/tree/two\nlines":   "line feed",
		"root/tree/-rf":          "dash",
		"root/tree/\xff\xfe":     "no UTF-8",
		"root/tree/$(id) *;#":    "shell",
		"root/tree/sub/big":      string(big),
		"root/tree/sub/set-uid":  "#!/bin/sh\n",
		"root/tree/sub/readable": "",
		"data/on another disk":   "of scsi1\n",
	} {
		ts.Check(os.WriteFile(filepath.Join(work, name), []byte(content), 0o644))
	}
	in := func(name string) string { return filepath.Join(work, "root/tree", name) }
	ts.Check(os.Chown(in("sub/set-uid"), 1234, 2345))
	ts.Check(unix.Chmod(in("sub/set-uid"), 0o4755))
	ts.Check(os.Chmod(in("sub/readable"), 0o600))
	ts.Check(os.Chtimes(in("sub/set-uid"), time.Unix(1e9, 0), time.Unix(1e9, 0)))
	ts.Check(os.Symlink("/etc/hostname", in("absolute")))
	ts.Check(os.Symlink("../../../../etc/hostname", in("above")))
	ts.Check(os.Symlink("/no such", in("nowhere")))
	ts.Check(os.Symlink("/etc", in("folder")))
	ts.Check(unix.Mkfifo(in("pipe"), 0o644))

	scsi0, scsi1, part := filepath.Join(work, "scsi0.raw"), filepath.Join(work, "scsi1.raw"), filepath.Join(work, "part")
	run := func(name string, args ...string) {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			ts.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	for path, size := range map[string]int64{scsi0: 64 << 20, scsi1: 16 << 20, part: 48 << 20, part + "1": 8 << 20} {
		ts.Check(os.WriteFile(path, nil, 0o600))
		ts.Check(os.Truncate(path, size))
	}
	run("sh", "-c", `printf 'label: gpt\nstart=1MiB, size=8MiB, type=U\nstart=9MiB, size=48MiB\n' | sfdisk -q "$0"`, scsi0)
	run("mkfs.vfat", "-n", "EFI", part+"1")
	run("mkfs.ext4", "-q", "-F", "-L", "root", "-d", filepath.Join(work, "root"), part)
	run("mkfs.ext4", "-q", "-F", "-L", "data", "-d", filepath.Join(work, "data"), scsi1)
	run("dd", "if="+part+"1", "of="+scsi0, "bs=1M", "seek=1", "conv=notrunc", "status=none")
	run("dd", "if="+part, "of="+scsi0, "bs=1M", "seek=9", "conv=notrunc", "status=none")
	g := repotest.NewGuest(tb{ts}, repotest.New(tb{ts}, dir), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	m := g.Add(repotest.Disk{Name: "scsi0", Image: scsi0}, repotest.Disk{Name: "scsi1", Image: scsi1})
	ts.Setenv("POINT", string(m.ID))
}

func release(ts *testscript.TestScript, _ bool, _ []string) {
	for _, f := range ts.Value("held").(map[string]*os.File) {
		_ = f.Close()
	}
}

// filesProcesses are those that the script in dir has started, by what they are.
func filesProcesses(dir string) map[string][]int {
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	found := map[string][]int{}
	for _, f := range files {
		env, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(env, []byte("WORK="+dir+"\x00")) {
			continue
		}
		args, err := os.ReadFile(filepath.Join(filepath.Dir(f), "cmdline"))
		if err != nil || len(args) == 0 { // a zombie
			continue
		}
		var kind string
		switch name := filepath.Base(string(args[:bytes.IndexByte(args, 0)])); {
		case strings.HasPrefix(name, "qemu"):
			kind = "qemu"
		case name == "guestmount":
			kind = "guestmount"
		case bytes.Contains(args, []byte("\x00--serve\x00")):
			kind = "server"
		case bytes.Contains(args, []byte("\x00--work=")):
			kind = "worker"
		case bytes.Contains(args, []byte("\x00--foreground\x00")):
			kind = "keeper"
		case strings.HasPrefix(name, "qmchain-fuse"):
			kind = "reader"
		default:
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err == nil {
			found[kind] = append(found[kind], pid)
		}
	}
	return found
}

func signalFiles(ts *testscript.TestScript, signal unix.Signal, which ...string) {
	all := filesProcesses(ts.Getenv("WORK"))
	for _, kind := range which {
		if len(all[kind]) == 0 {
			ts.Fatalf("no %s: %v", kind, all)
		}
		for _, pid := range all[kind] {
			if err := unix.Kill(pid, signal); err != nil && len(which) == 1 { // else the one before may have taken it along
				ts.Fatalf("kill %d: %v", pid, err)
			}
		}
	}
}

// leftovers says what is left of a script.
func leftovers(dir, point string) (left []string) {
	for kind, pids := range filesProcesses(dir) {
		left = append(left, fmt.Sprint(kind, pids))
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir+"/") && !strings.Contains(line, " - fuse."+shareType+" ") {
			left = append(left, line)
		}
	}
	temp, _ := filepath.Glob(filepath.Join(dir, "a tmp/*"))
	left = append(left, temp...)
	if hasLoop(point) {
		left = append(left, "loop device")
	}
	return left
}

func clean(ts *testscript.TestScript, _ bool, _ []string) {
	dir := ts.Getenv("WORK")
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		left := leftovers(dir, ts.Getenv("POINT"))
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("left: %q", left)
		}
	}
}

func cleanUpFiles(t *testing.T, dir string) {
	for range 3 {
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
				_ = unix.Unmount(f[4], unix.MNT_DETACH)
			}
		}
		for kind, pids := range filesProcesses(dir) {
			for _, pid := range pids {
				t.Errorf("%s %d was left", kind, pid)
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
	}
}
