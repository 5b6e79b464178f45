package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/cmd/internal/cli"
	"qmchain/internal/durable"
	"qmchain/internal/ledger"
	"qmchain/internal/testenv"
	"qmchain/qmp/qmptest"
)

// killAt makes the program, which the test binary then is, kill itself by SIGKILL before that step in the file system.
const killAt = "QMCHAIN_TEST_KILL_AT"

// testNode names the Proxmox VE node that the program then runs on.
const testNode = "QMCHAIN_TEST_NODE"

func TestMain(m *testing.M) {
	at, ok := os.LookupEnv(killAt)
	if !ok {
		os.Exit(m.Run())
	}
	kill, err := strconv.Atoi(at)
	if err != nil {
		panic(err)
	}
	steps := 0
	fsys := durable.FS{Before: func(op, path string) error {
		if steps++; steps == kill {
			fmt.Fprintf(os.Stderr, "killed before %s %s\n", op, path)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}}
	n := local()
	if text := os.Getenv(testNode); text != "" {
		if err := json.Unmarshal([]byte(text), &n); err != nil {
			panic(err)
		}
	}
	cli.Main(programOn(n, fsys))
}

// bench is a guest with two disks, and the real program that backs it up as a process of its own.
type bench struct {
	t      *testing.T
	vm     *testenv.VM
	ledger *ledger.Ledger
	repo   string
	fleece string
}

func newBench(t *testing.T, q testenv.QEMU, style testenv.Style) *bench {
	t.Helper()
	disks := []testenv.Disk{{ID: "scsi0", Size: 4 << 20, Discard: "unmap"}, {ID: "virtio1", Size: 4 << 20, Discard: "unmap"}}
	vm := testenv.Start(t, testenv.Config{QEMU: q, Style: style, Disks: disks})
	return &bench{t, vm, ledger.New(t, vm, rand.Uint64(), disks...), t.TempDir(), t.TempDir()}
}

func (b *bench) write(n int) {
	b.t.Helper()
	for range n {
		if err := b.ledger.Random(); err != nil {
			b.t.Fatal(err)
		}
	}
}

// command is the program; it kills itself before step kill in the file system, if that is not 0.
func (b *bench) command(kill int, args ...string) (cmd *exec.Cmd, stderr *bytes.Buffer) {
	self, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	cmd, stderr = exec.Command(self, args...), new(bytes.Buffer)
	cmd.Env = append(os.Environ(), killAt+"="+strconv.Itoa(kill))
	cmd.Stderr = stderr
	cmd.WaitDelay = 10 * time.Second
	return cmd, stderr
}

func (b *bench) args(socket string) []string {
	return []string{"run", "-v", "--socket", socket, "--name", "web", "--repo", b.repo, "--fleece-dir", b.fleece}
}

// point takes a point that must succeed with exit code 0 at exactly this level, and hold what the disks do now.
func (b *bench) point(level chain.Level) {
	b.t.Helper()
	cmd, stderr := b.command(0, b.args(b.vm.Socket)...)
	out, err := cmd.Output()
	if err != nil {
		b.t.Fatalf("%v: %s", err, stderr)
	}
	guest, id, _ := strings.Cut(strings.TrimSpace(string(out)), "/")
	if guest != "web" {
		b.t.Fatalf("output is %q", out)
	}
	text, err := os.ReadFile(filepath.Join(b.repo, guest, id, chain.ManifestFile))
	if err != nil {
		b.t.Fatal(err)
	}
	m, err := chain.DecodeManifest(text)
	if err != nil {
		b.t.Fatal(err)
	}
	if m.Level() != level {
		b.t.Fatalf("level is %s: %s\n%s", m.Level(), m.Disks[0].Reason, stderr)
	}
	disks := ledger.ReadPoint(b.t, b.vm.Config().QEMU, b.repo, guest, m.ID)
	if _, err := b.ledger.Instant(disks, b.ledger.Now(), b.ledger.Now()); err != nil {
		b.t.Fatalf("point %s: %v", id, err)
	}
}

// killed reports whether a program was ended by SIGKILL; any other failure ends the test.
func (b *bench) killed(err error, stderr *bytes.Buffer) bool {
	b.t.Helper()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return true
	}
	b.t.Fatalf("%v: %s", err, stderr)
	return false
}

// doctor has the doctor look and put right, so that it then finds nothing. Where there must be something it must find it.
func (b *bench) doctor(mustFind bool) {
	b.t.Helper()
	args := []string{"doctor", "--socket", b.vm.Socket, "--name", "web", "--repo", b.repo, "--fleece-dir", b.fleece}
	code, stdout, stderr := call(b.t, args...)
	if code != 0 && code != 6 || mustFind && code != 6 {
		b.t.Fatalf("doctor: exit code %d: %s%s", code, stdout, stderr)
	}
	if code, stdout, stderr := call(b.t, append(args, "--fix")...); code != 0 {
		b.t.Fatalf("doctor --fix: exit code %d: %s%s", code, stdout, stderr)
	}
	if code, stdout, stderr := call(b.t, args...); code != 0 || stdout != "all is well\n" {
		b.t.Fatalf("doctor after doctor --fix: exit code %d: %s%s", code, stdout, stderr)
	}
}

// after checks that the guest goes on as if nothing had been, and that the next run is an increment.
func (b *bench) after() {
	b.t.Helper()
	if got := b.vm.Status(); got != "running" {
		b.t.Fatalf("the guest is %s", got)
	}
	b.write(3)
	b.point(chain.Inc)
	for _, pattern := range []string{filepath.Join(b.fleece, "*"), filepath.Join(b.repo, "*", ".*.partial")} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			b.t.Fatalf("left behind: %v", left)
		}
	}
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Name string `json:"name"`
		} `json:"dirty-bitmaps"`
	}
	b.vm.Execute("query-named-block-nodes", map[string]any{"flat": true}, &nodes)
	for _, n := range nodes {
		if strings.HasPrefix(n.Name, "qmchain") || len(n.Bitmaps) > 1 {
			b.t.Fatalf("left in the guest: %+v", n)
		}
	}
	var objects []struct{ Name string }
	if b.vm.Try("qom-list", map[string]any{"path": "/objects"}, &objects) == nil {
		for _, o := range objects {
			if strings.HasPrefix(o.Name, "qmchain") {
				b.t.Fatalf("left in the guest: object %s", o.Name)
			}
		}
	}
}

// everywhere runs a test with PVE 8's command line on the oldest QEMU and PVE 9's on a newer one, as they are found.
func everywhere(t *testing.T, f func(*testing.T, *bench)) {
	for _, q := range testenv.QEMUs(t) {
		style := testenv.Drive
		if q.AtLeast(10, 0) {
			style = testenv.Throttle
		}
		t.Run(q.Name+"/"+style.String(), func(t *testing.T) {
			t.Parallel()
			f(t, newBench(t, q, style))
		})
	}
}

var every = flag.Int("every", 3, "tests of each command or step of a run try every so many, from a random one on; 1: all")

func TestKilledBeforeEveryCommand(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, b *bench) {
		b.write(40)
		b.point(chain.Full)
		for tries, at := 1, 1+rand.IntN(*every); ; tries, at = tries+1, at+*every {
			b.ledger.Forget()
			b.write(3)
			started := make(chan *os.Process, 1)
			proxy := qmptest.NewProxy(t, b.vm.Socket, qmptest.Hooks{
				Before: func(n int, _ []qmptest.CommandSeen) qmptest.Verdict {
					b.write(1) // the guest goes on writing
					if n != at {
						return qmptest.Verdict{}
					}
					_ = (<-started).Kill()
					return qmptest.Verdict{Drop: true}
				},
				After: func(int, qmptest.CommandSeen, json.RawMessage) { b.write(1) },
			})
			cmd, stderr := b.command(0, b.args(proxy.Addr())...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			started <- cmd.Process
			killed := b.killed(cmd.Wait(), stderr)
			if tries%4 == 0 {
				b.doctor(at > 4 && killed)
			}
			b.after()
			if !killed {
				t.Logf("a run has %d commands", proxy.Commands())
				if at < 40 {
					t.Error("too few")
				}
				return
			}
		}
	})
}

func TestKilledBeforeEveryFileSystemStep(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, b *bench) {
		b.write(40)
		for at := 1 + rand.IntN(*every); ; at += *every {
			b.ledger.Forget()
			b.write(3)
			cmd, stderr := b.command(at, b.args(b.vm.Socket)...)
			killed := b.killed(cmd.Run(), stderr)
			if points, _ := filepath.Glob(filepath.Join(b.repo, "web", "2*")); len(points) == 0 {
				// The very first run: there is no chain to go on with yet.
				b.point(chain.Full)
			}
			b.after()
			if !killed {
				if at < 20 {
					t.Errorf("a run of %d steps", at)
				}
				return
			}
		}
	})
}

// A kill in the middle of the copying, not at a command.
func TestKilledWhileCopying(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, b *bench) {
		b.write(40)
		b.point(chain.Full)
		for range 10 {
			b.write(20)
			cmd, stderr := b.command(0, b.args(b.vm.Socket)...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(rand.N(200 * time.Millisecond))
			_ = cmd.Process.Kill()
			b.killed(cmd.Wait(), stderr)
			b.after()
		}
	})
}

func TestTermination(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, b *bench) {
		b.write(40)
		b.point(chain.Full)
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
			b.write(20)
			started := make(chan *os.Process, 1)
			proxy := qmptest.NewProxy(t, b.vm.Socket, qmptest.Hooks{
				Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
					if cmds[0].Name == "blockdev-reopen" {
						select {
						case p := <-started:
							_ = p.Signal(sig)
							time.Sleep(200 * time.Millisecond) // until it has arrived
						default:
						}
					}
					return qmptest.Verdict{}
				},
			})
			cmd, stderr := b.command(0, b.args(proxy.Addr())...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			started <- cmd.Process
			err := cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 130 {
				t.Fatalf("%s: %v: %s", sig, err, stderr)
			}
			b.after()
		}
	})
}

// Who reads the log goes away: the run goes on.
func TestLogReaderGoesAway(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Drive)
	b.write(20)
	b.point(chain.Full)
	cmd, _ := b.command(0, b.args(b.vm.Socket)...)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	cmd.Stderr = w
	if out, err := cmd.Output(); err != nil || !strings.HasPrefix(string(out), "web/") {
		t.Errorf("%q, %v", out, err)
	}
	_ = w.Close()
	b.after()
}
