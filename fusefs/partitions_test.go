package fusefs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain/repo/repotest"
	"qmchain/fusefs"
)

const mib = 1 << 20

// partitioned makes a raw image with a partition table by sfdisk(8). Each of the pieces is filled with a byte of its own,
// the rest is a hole.
func partitioned(t *testing.T, size int64, script string, fills map[int64]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	f := must(os.Create(path))(t)
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", path)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	for at, fill := range fills {
		if _, err := f.WriteAt(bytes.Repeat([]byte{fill}, 64<<10), at); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

const (
	gptScript = `label: gpt
start=2048, size=2048, uuid=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI system"
start=4096, size=8193, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4
`
	dosScript = `label: dos
label-id: 0x1b2c3d4e
start=2048, size=2048, type=83
start=4096, size=12288, type=5
start=6144, size=2048, type=8e
`
)

func attribute(t *testing.T, path, name string) string {
	t.Helper()
	value := make([]byte, 1024)
	n, err := unix.Getxattr(path, "user.qmchain."+name, value)
	if err != nil {
		t.Errorf("%s: %s: %v", path, name, err)
		return ""
	}
	return string(value[:n])
}

// counter returns a value of the mount's .stats.
func counter(t *testing.T, m *mount, name string) string {
	t.Helper()
	for line := range strings.Lines(string(must(os.ReadFile(m.path(".stats")))(t))) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if metric, labels, _ := strings.Cut(series, "{"); metric+"{"+strings.TrimPrefix(labels, fmt.Sprintf("mount=%q", m.dir)) == name {
			return value
		}
	}
	t.Fatalf("no %s in .stats:\n%s", name, must(os.ReadFile(m.path(".stats")))(t))
	return ""
}

// Each partition is a file of its own, that holds what is there in the disk: by its name alone, in a listing, in another
// point, as a loop device's file.
func TestPartitions(t *testing.T) {
	t.Parallel()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	gpt := partitioned(t, 16*mib, gptScript, map[int64]byte{1 * mib: 1, 2 * mib: 2, 5*mib + 4096: 3})
	dos := partitioned(t, 16*mib, dosScript, map[int64]byte{1 * mib: 4, 3 * mib: 5})
	g.Add(
		repotest.Disk{Name: "scsi0", Image: gpt},
		repotest.Disk{Name: "scsi1", Image: dos},
		repotest.Disk{Name: "scsi1-part5", Size: mib}, // a disk, whatever it is called
		repotest.Disk{Name: "efidisk0", Size: 528 << 10},
	)
	second := g.Add(
		repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 2*mib + 8192, Len: 4096, Fill: 9}}},
		repotest.Disk{Name: "scsi1"},
		repotest.Disk{Name: "scsi1-part5"},
	)
	m := mountRepo(t, g.Repo)
	first := string(g.Points[0].ID)

	// A list of points does not open what is in them.
	_ = run(t, "ls", "-l", m.path("110"))
	_ = run(t, "ls", "-l", m.path("110", first, "scsi0.raw"))
	if n := counter(t, m, `qmchain_fuse_disks_opened_total{,how="first"`); n != "0" {
		t.Errorf("%s disks were opened for a list of points", n)
	}
	// A name is found without a listing, and no other disk is opened for it.
	path := m.path("110", first, "scsi0-part2.raw")
	inode := must(os.Stat(path))(t).Sys().(*syscall.Stat_t).Ino
	if n := counter(t, m, `qmchain_fuse_disks_opened_total{,how="first"`); n != "1" {
		t.Errorf("%s disks were opened for one partition", n)
	}

	want := "efidisk0.raw point.json scsi0-part1.raw scsi0-part2.raw scsi0.raw scsi1-part1.raw scsi1-part5.raw scsi1.raw"
	if got := strings.Join(strings.Fields(run(t, "env", "LC_ALL=C", "ls", m.path("110", first))), " "); got != want {
		t.Errorf("point: %s, want %s", got, want)
	}
	for _, test := range []struct {
		point      string
		disk, part string
		off, size  int64
	}{
		{first, "scsi0", "part1", 1 * mib, 1 * mib},
		{first, "scsi0", "part2", 2 * mib, 8193 * 512}, // ends within a page
		{first, "scsi1", "part1", 1 * mib, 1 * mib},
		{string(second.ID), "scsi0", "part2", 2 * mib, 8193 * 512},
	} {
		path := m.path("110", test.point, test.disk+"-"+test.part+".raw")
		disk := g.Points[0]
		if test.point != first {
			disk = second
		}
		want := g.Want(disk.ID, test.disk)[test.off : test.off+test.size]
		equal(t, path, must(os.ReadFile(path))(t), want)
		info := must(os.Stat(path))(t)
		st := info.Sys().(*syscall.Stat_t)
		if info.Size() != test.size || info.Mode() != 0o400 || !info.ModTime().Equal(disk.Time) || st.Blocks < 1 || st.Blocks > test.size/512 {
			t.Errorf("%s: size %d, mode %s, time %s, %d blocks", path, info.Size(), info.Mode(), info.ModTime(), st.Blocks)
		}
		to := filepath.Join(t.TempDir(), "copy")
		run(t, "cp", path, to)
		equal(t, "copy of "+path, must(os.ReadFile(to))(t), want)
		if got := allocated(t, to); got > 192<<10 {
			t.Errorf("%s: a copy takes %d bytes", path, got)
		}
		f := must(os.Open(path))(t)
		end := must(unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE))(t)
		if end != 64<<10 {
			t.Errorf("%s: the first hole is at %d", path, end)
		}
		_ = f.Close()
	}
	if info := must(os.Stat(m.path("110", first, "scsi1-part5.raw")))(t); info.Size() != mib {
		t.Errorf("scsi1-part5.raw has %d bytes: it is to be the disk of that name", info.Size())
	}
	for _, name := range []string{"scsi0-part3.raw", "scsi0-part2", "scsi0-part02.raw", "scsi0-part1-part1.raw", "efidisk0-part1.raw", "scsi0-.raw", "scsi2-part1.raw", "scsi1-part5-part1.raw"} {
		if _, err := os.Stat(m.path("110", first, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.OpenFile(path, os.O_RDWR, 0); !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
		t.Errorf("open to write: %v", err)
	}
	for name, want := range map[string]string{
		"partition.start": "1048576", "partition.type": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
		"partition.uuid": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "partition.label": "EFI system", "disk": "scsi0", "point": first,
	} {
		if got := attribute(t, m.path("110", first, "scsi0-part1.raw"), name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if got := attribute(t, m.path("110", first, "scsi1-part1.raw"), "partition.type"); got != "0x83" {
		t.Errorf("type in an MBR: %q", got)
	}
	if err := m.Unmount(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := openUnder(t, g.Repo.Dir); n != 0 {
		t.Errorf("%d images are left open", n)
	}
	again := mountRepo(t, g.Repo)
	if now := must(os.Stat(again.path("110", first, "scsi0-part2.raw")))(t).Sys().(*syscall.Stat_t).Ino; now != inode {
		t.Errorf("inode %d in another mount, %d before", now, inode)
	}
}

// A table inside a partition, and one that begins in a sector of 4096 bytes.
func TestOddPartitions(t *testing.T) {
	t.Parallel()
	inner := must(os.ReadFile(partitioned(t, 4*mib, "label: dos\nstart=2048, size=2048, type=83\n", map[int64]byte{mib: 7})))(t)
	outer := partitioned(t, 16*mib, "label: gpt\nstart=2048, size=8192\n", nil)
	f := must(os.OpenFile(outer, os.O_WRONLY, 0))(t)
	if _, err := f.WriteAt(inner, mib); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Image: outer})
	m := mountRepo(t, g.Repo)
	path := m.path("110", "latest", "scsi0-part1-part1.raw")
	equal(t, "inner partition", must(os.ReadFile(path))(t), inner[mib:2*mib])
	if got := attribute(t, path, "partition.start"); got != "2097152" {
		t.Errorf("it starts at %s", got)
	}
	if names := run(t, "ls", m.path("110", "latest")+"/"); !strings.Contains(names, "scsi0-part1-part1.raw") || !strings.Contains(names, "scsi0-part1.raw") {
		t.Errorf("listed are %q", names)
	}
}

// A damaged table hides what it can't say, is told once, and touches nothing else.
func TestDamagedTable(t *testing.T) {
	t.Parallel()
	path := partitioned(t, 16*mib, gptScript, nil)
	for _, at := range []int64{512 + 20, 16*mib - 512 + 20} { // both headers
		repotest.Flip(t, path, at)
	}
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Image: path}, repotest.Disk{Name: "scsi1", Image: partitioned(t, 16*mib, dosScript, nil)})
	m := mountRepo(t, g.Repo)
	for range 3 {
		names := strings.Join(strings.Fields(run(t, "ls", m.path("110", "latest")+"/")), " ")
		if names != "point.json scsi0.raw scsi1-part1.raw scsi1-part5.raw scsi1.raw" {
			t.Errorf("listed are %s", names)
		}
	}
	if _, err := os.Stat(m.path("110", "latest", "scsi0-part1.raw")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("partition of a damaged table: %v", err)
	}
	if n := strings.Count(m.log.String(), "partitions may be missing"); n != 1 || !strings.Contains(m.log.String(), "disk=scsi0 guest=110 point=") {
		t.Errorf("told %d times:\n%s", n, m.log)
	}
}

// A disk that can't be read, or not in time, costs its partitions and nothing else.
func TestPartitionsOfAHangingDisk(t *testing.T) {
	t.Parallel()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Image: partitioned(t, 16*mib, gptScript, nil)})
	s := newShare(t, g.Repo.Dir)
	m := mountSetOf(t, s.dir)
	_ = run(t, "ls", m.path("110"))
	s.hang(true)
	defer s.hang(false)
	began := time.Now()
	names := strings.Join(strings.Fields(run(t, "ls", m.path("110", "latest")+"/")), " ")
	if names != "point.json scsi0.raw" {
		t.Errorf("listed are %s", names)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("took %s", took)
	}
	if _, err := os.Stat(m.path("110", "latest", "scsi0-part1.raw")); !errors.Is(err, unix.EIO) {
		t.Errorf("a partition that can't be looked for: %v", err)
	}
	s.hang(false)
	eventually(t, "it is there when the disk can be read", func() bool {
		_, err := os.Stat(m.path("110", "latest", "scsi0-part1.raw"))
		return err == nil
	})
}

// A look into a disk that hangs does not keep the mount.
func TestUnmountWhileATableHangs(t *testing.T) {
	t.Parallel()
	g := repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Image: partitioned(t, 16*mib, gptScript, nil)})
	s := newShare(t, g.Repo.Dir)
	log := &logBuffer{}
	dir := t.TempDir()
	m, err := fusefs.Mount(t.Context(), fusefs.Options{Set: openSet(t, s.dir), Dir: dir, Log: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH) })
	_ = run(t, "ls", filepath.Join(dir, "110"))
	s.hang(true)
	defer s.hang(false)
	_ = run(t, "ls", filepath.Join(dir, "110", "latest")+"/")
	began := time.Now()
	if err := m.Unmount(t.Context()); !errors.Is(err, fusefs.ErrHangs) {
		t.Errorf("unmount: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("took %s", took)
	}
	if line := mountLine(t, dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}
