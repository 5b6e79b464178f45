package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
)

// disk is an image in memory: content, with holes where it is told.
type disk struct {
	data  []byte
	zero  func(off int64) bool // of 4 KiB; nil: nowhere
	fail  func(off, length int64) error
	reads sync.WaitGroup
}

const page = 4096

func (d *disk) Size() int64  { return int64(len(d.data)) }
func (d *disk) Close() error { return nil }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.reads.Add(1)
	defer d.reads.Done()
	if d.fail != nil {
		if err := d.fail(off, int64(len(p))); err != nil {
			return 0, err
		}
	}
	return bytes.NewReader(d.data).ReadAt(p, off)
}

func (d *disk) Extents(off, length int64) ([]image.Extent, error) {
	var list []image.Extent
	end := min(off+length, d.Size())
	for off < end && len(list) < 7 {
		to := min((off/page+1)*page, end)
		zero := d.zero != nil && d.zero(off/page*page)
		if n := len(list); n > 0 && list[n-1].Zero == zero {
			list[n-1].Len += to - off
		} else {
			list = append(list, image.Extent{Off: off, Len: to - off, Zero: zero})
		}
		off = to
	}
	return list, nil
}

// newDisk returns a disk of random data with holes.
func newDisk(seed uint64, size int64) *disk {
	rnd := rand.New(rand.NewPCG(seed, 1))
	d := &disk{data: imagetest.Random(rnd, size)}
	holes := map[int64]bool{}
	for range size / page / 3 {
		off := rnd.Int64N(size) / page * page
		holes[off] = true
		clear(d.data[off:min(off+page, size)])
	}
	d.zero = func(off int64) bool { return holes[off] }
	return d
}

// start serves exports at a unix socket until the end of the test, and returns its path and the end of the server.
func start(t testing.TB, s *Server) (path string, stop func() error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir() can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	ctx, cancel := context.WithCancel(context.Background())
	l, err := Listen(ctx, "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(time.Minute):
			return errors.New("the server does not end")
		}
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return path, stop
}

// client is a client that does exactly what a test wants.
type testClient struct {
	t testing.TB
	net.Conn
}

func dial(t testing.TB, path string) *testClient {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &testClient{t, c}
}

// send sends numbers, big-endian, and bytes.
func (c *testClient) send(parts ...any) {
	c.t.Helper()
	if _, err := c.Write(join(parts...)); err != nil {
		c.t.Fatal(err)
	}
}

func join(parts ...any) (b []byte) {
	for _, p := range parts {
		switch p := p.(type) {
		case uint16:
			b = be.AppendUint16(b, p)
		case uint32:
			b = be.AppendUint32(b, p)
		case uint64:
			b = be.AppendUint64(b, p)
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			panic(fmt.Sprintf("%T", p))
		}
	}
	return b
}

func (c *testClient) get(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatal(err)
	}
	return b
}

// greet goes through the greeting.
func (c *testClient) greet(flags uint32) *testClient {
	c.t.Helper()
	if got := c.get(18); string(got) != "NBDMAGICIHAVEOPT\x00\x03" {
		c.t.Fatalf("greeting %q", got)
	}
	c.send(flags)
	return c
}

// reply is an answer to an option.
type reply struct {
	kind uint32
	data string
}

// option sends an option and returns the answers to it, up to the last one.
func (c *testClient) option(opt uint32, data ...any) (replies []reply) {
	c.t.Helper()
	b := join(data...)
	c.send(uint64(magicOption), opt, uint32(len(b)), b)
	for {
		head := c.get(20)
		if be.Uint64(head) != magicOptionReply || be.Uint32(head[8:]) != opt {
			c.t.Fatalf("reply to option %d: %x", opt, head)
		}
		r := reply{be.Uint32(head[12:]), string(c.get(int(be.Uint32(head[16:]))))}
		replies = append(replies, r)
		if r.kind == repAck || r.kind&repErr != 0 {
			return replies
		}
	}
}

// must is option where the last answer is that kind.
func (c *testClient) must(kind uint32, opt uint32, data ...any) []reply {
	c.t.Helper()
	replies := c.option(opt, data...)
	if got := replies[len(replies)-1]; got.kind != kind {
		c.t.Fatalf("option %d with %q: %#x %q, not %#x", opt, join(data...), got.kind, got.data, kind)
	}
	return replies
}

// name is a string as options have it.
func name(s string) []byte { return join(uint32(len(s)), s) }

// open goes to the transmission phase, with structured replies and base:allocation.
func open(t testing.TB, path, export string) *testClient {
	t.Helper()
	c := dial(t, path).greet(flagFixedNewstyle | flagNoZeroes)
	c.must(repAck, optStructuredReply)
	c.must(repAck, optSetMetaContext, name(export), uint32(1), name(allocationContext))
	c.must(repAck, optGo, name(export), uint16(0))
	return c
}

func (c *testClient) request(kind, flags uint16, cookie, off uint64, length uint32) {
	c.t.Helper()
	c.send(uint32(magicRequest), flags, kind, cookie, off, length)
}

// chunk is a chunk of a structured reply.
type chunk struct {
	flags, kind uint16
	cookie      uint64
	data        []byte
}

func (c *testClient) chunk() chunk {
	c.t.Helper()
	head := c.get(20)
	if be.Uint32(head) != magicStructured {
		c.t.Fatalf("not a chunk: %x", head)
	}
	return chunk{be.Uint16(head[4:]), be.Uint16(head[6:]), be.Uint64(head[8:]), c.get(int(be.Uint32(head[16:])))}
}

// readAt reads from an export by one request, and checks how it is answered.
func (c *testClient) readAt(off uint64, length uint32, flags uint16) (data []byte, holes int, code uint32) {
	c.t.Helper()
	c.request(cmdRead, flags, 77, off, length)
	data = make([]byte, length)
	seen := uint32(0)
	for {
		k := c.chunk()
		if k.cookie != 77 {
			c.t.Fatalf("cookie %d", k.cookie)
		}
		switch k.kind {
		case chunkOffsetData:
			copy(data[be.Uint64(k.data)-off:], k.data[8:])
			seen += uint32(len(k.data) - 8)
		case chunkOffsetHole:
			seen += be.Uint32(k.data[8:])
			holes++
		case chunkError:
			return nil, holes, be.Uint32(k.data)
		}
		if k.flags&chunkFlagDone != 0 {
			if seen != length {
				c.t.Fatalf("%d bytes of %d", seen, length)
			}
			return data, holes, 0
		}
	}
}

// closed fails unless the server has closed the connection.
func (c *testClient) closed() {
	c.t.Helper()
	if b, err := io.ReadAll(c); len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("still open: %x, %v", b, err)
	}
}
