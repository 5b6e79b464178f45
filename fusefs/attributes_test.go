package fusefs_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
)

// attributes returns all extended attributes of a file.
func attributes(t *testing.T, path string) map[string]string {
	t.Helper()
	list := make([]byte, 4096)
	n, err := unix.Listxattr(path, list)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	all := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name != "" {
			all[name] = attribute(t, path, strings.TrimPrefix(name, "user.qmchain."))
		}
	}
	return all
}

func TestExtendedAttributes(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	p, before := f.g.Points[5], f.g.Points[4]
	point := m.path("110", string(p.ID))
	of := map[string]string{
		"user.qmchain.guest": "110", "user.qmchain.point": string(p.ID), "user.qmchain.uuid": p.UUID,
		"user.qmchain.time": "2026-11-20T15:15:23Z", "user.qmchain.consistency": "instant", "user.qmchain.level": "inc",
	}
	disk := map[string]string{
		"user.qmchain.disk": "scsi0", "user.qmchain.parent": string(before.ID), "user.qmchain.format": "raw",
		"user.qmchain.image": "110/images/" + string(p.ID) + ".scsi0.qcow2", "user.qmchain.sums": "sha256:" + p.Disk("scsi0").Sums.SHA256,
	}
	for k, v := range of {
		disk[k] = v
	}
	for path, want := range map[string]map[string]string{
		point:                                of,
		filepath.Join(point, "scsi0.raw"):    disk,
		m.path("110", "latest", "scsi0.raw"): disk,
		filepath.Join(point, "point.json"):   {},
		filepath.Join(point, "guest"):        {},
		m.dir:                                {},
		m.path("110"): {
			"user.qmchain.guest": "110", "user.qmchain.source": "qmchain", "user.qmchain.points": "6", "user.qmchain.point": string(p.ID),
		},
	} {
		got := attributes(t, path)
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s: %s is %q, want %q", path, k, got[k], v)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s has %v", path, got)
		}
	}
	if got := attributes(t, m.path("110", string(f.g.Points[0].ID), "scsi0.raw")); got["user.qmchain.level"] != "full" || got["user.qmchain.parent"] != "" {
		t.Errorf("a full has %v", got)
	}
	// As getxattr(2) has it: the size first, too little room, what is not there, what no file here can have.
	path := filepath.Join(point, "scsi0.raw")
	if n, err := unix.Getxattr(path, "user.qmchain.point", nil); err != nil || n != len(p.ID) {
		t.Errorf("size %d, %v", n, err)
	}
	if _, err := unix.Getxattr(path, "user.qmchain.point", make([]byte, 4)); !errors.Is(err, unix.ERANGE) {
		t.Errorf("too little room: %v", err)
	}
	for name, want := range map[string]error{"user.qmchain.nope": unix.ENODATA, "user.other": unix.ENODATA, "trusted.x": unix.ENOTSUP} {
		if _, err := unix.Getxattr(path, name, make([]byte, 64)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

// Copies can have the attributes as well.
func TestCopiesHaveAttributes(t *testing.T) {
	t.Parallel()
	f := shared(t)
	m := mountRepo(t, f.repo)
	id := string(f.g.Points[0].ID)
	want := attributes(t, m.path("110", id, "scsi0.raw"))
	to := t.TempDir()
	archive := filepath.Join(to, "point.tar")
	run(t, "tar", "--xattrs", "-C", m.path("110"), "-cf", archive, id)
	run(t, "tar", "--xattrs", "--xattrs-include=user.*", "--delay-directory-restore", "-C", to, "-xf", archive)
	run(t, "cp", "--preserve=all", m.path("110", id, "scsi0.raw"), to)
	for _, path := range []string{filepath.Join(to, id, "scsi0.raw"), filepath.Join(to, "scsi0.raw")} {
		got := attributes(t, path)
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s: %s is %q, want %q", path, k, got[k], v)
			}
		}
	}
	run(t, "chmod", "-R", "u+w", to) // or the test's folder can't be removed
}

// What is to be known of a disk that is shown all the same.
func TestAttributesOfForeignPoints(t *testing.T) {
	t.Parallel()
	const set = "virtnbdbackup/v2-zeroes"
	dir := filepath.Join(foreigntest.Unpack(t, set+"/"), set)
	m := mountSet(t, dir, image.PoolOptions{})
	guest, points := points(t, dir)
	if got := attribute(t, m.path(guest), "source"); got != "virtnbdbackup" {
		t.Errorf("source is %q", got)
	}
	warned := 0
	for _, w := range points.Warnings {
		warned++
		if got := attribute(t, m.path(guest, w.Point, rawName(w.Disk)), "warning"); got != w.Err.Error() {
			t.Errorf("%s/%s: warning %q, want %q", w.Point, w.Disk, got, w.Err)
		}
	}
	if warned == 0 {
		t.Error("the set has no warnings")
	}
	for _, p := range points.All.Kept() {
		got := attributes(t, m.path(guest, string(p.ID), rawName(p.Disks[0].Name)))
		for _, name := range []string{"sums", "consistency"} {
			if v, ok := got["user.qmchain."+name]; ok {
				t.Errorf("%s is %q, which the set does not know", name, v)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, got["user.qmchain.image"])); err != nil {
			t.Errorf("image: %v", err)
		}
	}
}
