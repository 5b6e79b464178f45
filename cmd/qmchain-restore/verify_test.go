package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
	"qmchain/chain/verify"
	"qmchain/cmd/internal/cli"
	"qmchain/fusefs"
	"qmchain/internal/durable"
	"qmchain/proxmox"
)

// branched makes a repository whose points are
//
//	scsi0    full 0 - inc 1 - inc 2 - diff 3
//	                              \ - inc 4
//	virtio1  full 0 - inc 1   full 2
//
// All increments of a disk are of the same size.
func branched(t *testing.T, dir string) *repotest.Guest {
	g := repotest.NewGuest(t, repotest.New(t, dir), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))
	const size = 4 << 20
	for i := range 5 {
		write := func(fill byte) []repotest.Write {
			if i == 0 {
				return []repotest.Write{{Len: size / 2, Fill: fill}}
			}
			return []repotest.Write{{Off: int64(5*i) << 16, Len: 3 << 16, Fill: fill}}
		}
		disks := []repotest.Disk{{Name: "scsi0", Size: size, Diff: i == 3, Write: write(byte(10 + i))}}
		if i < 3 {
			disks = append(disks, repotest.Disk{Name: "virtio1", Size: size, Full: i == 2, Write: write(byte(50 + i))})
		}
		g.Add(disks...)
	}
	return g
}

// copied is a copy of a repository, to be changed.
type copied struct {
	t   *testing.T
	dir string // of the repository
	g   *repotest.Guest
}

func copyOf(t *testing.T, g *repotest.Guest) *copied {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	if out, err := exec.Command("cp", "-a", g.Repo.Dir, dir).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	return &copied{t, dir, g}
}

func (c *copied) id(i int) string { return string(c.g.Points[i].ID) }

func (c *copied) check(errs ...error) {
	c.t.Helper()
	if err := errors.Join(errs...); err != nil {
		c.t.Fatal(err)
	}
}

// Names, relative to the repository.
func (c *copied) image(i int, disk string) string {
	return filepath.Join("110", "images", chain.ImageFile(c.g.Points[i].ID, disk))
}
func (c *copied) folder(i int) string            { return filepath.Join("110", c.id(i)) }
func (c *copied) manifest(i int) string          { return filepath.Join(c.folder(i), "point.json") }
func (c *copied) sums(i int, disk string) string { return filepath.Join(c.folder(i), disk+".sums") }
func (c *copied) path(name string) string        { return filepath.Join(c.dir, name) }

func (c *copied) read(name string) []byte {
	c.t.Helper()
	b, err := os.ReadFile(c.path(name))
	c.check(err)
	return b
}

func (c *copied) write(name string, b []byte) {
	c.t.Helper()
	c.check(os.WriteFile(c.path(name), b, 0o600))
}

func (c *copied) resize(name string, by int64) {
	c.t.Helper()
	info, err := os.Stat(c.path(name))
	c.check(err, os.Truncate(c.path(name), info.Size()+by))
}

func (c *copied) swap(a, b string) {
	c.t.Helper()
	c.check(os.Rename(c.path(a), c.path("x")), os.Rename(c.path(b), c.path(a)), os.Rename(c.path("x"), c.path(b)))
}

// flip inverts a bit of a file.
func (c *copied) flip(name string, off int64, bit int) {
	c.t.Helper()
	b := c.read(name)
	b[off] ^= 1 << bit
	c.write(name, b)
}

// Places in a qcow2 image, see QEMU's docs/interop/qcow2.
func (c *copied) word(name string, off int64) int64 {
	return int64(binary.BigEndian.Uint64(c.read(name)[off:]) & 0x00fffffffffffe00)
}
func (c *copied) l1(name string) int64       { return c.word(name, 40) }
func (c *copied) l2(name string) int64       { return c.word(name, c.l1(name)) }
func (c *copied) refTable(name string) int64 { return c.word(name, 48) }
func (c *copied) refBlock(name string) int64 { return c.word(name, c.refTable(name)) }

func (c *copied) data(name string) int64 {
	for i := range int64(64) {
		if at := c.word(name, c.l2(name)+8*i); at != 0 {
			return at
		}
	}
	c.t.Fatalf("%s has no data", name)
	return 0
}

// find returns where a text is in a file.
func (c *copied) find(name, text string) int64 {
	c.t.Helper()
	i := bytes.Index(c.read(name), []byte(text))
	if i < 0 {
		c.t.Fatalf("%q is not in %s", text, name)
	}
	return int64(i)
}

// mutation is something that is done to a repository.
type mutation struct {
	name string
	do   func(c *copied)
	// files that must be named, and no others.
	files func(c *copied) []string
	// images that are hit. What is read through them is damaged, and nothing else is.
	hit []place
	// lost points are those that can't be read; gone ones can't even be seen.
	lost, gone []int
	// seen: who opens a disk that is damaged finds out too, without reading all of it.
	seen bool
}

type place struct {
	point int
	disk  string
}

func only(name func(c *copied) string) func(c *copied) []string {
	return func(c *copied) []string { return []string{name(c)} }
}

func both(point int) []place { return []place{{point, "scsi0"}, {point, "virtio1"}} }

func mutations() []mutation {
	var list []mutation
	// each does the same to the images of several points.
	each := func(name string, seen bool, points []int, do func(c *copied, name string)) {
		for _, i := range points {
			file := func(c *copied) string { return c.image(i, "scsi0") }
			list = append(list, mutation{
				name: fmt.Sprintf("%s %d", name, i), do: func(c *copied) { do(c, file(c)) },
				files: only(file), hit: []place{{i, "scsi0"}}, seen: seen,
			})
		}
	}
	all := []int{0, 1, 2, 3, 4}
	each("image is missing", true, all, func(c *copied, name string) { c.check(os.Remove(c.path(name))) })
	each("image is cut by a byte", true, all, func(c *copied, name string) { c.resize(name, -1) })
	each("image is cut to half", true, []int{0, 2}, func(c *copied, name string) { c.resize(name, -int64(len(c.read(name))/2)) })
	each("image is empty", true, []int{1}, func(c *copied, name string) { c.write(name, nil) })
	each("image has grown", true, all, func(c *copied, name string) { c.resize(name, 1<<16) })
	each("image is zeroes", true, []int{0, 2}, func(c *copied, name string) { c.write(name, make([]byte, len(c.read(name)))) })
	each("image is a link", true, []int{0, 3}, func(c *copied, name string) {
		c.check(os.Rename(c.path(name), c.path("real")), os.Symlink(c.path("real"), c.path(name)))
	})
	each("image is a FIFO", true, []int{2}, func(c *copied, name string) { c.check(os.Remove(c.path(name)), unix.Mkfifo(c.path(name), 0o600)) })
	each("image is a folder", true, []int{1}, func(c *copied, name string) { c.check(os.Remove(c.path(name)), os.Mkdir(c.path(name), 0o700)) })

	swap := func(name string, a, b place) {
		list = append(list, mutation{
			name: "swapped with " + name,
			do:   func(c *copied) { c.swap(c.image(a.point, a.disk), c.image(b.point, b.disk)) },
			files: func(c *copied) []string {
				return []string{c.image(a.point, a.disk), c.image(b.point, b.disk)}
			},
			hit: []place{a, b}, seen: true,
		})
	}
	swap("its parent, of equal size", place{1, "scsi0"}, place{2, "scsi0"})
	swap("its sibling, of equal size", place{3, "scsi0"}, place{4, "scsi0"})
	swap("the full", place{0, "scsi0"}, place{1, "scsi0"})
	swap("the other disk's, of equal size", place{1, "scsi0"}, place{1, "virtio1"})
	swap("the other disk's full", place{0, "scsi0"}, place{0, "virtio1"})
	for _, i := range all {
		each("image is that of another disk", true, []int{i}, func(c *copied, name string) { c.write(name, c.read(c.image(min(i, 2), "virtio1"))) })
	}
	each("image is its parent's", true, []int{1, 2, 3}, func(c *copied, name string) {
		for i := range 5 {
			if c.image(i, "scsi0") == name {
				c.write(name, c.read(c.image(i-1, "scsi0")))
			}
		}
	})

	// One bit, where whoever opens the image must see it,
	for name, at := range map[string]func(c *copied, name string) int64{
		"magic":               func(*copied, string) int64 { return 0 },
		"version":             func(*copied, string) int64 { return 7 },
		"cluster size":        func(*copied, string) int64 { return 23 },
		"virtual size":        func(*copied, string) int64 { return 29 },
		"encryption":          func(*copied, string) int64 { return 35 },
		"place of the L1":     func(*copied, string) int64 { return 41 },
		"features":            func(*copied, string) int64 { return 78 },
		"identity's type":     func(c *copied, name string) int64 { return c.find(name, "qmch") },
		"identity":            func(c *copied, name string) int64 { return c.find(name, "/scsi0") + 1 },
		"backing file's name": func(c *copied, name string) int64 { return c.find(name, ".scsi0.qcow2") + 2 },
	} {
		each("a bit of the header, "+name, true, []int{2}, func(c *copied, name string) { c.flip(name, at(c, name), 1) })
	}
	// and where only the check sums tell for sure.
	for name, at := range map[string]func(c *copied, name string) int64{
		"L1 entry":                   func(c *copied, name string) int64 { return c.l1(name) + 5 },
		"L2 entry":                   func(c *copied, name string) int64 { return c.l2(name) + 8*10 + 5 },
		"L2 entry that is not used":  func(c *copied, name string) int64 { return c.l2(name) + 8*60 + 5 },
		"reference count table":      func(c *copied, name string) int64 { return c.refTable(name) + 5 },
		"reference count":            func(c *copied, name string) int64 { return c.refBlock(name) + 3 },
		"data":                       func(c *copied, name string) int64 { return c.data(name) + 1000 },
		"last byte":                  func(c *copied, name string) int64 { return int64(len(c.read(name))) - 1 },
		"place of the count's table": func(*copied, string) int64 { return 54 },
	} {
		each("a bit, "+name, false, []int{0, 2}, func(c *copied, name string) { c.flip(name, at(c, name), 1) })
	}
	for n := range 24 {
		r := rand.New(rand.NewPCG(uint64(n), 9))
		each(fmt.Sprintf("a bit anywhere, %d, in", n), false, []int{r.IntN(5)}, func(c *copied, name string) {
			c.flip(name, r.Int64N(int64(len(c.read(name)))), r.IntN(8))
		})
	}

	manifest := func(name string, i int, do func(c *copied, name string)) {
		file := func(c *copied) string { return c.manifest(i) }
		list = append(list, mutation{
			name: fmt.Sprintf("manifest %s %d", name, i), do: func(c *copied) { do(c, file(c)) }, files: only(file),
			hit: both(i), lost: []int{i}, seen: true,
		})
	}
	for _, i := range all {
		manifest("has another bit", i, func(c *copied, name string) { c.flip(name, int64(len(c.read(name))/2), 2) })
		manifest("is that of another point", i, func(c *copied, name string) { c.write(name, c.read(c.manifest((i+1)%5))) })
	}
	manifest("was edited", 1, func(c *copied, name string) {
		c.write(name, bytes.Replace(c.read(name), []byte(`"qemu": "repotest"`), []byte(`"qemu": "repo"`), 1))
	})
	manifest("is cut off", 2, func(c *copied, name string) { c.resize(name, -10) })
	manifest("is missing", 0, func(c *copied, name string) { c.check(os.Remove(c.path(name))) })
	manifest("is empty", 4, func(c *copied, name string) { c.write(name, nil) })

	sums := func(name string, do func(c *copied, name string)) {
		for _, i := range []int{1, 4} {
			file := func(c *copied) string { return c.sums(i, "scsi0") }
			list = append(list, mutation{
				name: fmt.Sprintf("check sums %s %d", name, i), do: func(c *copied) { do(c, file(c)) }, files: only(file),
				hit: []place{{i, "scsi0"}},
			})
		}
	}
	sums("have another bit", func(c *copied, name string) { c.flip(name, 60, 0) })
	sums("are missing", func(c *copied, name string) { c.check(os.Remove(c.path(name))) })
	sums("are another image's", func(c *copied, name string) { c.write(name, c.read(c.sums(2, "scsi0"))) })
	sums("are cut off", func(c *copied, name string) { c.resize(name, -1) })
	sums("are empty", func(c *copied, name string) { c.write(name, nil) })

	for _, i := range all {
		list = append(list, mutation{
			name: fmt.Sprintf("folder is missing %d", i),
			do:   func(c *copied) { c.check(os.RemoveAll(c.path(c.folder(i)))) },
			files: func(c *copied) (files []string) {
				for _, d := range c.g.Points[i].Disks {
					files = append(files, c.image(i, d.Name)) // which nobody needs now
				}
				if i < 3 {
					files = append(files, c.folder(i))
				}
				return files
			},
			hit: both(i), gone: []int{i}, seen: true,
		})
	}
	list = append(list, mutation{
		name: "folder is another point's",
		do: func(c *copied) {
			c.check(os.RemoveAll(c.path(c.folder(1))))
			out, err := exec.Command("cp", "-a", c.path(c.folder(2)), c.path(c.folder(1))).CombinedOutput()
			if err != nil {
				c.t.Fatalf("cp: %v: %s", err, out)
			}
		},
		files: only(func(c *copied) string { return c.manifest(1) }), hit: both(1), lost: []int{1}, seen: true,
	}, mutation{
		name: "two folders are swapped",
		do:   func(c *copied) { c.swap(c.folder(1), c.folder(2)) },
		files: func(c *copied) []string {
			return []string{c.manifest(1), c.manifest(2)}
		},
		hit: append(both(1), both(2)...), lost: []int{1, 2}, seen: true,
	}, mutation{
		name: "all images are missing",
		do:   func(c *copied) { c.check(os.RemoveAll(c.path("110/images"))) },
		files: func(c *copied) (files []string) {
			for i, p := range c.g.Points {
				for _, d := range p.Disks {
					files = append(files, c.image(i, d.Name))
				}
			}
			return files
		},
		hit: slices.Concat(both(0), both(1), both(2), both(3), both(4)), seen: true,
	})
	return list
}

// damagedBy returns what is read through the images that are hit.
func (c *copied) damagedBy(hit []place) map[place]bool {
	bad := map[place]bool{}
	for i, m := range c.g.Points { // parents come before their children
		for _, d := range m.Disks {
			at := place{i, d.Name}
			bad[at] = slices.Contains(hit, at)
			if d.Parent != nil {
				j := slices.IndexFunc(c.g.Points, func(p *chain.Manifest) bool { return p.ID == d.Parent.Point })
				bad[at] = bad[at] || bad[place{j, d.Parent.Disk}]
			}
		}
	}
	return bad
}

// inProcess runs the program.
func inProcess(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = program(durable.FS{}, proxmox.Local()).Run(t.Context(), args, cli.Env{Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }})
	return code, out.String(), errs.String()
}

func verifyJSON(t *testing.T, wantCode int, args ...string) verified {
	t.Helper()
	code, out, errs := inProcess(t, append([]string{"verify", "--json"}, args...)...)
	if code != wantCode {
		t.Fatalf("exit code %d, not %d: %s\n%s", code, wantCode, out, errs)
	}
	var v verified
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return v
}

// Whatever is done to a repository is found, with the file and exactly the disks that it costs; and where that can be seen
// without reading everything neither a restore nor the mount take the backup for whole.
func TestMutations(t *testing.T) {
	t.Parallel()
	g := branched(t, t.TempDir())
	if v := verifyJSON(t, 0, "--repo", g.Repo.Dir, "--deep"); v.State != verify.Good || v.Guests[0].Files != 8 {
		t.Fatalf("%+v", v)
	}
	for _, m := range mutations() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			c := copyOf(t, g)
			m.do(c)
			c.verified(m)
			if m.seen {
				c.refused(m)
			}
		})
	}
}

// verified checks what verify says.
func (c *copied) verified(m mutation) {
	t := c.t
	v := verifyJSON(t, 5, "--repo", c.dir)
	bad := c.damagedBy(m.hit)
	named := map[string]bool{}
	for _, f := range v.Guests[0].Findings {
		switch f.Kind {
		case verify.Damage:
			named[f.File] = true
		case verify.Leak: // of a table that was changed
		default:
			t.Errorf("%+v", f)
		}
	}
	want := m.files(c)
	for _, file := range want {
		if !named[file] {
			t.Errorf("%s is not named: %+v", file, v.Guests[0].Findings)
		}
	}
	if len(named) != len(want) {
		t.Errorf("named: %v, not %v", named, want)
	}
	for i := range c.g.Points {
		at := slices.IndexFunc(v.Guests[0].Points, func(p verify.Point) bool { return p.ID == c.id(i) })
		switch {
		case slices.Contains(m.gone, i):
			if at >= 0 {
				t.Errorf("point %d is there", i)
			}
			continue
		case at < 0:
			t.Errorf("point %d is not there", i)
			continue
		}
		p := v.Guests[0].Points[at]
		if slices.Contains(m.lost, i) {
			if p.State != verify.Damaged || len(p.Disks) > 0 {
				t.Errorf("%+v", p)
			}
			continue
		}
		for _, d := range p.Disks {
			state := verify.Good
			if bad[place{i, d.Name}] {
				state = verify.Damaged
			}
			if d.State != state || (state == verify.Good) != (len(d.Files) == 0) {
				t.Errorf("point %d: %+v, not %s", i, d, state)
			}
		}
	}
	// A point that is damaged, or is not, is so if it alone is asked for.
	if i := len(m.name) % 15; i < 5 && !slices.Contains(m.gone, i) {
		code := 0
		if bad[place{i, "scsi0"}] || bad[place{i, "virtio1"}] {
			code = 5
		}
		verifyJSON(t, code, "--repo", c.dir, "110/"+c.id(i))
	}
}

// refused sees that what is damaged is not restored and not shown, and what is not damaged is.
func (c *copied) refused(m mutation) {
	t := c.t
	bad := c.damagedBy(m.hit)
	set, err := source.Open(c.dir)
	c.check(err)
	defer set.Close()
	log := logrus.New()
	log.SetOutput(io.Discard)
	mnt := t.TempDir()
	mounted, err := fusefs.Mount(t.Context(), fusefs.Options{Set: set, Dir: mnt, Log: log})
	c.check(err)
	defer func() { c.check(mounted.Unmount(t.Context())) }()
	for i, p := range c.g.Points {
		for _, d := range p.Disks {
			at := place{i, d.Name}
			got, err := os.ReadFile(filepath.Join(mnt, "110", string(p.ID), d.Name+".raw"))
			hidden := slices.Contains(m.lost, i) || slices.Contains(m.gone, i)
			switch {
			case hidden:
				if !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%v is mounted: %v", at, err)
				}
			case bad[at]:
				if !errors.Is(err, unix.EIO) {
					t.Errorf("%v is mounted: %v", at, err)
				}
			case err != nil || !bytes.Equal(got, c.g.Want(p.ID, d.Name)):
				t.Errorf("%v is mounted as something else: %v", at, err)
			}
			if !bad[at] && i%2 == 0 || slices.Contains(m.gone, i) {
				continue
			}
			out := filepath.Join(t.TempDir(), "out")
			code, _, errs := inProcess(t, "image", "--repo", c.dir, "110/"+string(p.ID), "--disk", d.Name, "--output", out)
			if bad[at] != (code == 5) || !bad[at] && code != 0 {
				t.Errorf("%v: image ends with %d: %s", at, code, errs)
			}
			if _, err := os.Stat(out); bad[at] != errors.Is(err, os.ErrNotExist) {
				t.Errorf("%v: %v", at, err)
			}
		}
	}
}

// Foreign sets have an exit code of their own where they are doubtful.
func TestVerifyForeign(t *testing.T) {
	t.Parallel()
	for set, want := range map[string]int{
		"qmpbackup/a-default":       0,
		"qmpbackup/e-include-raw":   5,
		"qmpbackup/o-nots-copy":     4,
		"virtnbdbackup/v1-compress": 0,
		"virtnbdbackup/v3-compress": 4,
	} {
		dir := filepath.Join(foreigntest.Unpack(t, set+"/"), set)
		v := verifyJSON(t, want, "--repo", dir, "--deep")
		if !strings.HasPrefix(set, string(v.Kind)+"/") || len(v.Guests) != 1 || len(v.Guests[0].Points) < 2 {
			t.Errorf("%s: %+v", set, v)
		}
		if code, out, errs := inProcess(t, "verify", "--repo", dir, v.Guests[0].Guest+"/latest"); code != want {
			t.Errorf("%s: latest: exit code %d: %s%s", set, code, out, errs)
		}
		if code, _, _ := inProcess(t, "verify", "--repo", dir, "nobody"); code != 2 {
			t.Errorf("%s: another guest: exit code %d", set, code)
		}
	}
}

// Without qemu-img everything else is verified, and that it was not there is said.
func TestVerifyWithoutQemuImg(t *testing.T) {
	t.Parallel()
	g := branched(t, t.TempDir())
	cmd := exec.CommandContext(t.Context(), "qmchain-restore", "verify", "--repo", g.Repo.Dir)
	cmd.Env = []string{"PATH=" + t.TempDir()}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 4 || !strings.Contains(string(out), "110: good") || !strings.Contains(string(out), "qemu-img is not installed") {
		t.Errorf("%v: %s", err, out)
	}
	repotest.Flip(t, g.ImagePath(g.Points[1].ID, "scsi0"), 1000)
	cmd = exec.CommandContext(t.Context(), "qmchain-restore", "verify", "--repo", g.Repo.Dir)
	cmd.Env = []string{"PATH=" + t.TempDir()}
	if out, err := cmd.CombinedOutput(); !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Errorf("%v: %s", err, out)
	}
}
