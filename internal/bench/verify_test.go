package bench

import (
	"flag"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

var (
	verifySize    = flag.String("verify-size", "1GiB", "BenchmarkVerify: size of the disk, all of it data")
	verifyLengths = flag.String("verify-lengths", "1,50", "BenchmarkVerify: numbers of points in the chain")
	verifyRounds  = flag.Int("verify-rounds", 3, "BenchmarkVerify: how often each way is timed")
)

// What finding damage in a chain takes: qmchain-restore verify (sums), the same with --deep, and what one would do without it:
//
//   - sha256sum of all images, one after the other;
//   - check-compare, qemu-img check of each image, which looks at its tables alone, and qemu-img compare of the last point with
//     a raw copy of the disk.
func BenchmarkVerify(b *testing.B) {
	program := filepath.Join(b.TempDir(), "qmchain-restore")
	build(b, program, "qmchain/cmd/qmchain-restore")
	raw := filepath.Join(b.TempDir(), "raw")
	fill(b, raw, bytesOf(b, *verifySize))
	c := newMountChain(b, b.TempDir())
	c.full(raw, "")
	lengths := lengthsOf(b, *verifyLengths)
	slices.Sort(lengths)
	for _, n := range lengths {
		c.rewrite(n, raw)
		b.Run("points="+strconv.Itoa(n), func(b *testing.B) {
			images := c.images(n - 1)
			r := rounds{}
			ways := []struct {
				name string
				do   func()
			}{
				{"ours-sums", func() { run(b, program, "--quiet", "verify", "--repo", c.dir()) }},
				{"ours-deep", func() { run(b, program, "--quiet", "verify", "--repo", c.dir(), "--deep") }},
				{"sha256sum-sums", func() { run(b, "sha256sum", images...) }},
				{"check-compare-deep", func() {
					for _, image := range images {
						run(b, "qemu-img", "check", "-q", "-f", "qcow2", image)
					}
					run(b, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", images[n-1], raw)
				}},
			}
			run(b, "sha256sum", append(images, raw)...) // they are in the cache now
			once(b, func() {
				for round := range *verifyRounds {
					for i := range ways {
						w := ways[(i+round)%len(ways)]
						began := time.Now()
						w.do()
						r.add(w.name, time.Since(began).Seconds())
					}
				}
			})
			record(b, r.beside("sums", "s", "sha256sum"), r.beside("deep", "s", "check-compare"))
			b.Logf("%v; load %s", r, load())
		})
	}
}
