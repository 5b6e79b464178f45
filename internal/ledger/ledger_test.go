package ledger

import (
	"bytes"
	"testing"
)

// A made-up history of two disks of three clusters.
func history() *Ledger {
	l := &Ledger{state: map[string][]byte{"a": make([]byte, 3*cluster), "b": make([]byte, 3*cluster-512)}}
	for _, w := range []struct {
		disk string
		off  int
		len  int
		with byte
	}{{"a", 0, 512, 1}, {"b", cluster - 512, 1024, 2}, {"a", 512, 2 * cluster, 3}, {"b", 2 * cluster, 512, 4}, {"a", 0, 512, 0}} {
		state := l.state[w.disk][w.off : w.off+w.len]
		l.history = append(l.history, entry{w.disk, w.off, bytes.Clone(state)})
		copy(state, bytes.Repeat([]byte{w.with}, w.len))
	}
	return l
}

// at is what the disks held after n requests.
func at(l *Ledger, n int) map[string][]byte {
	disks := map[string][]byte{"a": bytes.Clone(l.state["a"]), "b": bytes.Clone(l.state["b"])}
	for i := len(l.history) - 1; i >= n; i-- {
		l.history[i].undo(disks)
	}
	return disks
}

func TestInstant(t *testing.T) {
	l := history()
	for n := range 6 {
		if got, err := l.Instant(at(l, n), 0, 5); err != nil || got != n {
			t.Errorf("after %d requests: %d, %v", n, got, err)
		}
		if _, err := l.Instant(at(l, n), n+1, 5); err == nil {
			t.Errorf("after %d requests, but not before %d", n, n+1)
		}
	}
	// Two disks of different instants, one byte that is wrong, and a disk of another size.
	torn := map[string][]byte{"a": at(l, 3)["a"], "b": at(l, 1)["b"]}
	if n, err := l.Instant(torn, 0, 5); err == nil {
		t.Errorf("torn disks were taken for those after %d requests", n)
	}
	flipped := at(l, 2)
	flipped["b"][2*cluster+7] ^= 1
	short := at(l, 2)
	short["a"] = short["a"][:len(short["a"])-512]
	for what, disks := range map[string]map[string][]byte{"a flipped bit": flipped, "a disk cut short": short} {
		if n, err := l.Instant(disks, 0, 5); err == nil {
			t.Errorf("%s: taken for %d", what, n)
		}
	}
	l.first = 10
	if n, err := l.Instant(at(l, 4), 10, 15); err != nil || n != 14 {
		t.Errorf("with a forgotten history: %d, %v", n, err)
	}
	if _, err := l.Instant(at(l, 4), 9, 15); err == nil {
		t.Error("what is forgotten was looked for")
	}
}
