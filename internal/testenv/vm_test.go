package testenv

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// eachQEMU runs a test with every version.
func eachQEMU(t *testing.T, test func(t *testing.T, q QEMU)) {
	t.Helper()
	for _, q := range QEMUs(t) {
		t.Run(q.Name, func(t *testing.T) {
			t.Parallel()
			test(t, q)
		})
	}
}

// eachStyle runs a test with every version and style.
func eachStyle(t *testing.T, test func(t *testing.T, q QEMU, style Style)) {
	t.Helper()
	eachQEMU(t, func(t *testing.T, q QEMU) {
		for _, style := range Styles {
			t.Run(style.String(), func(t *testing.T) { test(t, q, style) })
		}
	})
}

// Every kind of disk starts in every style, and its data survives.
func TestDisks(t *testing.T) {
	t.Parallel()
	eachStyle(t, func(t *testing.T, q QEMU, style Style) {
		const size = 1 << 20
		vm := Start(t, Config{QEMU: q, Style: style, Disks: []Disk{
			{ID: "scsi0", Size: size},
			{ID: "scsi1", Size: size, IOThread: true, Discard: "unmap"},
			{ID: "virtio1", Size: size, Format: "raw"},
			{ID: "virtio2", Size: size, IOThread: true, Cache: "writeback"},
			{ID: "sata0", Size: size, Cache: "unsafe"},
			{ID: "sata1", Size: size, Cache: "writethrough"},
			{ID: "ide0", Size: size},
			{ID: "ide2", Device: "ide-cd"},
			{ID: "nvme0", Size: size},
			{ID: "usb0", Size: size},
			{ID: "efidisk0", Size: 256 << 10, Format: "raw"},
		}})
		write := func(read bool) {
			for i, d := range vm.Config().Disks {
				if d.cdrom() {
					continue
				}
				if !read {
					vm.IO(d.ID, fmt.Sprintf("write -P %d 4k 64k", i+1))
					vm.IO(d.ID, "flush")
				}
				vm.IO(d.ID, fmt.Sprintf("read -P %d 4k 64k", i+1))
			}
		}
		write(false)
		var blocks []block
		vm.Execute("query-block", nil, &blocks)
		for _, d := range vm.Config().Disks {
			i := slices.IndexFunc(blocks, func(b block) bool { return b.QDev == d.qom() || b.QDev == d.ID })
			if i < 0 {
				t.Errorf("%s: not in query-block", d.ID)
				continue
			}
			b := blocks[i]
			if want := map[Style]string{Drive: "drive-" + d.ID}[style]; b.Device != want {
				t.Errorf("%s: device name %q, want %q", d.ID, b.Device, want)
			}
			if d.cdrom() {
				if b.Inserted != nil {
					t.Errorf("%s is not empty", d.ID)
				}
				continue
			}
			format := d.withDefaults().Format
			want := map[Style]string{Drive: format, Throttle: "throttle", Blockdev: format}[style]
			if b.Inserted == nil || b.Inserted.Drv != want {
				t.Errorf("%s: %+v, want a %s on top", d.ID, b.Inserted, want)
			}
			if style != Drive && b.Inserted.NodeName != topNode(style, d.ID) {
				t.Errorf("%s: node %s", d.ID, b.Inserted.NodeName)
			}
		}
		vm.Restart()
		write(true)
	})
}

// What IO writes passes a filter that was put in while the guest runs, in the
// way that fits each style.
func TestIOPassesFilters(t *testing.T) {
	t.Parallel()
	eachStyle(t, func(t *testing.T, q QEMU, style Style) {
		const size = 1 << 20
		disks := []Disk{{ID: "scsi0", Size: size, Discard: "unmap"}, {ID: "virtio1", Size: size, Format: "raw", Discard: "unmap"}}
		vm := Start(t, Config{QEMU: q, Style: style, Disks: disks})
		dir := t.TempDir()
		for _, disk := range disks {
			vm.IO(disk.ID, "write -P 0x11 0 256k")
			cbw, fleece := "cbw-"+disk.ID, "fleece-"+disk.ID
			path := filepath.Join(dir, fleece)
			CreateDisk(t, q, path, "qcow2", size)
			vm.Execute("blockdev-add", map[string]any{
				"driver": "qcow2", "node-name": fleece,
				"file": map[string]any{"driver": "file", "filename": path},
			}, nil)
			top := vm.top(disk.ID)
			below := top
			if style == Throttle {
				below = vm.child(top)
			}
			vm.Execute("blockdev-add", map[string]any{
				"driver": "copy-before-write", "node-name": cbw, "file": below, "target": fleece, "discard": "unmap",
			}, nil)
			if style == Throttle {
				vm.Execute("blockdev-reopen", map[string]any{"options": []any{map[string]any{
					"driver": "throttle", "node-name": top, "throttle-group": "throttle-" + top, "file": cbw, "read-only": false,
				}}}, nil)
			} else {
				vm.Execute("qom-set", map[string]any{"path": disk.qom(), "property": "drive", "value": cbw}, nil)
			}
			for i, command := range []string{"write -P 0x22 0 64k", "write -z 64k 64k", "write -z -u 128k 64k", "discard 192k 64k"} {
				vm.IO(disk.ID, command)
				vm.NodeIO(fleece, fmt.Sprintf("read -P 0x11 %dk 64k", i*64))
			}
			vm.IO(disk.ID, "read -P 0x22 0 64k")
			vm.IO(disk.ID, "read -P 0 64k 128k")
		}
		vm.Quit()
		for _, disk := range disks {
			out := Output(t, q.IO, "-r", "-f", "qcow2", "-c", "read -P 0x11 0 256k", filepath.Join(dir, "fleece-"+disk.ID))
			if err := ioOutcome("read", out); err != nil {
				t.Errorf("%s: what was there before the writes: %v", disk.ID, err)
			}
			var info struct {
				ActualSize int64 `json:"actual-size"`
			}
			decode(t, Output(t, q.Img, "info", "--output=json", "-f", "qcow2", filepath.Join(dir, "fleece-"+disk.ID)), &info)
			if info.ActualSize < 256<<10 || info.ActualSize > 768<<10 {
				t.Errorf("%s: the fleece file takes %d bytes", disk.ID, info.ActualSize)
			}
		}
	})
}

// block is a part of what query-block says of a device.
type block struct {
	Device   string
	QDev     string
	Inserted *struct {
		NodeName string `json:"node-name"`
		Drv      string
	}
}

func (vm *VM) top(disk string) string {
	vm.tb.Helper()
	var blocks []block
	vm.Execute("query-block", nil, &blocks)
	for _, b := range blocks {
		if b.QDev == disk || b.QDev == vm.Disk(disk).qom() {
			return b.Inserted.NodeName
		}
	}
	vm.tb.Fatalf("no disk %s", disk)
	return ""
}

func (vm *VM) child(node string) string {
	vm.tb.Helper()
	var graph struct {
		Nodes []struct {
			ID   int
			Name string
		}
		Edges []struct {
			Parent, Child int
			Name          string
		}
	}
	vm.Execute("x-debug-query-block-graph", nil, &graph)
	name := map[int]string{}
	for _, n := range graph.Nodes {
		name[n.ID] = n.Name
	}
	for _, e := range graph.Edges {
		if name[e.Parent] == node && e.Name == "file" {
			return name[e.Child]
		}
	}
	vm.tb.Fatalf("%s has no file child", node)
	return ""
}

func TestIOFails(t *testing.T) {
	t.Parallel()
	vm := Start(t, Config{QEMU: Host(t), Style: Throttle, Disks: []Disk{{ID: "scsi0", Size: 1 << 20}}})
	vm.IO("scsi0", "write -P 1 0 64k")
	for command, want := range map[string]string{
		"read -P 2 0 64k":    "Pattern verification failed",
		"write -P 1 1M 64k":  "Input/output error",
		"discard 1M 64k":     "failed",
		"write -P 1 0":       "",
		"write -q -P 1 0 4k": "not done",
		"frobnicate":         "not found",
		`write "0" 4k`:       "not supported",
	} {
		_, err := vm.TryIO("scsi0", command)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", command, err, want)
		}
	}
	if _, err := vm.TryIO("scsi7", "read 0 4k"); err == nil {
		t.Error("a disk that is not there was read")
	}
	vm.IO("scsi0", "read -P 1 0 64k") // none of them left output behind
	vm.Kill()
	if _, err := vm.TryIO("scsi0", "read 0 4k"); !errors.Is(err, errGone) {
		t.Errorf("after the end of QEMU: %v", err)
	}
}

// The sockets are independent: clients on all of them at once, and each of
// them survives the others.
func TestSockets(t *testing.T) {
	t.Parallel()
	vm := Start(t, Config{QEMU: Host(t)})
	for _, path := range []string{vm.Socket, vm.Spare} {
		m, err := dialMonitor(path, nil, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		defer m.close()
		if err := m.execute("query-status", nil, nil); err != nil {
			t.Error(err)
		}
	}
	vm.Execute("query-status", nil, nil)
	conn, err := net.Dial("unix", vm.AgentSocket)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}

func TestLife(t *testing.T) {
	t.Parallel()
	eachQEMU(t, func(t *testing.T, q QEMU) {
		vm := Start(t, Config{QEMU: q, Style: Throttle, NoShutdown: true, Disks: []Disk{{ID: "scsi0", Size: 1 << 20}}})
		cfg := vm.Config()
		identity := func() string {
			var uuid, genid, name map[string]string
			vm.Execute("query-uuid", nil, &uuid)
			vm.Execute("query-vm-generation-id", nil, &genid)
			vm.Execute("query-name", nil, &name)
			return uuid["UUID"] + " " + genid["guid"] + " " + name["name"]
		}
		want := cfg.UUID + " " + cfg.VMGenID + " qmchain-test"
		if got := identity(); got != want {
			t.Errorf("identity %q, want %q", got, want)
		}
		if s := vm.Status(); s != "running" {
			t.Errorf("status %s", s)
		}
		vm.IO("scsi0", "write -P 7 0 64k")
		vm.IO("scsi0", "flush")
		for _, end := range []struct {
			name string
			how  func()
		}{{"SIGKILL", vm.Kill}, {"quit", vm.Quit}, {"SIGTERM", vm.Terminate}} {
			name, pid := end.name, vm.Pid()
			end.how()
			if vm.Alive() || syscall.Kill(pid, 0) == nil {
				t.Fatalf("%s: still there", name)
			}
			if _, err := os.Stat(vm.Socket); (err == nil) != (name == "SIGKILL") {
				t.Errorf("%s: the socket: %v", name, err)
			}
			vm.Restart()
			if got := identity(); got != want {
				t.Errorf("%s: identity %q, want %q", name, got, want)
			}
			vm.IO("scsi0", "read -P 7 0 64k")
		}
		vm.PowerOff()
		vm.WaitEvent("SHUTDOWN", time.Minute)
		if s := vm.Status(); s != "shutdown" {
			t.Errorf("status %s after power off", s)
		}
		vm.Reconfigure(func(c *Config) { c.NoShutdown, c.VMGenID, c.Prelaunch = false, RandomUUID(), true })
		if got := identity(); got == want {
			t.Error("the same vmgenid after a change")
		}
		if s := vm.Status(); s != "prelaunch" {
			t.Errorf("status %s, want prelaunch", s)
		}
		vm.Execute("cont", nil, nil)
		vm.PowerOff()
		if err := vm.Wait(time.Minute); err != nil {
			t.Errorf("exit after power off: %v", err)
		}
	})
}

// The firmware is harmless, and the guest idle: it touches no disk, and needs
// no CPU time to speak of.
func TestIdle(t *testing.T) {
	t.Parallel()
	vm := Start(t, Config{QEMU: Host(t), Disks: []Disk{{ID: "scsi0", Size: 1 << 20}, {ID: "ide0", Size: 1 << 20}}})
	cpu := func() int {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", vm.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		user, _ := strconv.Atoi(fields[11])
		system, _ := strconv.Atoi(fields[12])
		return user + system
	}
	before := cpu()
	time.Sleep(300 * time.Millisecond)
	if used := cpu() - before; used > 10 { // of 30, in hundredths of a second
		t.Errorf("an idle guest used %d ms of CPU time in 300", used*10)
	}
	var stats []struct {
		Stats struct {
			Reads  int `json:"rd_operations"`
			Writes int `json:"wr_operations"`
		}
	}
	vm.Execute("query-blockstats", nil, &stats)
	for _, s := range stats {
		if s.Stats.Reads+s.Stats.Writes != 0 {
			t.Errorf("an idle guest made requests: %+v", s)
		}
	}
}

// A test process that is killed takes its QEMU along.
func TestDiesWithTheTest(t *testing.T) {
	t.Parallel()
	eachQEMU(t, func(t *testing.T, q QEMU) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestStartAndWait$")
		cmd.Env = append(os.Environ(), "TESTENV_START="+q.Name, "TMPDIR="+t.TempDir())
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if killErr := cmd.Process.Kill(); killErr != nil {
			t.Fatal(killErr)
		}
		_ = cmd.Wait()
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "pid ")))
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		deadline := time.Now().Add(time.Minute)
		for running(pid) {
			if time.Now().After(deadline) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
				t.Fatal("QEMU outlived the test process")
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
}

// running tells whether the process is there and no zombie: who waits for an
// orphan depends on the system.
func running(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	state := text[strings.LastIndexByte(string(text), ')')+2]
	return state != 'Z' && state != 'X'
}

// TestStartAndWait is the other half of TestDiesWithTheTest.
func TestStartAndWait(t *testing.T) {
	name := os.Getenv("TESTENV_START")
	if name == "" {
		return
	}
	vm := Start(t, Config{QEMU: Version(t, name)})
	// Threads come and go: only the one that forked QEMU counts.
	for range 20 {
		go runtime.LockOSThread()
	}
	time.Sleep(50 * time.Millisecond)
	fmt.Printf("pid %d\n", vm.Pid())
	time.Sleep(time.Minute)
}

// recorder is a test that fails without ending the real one.
type recorder struct {
	TB
	fatal    string
	cleanups []func()
}

func (r *recorder) Helper()               {}
func (r *recorder) Failed() bool          { return false }
func (r *recorder) Cleanup(f func())      { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Errorf(string, ...any) {}
func (r *recorder) Fatalf(format string, args ...any) {
	r.fatal = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// failure runs f and returns the message it failed with.
func failure(f func(tb TB)) string {
	r := &recorder{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, c := range slices.Backward(r.cleanups) {
				c()
			}
		}()
		f(r)
	}()
	<-done
	return r.fatal
}

func TestStartFails(t *testing.T) {
	t.Parallel()
	q := Host(t)
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"no QEMU":      {Config{}, "Config.QEMU is empty"},
		"bad argument": {Config{QEMU: q, Args: []string{"-frobnicate"}}, "-frobnicate: invalid option"},
		"bad format":   {Config{QEMU: q, Disks: []Disk{{ID: "scsi0", Format: "vmdk", Size: 1 << 20}}}, "unknown format"},
		"bad bus":      {Config{QEMU: q, Disks: []Disk{{ID: "mfm0", Size: 1 << 20}}}, "no such kind"},
		"no number":    {Config{QEMU: q, Disks: []Disk{{ID: "scsi", Size: 1 << 20}}}, "number"},
		"bad iothread": {Config{QEMU: q, Disks: []Disk{{ID: "sata0", Size: 1 << 20, IOThread: true}}}, "iothread"},
	} {
		if got := failure(func(tb TB) { Start(tb, c.cfg) }); !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	if got := failure(func(tb TB) { Version(tb, "0.9") }); !strings.Contains(got, "make setup") {
		t.Errorf("a version that is not there: %q", got)
	}
}

func TestVersions(t *testing.T) {
	t.Parallel()
	host := Host(t)
	alone, err := withCached(host, t.TempDir())
	if err != nil || len(alone) != 1 {
		t.Errorf("with an empty cache: %v, %v", alone, err)
	}
	all := QEMUs(t)
	if !slices.IsSortedFunc(all, func(a, b QEMU) int { return a.Major - b.Major }) {
		t.Errorf("not in order: %v", all)
	}
	for _, name := range expected {
		if q := Version(t, name); q.Name != name || !q.AtLeast(q.Major, q.Minor) || q.AtLeast(q.Major, q.Minor+1) || q.AtLeast(q.Major+1, 0) {
			t.Errorf("%+v", q)
		}
	}
}
