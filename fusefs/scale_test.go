package fusefs_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
)

// A mount of many guests is ready before any of their files was opened. Then each look opens what it needs: the manifests of
// the guest that is looked at, each once, and no image before a point's own folder is listed.
func TestManyGuests(t *testing.T) {
	t.Parallel()
	const guests, points = 40, 50
	many := repotest.Many{
		Guests: guests, Points: points, Disks: 1, Size: 1 << 20, Name: func(i int) string { return fmt.Sprint(110 + i) },
		Start: start, Every: time.Hour,
	}
	r := many.Make(t, t.TempDir())
	opened := repotest.Watch(t, r.Dir)
	m := mountRepo(t, r)
	look := func(what string, want int, fits func(file string) bool) {
		t.Helper()
		files := opened()
		maps.DeleteFunc(files, func(file string, _ int) bool { return file == "qmchain.json" }) // what the set is known by
		for file, n := range files {
			if n != 1 || !fits(file) {
				t.Errorf("%s: %s was opened %d times", what, file, n)
			}
		}
		if len(files) != want {
			t.Errorf("%s: %d files were opened, not %d", what, len(files), want)
		}
	}
	none := func(string) bool { return false }
	look("mount", 0, none)
	if n := strings.Count(run(t, "ls", "-l", m.path()), "\n"); n != guests+1 {
		t.Errorf("%d lines", n)
	}
	look("ls -l of the root", 0, none)

	manifests := func(file string) bool {
		return strings.HasPrefix(file, "115/") && filepath.Base(file) == chain.ManifestFile
	}
	if n := strings.Count(run(t, "ls", "-l", m.path("115")), "\n"); n != points+2 {
		t.Errorf("%d lines", n)
	}
	look("ls -l of a guest", points, manifests)
	time.Sleep(1100 * time.Millisecond) // until it is looked at anew
	latest := must(os.Readlink(m.path("115", "latest")))(t)
	run(t, "ls", "-l", m.path("115"))
	look("the same again", 0, none)

	// The kernel learns of the names in a point, and more only of what is looked at: what it has been told of it keeps.
	lookups := func() int { return must(strconv.Atoi(counter(t, m, `qmchain_fuse_requests_total{,op="lookup"`)))(t) }
	before := lookups()
	if names := run(t, "ls", m.path("115", latest)); names != "guest\npoint.json\nscsi0.raw\n" {
		t.Errorf("in the point: %s", names)
	}
	between := lookups()
	run(t, "ls", "-l", m.path("115", latest))
	if names, all := between-before, lookups()-between; names > 2 || all < 3 {
		t.Errorf("%d lookups for the names, %d for all there is to know", names, all)
	}
	// For its partitions the disk is opened, with all of its chain.
	look("ls -l of a point", points+1, func(file string) bool {
		return strings.HasPrefix(file, "115/images/") || file == filepath.Join("115", latest, ".lock")
	})
	if found := strings.Fields(run(t, "find", m.path(), "-mindepth", "2", "-maxdepth", "2", "-type", "d")); len(found) != guests*points || len(slices.Compact(found)) != len(found) {
		t.Errorf("%d points in the mount", len(found))
	}
}
