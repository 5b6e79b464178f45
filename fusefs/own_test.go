package fusefs

import (
	"testing"

	"golang.org/x/sys/unix"

	"qmchain/internal/mountinfo"
)

// A server must not take another one's mount for its own: the kernel gives the same numbers to the next mount.
func TestFindOwnMount(t *testing.T) {
	ours := mountinfo.Entry{ID: "37", Device: "0:50", Point: "/mnt/x", Type: fsType, Source: "/srv/repo", Options: "ro"}
	change := func(f func(e *mountinfo.Entry)) mountinfo.Entry {
		e := ours
		f(&e)
		return e
	}
	for _, test := range []struct {
		name         string
		there        mountinfo.Entry
		alive, ended bool // whether it is found, while the kernel has the connection and afterwards
	}{
		{"ours", ours, true, true},
		{"ours, moved; or another's with our numbers", change(func(e *mountinfo.Entry) { e.Point = "/mnt/y" }), true, false},
		{"another repository", change(func(e *mountinfo.Entry) { e.Source = "/srv/other" }), false, false},
		{"our number, another device", change(func(e *mountinfo.Entry) { e.Device = "0:51" }), false, false},
		{"a copy of ours, bound elsewhere", change(func(e *mountinfo.Entry) { e.ID, e.Point = "38", "/mnt/y" }), false, false},
		{"another type", change(func(e *mountinfo.Entry) { e.Type = "tmpfs" }), false, false},
	} {
		for _, alive := range []bool{true, false} {
			var pipe [2]int
			if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			// The writing end of a pipe says POLLERR when nobody can read, as the device does when the kernel has gone.
			m := &Mounted{dir: ours.Point, entry: ours, fd: pipe[1]}
			want := test.alive
			if !alive {
				want = test.ended
				_ = unix.Close(pipe[0])
			}
			if m.alive() != alive {
				t.Errorf("alive is %t", m.alive())
			}
			if _, ok := m.find([]mountinfo.Entry{test.there}); ok != want {
				t.Errorf("%s, connection %t: found %t, want %t", test.name, alive, ok, want)
			}
			if alive {
				_ = unix.Close(pipe[0])
			}
			_ = unix.Close(pipe[1])
		}
	}
}
