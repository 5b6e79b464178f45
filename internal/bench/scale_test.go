package bench

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain/repo/repotest"
	"qmchain/internal/testenv"
)

var (
	scaleDir    = flag.String("scale-dir", "", "BenchmarkScale: folder for the repository, on a disk; empty: a temporary one. One that is there is taken as it is")
	scaleGuests = flag.Int("scale-guests", 500, "BenchmarkScale: guests in the repository")
	scalePoints = flag.Int("scale-points", 200, "BenchmarkScale: points of each guest")
	scaleDisks  = flag.Int("scale-disks", 1, "BenchmarkScale: disks of each point")
	scaleRounds = flag.Int("scale-rounds", 3, "BenchmarkScale: how often each command is timed")
)

// What a large repository costs: each command a process of its own, the repository in the page cache after the first round.
// Metrics are medians over the rounds: NAME-s or NAME-ms is the time, NAME-cpu-s that of the processors, which other load on
// the machine changes less, NAME-MB the largest resident memory.
//
//	list, list-json    all points
//	list-one           those of one guest
//	plan               what a run of one guest would do: `run --dry-run` of a running one that has as many points as the others
//	prune-one, prune   what prune would remove, of one guest and of all
//	mount              until the mount answers
//	root, guest        the first `ls -l` of the root, and of one guest; second: the same again
//	points             `find -maxdepth 2`: all points
//	tree               `find`: every file of every point, for whose partitions each disk is opened; in the first round alone
//	-MB of these       of the server, after it
//
// What is wanted of 100,000 points: list-s 2, mount-ms 500, no -MB over 200. That of tree is the kernel's: it remembers each
// folder that was looked into, and so must the server.
func BenchmarkScale(b *testing.B) {
	b.Run(fmt.Sprintf("points=%d", *scaleGuests**scalePoints), func(b *testing.B) {
		s := newScale(b)
		for b.Loop() {
			for round := range *scaleRounds {
				s.commands(b)
				s.mount(b, round == 0)
				b.Logf("round %d of %d; load %s", round+1, *scaleRounds, load())
			}
		}
		recordAmounts(b, s.seen)
	})
}

type scale struct {
	backup, fuse string // the programs
	dir          string
	vm           *testenv.VM
	seen         map[string][]float64
}

// scaleGuest is the guest that runs.
const scaleGuest = "web"

func scaleName(i int) string {
	if i == 0 {
		return scaleGuest
	}
	return fmt.Sprint(1000 + i)
}

func newScale(b *testing.B) *scale {
	b.Helper()
	s := &scale{dir: *scaleDir, seen: map[string][]float64{}}
	programs := b.TempDir()
	s.backup, s.fuse = filepath.Join(programs, "qmchain-backup"), filepath.Join(programs, "qmchain-fuse")
	build(b, s.backup, "qmchain/cmd/qmchain-backup")
	build(b, s.fuse, "qmchain/cmd/qmchain-fuse")
	if s.dir == "" {
		s.dir = b.TempDir()
	}
	const size = 64 << 20
	if _, err := os.Stat(filepath.Join(s.dir, "qmchain.json")); err != nil {
		began := time.Now()
		repotest.Many{
			Guests: *scaleGuests, Points: *scalePoints, Disks: *scaleDisks, Size: size, Name: scaleName,
			Start: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Every: time.Hour,
		}.Make(b, s.dir)
		b.Logf("%d points made in %s", *scaleGuests**scalePoints, time.Since(began).Round(time.Second))
	}
	disks := make([]testenv.Disk, *scaleDisks)
	for i := range disks {
		disks[i] = testenv.Disk{ID: fmt.Sprint("scsi", i), Size: size}
	}
	q := testenv.Host(b)
	s.vm = testenv.Start(b, testenv.Config{QEMU: q, Style: styleOf(q), Disks: disks})
	c := config(s.vm.Socket, s.dir, b.TempDir(), backup.Auto)
	c.Guest, c.Request.Adopt = scaleGuest, true // its points are of another UUID
	if _, err := backup.Run(b.Context(), c); err != nil {
		b.Fatal(err)
	}
	return s
}

func (s *scale) commands(b *testing.B) {
	one := scaleName(*scaleGuests - 1)
	keep := []string{"prune", "--repo", s.dir, "--dry-run", "--keep-last", "24", "--keep-daily", "30", "--keep-monthly", "12"}
	for _, c := range []struct {
		name, says string
		args       []string
	}{
		{"list", one, []string{"list", "--repo", s.dir}},
		{"list-json", one, []string{"list", "--repo", s.dir, "--json"}},
		{"list-one", one, []string{"list", "--repo", s.dir, one}},
		{"plan", "inc", []string{"run", "--dry-run", "--repo", s.dir, "--socket", s.vm.Socket, "--name", scaleGuest}},
		{"prune-one", one, append(slices.Clone(keep), one)},
		{"prune", one, keep},
	} {
		out, err := os.Create(filepath.Join(b.TempDir(), "out"))
		if err != nil {
			b.Fatal(err)
		}
		var said strings.Builder
		cmd := exec.CommandContext(b.Context(), s.backup, c.args...)
		cmd.Stdout, cmd.Stderr = out, &said
		var most int64
		s.time(c.name, func() {
			err := cmd.Start()
			if err == nil {
				most = memory(cmd.Process.Pid)
				err = cmd.Wait()
			}
			if err != nil {
				b.Fatalf("%s: %v: %s", c.name, err, said.String())
			}
		})
		s.add(c.name+"-MB", float64(most)/1e6)
		s.add(c.name+"-cpu-s", (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds())
		text, err := os.ReadFile(out.Name())
		if err != nil || !strings.Contains(string(text), c.says) {
			b.Fatalf("%s: there is no %q in %.300s %v", c.name, c.says, text, err)
		}
		_ = out.Close()
	}
}

// memory waits for a process to end and returns the most that it had, in bytes, but for its last milliseconds. What the kernel
// says when it has ended counts what this process had when it made it.
func memory(pid int) (most int64) {
	for {
		now := highWater(pid)
		if now == 0 {
			return most
		}
		most = max(most, now)
		time.Sleep(2 * time.Millisecond)
	}
}

// mount looks at a mount; all of its files are walked through only if walk is set.
func (s *scale) mount(b *testing.B, walk bool) {
	var m *server
	s.time("mount", func() { m = serveMount(b, s.fuse, s.dir) })
	defer m.stop()
	s.add("mount-MB", float64(m.resident())/1e6)
	last := filepath.Join(m.mount, scaleName(*scaleGuests-1))
	points := *scaleGuests**scalePoints + 1 // and that of the guest that runs
	for _, look := range []struct {
		name  string
		lines int // at least
		args  []string
	}{
		{"root", *scaleGuests, []string{"ls", "-l", m.mount}},
		{"guest", *scalePoints, []string{"ls", "-l", last}},
		{"second", *scalePoints, []string{"ls", "-l", last}},
		{"points", points, []string{"find", m.mount, "-mindepth", "2", "-maxdepth", "2", "-type", "d"}},
		{"tree", (points - 1) * (3 + *scaleDisks), []string{"find", m.mount, "-mindepth", "3"}},
	} {
		if look.name == "tree" && !walk {
			continue
		}
		cmd := exec.CommandContext(b.Context(), look.args[0], look.args[1:]...)
		before := m.cpu()
		var out []byte
		s.time(look.name, func() {
			var err error
			if out, err = cmd.Output(); err != nil {
				b.Fatalf("%v: %v", cmd, err)
			}
		})
		if n := strings.Count(string(out), "\n"); n < look.lines {
			b.Fatalf("%v: %d lines, less than %d", cmd, n, look.lines)
		}
		s.add(look.name+"-cpu-s", m.cpu()-before)
		s.add(look.name+"-MB", float64(m.resident())/1e6)
	}
	if _, err := os.Stat(filepath.Join(last, "nothing")); !os.IsNotExist(err) {
		b.Fatalf("%v, not %v", err, fs.ErrNotExist)
	}
}

// time measures what f takes, in the unit that its name is to have.
func (s *scale) time(name string, f func()) {
	began := time.Now()
	f()
	took := time.Since(began)
	if slices.Contains([]string{"list", "list-json", "prune", "points", "tree"}, name) {
		s.add(name+"-s", took.Seconds())
		return
	}
	s.add(name+"-ms", milliseconds(took))
}

func (s *scale) add(name string, value float64) { s.seen[name] = append(s.seen[name], value) }
