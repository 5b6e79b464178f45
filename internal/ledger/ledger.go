// Package ledger keeps account, for tests, of every request that a guest's disks were sent, so that a test can say what
// the disks held at any instant, and whether the disks of a point are of one instant.
package ledger

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

const cluster = 64 << 10

// Ledger sends requests to a guest's disks and keeps what they do. Requests are sent one after the other, so the disks
// have a well-defined state after each.
type Ledger struct {
	// NoDiscards keeps discards out of Random. QEMU drops a guest's discards while a backup job without fleecing runs, as
	// it may: a discard promises nothing.
	NoDiscards bool

	tb testenv.TB
	vm *testenv.VM

	mu      sync.Mutex
	rand    *rand.Rand
	disks   []string
	state   map[string][]byte
	history []entry
	first   int // the number of requests before history[0]
}

// entry is what a request has overwritten.
type entry struct {
	disk string
	off  int
	old  []byte
}

// New begins a ledger of a guest whose disks are all zero.
func New(tb testenv.TB, vm *testenv.VM, seed uint64, disks ...testenv.Disk) *Ledger {
	tb.Logf("ledger with seed %d", seed)
	l := &Ledger{tb: tb, vm: vm, rand: rand.New(rand.NewPCG(seed, 0)), state: make(map[string][]byte)}
	for _, d := range disks {
		l.disks = append(l.disks, d.ID)
		l.state[d.ID] = make([]byte, d.Size)
	}
	return l
}

// Random sends one request of a random kind to a random disk: mostly writes, of odd places and lengths, and zeroes and
// discards of whole clusters. It returns the error of the guest's request; the ledger is then of no more use. It can be
// called from any goroutine.
func (l *Ledger) Random() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	disk := l.disks[l.rand.IntN(len(l.disks))]
	size := len(l.state[disk])
	var off, length int
	pattern := byte(0)
	var command string
	switch kind := l.rand.IntN(10); {
	case kind < 6:
		off = l.rand.IntN(size/512) * 512
		length = min((1+l.rand.IntN(200))*512, size-off)
		pattern = byte(1 + l.rand.IntN(255))
		command = fmt.Sprintf("write -P %d %d %d", pattern, off, length)
	default:
		off = l.rand.IntN(size/cluster) * cluster
		length = min((1+l.rand.IntN(6))*cluster, size-off)
		commands := []string{"write -z %d %d", "write -z -u %d %d", "discard %d %d"}
		if l.NoDiscards {
			commands = commands[:2]
		}
		command = fmt.Sprintf(commands[kind%len(commands)], off, length)
	}
	return l.send(disk, off, bytes.Repeat([]byte{pattern}, length), command)
}

// Fill writes one byte value over a range of a disk.
func (l *Ledger) Fill(disk string, off, length int, pattern byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.send(disk, off, bytes.Repeat([]byte{pattern}, length), fmt.Sprintf("write -P %d %d %d", pattern, off, length))
}

func (l *Ledger) send(disk string, off int, data []byte, command string) error {
	if _, err := l.vm.TryIO(disk, command); err != nil {
		return fmt.Errorf("guest's request %q to %s: %w", command, disk, err)
	}
	state := l.state[disk][off : off+len(data)]
	l.history = append(l.history, entry{disk, off, bytes.Clone(state)})
	copy(state, data)
	return nil
}

// Follow sends requests to another VM from now on: the guest has been migrated there.
func (l *Ledger) Follow(vm *testenv.VM) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.vm = vm
}

// Swap notes that two disks have changed names. No Instant is asked for across it.
func (l *Ledger) Swap(a, b string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state[a], l.state[b] = l.state[b], l.state[a]
}

// Resize notes that a disk has another size now. No Instant is asked for across it.
func (l *Ledger) Resize(disk string, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	state := make([]byte, size)
	copy(state, l.state[disk])
	l.state[disk] = state
}

// Size is a disk's size.
func (l *Ledger) Size(disk string) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int64(len(l.state[disk]))
}

// Now is the number of requests sent so far: an instant in the disks' history.
func (l *Ledger) Now() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first + len(l.history)
}

// Forget gives up the history so far: no Instant before now will be asked for.
func (l *Ledger) Forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.first += len(l.history)
	l.history = nil
}

// Instant finds an instant from..to at which the disks held just these bytes, all of them at once.
func (l *Ledger) Instant(disks map[string][]byte, from, to int) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if from < l.first {
		return 0, fmt.Errorf("what was before request %d is forgotten", l.first)
	}
	at := make(map[string][]byte)
	for name := range disks {
		at[name] = bytes.Clone(l.state[name])
	}
	for i := l.first + len(l.history) - 1; i >= to; i-- {
		l.history[i-l.first].undo(at)
	}
	// The clusters that differ are known for each instant from those of the next one: only what one request has changed is
	// compared again.
	wrong := make(map[string]map[int]bool)
	for name, data := range disks {
		wrong[name] = make(map[int]bool)
		for _, c := range differences(at[name], data) {
			wrong[name][c] = true
		}
	}
	closest, least := "", 1<<62
	for n := to; n >= from; n-- {
		if n < to {
			e := l.history[n-l.first]
			e.undo(at)
			if data, ok := disks[e.disk]; ok {
				for c := e.off / cluster; c <= (e.off+len(e.old)-1)/cluster; c++ {
					if sameCluster(at[e.disk], data, c) {
						delete(wrong[e.disk], c)
					} else {
						wrong[e.disk][c] = true
					}
				}
			}
		}
		count, where := 0, ""
		for name := range disks {
			count += len(wrong[name])
		}
		if count == 0 {
			return n, nil
		}
		if count < least {
			for name, data := range disks {
				bad := slices.Sorted(maps.Keys(wrong[name]))
				if len(bad) > 0 {
					where += fmt.Sprintf(" %s: clusters %v (of %d and %d bytes);", name, bad[:min(len(bad), 12)], len(at[name]), len(data))
				}
			}
			closest, least = fmt.Sprintf("after request %d, but for%s", n, where), count
		}
	}
	return 0, fmt.Errorf("the disks are of no instant in %d..%d; closest is %s", from, to, closest)
}

func (e entry) undo(at map[string][]byte) {
	if data, ok := at[e.disk]; ok {
		copy(data[e.off:], e.old)
	}
}

// sameCluster reports whether two disks are the same in one cluster.
func sameCluster(a, b []byte, c int) bool {
	from, to := c*cluster, (c+1)*cluster
	return bytes.Equal(a[min(from, len(a)):min(to, len(a))], b[min(from, len(b)):min(to, len(b))])
}

// differences lists the clusters that differ.
func differences(a, b []byte) []int {
	var bad []int
	for c := range (max(len(a), len(b)) + cluster - 1) / cluster {
		if !sameCluster(a, b, c) {
			bad = append(bad, c)
		}
	}
	return bad
}

// ReadPoint returns the bytes of all disks of a point. They are read by qemu-img alone, as one does who has no qmchain,
// and by this project's reader: the two must agree.
func ReadPoint(tb testenv.TB, qemu testenv.QEMU, dir, guest string, id chain.ID) map[string][]byte {
	tb.Helper()
	r, err := repo.Open(dir, durable.FS{})
	if err != nil {
		tb.Fatalf("%v", err)
	}
	g, err := r.Guest(guest)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	points, problems, err := g.Points()
	if err != nil || len(problems) > 0 {
		tb.Fatalf("points of %s: %v %v", guest, err, problems)
	}
	point := points.Find(id)
	if point == nil {
		tb.Fatalf("no point %s/%s", guest, id)
	}
	pool := image.NewPool(image.PoolOptions{})
	tmp, err := os.MkdirTemp("", "qmchain-ledger-")
	if err != nil {
		tb.Fatalf("%v", err)
	}
	defer os.RemoveAll(tmp)
	disks := make(map[string][]byte)
	for _, d := range point.Disks {
		raw := filepath.Join(tmp, d.Name)
		testenv.Output(tb, qemu.Img, "convert", "-f", "qcow2", "-O", "raw", g.ImagePath(id, d.Name), raw)
		want, err := os.ReadFile(raw)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		img, err := g.OpenDisk(pool, points, point, d.Name)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		got := make([]byte, img.Size())
		if n, err := img.ReadAt(got, 0); err != nil && n != len(got) {
			tb.Fatalf("%s/%s: disk %s: %v", guest, id, d.Name, err)
		}
		if err := img.Close(); err != nil {
			tb.Fatalf("%v", err)
		}
		if !bytes.Equal(got, want) {
			tb.Fatalf("%s/%s: disk %s: qemu-img and qmchain read different bytes: clusters %v", guest, id, d.Name, differences(got, want))
		}
		disks[d.Name] = got
	}
	return disks
}
