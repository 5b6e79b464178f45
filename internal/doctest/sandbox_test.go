package doctest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qmchain/internal/testenv"
)

// The sandbox's process is this test's program again, with these in its environment.
const (
	insideDocument = "QMCHAIN_DOCTEST_DOCUMENT"
	insidePrograms = "QMCHAIN_DOCTEST_PROGRAMS"
)

// The limits of a document and of one command. A document is to be done in seconds.
const (
	documentLimit = 5 * time.Minute
	commandLimit  = 2 * time.Minute
)

// enter makes the sandbox, and runs its arguments in it: all of this host with what is written kept in memory, in mount and
// process name spaces of its own. Bash is the first process there, and takes what others leave; when it ends, everything
// does. What must be there though it may be another file system on this host is bound in.
const enter = `
set -euo pipefail
temp=$1 base=$2
shift 2
# Other tests wait for the end of their mounts, which is not before that of their copies here.
mapfile -t mounts </proc/self/mountinfo
for line in "${mounts[@]}"; do
	read -r _ _ _ _ place rest <<<"$line"
	place=$(printf %b "$place")
	if [[ $place == "$temp"/* && $rest =~ ' - fuse'|' /dev/loop' ]]; then
		umount --lazy --no-canonicalize --internal-only "$place" 2>/dev/null || true
	fi
done
mount -t tmpfs -o mode=755 tmpfs "$base"
root=$base/root
mkdir "$base/upper" "$base/work" "$root"
mount -t overlay -o lowerdir=/,upperdir="$base/upper",workdir="$base/work" overlay "$root"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/mnt"
while [[ $1 != -- ]]; do
	mkdir -p "$root$1"
	mount --bind "$1" "$root$1"
	shift
done
shift
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
# There are hosts whose KVM does not work, and none of this needs it: a device that nobody serves.
mknod "$base/none" c 10 250
[[ ! -e $root/dev/kvm ]] || mount --bind "$base/none" "$root/dev/kvm"
folder=$PWD
chroot "$root" bash -c 'cd "$0" && "$@"' "$folder" "$@"
exit $?
`

// sandbox runs a document in one.
func sandbox(t *testing.T, name, programs string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tree, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	temp, err := filepath.EvalSymlinks(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), documentLimit)
	defer cancel()
	args := []string{
		"--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--",
		"bash", "-c", enter, "bash", temp, t.TempDir(), tree, cache, filepath.Dir(self), programs, "--", self,
	}
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.Env = append(os.Environ(), insideDocument+"="+name, insidePrograms+"="+programs, "TMPDIR=/tmp")
	// It ends with this process, however that ends. What the kernel watches is the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// TestMain is the sandbox's process, where it is started as that.
func TestMain(m *testing.M) {
	if name := os.Getenv(insideDocument); name != "" {
		os.Exit(inside(name))
	}
	os.Exit(m.Run())
}

// inside runs a document on the machine that this process has to itself.
func inside(name string) (code int) {
	tb := &machine{}
	defer func() {
		if r := recover(); r != nil {
			tb.failed = true
			if f, ok := r.(fatal); ok {
				fmt.Println(f.error)
			} else {
				fmt.Printf("panic: %v\n%s", r, debug.Stack())
			}
		}
		tb.cleanUp()
		if tb.failed {
			code = 1
		}
	}()
	d, err := readDocument(name)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	run(tb, d, scenarios[name])
	return 0
}

// machine is a testing.TB in a process that is no test, as far as it is used here.
type machine struct {
	testing.TB
	mu       sync.Mutex
	failed   bool
	cleanups []func()
}

type fatal struct{ error }

func (m *machine) Helper()                         {}
func (m *machine) Fatal(args ...any)               { panic(fatal{errors.New(fmt.Sprint(args...))}) }
func (m *machine) Logf(format string, args ...any) { fmt.Printf(format+"\n", args...) }
func (m *machine) Fatalf(format string, args ...any) {
	panic(fatal{fmt.Errorf(format, args...)})
}

func (m *machine) Errorf(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed = true
	fmt.Printf(format+"\n", args...)
}

func (m *machine) Failed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failed
}

func (m *machine) Cleanup(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cleanups = append(m.cleanups, f)
}

// TempDir needs no clean-up: all of this machine goes.
func (m *machine) TempDir() string {
	dir, err := os.MkdirTemp("", "machine")
	check(m, err)
	return dir
}

func (m *machine) cleanUp() {
	for _, f := range slices.Backward(m.cleanups) {
		f()
	}
}

// shell is one bash, as a reader's: what a command sets, and where it goes, is there for the next.
type shell struct {
	tb     testing.TB
	stdin  io.WriteCloser
	codes  *os.File // a line for each command that has ended
	output string   // a file
	script string   // a file
}

func newShell(tb testing.TB, env []string) *shell {
	dir, err := os.MkdirTemp("", "shell")
	check(tb, err)
	s := &shell{tb: tb, output: filepath.Join(dir, "output"), script: filepath.Join(dir, "command")}
	read, write, err := os.Pipe()
	check(tb, err)
	s.codes = read
	output, err := os.Create(s.output)
	check(tb, err)
	cmd := exec.Command("bash", "--norc", "-o", "pipefail")
	cmd.Env, cmd.Dir = env, "/root"
	cmd.Stdout, cmd.Stderr = output, output
	cmd.ExtraFiles = []*os.File{write}
	s.stdin, err = cmd.StdinPipe()
	check(tb, err)
	check(tb, cmd.Start())
	check(tb, errors.Join(output.Close(), write.Close()))
	tb.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return s
}

// run runs a command and returns what it says.
func (s *shell) run(command string) (code int, output string) {
	check(s.tb, os.Truncate(s.output, 0))
	check(s.tb, os.WriteFile(s.script, []byte(command+"\n"), 0o600))
	// What is started must not hold the pipe of the exit codes, nor read the commands.
	_, err := fmt.Fprintf(s.stdin, "source %s </dev/null 3>&-; echo $? >&3\n", s.script)
	check(s.tb, err)
	check(s.tb, s.codes.SetReadDeadline(time.Now().Add(commandLimit)))
	_, err = fmt.Fscan(s.codes, &code)
	text, readErr := os.ReadFile(s.output)
	check(s.tb, readErr)
	output = strings.TrimLeft(string(text), "\x00") // the shell's own position is where it was
	if err != nil {
		s.tb.Fatalf("%s: %v\n%s", command, err, output)
	}
	return code, output
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatalf("%v", err)
	}
}
