package bench

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// server is a process that serves files by FUSE until the benchmark ends.
type server struct {
	b     *testing.B
	cmd   *exec.Cmd
	mount string // what it serves: a folder or a file
	place string // where it is mounted
	said  strings.Builder
	ended chan error // what Wait returned
	under []*server  // which it gets its data from
	// unmounting ends it; a signal would be a failure to it.
	unmounting bool
}

// serverLimit bounds how long a server may take to come up, and to end.
const serverLimit = time.Minute

// stopDelay lets a server that answers already come to the end of its start: to be told to end before that is a failure to it.
const stopDelay = 50 * time.Millisecond

// serve starts a program that mounts at a path, and waits until ready.
func serve(b *testing.B, mount string, ready func() bool, program string, args ...string) *server {
	b.Helper()
	s := &server{b: b, mount: mount, place: mount, cmd: exec.Command(program, args...), ended: make(chan error, 1)}
	s.cmd.Stderr = &s.said
	// In a group of its own: what interrupts the benchmark leaves its end to us.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	go func(cmd *exec.Cmd) { s.ended <- cmd.Wait() }(s.cmd)
	b.Cleanup(s.stop)
	for end := time.After(serverLimit); !ready(); {
		select {
		case err := <-s.ended:
			s.cmd = nil
			b.Fatalf("%s ended at once: %v: %s", program, err, s.said.String())
		case <-end:
			b.Fatalf("%s does not answer", program)
		case <-time.After(time.Millisecond):
		}
	}
	return s
}

// stop unmounts, and waits for the end of the server and of those under it.
func (s *server) stop() {
	if s.cmd == nil {
		return
	}
	time.Sleep(stopDelay)
	if s.unmounting {
		_ = exec.Command("fusermount3", "-u", s.place).Run() // if it fails, the kill comes
	} else {
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
	}
	kill := time.AfterFunc(serverLimit, func() { _ = s.cmd.Process.Kill() })
	if err := <-s.ended; err != nil {
		s.b.Errorf("%s: %v: %s", s.cmd.Path, err, s.said.String())
	}
	kill.Stop()
	_ = unix.Unmount(s.place, unix.MNT_DETACH) // what a server that was killed leaves
	s.cmd = nil
	for _, below := range s.under {
		below.stop()
	}
}

// serveMount mounts a set with qmchain-fuse.
func serveMount(b *testing.B, program, set string) *server {
	b.Helper()
	mnt := b.TempDir()
	var empty unix.Stat_t
	if err := unix.Stat(mnt, &empty); err != nil {
		b.Fatal(err)
	}
	mounted := func() bool {
		var st unix.Stat_t
		return unix.Stat(mnt, &st) == nil && st.Dev != empty.Dev
	}
	return serve(b, mnt, mounted, program, "--quiet", "mount", "--foreground", set, mnt)
}

// serveDaemon exports an image with qemu-storage-daemon. The mount is a file.
func serveDaemon(b *testing.B, image string) *server {
	b.Helper()
	file := filepath.Join(b.TempDir(), "export")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	exported := func() bool {
		info, err := os.Stat(file)
		return err == nil && info.Size() > 0
	}
	return serve(b, file, exported, "qemu-storage-daemon",
		"--blockdev", "driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename="+strings.ReplaceAll(image, ",", ",,"),
		"--export", "type=fuse,id=export,node-name=disk,writable=off,mountpoint="+strings.ReplaceAll(file, ",", ",,"))
}

// serveNBD exports an image with qemu-nbd, and makes a file of that with nbdfuse; with nbdkit as a proxy between the two, if
// asked for. The mount is the file.
func serveNBD(b *testing.B, image string, nbdkit bool) *server {
	b.Helper()
	// Sockets' paths must be short, and those of benchmarks' folders are not.
	dir, err := os.MkdirTemp("", "nbd-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	// A socket is there before it takes connections.
	listens := func(socket string) func() bool {
		return func() bool {
			c, err := net.Dial("unix", socket)
			if err == nil {
				_ = c.Close()
			}
			return err == nil
		}
	}
	socket := filepath.Join(dir, "qemu")
	servers := []*server{serve(b, dir, listens(socket), "qemu-nbd", "--read-only", "--persistent", "--shared=0", "--format=qcow2", "--socket="+socket, image)}
	if nbdkit {
		proxy := filepath.Join(dir, "nbdkit")
		servers = append(servers, serve(b, dir, listens(proxy), "nbdkit", "--foreground", "--readonly", "--unix", proxy, "nbd", "socket="+socket))
		socket = proxy
	}
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		b.Fatal(err)
	}
	file := filepath.Join(mnt, "disk")
	there := func() bool { _, err := os.Stat(file); return err == nil }
	s := serve(b, mnt, there, "nbdfuse", "--readonly", file, "--unix", socket)
	s.mount, s.place, s.under, s.unmounting = file, mnt, servers, true
	return s
}

// disk is the path of a point's disk in a mount.
func (s *server) disk(point string) string {
	return filepath.Join(s.mount, mountGuest, point, mountDisk+".raw")
}

// cpu is what the server and those under it took of the processors so far, in seconds.
func (s *server) cpu() (seconds float64) {
	s.b.Helper()
	for _, below := range s.under {
		seconds += below.cpu()
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		s.b.Fatal(err)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var user, system float64
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		s.b.Fatal(err)
	}
	return seconds + (user+system)/100 // USER_HZ, the same on all of Linux's platforms for Go
}

// resident is the memory that the server and those under it have, in bytes.
func (s *server) resident() (bytes int64) {
	s.b.Helper()
	for _, below := range s.under {
		bytes += below.resident()
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return bytes + kib<<10
		}
	}
	s.b.Fatalf("no VmRSS in %s", text)
	return 0
}

// hold keeps a file open, and with it what a server has found out of it.
func hold(b *testing.B, path string) io.Closer {
	b.Helper()
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); err != nil {
		b.Fatal(err)
	}
	return f
}

// dropCache takes what the kernel has of files out of its cache.
func dropCache(b *testing.B, paths ...string) {
	b.Helper()
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		_ = f.Close()
		if err != nil {
			b.Fatal(err)
		}
	}
}
