package bench

import (
	"bytes"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"qmchain/chain/repo/repotest"
)

var (
	listGuests = flag.Int("list-guests", 500, "BenchmarkList: guests in the repository")
	listPoints = flag.Int("list-points", 200, "BenchmarkList: points of each guest")
	listRounds = flag.Int("list-rounds", 3, "BenchmarkList: how often each way is timed")
)

// What listing all points of a large repository takes, and planning what prune would remove of them, beside cat of all their
// manifests. Everything is in the page cache. BenchmarkScale has more of large repositories.
func BenchmarkList(b *testing.B) {
	program, dir := filepath.Join(b.TempDir(), "qmchain-backup"), b.TempDir()
	build(b, program, "qmchain/cmd/qmchain-backup")
	repotest.Many{
		Guests: *listGuests, Points: *listPoints, Disks: 1, Size: 64 << 20,
		Name:  func(i int) string { return fmt.Sprint(1000 + i) },
		Start: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Every: time.Hour,
	}.Make(b, dir)
	points := *listGuests * *listPoints
	b.Run("points="+strconv.Itoa(points), func(b *testing.B) {
		said := func(name string, args ...string) int {
			cmd := exec.CommandContext(b.Context(), name, args...)
			var failed bytes.Buffer
			cmd.Stderr = &failed
			out, err := cmd.Output()
			if err != nil {
				b.Fatalf("%v: %v: %s", cmd, err, failed.String())
			}
			return bytes.Count(out, []byte("\n"))
		}
		ways := []struct {
			name string
			do   func()
		}{
			{"cat-list", func() {
				said("sh", "-c", `find "$1" -name images -prune -o -name point.json -exec cat {} + >/dev/null`, "sh", dir)
			}},
			{"ours-list", func() {
				if n := said(program, "list", "--repo", dir); n < points {
					b.Fatalf("%d lines for %d points", n, points)
				}
			}},
			{"ours-prune", func() { said(program, "prune", "--repo", dir, "--dry-run", "--keep-last", "24", "--keep-daily", "30") }},
		}
		r := rounds{}
		for _, w := range ways {
			w.do() // all is in the cache now
		}
		once(b, func() {
			for round := range *listRounds {
				for i := range ways {
					w := ways[(i+round)%len(ways)]
					began := time.Now()
					w.do()
					r.add(w.name, time.Since(began).Seconds())
				}
			}
		})
		r["cat-prune"] = r["cat-list"]
		record(b, r.beside("list", "s", "cat"), r.beside("prune", "s", "cat"))
		b.Logf("%v; load %s", r, load())
	})
}
