package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/repo/repotest"
	"qmchain/cmd/internal/jsondoc"
	"qmchain/fusefs/tree"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"qmchain-fuse": main, helperName: main})
}

// The scripts run the real program; see each for what it guards. Beside testscript's own commands they have:
//
//	mkrepo DIR              make a repository with guest 110 of three points; $POINT is the newest, WANT its scsi0
//	mkforeign SET DIR       make the directory of a set of foreigntest's, as "virtnbdbackup/v1-chain"
//	exits CODE PROGRAM...   run a program, which must end with that code
//	mounted DIR, unmounted DIR
//	                        wait until a repository is mounted, or is not
//	noserver                wait until no server is left
//	hold FILE               open a file, until the script ends
//	broken FILE             reading FILE, which is held, must fail
//	terminate               send SIGTERM to the server
//	killserver DIR          send it SIGKILL
//	automount REPO DIR      have REPO mounted at DIR when somebody looks into it, as x-systemd.automount does
//	systemd [TEXT]          listen where $NOTIFY_SOCKET says; with a text: wait until it was sent
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Values["held"] = map[string]*os.File{}
			env.Values["systemd"] = &notified{}
			env.Defer(func() { cleanUp(t, env.WorkDir) })
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"mkrepo":     mkrepo,
			"mkforeign":  func(ts *testscript.TestScript, _ bool, args []string) { mkForeign(t, ts, args[0], args[1]) },
			"exits":      exits,
			"mounted":    func(ts *testscript.TestScript, _ bool, args []string) { waitMounted(ts, args, true) },
			"unmounted":  func(ts *testscript.TestScript, _ bool, args []string) { waitMounted(ts, args, false) },
			"noserver":   noServer,
			"hold":       hold,
			"broken":     broken,
			"terminate":  terminate,
			"killserver": killServer,
			"systemd":    systemd,
			"automount":  automount,
		},
	})
}

// cleanUp takes away what a script that failed has left.
func cleanUp(t *testing.T, dir string) {
	for _, m := range mountsUnder(dir) {
		_ = unix.Unmount(m, unix.MNT_FORCE|unix.MNT_DETACH)
	}
	for _, pid := range servers(dir) {
		t.Errorf("server %d was left", pid)
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

func mountsUnder(dir string) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") && strings.Contains(line, " - fuse.qmchain ") {
			found = append(found, fields[4])
		}
	}
	return found
}

// servers returns the servers that the script in dir has started. Their arguments are relative paths, but they have its
// environment.
func servers(dir string) []int {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var pids []int
	for _, f := range files {
		args, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(args, []byte("\x00--foreground\x00")) {
			continue
		}
		env, err := os.ReadFile(filepath.Join(filepath.Dir(f), "environ"))
		if err != nil || !slices.Contains(strings.Split(string(env), "\x00"), "WORK="+dir) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

const diskSize = 4 << 20

func mkrepo(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	g := repotest.NewGuest(tb{ts}, repotest.New(tb{ts}, dir), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	for i := range byte(3) {
		g.Add(repotest.Disk{Name: "scsi0", Size: diskSize, Write: repotest.RandomWrites(uint64(i), 10, diskSize, 10+20*i)})
	}
	newest := g.Points.Latest().ID
	ts.Setenv("POINT", string(newest))
	ts.Check(os.WriteFile(ts.MkAbs("WANT"), g.Want(newest, "scsi0"), 0o600))
}

func mkForeign(t *testing.T, ts *testscript.TestScript, set, dir string) {
	ts.Check(os.Rename(filepath.Join(foreigntest.Unpack(t, set+"/"), set), ts.MkAbs(dir)))
}

type tb struct{ ts *testscript.TestScript }

func (tb) Helper()                             {}
func (t tb) Fatalf(format string, args ...any) { t.ts.Fatalf(format, args...) }

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

func eventually(ts *testscript.TestScript, what string, ok func() bool) {
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("not in time: %s", what)
		}
	}
}

func waitMounted(ts *testscript.TestScript, args []string, want bool) {
	dir := ts.MkAbs(args[0])
	eventually(ts, "mounted is "+strconv.FormatBool(want), func() bool {
		return (len(mountsUnder(filepath.Dir(dir))) > 0) == want
	})
}

func noServer(ts *testscript.TestScript, _ bool, _ []string) {
	eventually(ts, "no server", func() bool { return len(servers(ts.Getenv("WORK"))) == 0 })
}

func theServer(ts *testscript.TestScript) int {
	pids := servers(ts.Getenv("WORK"))
	if len(pids) != 1 {
		ts.Fatalf("servers: %v", pids)
	}
	return pids[0]
}

func terminate(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(unix.Kill(theServer(ts), unix.SIGTERM))
}

func hold(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.Open(ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Defer(func() { _ = f.Close() })
	ts.Value("held").(map[string]*os.File)[args[0]] = f
}

func broken(ts *testscript.TestScript, _ bool, args []string) {
	f := ts.Value("held").(map[string]*os.File)[args[0]]
	if _, err := f.ReadAt(make([]byte, 4096), diskSize-4096); err == nil {
		ts.Fatalf("%s can still be read", args[0])
	}
}

func killServer(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(unix.Kill(theServer(ts), unix.SIGKILL))
	eventually(ts, "the server is dead", func() bool {
		_, err := os.Stat(dir)
		return errors.Is(err, unix.ENOTCONN)
	})
}

// systemd is systemd's side of sd_notify(3).
func systemd(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) == 0 {
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: ts.MkAbs("notify"), Net: "unixgram"})
		ts.Check(err)
		ts.Defer(func() { _ = conn.Close() })
		ts.Setenv("NOTIFY_SOCKET", ts.MkAbs("notify"))
		ts.Value("systemd").(*notified).conn = conn
		return
	}
	n := ts.Value("systemd").(*notified)
	b := make([]byte, 4096)
	ts.Check(n.conn.SetReadDeadline(time.Now().Add(time.Minute)))
	for !strings.Contains(n.said, args[0]) {
		k, err := n.conn.Read(b)
		if err != nil {
			ts.Fatalf("%v; was told %q", err, n.said)
		}
		n.said += string(b[:k]) + "\n"
	}
}

// automount is what systemd does for x-systemd.automount: there is a mount of type autofs, whose requests come through a pipe,
// autofs(5). The kernel has those wait who come to the place meanwhile, but not the processes of one process group: systemd's,
// in which it starts mount(8), and here this one.
func automount(ts *testscript.TestScript, _ bool, args []string) {
	repo, dir := ts.MkAbs(args[0]), ts.MkAbs(args[1])
	helper := ""
	for _, d := range filepath.SplitList(ts.Getenv("PATH")) {
		if path := filepath.Join(d, helperName); helper == "" && unix.Access(path, unix.X_OK) == nil {
			helper = path
		}
	}
	var pipe [2]int
	ts.Check(unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	ts.Check(unix.SetNonblock(pipe[0], true)) // so that Close ends a read
	requests := os.NewFile(uintptr(pipe[0]), "autofs")
	if unix.Getpgrp() == 0 { // it is of another pid namespace, as in a container that was entered
		ts.Check(unix.Setpgid(0, 0))
	}
	options := fmt.Sprintf("fd=%d,pgrp=%d,minproto=5,maxproto=5,direct", pipe[1], unix.Getpgrp())
	ts.Check(unix.Mount("systemd-1", dir, "autofs", 0, options))
	ts.Check(unix.Close(pipe[1])) // the kernel has its own
	place, err := os.Open(dir)
	ts.Check(err)
	ended := make(chan struct{})
	ts.Defer(func() {
		_ = requests.Close()
		<-ended
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		_ = place.Close()
	})
	env := []string{"WORK=" + ts.Getenv("WORK"), "PATH=" + ts.Getenv("PATH")}
	go func() {
		defer close(ended)
		const missingDirect, ready, fail = 5, 0x9360, 0x9361 // linux/auto_fs4.h
		packet := make([]byte, 304)
		for {
			n, err := requests.Read(packet)
			if err != nil {
				return
			}
			if n < 12 || binary.NativeEndian.Uint32(packet[4:]) != missingDirect {
				continue
			}
			token := binary.NativeEndian.Uint32(packet[8:])
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			cmd := exec.CommandContext(ctx, helper, repo, dir, "-o", "rw")
			cmd.Env = env
			answer := uint(ready)
			if cmd.Run() != nil {
				answer = fail
			}
			cancel()
			_ = unix.IoctlSetInt(int(place.Fd()), answer, int(token))
		}
	}()
}

// notified is what systemd was told.
type notified struct {
	conn *net.UnixConn
	said string
}

func TestOptions(t *testing.T) {
	id := func(n uint32) *uint32 { return &n }
	mask := fs.FileMode(0o27)
	for _, test := range []struct {
		in   string
		want options
		err  string
	}{
		{"", options{}, ""},
		{"rw,nosuid,nodev,relatime", options{}, ""},
		{"defaults,noauto,_netdev,nofail,user,x-systemd.requires=network.target,X-mount.mkdir,comment=a b", options{}, ""},
		{"allow_other", options{allowOther: true}, ""},
		{"ro,allow_other,debug", options{allowOther: true, debug: true}, ""},
		{"uid=1000,gid=0,umask=027", options{view: tree.View{UID: id(1000), GID: id(0), Umask: &mask}}, ""},
		{"metrics_file=/run/a=b.prom", options{metricsFile: "/run/a=b.prom"}, ""},
		{"allow_othe", options{}, "-o allow_othe: not known"},
		{"ro,uid=root", options{}, "-o uid=root: the number of a user or group is asked for"},
		{"gid=-1", options{}, "-o gid=-1: the number of a user or group is asked for"},
		{"gid=4294967295", options{}, "-o gid=4294967295: the number of a user or group is asked for"},
		{"uid", options{}, "-o uid: the number of a user or group is asked for"},
		{"umask=888", options{}, "-o umask=888: three octal digits are asked for, as in 027"},
		{"umask=1777", options{}, "-o umask=1777: three octal digits are asked for, as in 027"},
		{"metrics_file", options{}, "-o metrics_file: not known"},
		{"remount,ro", options{}, "-o remount: the mount can't be changed: unmount and mount it again"},
	} {
		got, err := parseOptions(strings.Split(test.in, ","), false)
		if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(options{})); diff != "" {
			t.Errorf("%q: %s", test.in, diff)
		}
		if (err == nil) != (test.err == "") || err != nil && err.Error() != test.err {
			t.Errorf("%q: error %v, want %q", test.in, err, test.err)
		}
	}
	if got, err := parseOptions([]string{"nope", "allow_other"}, true); err != nil || !got.allowOther {
		t.Errorf("sloppy: %+v, %v", got, err)
	}
	if _, err := parseOptions([]string{"uid=x"}, true); err == nil {
		t.Error("sloppy, but a value that is wrong is accepted")
	}
}

// What mount(8) calls its helper with, and systemd by way of it.
func TestHelperArgs(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"qmchain-fuse mount a b", "qmchain-fuse mount a b"},
		{"/usr/bin/qmchain-fuse umount b", "/usr/bin/qmchain-fuse umount b"},
		{"/sbin/mount.fuse.qmchain /repo /mnt -o rw,allow_other", "qmchain-fuse mount -o rw,allow_other -- /repo /mnt"},
		{"mount.fuse.qmchain /repo /mnt -nsv -o ro -t fuse.qmchain", "qmchain-fuse mount --sloppy --verbose -o ro -- /repo /mnt"},
		{"mount.fuse.qmchain -f /repo /mnt", "qmchain-fuse mount --fake -- /repo /mnt"},
		{"mount.fuse.qmchain -- -repo /mnt", "qmchain-fuse mount -- -repo /mnt"},
		{"mount.fuse.qmchain /repo", "qmchain-fuse mount -- /repo"},
		{"mount.fuse.qmchain /repo /mnt -x", "qmchain-fuse mount -x -- /repo /mnt"}, // which is refused then
		{"mount.fuse.qmchain --help", "qmchain-fuse mount --help"},
		{"mount.fuse.qmchain /repo /mnt -o", "qmchain-fuse mount -o -- /repo /mnt"}, // so is this
	} {
		if got := strings.Join(helperArgs(strings.Fields(test.in)), " "); got != test.want {
			t.Errorf("%s: %s, want %s", test.in, got, test.want)
		}
	}
}
