package imagetest

import (
	"encoding/binary"
	"os"
	"testing"
)

// Build writes a qcow2 image with the given guest clusters, in the order of the
// list; contents that are nil stay holes in the file. It takes the place of
// qemu-img where hundreds of images or hundreds of thousands of clusters are needed.
func Build(t testing.TB, path string, bits int, size int64, guest []int64, contents func(i int) []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cluster := int64(1) << bits
	write := func(b []byte, off int64) {
		t.Helper()
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	be := binary.BigEndian
	perTable := cluster / 8
	tables := (size + cluster*perTable - 1) / (cluster * perTable)
	l1 := make([]byte, (tables*8+cluster-1)&^(cluster-1))
	l1Off := 2 * cluster
	end := l1Off + int64(len(l1))
	l2 := map[int64][]byte{}
	l2Off := map[int64]int64{}
	for _, g := range guest {
		if i := g / perTable; l2[i] == nil {
			l2[i], l2Off[i] = make([]byte, cluster), end
			be.PutUint64(l1[i*8:], uint64(end)|1<<63)
			end += cluster
		}
	}
	for i, g := range guest {
		be.PutUint64(l2[g/perTable][g%perTable*8:], uint64(end)|1<<63)
		if b := contents(i); b != nil {
			write(b, end)
		}
		end += cluster
	}
	for i, b := range l2 {
		write(b, l2Off[i])
	}
	write(l1, l1Off)
	h := make([]byte, 112)
	be.PutUint32(h, 0x514649fb)
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], uint32(bits))
	be.PutUint64(h[24:], uint64(size))
	be.PutUint32(h[36:], uint32(tables))
	be.PutUint64(h[40:], uint64(l1Off))
	be.PutUint64(h[48:], uint64(cluster)) // an empty refcount table: only writers need it
	be.PutUint32(h[56:], 1)
	be.PutUint32(h[96:], 4)
	be.PutUint32(h[100:], 112)
	write(h, 0)
	if err := f.Truncate(end); err != nil {
		t.Fatal(err)
	}
}
