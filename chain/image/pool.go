package image

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"qmchain/chain/qcow2"
	"qmchain/chain/virtnbd"
)

// PoolOptions bound what a Pool uses. Zero is the default of each.
type PoolOptions struct {
	MaxFiles    int   // open files at a time; 256
	MaxMeta     int64 // bytes of maps kept; 64 MiB
	MaxClusters int64 // bytes of decompressed clusters kept, and again of streams; 32 MiB
}

// Pool opens images and keeps what they share: files, maps, decompressed
// clusters. It holds nothing once all its images are closed.
type Pool struct {
	files    *files
	groups   *cache[*group]           // by node and group
	runs     *cache[[]qcow2.Run]      // by layer and span
	clusters *cache[[]byte]           // by layer and guest cluster, decompressed
	pieces   *cache[*virtnbd.Piece]   // by layer and guest offset, decompressed
	restarts *cache[*virtnbd.Restart] // by layer and guest offset of the piece that they are for

	decoder *qcow2.Decoder
	streams virtnbd.Decoder
	helpers chan struct{} // a place for each goroutine that helps a large read
	tables  qcow2.Buffers
	scratch sync.Pool // *scratch
	inputs  sync.Pool // *[]byte, for compressed clusters

	mu     sync.Mutex
	lastID uint64
	layers map[layerKey]*layer
	nodes  map[nodeKey]*node
}

// runsShare is the part of MaxMeta for what single layers hold. That is only needed until
// the groups of one span are resolved, while groups are needed for each read.
const runsShare = 16

type nodeKey struct {
	parent *node
	layer  *layer
}

// NewPool returns a pool without images.
func NewPool(opts PoolOptions) *Pool {
	if opts.MaxFiles <= 0 {
		opts.MaxFiles = 256
	}
	if opts.MaxMeta <= 0 {
		opts.MaxMeta = 64 << 20
	}
	if opts.MaxClusters <= 0 {
		opts.MaxClusters = 32 << 20
	}
	cpus := runtime.NumCPU()
	p := &Pool{
		files:    newFiles(opts.MaxFiles),
		groups:   newCache[*group](opts.MaxMeta - opts.MaxMeta/runsShare),
		runs:     newCache[[]qcow2.Run](opts.MaxMeta / runsShare),
		clusters: newCache[[]byte](opts.MaxClusters),
		pieces:   newCache[*virtnbd.Piece](opts.MaxClusters / 2),
		restarts: newCache[*virtnbd.Restart](opts.MaxClusters / 2),
		decoder:  qcow2.NewDecoder(cpus),
		helpers:  make(chan struct{}, cpus),
		layers:   map[layerKey]*layer{},
		nodes:    map[nodeKey]*node{},
	}
	p.scratch.New = func() any { return &scratch{} }
	p.inputs.New = func() any { return new([]byte) }
	return p
}

// Open opens the disk that the layers make, the base first and the top last.
//
// size is its size in bytes, which must be that of the top layer (of a raw file
// also rounded up to a sector of 512 bytes, as QEMU sees it); -1 takes the top
// layer's own. Layers below may be smaller or larger: where a layer ends, there
// are zeroes for those above it.
//
// Every layer is looked at now, its Check called, its headers read. Errors name
// the layer: ErrChanged, ErrNotRegular, those of the file system, of qcow2.Open,
// of virtnbd.Open and of Check.
func (p *Pool) Open(size int64, layers ...Layer) (Image, error) {
	if len(layers) == 0 {
		return nil, errors.New("an image without layers")
	}
	var top *node
	chain := make([]*layer, 0, len(layers))
	for _, spec := range layers {
		l, err := p.layer(spec)
		if err != nil {
			p.release(top)
			return nil, err
		}
		if top != nil && l.stream != nil && !l.stream.Meta().Incremental {
			p.release(p.node(top, l))
			return nil, fmt.Errorf("%s: a stream that is no increment lies on another layer", spec.Name)
		}
		top = p.node(top, l)
		chain = append(chain, l)
	}
	own := top.layer.size
	if top.layer.disk == nil && size != own {
		own = (own + 511) &^ 511
	}
	if size < 0 {
		size = top.layer.size
	} else if size != own {
		err := fmt.Errorf("%s: %w: a disk of %d bytes, %d expected", top.layer.key.name, ErrChanged, top.layer.size, size)
		p.release(top)
		return nil, err
	}
	return &layered{pool: p, size: size, top: top, chain: chain}, nil
}

// layer returns the layer that spec names, with a reference for the caller.
func (p *Pool) layer(spec Layer) (*layer, error) {
	now, err := p.files.stat(spec.Path, spec.Name)
	if err != nil {
		return nil, err
	}
	if spec.Bytes >= 0 && now.size != spec.Bytes {
		return nil, fmt.Errorf("%s: %w: %d bytes, %d expected", spec.Name, ErrChanged, now.size, spec.Bytes)
	}
	k := layerKey{path: spec.Path, name: spec.Name, snapshot: spec.Snapshot, format: spec.Format, changing: spec.Changing, stamp: now}
	l := p.known(k)
	if l == nil {
		// Without the lock: a slow file must not hold up other images.
		l = &layer{key: k, file: p.files.newFile(spec.Path, spec.Name, now)}
		l.file.changing = spec.Changing
		if err := l.open(p); err != nil {
			p.files.forget(l.file)
			return nil, err
		}
		l = p.share(l)
	}
	if err := l.check(spec); err != nil {
		p.mu.Lock()
		dropped := p.unref(l)
		p.mu.Unlock()
		p.drop(dropped, nil)
		return nil, fmt.Errorf("%s: %w", spec.Name, err)
	}
	return l, nil
}

// known returns the layer with the key, if an image has it open.
func (p *Pool) known(k layerKey) *layer {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.layers[k]
	if l != nil {
		l.refs++
	}
	return l
}

// share makes l known, unless somebody else has been faster.
func (p *Pool) share(l *layer) *layer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if other := p.layers[l.key]; other != nil {
		p.files.forget(l.file)
		other.refs++
		return other
	}
	p.lastID++
	l.id = p.lastID
	l.refs = 1
	p.layers[l.key] = l
	return l
}

// node returns the chain of l on parent. It takes over the caller's references to
// both and returns one to the node.
func (p *Pool) node(parent *node, l *layer) *node {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := nodeKey{parent, l}
	if n := p.nodes[k]; n != nil {
		// The node has references of its own already, so none of these is the last.
		l.refs--
		if parent != nil {
			parent.refs--
		}
		n.refs++
		return n
	}
	p.lastID++
	n := &node{id: p.lastID, parent: parent, layer: l, refs: 1}
	if parent != nil {
		n.index = parent.index + 1
	}
	p.nodes[k] = n
	return n
}

// release gives back a reference to a node, which may be nil.
func (p *Pool) release(n *node) {
	var layers []*layer
	var nodes []*node
	p.mu.Lock()
	for n != nil {
		n.refs--
		if n.refs > 0 {
			break
		}
		delete(p.nodes, nodeKey{n.parent, n.layer})
		nodes = append(nodes, n)
		layers = append(layers, p.unref(n.layer)...)
		n = n.parent
	}
	p.mu.Unlock()
	p.drop(layers, nodes)
}

// unref gives back a reference to l and returns l if it was the last one. The
// caller holds the lock, and drops what is returned without it.
func (p *Pool) unref(l *layer) []*layer {
	l.refs--
	if l.refs > 0 {
		return nil
	}
	delete(p.layers, l.key)
	return []*layer{l}
}

// drop frees what layers and nodes have that nobody uses any more.
func (p *Pool) drop(layers []*layer, nodes []*node) {
	ids := map[uint64]bool{}
	for _, l := range layers {
		p.files.forget(l.file)
		ids[l.id] = true
	}
	if len(ids) > 0 {
		p.runs.drop(ids)
		p.clusters.drop(ids)
		p.pieces.drop(ids)
		p.restarts.drop(ids)
	}
	clear(ids)
	for _, n := range nodes {
		ids[n.id] = true
	}
	if len(ids) > 0 {
		p.groups.drop(ids)
	}
}
