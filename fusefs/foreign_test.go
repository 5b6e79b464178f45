package fusefs_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
)

// points returns the points of a set with one guest, read past the mount.
func points(t *testing.T, dir string) (guest string, points *source.Points) {
	t.Helper()
	set := openSet(t, dir)
	defer set.Close()
	names, err := set.Guests()
	if err != nil || len(names) != 1 {
		t.Fatalf("guests %v, %v", names, err)
	}
	g, err := set.Guest(names[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := g.Points()
	if err != nil {
		t.Fatal(err)
	}
	return names[0], p
}

func digestOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 1<<20))
	return hex.EncodeToString(h.Sum(nil)), err
}

// Every disk of every point of sets that other programs have written, through the mount. What is refused is shown, and is
// an I/O error; what is warned of can be read.
func TestForeign(t *testing.T) {
	t.Parallel()
	wanted := map[string]string{ // what the log says of them
		"qmpbackup/f-drive-style":    "",
		"qmpbackup/d-monthly-auto":   "",
		"qmpbackup/e-include-raw":    "can't be read",
		"qmpbackup/l-snapshotrebase": "",
		"qmpbackup/o-nots-copy":      "can't be proven",
		"virtnbdbackup/v1-compress":  "",
		"virtnbdbackup/v2-zeroes":    "may be back",
		"virtnbdbackup/v3-compress":  "may be back",
	}
	for _, c := range foreigntest.Cases(t) {
		says, ok := wanted[c.Path()]
		if !ok {
			continue
		}
		delete(wanted, c.Path())
		t.Run(c.Path(), func(t *testing.T) {
			t.Parallel()
			// By way of a link, which is the user's own.
			dir := filepath.Join(t.TempDir(), c.Name)
			if err := os.Symlink(filepath.Join(foreigntest.Unpack(t, c.Path()+"/"), c.Path()), dir); err != nil {
				t.Fatal(err)
			}
			m := mountSet(t, dir, image.PoolOptions{})
			guest, points := points(t, dir)
			for _, w := range c.Points {
				checkForeign(t, m, guest, points, w)
			}
			checkFiles(t, m, guest, points)
			for text, want := range map[string]bool{says: true, "can't be read": says == "can't be read", "level=error": says == "can't be read"} {
				if strings.Contains(m.log.String(), text) != want {
					t.Errorf("%q is in the log: %v", text, !want)
				}
			}
			if says == "may be back" && strings.Count(m.log.String(), says) != 1 {
				t.Errorf("the same is said of each disk:\n%s", m.log)
			}
		})
	}
	if len(wanted) > 0 {
		t.Errorf("no such sets: %v", wanted)
	}
}

// What was read of another program's image is read again when that program has written to it.
func TestForeignIsWrittenTo(t *testing.T) {
	t.Parallel()
	const name = "qmpbackup/a-default"
	dir := filepath.Join(foreigntest.Unpack(t, name+"/"), name)
	m := mountSet(t, dir, image.PoolOptions{})
	guest, points := points(t, dir)
	p := points.All[0]
	d := &p.Disks[0]
	path := m.path(guest, string(p.ID), d.Name+".raw")
	if _, err := digestOf(path); err != nil {
		t.Fatal(err)
	}
	layer, ok := points.Image(chain.Layer{Point: p, Disk: d})
	if !ok {
		t.Fatal("no image")
	}
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x77 0 1M", layer.Path)
	time.Sleep(1500 * time.Millisecond) // lists are never older than a second
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, 1<<20)
	if _, err := io.ReadFull(f, got); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{0x77}, len(got))) {
		t.Errorf("it reads %x…, %v", got[:16], err)
	}
}

func checkForeign(t *testing.T, m *mount, guest string, points *source.Points, w foreigntest.Point) {
	t.Helper()
	var point *chain.Manifest
	for _, p := range points.All {
		if d := p.Disk(w.Disk); d != nil && d.File == w.File {
			point = p // the newest: of a file with snapshots that is what it says itself
		}
	}
	if point == nil {
		t.Errorf("%s is in no point", w.File)
		return
	}
	path := m.path(guest, string(point.ID), rawName(w.Disk))
	info, err := os.Stat(path)
	if err != nil || !info.ModTime().Equal(point.Time) || !w.Refuse && info.Size() != w.Size {
		t.Errorf("%s: %v, %v", path, info, err)
	}
	switch got, err := digestOf(path); {
	case w.Refuse:
		if !errors.Is(err, unix.EIO) {
			t.Errorf("%s, which is refused: %v", path, err)
		}
	case err != nil:
		t.Error(err)
	case got != w.SHA256 && !w.RefuseOrWarn:
		t.Errorf("%s: other content", path)
	}
}

// checkFiles compares what is shown beside the disks: no manifest, and the guest's configuration as it is.
func checkFiles(t *testing.T, m *mount, guest string, points *source.Points) {
	t.Helper()
	for _, p := range points.All {
		dir := m.path(guest, string(p.ID))
		if _, err := os.Lstat(filepath.Join(dir, chain.ManifestFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("manifest of a foreign point: %v", err)
		}
		files, err := points.Files(p)
		if err != nil {
			t.Fatal(err)
		}
		want := len(p.Disks)
		if len(files) > 0 {
			want++
			if got := must(os.ReadDir(filepath.Join(dir, "guest")))(t); len(got) != len(files) {
				t.Errorf("%d files of the guest, not %d", len(got), len(files))
			}
		}
		if got := must(os.ReadDir(dir))(t); len(got) != want {
			t.Errorf("%v", got)
		}
		for _, f := range files {
			path := filepath.Join(dir, "guest", filepath.Base(f))
			equal(t, path, must(os.ReadFile(path))(t), must(os.ReadFile(filepath.Join(points.Folder(p), f)))(t))
		}
	}
	if latest := must(os.Readlink(m.path(guest, "latest")))(t); latest != string(points.All.Latest().ID) {
		t.Errorf("latest is %s", latest)
	}
	if got := must(os.ReadDir(m.path(guest)))(t); len(got) != len(points.All)+1 {
		t.Errorf("%v", got)
	}
	for _, name := range []string{"nobody", guest + "/20200101T000000Z-0000", guest + "/latest/guest/nope"} {
		if _, err := os.Lstat(m.path(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Runs of the other program come and go while the set is mounted, and what is open is read on.
func TestForeignChanges(t *testing.T) {
	t.Parallel()
	const set = "virtnbdbackup/v1-chain"
	dir := filepath.Join(foreigntest.Unpack(t, set+"/"), set)
	guest, all := points(t, dir)
	newest := all.All.Latest()
	aside := t.TempDir()
	move := func(from, to string) {
		for _, d := range newest.Disks {
			if err := os.Rename(filepath.Join(from, d.File), filepath.Join(to, d.File)); err != nil {
				t.Fatal(err)
			}
		}
	}
	move(dir, aside)
	m := mountSet(t, dir, image.PoolOptions{})
	path := m.path(guest, string(newest.ID), rawName(newest.Disks[0].Name))
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("not there yet: %v", err)
	}
	move(aside, dir)
	f := must(os.Open(path))(t) // at once, by its name
	defer f.Close()
	img, err := all.OpenDisk(image.NewPool(image.PoolOptions{}), newest, newest.Disks[0].Name)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	want := must(io.ReadAll(io.NewSectionReader(img, 0, img.Size())))(t)
	move(dir, aside)
	eventually(t, "the point is gone", func() bool {
		_, err := os.Stat(path)
		return errors.Is(err, os.ErrNotExist)
	})
	equal(t, "what was open", must(io.ReadAll(f))(t), want)
	eventually(t, "latest is another one", func() bool {
		return must(os.Readlink(m.path(guest, "latest")))(t) != string(newest.ID)
	})
}

// A repository and folders of other programs in one mount. One whose share goes away does not take the others along, and its
// guests don't look as if they had been removed.
func TestSeveralSets(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "repo"), 0o700); err != nil {
		t.Fatal(err)
	}
	g := repotest.NewGuest(t, repotest.New(t, filepath.Join(dir, "repo")), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Size: smallSize, Write: []repotest.Write{{Off: 0, Len: smallSize, Fill: 1}}})
	const name = "qmpbackup/a-default"
	set := filepath.Join(dir, "web")
	if err := os.Rename(filepath.Join(foreigntest.Unpack(t, name+"/"), name), set); err != nil {
		t.Fatal(err)
	}
	m := mountSet(t, dir, image.PoolOptions{})
	list := func(want ...string) {
		t.Helper()
		var names []string
		for _, e := range must(os.ReadDir(m.dir))(t) {
			names = append(names, e.Name())
		}
		if !slices.Equal(names, want) {
			t.Fatalf("%q, want %q", names, want)
		}
	}
	list("110", "web")
	latest := m.path("110", "latest", "scsi0.raw")
	want := must(digestOf(latest))(t)
	for _, w := range foreigntest.Cases(t)[0].Points[:1] {
		guest, points := points(t, set)
		checkForeign(t, m, guest, points, w)
	}
	if got := attribute(t, m.path("web"), "source"); got != "qmpbackup" {
		t.Errorf("kind %q", got)
	}

	// A copy of the repository is not taken for the original, though all its points have the same ids.
	other := filepath.Join(dir, "copy")
	if out, err := exec.Command("cp", "-a", filepath.Join(dir, "repo"), other).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	images := must(filepath.Glob(filepath.Join(other, "110/images/*.qcow2")))(t)
	for _, image := range images {
		if err := os.Truncate(image, 0); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the copy is there", func() bool {
		_, err := os.Stat(m.path("copy.110"))
		return err == nil
	})
	if got := must(digestOf(m.path("repo.110", "latest", "scsi0.raw")))(t); got != want {
		t.Error("the original has other content beside its copy")
	}
	if _, err := digestOf(m.path("copy.110", "latest", "scsi0.raw")); err == nil {
		t.Error("a destroyed copy can be read")
	}
	if err := os.RemoveAll(other); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the name is plain again", func() bool {
		_, err := os.Stat(latest)
		return err == nil
	})

	away := filepath.Join(dir, ".away")
	if err := errors.Join(os.Rename(filepath.Join(dir, "repo"), away), os.Mkdir(filepath.Join(dir, "repo"), 0o700)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the guest can't be read", func() bool {
		_, err := os.ReadDir(m.path("110"))
		return errors.Is(err, unix.EIO)
	})
	list("110", "web")
	if _, err := os.ReadDir(m.path("web", "latest")); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "repo")), os.Rename(away, filepath.Join(dir, "repo"))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is back", func() bool {
		got, err := digestOf(latest)
		return err == nil && got == want
	})
	if err := os.RemoveAll(set); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is removed goes", func() bool {
		_, err := os.Stat(m.path("web"))
		return errors.Is(err, os.ErrNotExist)
	})
}
