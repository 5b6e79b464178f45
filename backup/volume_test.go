package backup

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/internal/testenv"
)

// readAfterSettling reads the state of a file that this process has open.
func readAfterSettling(t *testing.T, path string) volume {
	t.Helper()
	time.Sleep(settleTime)
	v, err := readVolume(t.Context(), os.Getpid(), "file", path)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// A crash of the host can put back the times of a file that was written to.
func TestFileOverARestart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	now := readAfterSettling(t, path)
	before := *now.File
	before.Boot = "another"
	if why := (volume{Path: path, File: &before}).change(now); !strings.Contains(why, "restarted") {
		t.Errorf("%q", why)
	}
}

// Everything that changes a file's bytes shows, whatever is done to hide it.
func TestFileShowsWrites(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		what string
		do   func(t *testing.T, f *os.File)
		same bool
	}{
		{what: "nothing", do: func(*testing.T, *os.File) {}, same: true},
		{what: "a read", same: true, do: func(t *testing.T, f *os.File) {
			if _, err := os.ReadFile(f.Name()); err != nil {
				t.Fatal(err)
			}
		}},
		{what: "a write of the same", do: func(t *testing.T, f *os.File) {
			if _, err := f.WriteAt([]byte{0}, 100); err != nil {
				t.Fatal(err)
			}
		}},
		{what: "a write with the time put back", do: func(t *testing.T, f *os.File) {
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte{1}, 100); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(f.Name(), info.ModTime(), info.ModTime()); err != nil {
				t.Fatal(err)
			}
		}},
		{what: "a hole", do: func(t *testing.T, f *os.File) {
			testenv.Output(t, "fallocate", "-p", "-o", "0", "-l", "4096", f.Name())
		}},
		{what: "a mapping", do: func(t *testing.T, f *os.File) {
			m, err := syscall.Mmap(int(f.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			m[5] = 7
			if err := syscall.Munmap(m); err != nil {
				t.Fatal(err)
			}
		}},
		{what: "a loop device", do: func(t *testing.T, f *os.File) {
			loop := strings.TrimSpace(testenv.Output(t, "losetup", "-f", "--show", f.Name()))
			defer testenv.Output(t, "losetup", "-d", loop)
			testenv.Output(t, "dd", "if=/dev/zero", "of="+loop, "bs=4096", "count=1", "conv=fsync")
		}},
	} {
		t.Run(test.what, func(t *testing.T) {
			t.Parallel()
			f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(1 << 20); err != nil {
				t.Fatal(err)
			}
			before := readAfterSettling(t, f.Name())
			test.do(t, f)
			if after := readAfterSettling(t, f.Name()); before.equal(after) != test.same {
				t.Errorf("%+v and %+v: equal is %v", before.File, after.File, before.equal(after))
			}
		})
	}
}

// What can't be proven is refused.
func TestVolumesWithoutProof(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mounted := func(name string, args ...string) string {
		t.Helper()
		at := filepath.Join(dir, name)
		if err := os.Mkdir(at, 0o700); err != nil {
			t.Fatal(err)
		}
		testenv.Output(t, "mount", append(args, at)...)
		t.Cleanup(func() { testenv.Output(t, "umount", "-l", at) })
		return filepath.Join(at, "disk")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		what, driver, path string
		open               bool
		text               string
	}{
		{"times in memory", "file", mounted("lazy", "-t", "tmpfs", "-o", "lazytime,size=1m", "none"), true, "lazytime"},
		{"a file system that is not known", "file", "/proc/self/status", true, "file system of the kind"},
		{"a FIFO", "file", fifo, true, "no regular file"},
		{"not open in QEMU", "file", other, false, "does not have it open"},
		{"a relative path", "file", "disk.raw", false, "no absolute path"},
		{"a device of another host", "rbd", "/pool/image", false, "rbd"},
		{"a file that is not there", "file", filepath.Join(dir, "none"), false, "no such file"},
		{"a file for a device", "host_device", other, true, "no block device"},
	} {
		if test.open {
			f, err := os.OpenFile(test.path, os.O_RDWR|os.O_CREATE, 0o600)
			if errors.Is(err, os.ErrPermission) {
				f, err = os.Open(test.path)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if test.what != "a FIFO" && test.driver == "file" {
				_, _ = f.WriteAt([]byte("x"), 0)
			}
		}
		_, err := readVolume(t.Context(), os.Getpid(), test.driver, test.path)
		if err == nil || !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: error is %v", test.what, err)
		}
	}
}

func TestTimesInSeconds(t *testing.T) {
	t.Parallel()
	st := unix.Statx_t{Mtime: unix.StatxTimestamp{Sec: 5}, Ctime: unix.StatxTimestamp{Sec: 5}}
	if _, err := fileStateOf(&st); !errors.Is(err, errNoProof) {
		t.Errorf("error is %v", err)
	}
	st.Ctime.Nsec = 1
	if _, err := fileStateOf(&st); err != nil {
		t.Error(err)
	}
}

// fakeDevice makes a block device's folder as sysfs has it.
func fakeDevice(t *testing.T, dir string, more map[string]string) {
	t.Helper()
	files := map[string]string{"diskseq": "12\n", "size": "8192\n", "queue/iostats": "1\n", "stat": " 1 0 8 0 5 0 40 0 0 0 0 2 0 16 0 3 0\n"}
	for name, text := range more {
		files[name] = text
	}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDeviceShowsWrites(t *testing.T) {
	root := t.TempDir()
	nvme := filepath.Join(root, "devices/pci0000:00/0000:00:01.0/nvme/nvme0/nvme0n1")
	lun := filepath.Join(root, "devices/pci0000:00/host7/session1/target7:0:0/7:0:0:0/block/sdb")
	fakeDevice(t, nvme, nil)
	fakeDevice(t, lun, nil)
	part := filepath.Join(nvme, "nvme0n1p2")
	fakeDevice(t, part, map[string]string{"partition": "2\n"})
	for _, name := range []string{"diskseq", "queue"} {
		if err := os.RemoveAll(filepath.Join(part, name)); err != nil {
			t.Fatal(err)
		}
	}
	lv := func(name, below string) string {
		dir := filepath.Join(root, "devices/virtual/block", name)
		fakeDevice(t, dir, map[string]string{"dm/uuid": "LVM-abc\n", "dm/name": "vg-" + name + "\n", "slaves/.keep": ""})
		if err := os.Remove(filepath.Join(dir, "slaves/.keep")); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(below, filepath.Join(dir, "slaves", filepath.Base(below))); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	// A dmsetup that prints what the test says.
	bin, table := t.TempDir(), filepath.Join(root, "table")
	if err := testenv.WriteProgram(filepath.Join(bin, "dmsetup"), "#!/bin/sh\necho $2\ncat "+table+"\n"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	setTable := func(text string) {
		if err := os.WriteFile(table, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	setTable("0 8192 linear 259:2 2048\n")
	local, shared := lv("dm-0", part), lv("dm-1", lun)

	read := func(dir string) (volume, error) {
		devices, err := readDeviceAt(t.Context(), dir)
		return volume{Device: devices}, err
	}
	if _, err := read(shared); !errors.Is(err, errNoProof) || !strings.Contains(err.Error(), "sdb") {
		t.Errorf("a volume on a LUN that others may have: %v", err)
	}
	zvol := filepath.Join(root, "devices/virtual/block/zd0")
	fakeDevice(t, zvol, nil)
	if _, err := read(zvol); !errors.Is(err, errNoProof) || !strings.Contains(err.Error(), "ZFS") {
		t.Errorf("a ZFS volume: %v", err)
	}
	before, err := read(local)
	if err != nil || len(before.Device) != 2 {
		t.Fatalf("a local volume: %+v, %v", before, err)
	}
	for _, test := range []struct {
		what   string
		do     func()
		reason string
	}{
		{"nothing", func() {}, ""},
		{"somebody else writes to the disk below", func() { fakeDevice(t, part, map[string]string{"stat": "9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9\n"}) }, ""},
		{"a read", func() { fakeDevice(t, local, map[string]string{"stat": "7 0 99 0 5 0 40 0 0 0 0 2 0 16 0 3 0\n"}) }, ""},
		{"a flush", func() { fakeDevice(t, local, map[string]string{"stat": "1 0 8 0 6 0 40 0 0 0 0 2 0 16 0 4 0\n"}) }, ""},
		{"a write", func() { fakeDevice(t, local, map[string]string{"stat": "1 0 8 0 6 0 48 0 0 0 0 2 0 16 0 3 0\n"}) }, changed},
		{"a discard", func() { fakeDevice(t, local, map[string]string{"stat": "1 0 8 0 5 0 40 0 0 0 0 3 0 24 0 3 0\n"}) }, changed},
		{"another table", func() { setTable("0 8192 snapshot-merge 1\n") }, changed},
		{"another instance", func() { fakeDevice(t, local, map[string]string{"diskseq": "13\n"}) }, "taken away"},
		// An LVM snapshot that was merged back, and another one taken, leave the table of their origin as it was; but the device
		// that it names is made anew.
		{"another instance of the device below", func() { fakeDevice(t, nvme, map[string]string{"diskseq": "14\n"}) }, "taken away"},
		{"another volume", func() { fakeDevice(t, local, map[string]string{"dm/uuid": "LVM-def\n"}) }, changed},
	} {
		test.do()
		after, err := read(local)
		if err != nil {
			t.Fatalf("%s: %v", test.what, err)
		}
		if got := before.change(after); !strings.Contains(got, test.reason) || test.reason == "" && got != "" {
			t.Errorf("%s: %q", test.what, got)
		}
		fakeDevice(t, local, map[string]string{"dm/uuid": "LVM-abc\n"})
		fakeDevice(t, nvme, nil)
		setTable("0 8192 linear 259:2 2048\n")
	}
	fakeDevice(t, local, map[string]string{"queue/iostats": "0\n"})
	if _, err := read(local); !errors.Is(err, errNoProof) || !strings.Contains(err.Error(), "does not count") {
		t.Errorf("a device that does not count: %v", err)
	}
}
