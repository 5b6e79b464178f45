package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/jsondoc"
	"qmchain/hooks"
	"qmchain/internal/testenv"
	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

// testSite names the variable with which this test's program is qmchain-hook, at a test's site.
const testSite = "QMCHAIN_HOOK_TEST_SITE"

type madeSite struct {
	Site   site
	Config string
}

func TestMain(m *testing.M) {
	if calls, ok := os.LookupEnv(testCalls); ok {
		os.Exit(systemdRun(calls, os.Args[1:]))
	}
	text, ok := os.LookupEnv(testSite)
	if !ok {
		os.Exit(m.Run())
	}
	var s madeSite
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		panic(err)
	}
	cli.MainOf(func(ctx context.Context, args []string, env cli.Env) int {
		env.Config = s.Config
		return run(ctx, s.Site, args, env)
	})
}

// rig is a node with qmchain-hook on it. Its systemd is two programs that write down how they are called; the second, systemd-run,
// does what it is asked for.
type rig struct {
	*pvetest.Node
	t      *testing.T
	site   site
	config string
	calls  string // the file of calls
}

const systemctl = `#!/bin/sh
echo "systemctl $*" >> '%[1]s'
`

func newRig(t *testing.T) *rig {
	t.Helper()
	n := pvetest.Install(t)
	r := &rig{
		Node: n, t: t,
		site: site{
			Host:    proxmox.Host{Etc: n.Etc, Run: n.Run, Events: n.Events, VzdumpLock: n.VzdumpLock, Program: n.Program},
			Systemd: hooks.Systemd{Dir: n.Bin},
			Backup:  filepath.Join(n.Bin, "qmchain-backup"),
			Program: filepath.Join(n.Bin, "qmchain-hook"),
		},
		config: filepath.Join(n.Dir, "config.toml"),
		calls:  filepath.Join(n.Dir, "calls"),
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(madeSite{r.site, r.config})
	if err != nil {
		t.Fatal(err)
	}
	r.write(r.site.Program, fmt.Sprintf("#!/bin/sh\n%s='%s' exec '%s' \"$@\"\n", testSite, text, self))
	r.write(r.site.Backup, "#!/bin/sh\n")
	r.write(filepath.Join(n.Bin, "systemctl"), fmt.Sprintf(systemctl, r.calls))
	r.write(filepath.Join(n.Bin, "systemd-run"), fmt.Sprintf("#!/bin/sh\n%s='%s' exec '%s' \"$@\"\n", testCalls, r.calls, self))
	return r
}

// write writes a file that can be executed, at once: a script that is written while it is being started can't be.
func (r *rig) write(path, text string) {
	r.t.Helper()
	if err := testenv.WriteProgram(path+".new", text); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		r.t.Fatal(err)
	}
}

// addVM adds a VM with a backup socket.
func (r *rig) addVM(vmid int, lines ...string) {
	r.t.Helper()
	r.AddVM(vmid, lines...)
	if _, err := r.site.Host.AddSocket(r.t.Context(), proxmox.VMID(vmid), false); err != nil {
		r.t.Fatal(err)
	}
}

// call runs the program in this process.
func (r *rig) call(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	env := cli.Env{Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }, Config: r.config}
	code = run(r.t.Context(), r.site, args, env)
	if slices.Contains(args, "--json") {
		jsondoc.Load(r.t).Output(r.t, "qmchain-hook "+args[0], out.Bytes())
	}
	return code, out.String(), errs.String()
}

// expect runs the program and compares its exit code and its standard output, without regard to runs of spaces.
func (r *rig) expect(code int, stdout string, args ...string) (stderr string) {
	r.t.Helper()
	gotCode, gotOut, gotErr := r.call(args...)
	if gotCode != code || words(gotOut) != words(stdout) {
		r.t.Errorf("qmchain-hook %s: exit code %d, want %d\n got %s\nwant %s\n%s", strings.Join(args, " "), gotCode, code, words(gotOut), words(stdout), gotErr)
	}
	return gotErr
}

func (r *rig) contains(text string, parts ...string) {
	r.t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			r.t.Errorf("%q is not said: %s", part, text)
		}
	}
}

// silent makes sure that nothing is said of ours.
func (r *rig) silent(text string, not ...string) {
	r.t.Helper()
	for _, part := range not {
		if strings.Contains(text, part) {
			r.t.Errorf("%q is said: %s", part, text)
		}
	}
}

func words(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(lines, "\n")
}

// install gives a VM our hook script.
func (r *rig) install(vmid string) {
	r.t.Helper()
	if code, _, stderr := r.call("install", vmid); code != 0 {
		r.t.Fatalf("install: exit code %d: %s", code, stderr)
	}
}

// qm runs qm, which must succeed, and returns all it says.
func (r *rig) qm(args ...string) string {
	r.t.Helper()
	code, stdout, stderr := r.TryQM(args...)
	if code != 0 {
		r.t.Fatalf("qm %s: exit code %d: %s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout + stderr
}

// called returns the calls since the last time, without the options that are always there.
func (r *rig) called() string {
	r.t.Helper()
	text, err := os.ReadFile(r.calls)
	if err != nil && !os.IsNotExist(err) {
		r.t.Fatal(err)
	}
	_ = os.Remove(r.calls)
	var lines []string
	for line := range strings.Lines(string(text)) {
		lines = append(lines, strings.TrimSpace(strings.Replace(line, "--no-ask-password --no-block ", "", 1)))
	}
	return strings.Join(lines, "\n")
}

// expectCalls waits for what the end of a VM has called, which is not awaited by qm.
func (r *rig) expectCalls(want ...string) {
	r.t.Helper()
	wanted, got := strings.Join(want, "\n"), ""
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		more := r.called()
		if more != "" && got != "" {
			got += "\n"
		}
		if got += more; got == wanted {
			return
		}
		if time.Now().After(deadline) || !strings.HasPrefix(wanted, got) {
			r.t.Fatalf("called:\n%s\nwant:\n%s", got, wanted)
		}
	}
}

func (r *rig) wait(what string, done func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// bare runs the program as vzdump does: without an environment.
func (r *rig) bare(args ...string) (code int, output string) {
	r.t.Helper()
	cmd := exec.Command(r.site.Program, args...)
	cmd.Env = []string{}
	text, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		r.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(text)
}
