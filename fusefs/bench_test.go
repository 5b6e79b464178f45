package fusefs_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"qmchain/chain/repo/repotest"
	"qmchain/fusefs"
)

// Reading through the mount, with a warm repository and a cold mount: one full, and 50 increments of a hundredth each.
// Each turn of "sequential" reads the whole disk; "random4k" reads past the page cache.
func BenchmarkRead(b *testing.B) {
	const size, layers = 256 << 20, 50
	base := filepath.Join(b.TempDir(), "base.raw")
	f, err := os.Create(base)
	if err != nil {
		b.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{}), size); err != nil {
		b.Fatal(err)
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
	g := repotest.NewGuest(b, repotest.New(b, b.TempDir()), "110", start)
	g.Add(repotest.Disk{Name: "scsi0", Image: base})
	for i := range layers {
		writes := make([]repotest.Write, size/(64<<10)/100)
		for j := range writes {
			writes[j] = repotest.Write{Off: r.Int64N(size/(64<<10)) * (64 << 10), Len: 64 << 10, Fill: byte(i + 1)}
		}
		g.Add(repotest.Disk{Name: "scsi0", Write: writes})
	}

	for _, n := range []int{1, layers + 1} {
		id := string(g.Points[n-1].ID)
		with := func(b *testing.B, flags int, read func(f *os.File)) {
			b.StopTimer()
			dir := b.TempDir()
			m, err := fusefs.Mount(context.Background(), fusefs.Options{Set: openSet(b, g.Repo.Dir), Dir: dir, Log: (&logBuffer{}).logger()})
			if err != nil {
				b.Fatal(err)
			}
			defer func() {
				if err := m.Unmount(context.Background()); err != nil {
					b.Error(err)
				}
			}()
			f, err := os.OpenFile(filepath.Join(dir, "110", id, "scsi0.raw"), flags, 0)
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			read(f)
			b.StopTimer()
			_ = f.Close()
		}
		b.Run(fmt.Sprintf("sequential/layers=%d", n), func(b *testing.B) {
			b.SetBytes(size)
			buf := make([]byte, 1<<20)
			for range b.N {
				with(b, unix.O_RDONLY, func(f *os.File) {
					for {
						if _, err := f.Read(buf); err == io.EOF {
							return
						} else if err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		})
		b.Run(fmt.Sprintf("random4k/layers=%d", n), func(b *testing.B) {
			b.SetBytes(4096)
			buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
			if err != nil {
				b.Fatal(err)
			}
			with(b, unix.O_RDONLY|unix.O_DIRECT, func(f *os.File) {
				for range b.N {
					if _, err := f.ReadAt(buf, r.Int64N(size/4096)*4096); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
