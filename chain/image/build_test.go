package image_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
)

// buildChain builds a chain: a base that holds everything and increments each of
// which changes some clusters. It returns the layers and the disk.
func buildChain(t testing.TB, bits int, size int64, layers, changed int) ([]image.Layer, []byte) {
	t.Helper()
	dir := t.TempDir()
	w := imagetest.NewWriter(t, 11)
	cluster := int64(1) << bits
	model := make([]byte, size)
	var list []image.Layer
	for i := range layers {
		var guest []int64
		if i == 0 {
			for g := range size / cluster {
				guest = append(guest, g)
			}
		} else {
			for range changed {
				guest = append(guest, w.Rand().Int64N(size/cluster))
			}
			slices.Sort(guest)
			guest = slices.Compact(guest)
		}
		path := filepath.Join(dir, fmt.Sprintf("%04d.qcow2", i))
		imagetest.Build(t, path, bits, size, guest, func(n int) []byte {
			b := imagetest.Random(w.Rand(), cluster)
			copy(model[guest[n]*cluster:], b)
			return b
		})
		list = append(list, layerOf(path, image.Qcow2))
	}
	return list, model
}

// The builder's images are what qemu-img takes them for.
func TestBuild(t *testing.T) {
	t.Parallel()
	layers, model := buildChain(t, 12, 3<<20, 3, 50)
	for i, l := range layers[1:] {
		imagetest.QemuImg(t, "rebase", "-u", "-f", "qcow2", "-b", layers[i].Path, "-F", "qcow2", l.Path)
	}
	got := imagetest.Content(t, "qcow2", layers[2].Path)
	if string(got) != string(model) {
		t.Fatal("qemu-img reads something else")
	}
	imagetest.Run(t, opener(layers...), model)
}
