package fusefs

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseMounts(t *testing.T) {
	const text = `25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw
36 35 98:0 /mnt1 /mnt/a\040b\134c rw,noatime - ext3 /dev/root rw,errors=continue
37 35 0:50 / /mnt/x ro,nosuid shared:8 master:1 - fuse.qmchain /srv/my\040repo ro,user_id=0
38 37 0:51 / /mnt/x rw - tmpfs cover rw
`
	got, err := parseMounts(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []mountEntry{
		{"25", "0:23", "/sys", "sysfs", "sysfs"},
		{"36", "98:0", `/mnt/a b\c`, "ext3", "/dev/root"},
		{"37", "0:50", "/mnt/x", "fuse.qmchain", "/srv/my repo"},
		{"38", "0:51", "/mnt/x", "tmpfs", "cover"},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(mountEntry{})); diff != "" {
		t.Error(diff)
	}
	if top, ok := topMount(got, "/mnt/x"); !ok || top.id != "38" {
		t.Errorf("on top: %+v", top)
	}
	if _, ok := topMount(got, "/mnt"); ok {
		t.Error("found what is not mounted")
	}
	for _, bad := range []string{"25 30 0:23 / /sys rw", "25 30 0:23 / /sys rw shared:1 -", "x\n"} {
		if _, err := parseMounts(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
	if _, err := readMounts(); err != nil {
		t.Error(err)
	}
}

// A server must not take another one's mount for its own: the kernel gives the same numbers to the next mount.
func TestFindOwnMount(t *testing.T) {
	ours := mountEntry{"37", "0:50", "/mnt/x", fsType, "/srv/repo"}
	change := func(f func(e *mountEntry)) mountEntry {
		e := ours
		f(&e)
		return e
	}
	for _, test := range []struct {
		name         string
		there        mountEntry
		alive, ended bool // whether it is found, while the kernel has the connection and afterwards
	}{
		{"ours", ours, true, true},
		{"ours, moved; or another's with our numbers", change(func(e *mountEntry) { e.point = "/mnt/y" }), true, false},
		{"another repository", change(func(e *mountEntry) { e.source = "/srv/other" }), false, false},
		{"our number, another device", change(func(e *mountEntry) { e.device = "0:51" }), false, false},
		{"a copy of ours, bound elsewhere", change(func(e *mountEntry) { e.id, e.point = "38", "/mnt/y" }), false, false},
		{"another type", change(func(e *mountEntry) { e.fsType = "tmpfs" }), false, false},
	} {
		for _, alive := range []bool{true, false} {
			var pipe [2]int
			if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			// The writing end of a pipe says POLLERR when nobody can read, as the device does when the kernel has gone.
			m := &Mounted{dir: ours.point, entry: ours, fd: pipe[1]}
			want := test.alive
			if !alive {
				want = test.ended
				_ = unix.Close(pipe[0])
			}
			if m.alive() != alive {
				t.Errorf("alive is %t", m.alive())
			}
			if _, ok := m.find([]mountEntry{test.there}); ok != want {
				t.Errorf("%s, connection %t: found %t, want %t", test.name, alive, ok, want)
			}
			if alive {
				_ = unix.Close(pipe[0])
			}
			_ = unix.Close(pipe[1])
		}
	}
}
