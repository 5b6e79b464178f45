package testenv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// toolTimeout bounds a run of qemu-img and its like: far above what the small
// images of tests need, on a loaded machine and under the race detector.
const toolTimeout = 2 * time.Minute

// QEMU is one installed version of QEMU. Its programs are paths of executables
// or of scripts that replace themselves with one.
type QEMU struct {
	Name         string // version, such as "7.2"
	Major, Minor int

	System  string // qemu-system-x86_64
	Img     string // qemu-img
	IO      string // qemu-io
	NBD     string // qemu-nbd
	Storage string // qemu-storage-daemon
}

// AtLeast tells whether the version is major.minor or later.
func (q QEMU) AtLeast(major, minor int) bool {
	return q.Major > major || q.Major == major && q.Minor >= minor
}

// expected are the versions that every test run covers: those of PVE 8's and
// of PVE 9's Debian.
var expected = []string{"7.2", "10.0"}

// CacheDir is the folder where `make setup` keeps what it fetched:
// $QMCHAIN_CACHE, else qmchain in the user's cache folder.
func CacheDir() (string, error) {
	if dir := os.Getenv("QMCHAIN_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "qmchain"), nil
}

// QEMUs returns the installed versions, oldest first: the host's, and those
// in the cache. It fails the test when one that tests must cover is missing.
func QEMUs(tb TB) []QEMU {
	tb.Helper()
	all, err := installed()
	if err != nil {
		tb.Fatalf("testenv: %v; run `make setup`", err)
	}
	for _, name := range expected {
		if _, ok := byName(all, name); !ok {
			tb.Fatalf("testenv: QEMU %s is not installed; run `make setup`", name)
		}
	}
	return slices.Clone(all)
}

func byName(all []QEMU, name string) (QEMU, bool) {
	i := slices.IndexFunc(all, func(q QEMU) bool { return q.Name == name })
	if i < 0 {
		return QEMU{}, false
	}
	return all[i], true
}

// Host returns the host's own QEMU.
func Host(tb TB) QEMU {
	tb.Helper()
	q, err := host()
	if err != nil {
		tb.Fatalf("testenv: %v; run `make setup`", err)
	}
	return q
}

// Version returns the installed QEMU of that name ("7.2", "10.0"). It fails
// the test when there is none.
func Version(tb TB, name string) QEMU {
	tb.Helper()
	all, err := installed()
	if err != nil {
		tb.Fatalf("testenv: %v; run `make setup`", err)
	}
	q, ok := byName(all, name)
	if !ok {
		tb.Fatalf("testenv: QEMU %s is not installed; run `make setup`", name)
	}
	return q
}

// What is installed does not change while tests run, and asking costs the
// start of a process.
var (
	host      = sync.OnceValues(func() (QEMU, error) { return probe("") })
	installed = sync.OnceValues(func() ([]QEMU, error) {
		q, err := host()
		if err != nil {
			return nil, err
		}
		cache, err := CacheDir()
		if err != nil {
			return nil, err
		}
		return withCached(q, cache)
	})
)

// withCached returns the host's version and those in the cache, oldest first.
// Where the same version is in both, it is the host's.
func withCached(host QEMU, cache string) ([]QEMU, error) {
	all := []QEMU{host}
	dirs, err := filepath.Glob(filepath.Join(cache, "qemu", "*", "bin"))
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		if strings.HasSuffix(filepath.Dir(dir), ".new") {
			continue // being unpacked
		}
		q, err := probe(dir)
		if err != nil {
			return nil, err
		}
		if _, have := byName(all, q.Name); !have {
			all = append(all, q)
		}
	}
	slices.SortFunc(all, func(a, b QEMU) int {
		return cmp.Or(cmp.Compare(a.Major, b.Major), cmp.Compare(a.Minor, b.Minor))
	})
	return all, nil
}

var versionLine = regexp.MustCompile(`^QEMU emulator version (\d+)\.(\d+)`)

// probe looks for QEMU's programs in dir, or on PATH when dir is empty.
func probe(dir string) (QEMU, error) {
	var q QEMU
	var errs []error
	find := func(name string) string {
		path, err := exec.LookPath(filepath.Join(dir, name))
		if err != nil {
			errs = append(errs, err)
		}
		return path
	}
	q.System = find("qemu-system-x86_64")
	q.Img = find("qemu-img")
	q.IO = find("qemu-io")
	q.NBD = find("qemu-nbd")
	q.Storage = find("qemu-storage-daemon")
	if err := errors.Join(errs...); err != nil {
		return QEMU{}, err
	}
	out, err := run(q.System, "--version")
	if err != nil {
		return QEMU{}, err
	}
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return QEMU{}, fmt.Errorf("%s: no version in %q", q.System, out)
	}
	if q.Major, err = strconv.Atoi(m[1]); err != nil {
		return QEMU{}, err
	}
	if q.Minor, err = strconv.Atoi(m[2]); err != nil {
		return QEMU{}, err
	}
	q.Name = m[1] + "." + m[2]
	return q, nil
}

// Output runs a program (one of [QEMU]'s, or any other) and returns what it
// printed on stdout. It fails the test when the program fails or hangs.
func Output(tb TB, program string, args ...string) string {
	tb.Helper()
	out, err := run(program, args...)
	if err != nil {
		tb.Fatalf("testenv: %v", err)
	}
	return out
}

func run(program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", program, strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// CreateDisk makes a disk image of size bytes with q's qemu-img. Each option
// is a -o option of the format, such as "compat=0.10".
func CreateDisk(tb TB, q QEMU, path, format string, size int64, opts ...string) {
	tb.Helper()
	if err := createDisk(q, path, format, size, opts...); err != nil {
		tb.Fatalf("testenv: %v", err)
	}
}

func createDisk(q QEMU, path, format string, size int64, opts ...string) error {
	args := []string{"create", "-q", "-f", format}
	for _, opt := range opts {
		args = append(args, "-o", opt)
	}
	_, err := run(q.Img, append(args, path, strconv.FormatInt(size, 10))...)
	return err
}
