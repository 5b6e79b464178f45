package main

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
	"qmchain/internal/testenv"
)

// What is asked of one guest in a repository of many opens no other guest's files, and of its own each manifest once for each time
// that its points are looked at.
func TestOneGuestOfMany(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Drive)
	const points = 60
	repotest.Many{
		Guests: 6, Points: points, Disks: 1, Size: 4 << 20, Name: func(i int) string { return []string{"web", fmt.Sprint(110 + i)}[min(i, 1)] },
		Start: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Every: time.Hour,
	}.Make(t, b.repo)
	run := []string{"run", "--name", "web", "--socket", b.vm.Socket, "--repo", b.repo, "--fleece-dir", b.fleece}
	if code, _, stderr := call(t, append(run, "--adopt")...); code != 0 && code != 4 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	opened := repotest.Watch(t, b.repo)
	for what, allowed := range map[string]struct{ manifests, others int }{
		"list web":                          {1, 0},
		"prune web --keep-last 3 --dry-run": {1, 0},
		"check web":                         {2, 2}, // of the newest point the images are looked at, too
		// Before and after it was looked for what a killed run has left; and the image of each disk that the next is made on.
		strings.Join(append(run, "--dry-run"), " "): {2, 2},
	} {
		args := append(strings.Fields(what), "--repo", b.repo)
		if code, _, stderr := call(t, args...); code != 0 {
			t.Errorf("%s: exit code %d: %s", what, code, stderr)
		}
		files := opened()
		if len(files) == 0 {
			t.Errorf("%s: nothing was read", what)
		}
		others := 0
		for _, file := range slices.Sorted(maps.Keys(files)) {
			guest, _, _ := strings.Cut(file, "/")
			switch name := filepath.Base(file); {
			case name == "qmchain.json", guest == "web" && name == ".lock":
			case guest == "web" && name == chain.ManifestFile && files[file] <= allowed.manifests:
			case guest == "web" && name != chain.ManifestFile && others < allowed.others:
				others++
			default:
				t.Errorf("%s: %s was opened %d times", what, file, files[file])
			}
		}
	}
}
