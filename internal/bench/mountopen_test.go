package bench

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/internal/bench/figures"
)

// opening times a server from its start to the first byte of a file, and says what memory it then has. The kernel forgets what is
// cold before.
func (r rounds) opening(b *testing.B, who string, cold []string, start func() (s *server, file string)) (*server, io.Closer) {
	b.Helper()
	dropCache(b, cold...)
	began := time.Now()
	s, file := start()
	ready := time.Now()
	held := hold(b, file)
	if len(cold) > 0 {
		r.add(who+"-first-byte-cold", milliseconds(time.Since(began)))
		return s, held
	}
	r.add(who+"-first-byte", milliseconds(time.Since(began)))
	r.add(who+"-opened", milliseconds(ready.Sub(began)))
	r.add(who+"-memory", float64(s.resident())/1e6)
	return s, held
}

// openingPeers is the same for the peers of a mount of an image.
func (r rounds) openingPeers(b *testing.B, image string, cold []string) {
	b.Helper()
	for who, serve := range map[string]func() *server{
		"daemon":  func() *server { return serveDaemon(b, image) },
		"nbdfuse": func() *server { return serveNBD(b, image, false) },
	} {
		s, held := r.opening(b, who, cold, func() (*server, string) { s := serve(); return s, s.mount })
		_ = held.Close()
		s.stop()
	}
}

func (m *mountBench) open(b *testing.B, n int) {
	last := string(m.chain.points[n].ID)
	images := m.chain.images(n)
	r := rounds{}
	once(b, func() {
		for range *mountRounds {
			mount := func() (*server, string) { s := serveMount(b, m.program, m.chain.dir()); return s, s.disk(last) }
			s, held := r.opening(b, "ours", images, mount)
			_ = held.Close()
			s.stop()
			r.openingPeers(b, m.chain.image(n), images)

			job{Workers: 1, Block: large, Files: images, Keep: true}.read(b) // they are in the cache now
			s, held = r.opening(b, "ours", nil, mount)
			// Points that are open at once share what their chains do.
			before := s.resident()
			if points := m.chain.points[max(0, n-100):n]; len(points) >= 49 {
				for _, p := range points {
					held := hold(b, s.disk(string(p.ID)))
					defer held.Close()
				}
				// A heap that was collected meanwhile can be smaller than it was.
				r.add("point", max(0, float64(s.resident()-before)/1e6/float64(len(points))))
			}
			_ = held.Close()
			r.openingPeers(b, m.chain.image(n), nil)

			began := time.Now()
			s, file := mount()
			extents := extentsOf(b, file)
			r.add("ours-map", milliseconds(time.Since(began)))
			s.stop()
			began = time.Now()
			run(b, "qemu-img", "map", "--output=json", "-f", "qcow2", m.chain.image(n))
			r.add("qemu-map-map", milliseconds(time.Since(began)))
			if extents == 0 {
				b.Fatal("no data in the disk")
			}
		}
	})
	for _, name := range []string{"first-byte", "first-byte-cold"} {
		record(b, r.beside(name, "ms", "daemon"), r.beside(name, "ms", "nbdfuse"))
	}
	record(b,
		figures.Figure{Name: "opened", Unit: "ms", Less: true, Ours: r["ours-opened"]},
		r.beside("memory", "MB", "daemon"), r.beside("map", "ms", "qemu-map"))
	if len(r["point"]) > 0 {
		record(b, r.alone("point", "MB"))
	}
}

// extentsOf counts the extents of a file that hold data.
func extentsOf(b *testing.B, path string) (n int) {
	b.Helper()
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for at := int64(0); ; n++ {
		at, err = f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return n
		}
		if err == nil {
			at, err = f.Seek(at, unix.SEEK_HOLE)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

func (m *mountBench) huge(b *testing.B) {
	set := m.folder(b, "huge-")
	pattern, image := hugeSet(b, set)
	r := rounds{}
	// So many reads that they come to every part of the map.
	all := job{Workers: 16, Block: small, Random: true, For: 4 * *mountWindow, Seed: 1}
	once(b, func() {
		for range *mountRounds {
			s, held := r.opening(b, "ours", nil, func() (*server, string) {
				s := serveMount(b, m.program, set)
				found, err := filepath.Glob(filepath.Join(s.mount, pattern))
				if err != nil || len(found) != 1 {
					b.Fatalf("%v in the mount, %v", found, err)
				}
				all.Files = found
				return s, found[0]
			})
			r.iops(all.read(b), "ours")
			r.add("ours-resident", float64(s.resident())/1e6)
			_ = held.Close()
			began := time.Now()
			if n := extentsOf(b, all.Files[0]); n < 100_000 {
				b.Fatalf("%d extents", n)
			}
			r.add("ours-map", milliseconds(time.Since(began)))
			s.stop()
			began = time.Now()
			run(b, "qemu-img", "map", "--output=json", "-f", "qcow2", image)
			r.add("qemu-map-map", milliseconds(time.Since(began)))
			r.openingPeers(b, image, nil)
			daemon := serveDaemon(b, image)
			all.Files = []string{daemon.mount}
			r.iops(all.read(b), "daemon")
			r.add("daemon-resident", float64(daemon.resident())/1e6)
			daemon.stop()
		}
	})
	memory := r.beside("resident", "MB", "daemon")
	memory.Name = "memory"
	reads := r.beside("qd16", "IOPS", "daemon")
	reads.Less = false
	record(b, r.beside("first-byte", "ms", "daemon"), r.beside("first-byte", "ms", "nbdfuse"), memory, reads, r.beside("map", "ms", "qemu-map"))
}

func (r rounds) iops(d done, who string) { r.add(who+"-qd16", float64(d.Reads)/d.Seconds) }
