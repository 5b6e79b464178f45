package inside

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// appliances bounds how many run at a time: each takes a processor for ten seconds and more.
var appliances = make(chan struct{}, 2)

// startLimit is ample for a start without KVM on a busy machine.
const startLimit = 3 * time.Minute

func (a Appliance) start(t testing.TB) *View {
	t.Helper()
	appliances <- struct{}{}
	t.Cleanup(func() { <-appliances })
	a.Temp, a.Env, a.Log = t.TempDir(), guestmountEnv(t), quiet()
	a.Source = "test"
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	v, err := a.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		v.Close()
		if target, err := os.Readlink(filepath.Join(a.Temp, socketsNote)); err != nil {
			t.Error("libguestfs' sockets were not found")
		} else if _, err := os.Lstat(target); err == nil {
			t.Errorf("left: %s", target)
		}
	})
	return v
}

// The appliance replays the journal, on something of its own.
func TestAppliance(t *testing.T) {
	t.Parallel()
	path := dirty(t)
	before := sum(t, path)
	v, err := Choose(find(t, disk(t, "scsi0", path)), Want{})
	if err != nil {
		t.Fatal(err)
	}
	view := Appliance{Volume: &v}.start(t)
	if got, err := readFile(t.Context(), view, "/late"); err != nil || got != "in the journal\n" {
		t.Errorf("%q, %v", got, err)
	}
	if err := unix.Mkdirat(int(view.Root().Fd()), "new", 0o700); err == nil {
		t.Error("mkdir")
	}
	own := filepath.Dir(t.TempDir()) + "/" // and not another's whose name begins with this one
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || os.Geteuid() == 0 && strings.Contains(string(mounts), own) {
		t.Errorf("the mount is visible: %v", err)
	}
	view.Close()
	if _, err := readFile(t.Context(), view, "/late"); err == nil {
		t.Error("the files are still there")
	}
	if sum(t, path) != before {
		t.Error("the disk has changed")
	}
}

// Without a replay, at a mount point, and until somebody unmounts it.
func TestApplianceMountPoint(t *testing.T) {
	t.Parallel()
	path := dirty(t)
	v, err := Choose(find(t, disk(t, "scsi0", path)), Want{})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "a mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Detach(t.Context(), dir) })
	view := Appliance{Volume: &v, SkipJournal: true, Dir: dir}.start(t)
	if ours, err := Mounted(dir); err != nil || !ours {
		t.Errorf("mounted: %v, %v", ours, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Flags&(unix.ST_RDONLY|unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC) != unix.ST_RDONLY|unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC {
		t.Errorf("flags %#x, %v", st.Flags, err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "etc/fstab")); err != nil || string(got) != "of a guest\n" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "late")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("late: %v", err)
	}
	if err := Unmount(t.Context(), dir, false); err != nil {
		t.Fatal(err)
	}
	select {
	case <-view.Done():
		if view.Err() != nil {
			t.Errorf("end: %v", view.Err())
		}
	case <-time.After(time.Minute):
		t.Error("no end")
	}
}

// What the host's kernel may not have a driver for.
func TestApplianceNTFS(t *testing.T) {
	t.Parallel()
	path, at := partitioned(t, 16)
	ntfs := makeFile(t, 16<<20)
	makers["ntfs"].make(t, ntfs, tree(t))
	put(t, path, at[0], ntfs)
	v, err := Choose(find(t, disk(t, "scsi0", path)), Want{Part: "1"})
	if err != nil {
		t.Fatal(err)
	}
	view := Appliance{Volume: &v}.start(t)
	if got, err := readFile(t.Context(), view, "/fstab"); err != nil || got != "of a guest\n" {
		t.Errorf("%q, %v", got, err)
	}
}

// A logical volume that is left to the appliance's LVM reads like one that is put together here.
func TestApplianceLVM(t *testing.T) {
	t.Parallel()
	path, ext4 := makeFile(t, 48<<20), makeFile(t, 20<<20)
	makers["ext4"].make(t, ext4, tree(t))
	loop := loopOn(t, path, 0, 48<<20)
	l := newLVM(t, loop)
	l.run("pvcreate", "-q", loop)
	l.run("vgcreate", "-s", "1M", "vg-0", loop)
	l.run("lvcreate", "-an", "-Zn", "-Wn", "-l", "10", "-n", "before", "vg-0")
	l.run("lvcreate", "-an", "-Zn", "-Wn", "-l", "20", "-n", "my-root", "vg-0")
	run(t, "dd", "if="+ext4, "of="+loop, "bs=1M", "seek=11", "conv=fsync", "status=none")
	whole := disk(t, "scsi0", path)
	v, err := Choose(find(t, whole), Want{LV: "vg-0/my-root"})
	if err != nil || v.Type != "ext4" || v.Why != "" {
		t.Fatalf("%+v, %v", v, err)
	}
	v.lvm = true
	view := Appliance{Volume: &v, Disks: []Disk{whole}}.start(t)
	if got, err := readFile(t.Context(), view, "/etc/fstab"); err != nil || got != "of a guest\n" {
		t.Errorf("%q, %v", got, err)
	}
}

// What guestmount says is in the error, and nothing is left.
func TestApplianceFails(t *testing.T) {
	t.Parallel()
	appliances <- struct{}{}
	defer func() { <-appliances }()
	v := Volume{Disk: "scsi0", Type: "xfs", img: disk(t, "scsi0", makeFile(t, 1<<20))}
	temp := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	_, err := Appliance{Volume: &v, Temp: temp, Env: guestmountEnv(t), Log: quiet()}.Start(ctx)
	if err == nil || !strings.Contains(err.Error(), "guestmount: ") || !strings.Contains(err.Error(), "mount") {
		t.Errorf("no file system: %v", err)
	}
}
