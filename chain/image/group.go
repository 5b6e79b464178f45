package image

// groupSize is the part of a disk that is resolved at once. It is a multiple of
// every cluster size. Even if each 64 KiB of it is elsewhere, its map has but 24 KiB.
const groupSize = 64 << 20

// extent is a piece of a group whose bytes come from one place.
type extent struct {
	host      int64  // as qcow2.Run.Host
	off, len  uint32 // bytes; off from the group's start
	layer     uint32 // index in the chain, 0 is the base
	kindBytes uint32 // a kind, and qcow2.Run.Bytes
}

const (
	kindZero uint32 = iota << 29
	kindData
	kindCompressed
	kindInvalid

	kindMask    = 7 << 29
	extentBytes = 24
)

func (e extent) end() uint32  { return e.off + e.len }
func (e extent) kind() uint32 { return e.kindBytes & kindMask }
func (e extent) bytes() int32 { return int32(e.kindBytes &^ kindMask) }

// until returns the part of e before off, from the part from off on.
func (e extent) until(off uint32) extent {
	e.len = off - e.off
	return e
}

func (e extent) from(off uint32) extent {
	if e.kind() == kindData {
		e.host += int64(off - e.off)
	}
	e.len = e.end() - off
	e.off = off
	return e
}

// group is the resolved map of a group, immutable: extents in order, without the
// zeroes, which are the gaps.
type group struct {
	extents []extent
}

var emptyGroup = &group{}

// first returns the index of the first extent that ends behind off.
func (g *group) first(off uint32) int { return firstExtent(g.extents, off) }

func firstExtent(list []extent, off uint32) int {
	lo, hi := 0, len(list)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if list[mid].end() > off {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// add appends e, or lengthens the last extent where e goes on from it.
func add(list []extent, e extent) []extent {
	if e.len == 0 {
		return list
	}
	if n := len(list); n > 0 && e.kind() == kindData {
		last := &list[n-1]
		if last.kind() == kindData && last.layer == e.layer && last.end() == e.off && last.host+int64(last.len) == e.host {
			last.len += e.len
			return list
		}
	}
	return append(list, e)
}

// overlay appends to dst what is seen of below when over lies on it, up to limit.
// Zeroes in over hide what is below and leave a gap.
func overlay(dst, below, over []extent, limit uint32) []extent {
	at := uint32(0)
	for _, o := range over {
		dst, below = part(dst, below, at, min(o.off, limit))
		if o.kind() != kindZero {
			dst = add(dst, o)
		}
		at = o.end()
	}
	dst, _ = part(dst, below, at, limit)
	return dst
}

// part appends to dst what is between from and to in list, and returns what of the
// list is not used up by that. Usually a layer changes little of what is below it:
// long stretches are copied as they are.
func part(dst, list []extent, from, to uint32) (longer, rest []extent) {
	if from >= to {
		return dst, list
	}
	list = list[firstExtent(list, from):]
	n := firstExtent(list, to) // the first that ends behind
	if n > 0 {
		e := list[0]
		dst = add(dst, e.from(max(e.off, from)))
		dst = append(dst, list[1:n]...) // neighbours in a list don't join
	}
	if n < len(list) && list[n].off < to {
		e := list[n]
		dst = add(dst, e.from(max(e.off, from)).until(to))
	}
	return dst, list[n:]
}

// node is a chain: a layer and the node of the layers below it. Images whose
// lower layers are the same share their nodes.
type node struct {
	id     uint64
	parent *node // nil at the base
	layer  *layer
	index  uint32 // of the layer in the chain
	refs   int    // images and nodes above; guarded by Pool.mu
}

// group returns the resolved map of group g.
func (n *node) group(p *Pool, g int64) (*group, error) {
	k := key{n.id, g}
	if v, ok := p.groups.get(k); ok {
		return v, nil
	}
	return p.groups.load(k, func() (*group, int64, error) { return n.resolve(p, g) })
}

// scratch is what resolving a group needs on the way.
type scratch struct {
	nodes    []*node
	over     []extent // what a layer holds
	one, two []extent // the map so far, and the next one
}

// resolve makes the map of group g from that of the nearest chain below that has
// one, and the layers above it. Where they hold nothing, it is that very map.
func (n *node) resolve(p *Pool, g int64) (*group, int64, error) {
	s := p.scratch.Get().(*scratch)
	defer p.scratch.Put(s)
	s.nodes = s.nodes[:0]
	known := emptyGroup
	for b := n; b != nil; b = b.parent {
		if b != n {
			if v, ok := p.groups.get(key{b.id, g}); ok {
				known = v
				break
			}
		}
		s.nodes = append(s.nodes, b)
	}
	cur, own := known.extents, false // own: cur is in s.one
	for i := len(s.nodes) - 1; i >= 0; i-- {
		b := s.nodes[i]
		var err error
		if s.over, err = b.layer.extents(p, g, b.index, s.over[:0]); err != nil {
			return nil, 0, err
		}
		limit := uint32(max(0, min(groupSize, b.layer.size-g*groupSize)))
		if len(s.over) == 0 && (len(cur) == 0 || cur[len(cur)-1].end() <= limit) {
			continue
		}
		s.two = overlay(s.two[:0], cur, s.over, limit)
		s.one, s.two = s.two, s.one
		cur, own = s.one, true
	}
	clear(s.nodes) // don't keep closed chains alive
	if !own {
		return known, 0, nil
	}
	if len(cur) == 0 {
		return emptyGroup, 0, nil
	}
	return &group{append(make([]extent, 0, len(cur)), cur...)}, int64(len(cur)) * extentBytes, nil
}
