package fusefs_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
)

// A raw file of a foreign set reads the same by whichever way, whole and in parts, by several readers and after all have gone. So does
// one that is not a whole number of sectors, which can't be passed through.
func TestRawFile(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int64{"whole sectors": 3<<20 + 512, "a part of a sector": 3<<20 + 100} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			want := imagetest.Random(rand.New(rand.NewPCG(1, 4)), size)
			if err := os.Mkdir(filepath.Join(dir, "a"), 0o700); err != nil {
				t.Fatal(err)
			}
			for file, data := range map[string][]byte{
				"uuid":                []byte("0d6ea2a5-9c5b-4c8e-9c4f-6a1f9d8a7b10"),
				"a.config":            []byte(`{"format": "raw"}`),
				"a/FULL-1700000000-a": want,
			} {
				if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want = append(want, make([]byte, (512-size%512)%512)...)
			m := mountSet(t, dir, image.PoolOptions{})
			_, points := points(t, dir)
			found, err := filepath.Glob(m.path("*", string(points.All[0].ID), "a.raw"))
			if err != nil || len(found) != 1 {
				t.Fatalf("found %v, %v", found, err)
			}
			for range 2 {
				var open []*os.File
				for range 3 {
					f := must(os.Open(found[0]))(t)
					open = append(open, f)
					got, err := io.ReadAll(f)
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("%d bytes, same %v, %v", len(got), bytes.Equal(got, want), err)
					}
					part := make([]byte, 5000)
					if _, err := f.ReadAt(part, 70000); err != nil || !bytes.Equal(part, want[70000:75000]) {
						t.Errorf("a part: %v", err)
					}
					mapped, err := unix.Mmap(int(f.Fd()), 0, 1<<20, unix.PROT_READ, unix.MAP_SHARED)
					if err != nil || !bytes.Equal(mapped, want[:1<<20]) {
						t.Errorf("mapped: %v", err)
					}
					_ = unix.Munmap(mapped)
				}
				for _, f := range open {
					_ = f.Close()
				}
			}
			eventually(t, "the files are closed", func() bool { return openUnder(t, dir) == 0 })
		})
	}
}
