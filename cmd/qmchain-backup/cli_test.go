package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/jsondoc"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

// call runs the program in this process.
func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = program(durable.FS{}).Run(t.Context(), args, cli.Env{Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }})
	checkJSON(t, args, out.Bytes())
	return code, out.String(), errs.String()
}

// checkJSON compares what was printed with the manual page.
func checkJSON(t *testing.T, args []string, printed []byte) {
	t.Helper()
	if slices.Contains(args, "--json") {
		jsondoc.Load(t).Output(t, "qmchain-backup "+args[0], printed)
	}
}

// tree lists all files below a folder with their contents.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		b.WriteString(path + "\n")
		if d.Type().IsRegular() {
			text, err := os.ReadFile(path)
			b.Write(text)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Drive)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	full := filepath.Join(dir, "full")
	for _, d := range []string{full, filepath.Join(full, "photos")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Somebody talks another protocol, and somebody else says nothing.
	chatty, mute := listen(t, "220 mail.example.org ESMTP\r\n"), listen(t, "")
	stale := filepath.Join(dir, "stale.qmp")
	if l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale}); err != nil {
		t.Fatal(err)
	} else {
		l.SetUnlinkOnClose(false)
		_ = l.Close()
	}

	run := func(socket string, more ...string) []string {
		args := []string{"run", "--socket", socket, "--name", "web", "--repo", b.repo, "--fleece-dir", b.fleece, "--lock-wait", "0s"}
		return append(args, more...)
	}
	before := tree(t, b.repo)
	for _, test := range []struct {
		what string
		args []string
		code int
		text string // in the error
	}{
		{"no command", nil, 80, "run"},
		{"an unknown flag", run(b.vm.Socket, "--fast"), 80, "unknown flag --fast"},
		{"an unknown level", run(b.vm.Socket, "--level", "most"), 80, "level"},
		{"no socket", []string{"run", "--name", "web", "--repo", b.repo}, 80, "--socket"},
		{"a guest's name that is a path", run(b.vm.Socket, "--name", "../web"), 80, "guest's name"},
		{"an address of no known kind", run("http://example.org"), 2, "http://example.org"},
		{"a socket that is not there", run(filepath.Join(dir, "none")), 2, "no such file"},
		{"a socket without a listener", run(stale), 2, "is the guest running"},
		{"a file for a socket", run(file), 2, file},
		{"another protocol", run(chatty), 1, "not QMP"},
		{"the guest agent's socket, or one in use", run(mute), 3, "socket of its own"},
		{"a repository that is not there", run(b.vm.Socket, "--repo", filepath.Join(dir, "none")), 2, "no such file"},
		{"a file for a repository", run(b.vm.Socket, "--repo", file), 1, "not a directory"},
		{"a folder of something else", run(b.vm.Socket, "--repo", full), 2, "is the share mounted"},
		{"an unknown disk", run(b.vm.Socket, "--disk", "scsi7"), 2, "only scsi0, virtio1"},
		{"an unknown disk left out", run(b.vm.Socket, "--exclude-disk", "scsi7"), 2, "no disk"},
		{"all disks left out", run(b.vm.Socket, "--exclude-disk", "scsi0", "--exclude-disk", "virtio1"), 2, "no disk that can be backed up"},
		{"no fleece folder", run(b.vm.Socket, "--fleece-dir", filepath.Join(dir, "none")), 2, "--fleece-dir"},
		{"a file for the fleece folder", run(b.vm.Socket, "--fleece-dir", file), 2, "--fleece-dir"},
		{"an increment of nothing", run(b.vm.Socket, "--level", "inc"), 1, "first point"},
		{"a list of nothing", []string{"list", "--repo", full}, 2, "not a qmchain repository"},
	} {
		code, _, stderr := call(t, test.args...)
		if code != test.code || !strings.Contains(stderr, test.text) {
			t.Errorf("%s: exit code %d, error %s", test.what, code, stderr)
		}
	}
	// What is there now was made by the runs that had come as far as the repository; it holds no point.
	if after := tree(t, b.repo); strings.Contains(after, "point.json") || strings.Contains(after, ".partial") {
		t.Errorf("changed: %s to %s", before, after)
	}
	b.point(chain.Full)
	b.point(chain.Inc)
}

// listen greets everybody on a unix socket.
func listen(t *testing.T, greeting string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if _, err := io.WriteString(conn, greeting); err != nil {
				return
			}
			t.Cleanup(func() { _ = conn.Close() })
		}
	}()
	return path
}

func TestUnwritableRepository(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Throttle)
	b.write(20)
	b.point(chain.Full)
	testenv.Output(t, "mount", "--bind", b.repo, b.repo)
	t.Cleanup(func() { testenv.Output(t, "umount", "-l", b.repo) })
	testenv.Output(t, "mount", "-o", "remount,bind,ro", b.repo)
	before := tree(t, b.repo)
	code, _, stderr := call(t, b.args(b.vm.Socket)...)
	if code != 1 || !strings.Contains(stderr, "read-only file system") {
		t.Errorf("exit code %d, error %s", code, stderr)
	}
	if tree(t, b.repo) != before {
		t.Error("changed all the same")
	}
	testenv.Output(t, "mount", "-o", "remount,bind,rw", b.repo)
	b.after()
}

// A chain with a damaged link is not built on, and nothing of it is touched.
func TestDamagedChain(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Throttle)
	b.write(20)
	b.point(chain.Full)
	b.write(5)
	b.point(chain.Inc)
	images := func(disk string) []string {
		paths, err := filepath.Glob(filepath.Join(b.repo, "web", repo.ImagesFolder, "*."+disk+".qcow2"))
		if err != nil || len(paths) != 2 {
			t.Fatal(paths, err)
		}
		return paths
	}
	base, inc := images("scsi0")[0], images("scsi0")[1]
	content := func(path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	put := func(path string, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	baseData, incData := content(base), content(inc)
	other := content(images("virtio1")[0])
	restore := func() { put(base, baseData); put(inc, incData) }
	for what, damage := range map[string]func(){
		"missing":   func() { _ = os.Remove(base) },
		"truncated": func() { put(base, baseData[:len(baseData)-1]) },
		"empty":     func() { put(inc, nil) },
		"swapped with another disk's of the same size": func() {
			put(base, append(other[:min(len(other), len(baseData)):len(other)], baseData[min(len(other), len(baseData)):]...))
		},
		"swapped with its neighbour": func() { put(base, incData); put(inc, baseData) },
		"a link to another file":     func() { _ = os.Rename(inc, inc+".away"); _ = os.Symlink(inc+".away", inc) },
		"garbage in the header":      func() { put(inc, append(bytes.Repeat([]byte{0xff}, 64), incData[64:]...)) },
	} {
		damage()
		before := tree(t, b.repo)
		code, _, stderr := call(t, append(b.args(b.vm.Socket), "--level", "inc")...)
		if code != 1 || !strings.Contains(stderr, "scsi0.qcow2") {
			t.Errorf("%s: exit code %d, error %s", what, code, stderr)
		}
		if tree(t, b.repo) != before {
			t.Errorf("%s: the repository was changed", what)
		}
		_ = os.Remove(inc)
		_ = os.Remove(inc + ".away")
		restore()
	}
	b.write(5)
	b.point(chain.Inc) // all is well again

	// With a damaged chain, auto begins a new one, and says so.
	_ = os.Remove(base)
	code, stdout, stderr := call(t, append(b.args(b.vm.Socket), "--disk", "scsi0")...)
	if code != 4 || !strings.HasPrefix(stdout, "web/2") || !strings.Contains(stderr, "a full instead of an increment") {
		t.Errorf("exit code %d, output %q, error %s", code, stdout, stderr)
	}
	b.write(5)
	b.point(chain.Inc)
}

func TestListAndInfo(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Drive)
	b.point(chain.Full)
	b.write(10)
	if code, _, stderr := call(t, append(b.args(b.vm.Socket), "--note", "before the upgrade")...); code != 0 {
		t.Fatal(stderr)
	}
	code, stdout, stderr := call(t, "list", "--repo", b.repo, "--json")
	if code != 0 {
		t.Fatal(stderr)
	}
	var points []map[string]any
	if err := json.Unmarshal([]byte(stdout), &points); err != nil {
		t.Fatal(err)
	}
	if len(points) != 2 || points[1]["note"] != "before the upgrade" || points[1]["level"] != "inc" || points[0]["guest"] != "web" {
		t.Errorf("points: %v", points)
	}
	disk := points[1]["disks"].([]any)[0].(map[string]any)
	if disk["parent"] != points[0]["id"] || disk["virtual_size"] != 4194304.0 || disk["format"] != "qcow2" {
		t.Errorf("disk: %v", disk)
	}
	if _, err := os.Stat(filepath.Join(b.repo, disk["file"].(string))); err != nil {
		t.Error(err)
	}
	for flag, lines := range map[string]int{"--long=false": 4, "--long": 8} { // a heading, the guest, its points, their disks
		if code, stdout, _ := call(t, "list", "--repo", b.repo, flag); code != 0 || strings.Count(stdout, "\n") != lines {
			t.Errorf("%s: exit code %d, text %s", flag, code, stdout)
		}
	}
	if code, _, stderr := call(t, "list", "--repo", b.repo, "wbe"); code != 2 || !strings.Contains(stderr, "did you mean web?") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if code, _, stderr := call(t, "list", "--repo", b.repo, "--watch"); code != 80 || !strings.Contains(stderr, "no terminal") {
		t.Errorf("exit code %d: %s", code, stderr)
	}

	code, stdout, stderr = call(t, "info", "--socket", b.vm.Socket, "--json")
	if code != 0 {
		t.Fatal(stderr)
	}
	var info struct {
		Status string
		Disks  []struct {
			Name    string
			Bitmaps []struct{ Point string }
		}
	}
	if err := json.Unmarshal([]byte(stdout), &info); err != nil {
		t.Fatal(err)
	}
	if info.Status != "running" || len(info.Disks) != 2 || len(info.Disks[0].Bitmaps) != 1 || info.Disks[0].Bitmaps[0].Point != points[1]["id"] {
		t.Errorf("info: %+v", info)
	}

	for want, args := range map[string][]string{
		`"estimate": `: append(b.args(b.vm.Socket), "--dry-run", "--json"),
		`"removed": [`: {"cleanup", "--socket", b.vm.Socket, "--json"},
	} {
		if code, stdout, stderr := call(t, args...); code != 0 || !strings.Contains(stdout, want) {
			t.Errorf("%q: exit code %d: %s%s", args, code, stdout, stderr)
		}
	}

	// A manifest that was edited.
	manifest := filepath.Join(b.repo, "web", points[0]["id"].(string), "point.json")
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(manifest, bytes.Replace(text, []byte(`"instant"`), []byte(`"frozen"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := call(t, "list", "--repo", b.repo); code != 5 || !strings.Contains(stderr, points[0]["id"].(string)) {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

func TestEventsMetricsAndCheck(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Drive)
	b.write(20)
	file := filepath.Join(t.TempDir(), "m.prom")
	args := append(b.args(b.vm.Socket), "--json", "--metrics-file", file)
	code, stdout, stderr := call(t, args...)
	if code != 0 {
		t.Fatal(stderr)
	}
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	var last struct {
		Event, Guest, ID, Level string
		Seconds                 float64
		Warnings                []string
	}
	for _, line := range lines {
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	if last.Event != "point" || last.Guest != "web" || last.ID == "" || last.Level != "full" || last.Seconds <= 0 || last.Warnings == nil {
		t.Errorf("last event: %+v", last)
	}
	if code, stdout, stderr := call(t, append(args, "--threshold", "1GiB")...); code != 0 || !strings.Contains(stdout, `"event":"skipped"`) {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	text, err := os.ReadFile(file)
	if err != nil || !strings.Contains(string(text), `qmchain_backup_last_run_exit_code{guest="web"} 0`) {
		t.Errorf("%s, %v", text, err)
	}
	code, stdout, _ = call(t, append(args, "--disk", "scsi9")...)
	if code != 2 || !strings.Contains(stdout, `"exit_code":2`) {
		t.Errorf("exit code %d: %s", code, stdout)
	}
	if text, _ := os.ReadFile(file); !strings.Contains(string(text), `qmchain_backup_last_run_exit_code{guest="web"} 2`) {
		t.Errorf("%s", text)
	}

	for _, test := range []struct {
		args []string
		code int
		text string
	}{
		{nil, 0, "ok"},
		{[]string{"--max-age", "1ns"}, 1, "TOO OLD"},
		{[]string{"web", "mail"}, 2, "no point"},
		{[]string{"../web"}, 80, ""},
		{[]string{"--json"}, 0, `"state": "ok"`},
		{[]string{"--json", "--max-age", "1ns"}, 1, `"state": "old"`},
		{[]string{"--json", "mail"}, 2, `"state": "none"`},
	} {
		code, stdout, stderr := call(t, append([]string{"check", "--repo", b.repo}, test.args...)...)
		if code != test.code || !strings.Contains(stdout, test.text) {
			t.Errorf("check %q: exit code %d: %s%s", test.args, code, stdout, stderr)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--help"}, {"run", "--help"}, {"--version"}} {
		if code, stdout, _ := call(t, args...); code != 0 || !strings.Contains(stdout, "qmchain-backup") {
			t.Errorf("%v: exit code %d: %s", args, code, stdout)
		}
	}
	if _, stdout, _ := call(t, "--help"); !strings.Contains(stdout, "130") {
		t.Error("no table of exit codes")
	}
}
