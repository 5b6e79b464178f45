package image

import (
	"sync"
	"sync/atomic"
)

// key names a thing in a cache: the n-th of the layer or node with the id owner.
type key struct {
	owner uint64
	n     int64
}

// cache keeps values up to a number of bytes, and drops those first that were not
// used lately (the clock algorithm: a hit only sets a flag, so that readers share
// a lock). Each missing value is made once, whoever asks for it meanwhile.
type cache[V any] struct {
	max int64

	mu      sync.RWMutex
	entries map[key]*entry[V]
	clock   []*entry[V] // the same entries
	hand    int
	bytes   int64
	making  map[key]*flight[V]
}

type entry[V any] struct {
	key   key
	value V
	bytes int64
	used  atomic.Bool
}

type flight[V any] struct {
	done  chan struct{}
	value V
	err   error
}

// entryBytes is what an entry costs beside its value: the entry, its places in
// the map and on the clock, the allocator's rounding.
const entryBytes = 160

func newCache[V any](maxBytes int64) *cache[V] {
	return &cache[V]{max: maxBytes, entries: map[key]*entry[V]{}, making: map[key]*flight[V]{}}
}

func (c *cache[V]) get(k key) (V, bool) {
	c.mu.RLock()
	e := c.entries[k]
	c.mu.RUnlock()
	if e == nil {
		var none V
		return none, false
	}
	if !e.used.Load() {
		e.used.Store(true)
	}
	return e.value, true
}

// load returns the value of k. If there is none yet, it comes from produce, which
// returns its size in bytes too. Errors are not kept.
func (c *cache[V]) load(k key, produce func() (V, int64, error)) (V, error) {
	if v, ok := c.get(k); ok {
		return v, nil
	}
	c.mu.Lock()
	if e := c.entries[k]; e != nil {
		c.mu.Unlock()
		return e.value, nil
	}
	if f := c.making[k]; f != nil {
		c.mu.Unlock()
		<-f.done
		return f.value, f.err
	}
	f := &flight[V]{done: make(chan struct{})}
	c.making[k] = f
	c.mu.Unlock()

	var bytes int64
	f.value, bytes, f.err = produce()

	c.mu.Lock()
	delete(c.making, k)
	if f.err == nil {
		c.insert(k, f.value, bytes+entryBytes)
	}
	c.mu.Unlock()
	close(f.done)
	return f.value, f.err
}

// insert adds a value and makes room for it. One that is larger than the whole
// cache stays until the next one comes. The caller holds the lock.
func (c *cache[V]) insert(k key, v V, bytes int64) {
	for c.bytes+bytes > c.max && len(c.clock) > 0 {
		if c.hand >= len(c.clock) {
			c.hand = 0
		}
		if c.clock[c.hand].used.Swap(false) {
			c.hand++
			continue
		}
		c.remove(c.hand)
	}
	e := &entry[V]{key: k, value: v, bytes: bytes}
	c.entries[k] = e
	c.clock = append(c.clock, e)
	c.bytes += bytes
}

// remove takes the i-th entry of the clock away; the last one takes its place.
func (c *cache[V]) remove(i int) {
	e := c.clock[i]
	last := len(c.clock) - 1
	c.clock[i] = c.clock[last]
	c.clock[last] = nil
	c.clock = c.clock[:last]
	delete(c.entries, e.key)
	c.bytes -= e.bytes
}

// drop removes what the owners have in the cache. Nobody asks for it any more.
func (c *cache[V]) drop(owners map[uint64]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := len(c.clock) - 1; i >= 0; i-- {
		if owners[c.clock[i].key.owner] {
			c.remove(i)
		}
	}
}
