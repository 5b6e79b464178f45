package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"qmchain/chain/image"
	"qmchain/chain/image/imagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mib = 1 << 20

// The programs of QEMU read what is there, and see what is a hole.
func TestQEMU(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := imagetest.NewWriter(t, 5)
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	const size = 9*mib + 512
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", base, fmt.Sprint(size))
	imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	for _, path := range []string{base, top} {
		var cmds []string
		for range 20 {
			off := w.Rand().Int64N(size-mib) &^ 511
			cmd, _ := w.Write(t, "", off, 512*(1+w.Rand().Int64N(500)))
			cmds = append(cmds, cmd)
		}
		imagetest.QemuIO(t, "qcow2", path, append(cmds, "write -z 1M 2M")...)
	}
	pool := image.NewPool(image.PoolOptions{})
	var exports []Export
	for i, layers := range [][]string{{base}, {base, top}} {
		var list []image.Layer
		for _, path := range layers {
			list = append(list, image.Layer{Path: path, Name: path, Format: image.Qcow2, Bytes: -1})
		}
		img, err := pool.Open(-1, list...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = img.Close() })
		exports = append(exports, Export{Name: fmt.Sprint("disk ", i), Description: "a test's", Image: img})
	}
	path, stop := start(t, &Server{Exports: exports, Problem: func(err error) { t.Error(err) }})
	addr := &net.UnixAddr{Name: path, Net: "unix"}

	for i, file := range []string{base, top} {
		uri := URI(addr, exports[i].Name)
		imagetest.QemuImg(t, "compare", "-f", "raw", "-F", "qcow2", uri, file)
		if got := imagetest.Content(t, "raw", uri); !bytes.Equal(got, imagetest.Content(t, "qcow2", file)) {
			t.Errorf("%s: qemu-img convert reads something else", uri)
		}
		if diff := cmp.Diff(zeroMap(t, "qcow2", file), zeroMap(t, "raw", uri)); diff != "" {
			t.Errorf("%s: qemu-img map (-file +nbd):\n%s", uri, diff)
		}
	}
	uri := URI(addr, exports[1].Name)
	content := imagetest.Content(t, "qcow2", top)
	var cmds []string
	for i := range 300 {
		off := w.Rand().Int64N(size)
		cmds = append(cmds, fmt.Sprintf("aio_read -q %d %d", off, 1+w.Rand().Int64N(min(size-off, 1<<(1+i%22)))))
	}
	at := bytes.IndexFunc(content, func(r rune) bool { return r != 0 })
	args := []string{"-r", "-f", "raw", uri, "-c", "aio_flush", "-c", fmt.Sprintf("read -P %d %d 1", content[at], at)}
	for _, c := range cmds {
		args = append(args, "-c", c)
	}
	if out, err := exec.CommandContext(t.Context(), "qemu-io", args...).CombinedOutput(); err != nil || strings.Contains(string(out), "fail") {
		t.Errorf("qemu-io: %v: %s", err, out)
	}
	out, err := exec.CommandContext(t.Context(), "qemu-io", "-f", "raw", "-c", "write 0 512", uri).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Permission denied") {
		t.Errorf("opened for writing: %v: %s", err, out)
	}
	out, err = exec.CommandContext(t.Context(), "qemu-nbd", "-L", "-k", path).CombinedOutput()
	for _, want := range []string{"exports available: 2", "'disk 0'", "'disk 1'", "a test's", "base:allocation", "readonly", "multi"} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("qemu-nbd -L: %v: no %q in %s", err, want, out)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is left")
	}
}

// zeroMap is what qemu-img map tells of a disk, with neighbours of a kind as one.
func zeroMap(t *testing.T, format, path string) (runs []string) {
	t.Helper()
	var list []struct {
		Start, Length int64
		Zero          bool
	}
	if err := json.Unmarshal([]byte(imagetest.QemuImg(t, "map", "--output=json", "-f", format, path)), &list); err != nil {
		t.Fatal(err)
	}
	for i, e := range list {
		if i == 0 || list[i-1].Zero != e.Zero {
			runs = append(runs, fmt.Sprintf("%d zero=%v", e.Start, e.Zero))
		}
	}
	return runs
}

func TestNegotiation(t *testing.T) {
	t.Parallel()
	a, b := newDisk(1, mib+512), newDisk(2, 3*mib)
	path, _ := start(t, &Server{Exports: []Export{{"a", "the first", a}, {"b", "", b}}})
	c := dial(t, path).greet(flagFixedNewstyle | flagNoZeroes)

	want := []reply{{repServer, "\x00\x00\x00\x01athe first"}, {repServer, "\x00\x00\x00\x01b"}, {repAck, ""}}
	if diff := cmp.Diff(want, c.option(optList), cmp.AllowUnexported(reply{})); diff != "" {
		t.Errorf("list: %s", diff)
	}
	// What is malformed, unknown or out of order is refused, and the negotiation goes on.
	for _, bad := range []struct {
		kind uint32
		opt  uint32
		data []byte
	}{
		{repErrInvalid, optList, []byte("x")},
		{repErrInvalid, optStructuredReply, []byte("x")},
		{repErrUnsup, 5, nil},  // NBD_OPT_STARTTLS
		{repErrUnsup, 11, nil}, // NBD_OPT_EXTENDED_HEADERS
		{repErrUnsup, 4711, make([]byte, maxOption)},
		{repErrUnknown, optGo, join(name("c"), uint16(0))},
		{repErrUnknown, optInfo, join(name(""), uint16(0))}, // there is no default among two
		{repErrInvalid, optGo, nil},
		{repErrInvalid, optGo, []byte{0, 0, 0}},
		{repErrInvalid, optGo, join(uint32(1<<32-1), "a", uint16(0))},
		{repErrInvalid, optGo, join(uint32(maxString+1), make([]byte, maxString+1), uint16(0))},
		{repErrInvalid, optGo, join(name("a"), uint16(3), uint16(0))},
		{repErrInvalid, optGo, join(name("a"), uint16(0), "more")},
		{repErrInvalid, optSetMetaContext, join(name("a"), uint32(0))}, // before structured replies
	} {
		c.must(bad.kind, bad.opt, bad.data)
	}
	c.must(repAck, optStructuredReply)
	for _, bad := range [][]byte{
		nil,
		join(name("a"), uint32(1)),
		join(name("a"), uint32(1<<32-1), name("base:")),
		join(name("a"), uint32(1), name("base:allocation"), "more"),
	} {
		c.must(repErrInvalid, optSetMetaContext, bad)
	}
	c.must(repErrUnknown, optListMetaContext, name("c"), uint32(0))
	context := reply{repMetaContext, "\x00\x00\x00\x01base:allocation"}
	for _, q := range []struct {
		opt  uint32
		data []byte
		want bool
	}{
		{optListMetaContext, join(uint32(0)), true},
		{optListMetaContext, join(uint32(1), name("base:")), true},
		{optListMetaContext, join(uint32(1), name("qemu:")), false},
		{optListMetaContext, join(uint32(1), name("")), false},
		{optSetMetaContext, join(uint32(0)), false},
		{optSetMetaContext, join(uint32(1), name("base:")), false},
		{optSetMetaContext, join(uint32(2), name("x:y"), name("base:allocation")), true},
	} {
		got := c.must(repAck, q.opt, name("b"), q.data)
		if has := got[0] == context; has != q.want || len(got) > 2 {
			t.Errorf("option %d with %q: %+v", q.opt, q.data, got)
		}
	}
	flags := uint16(flagHasFlags | flagReadOnly | flagSendDF | flagCanMultiConn)
	want = []reply{
		{repInfo, string(join(uint16(infoExport), uint64(3*mib), flags))},
		{repInfo, string(join(uint16(infoName), "b"))},
		{repInfo, string(join(uint16(infoDescription)))},
		{repInfo, string(join(uint16(infoBlockSize), uint32(1), uint32(64<<10), uint32(32<<20)))},
		{repAck, ""},
	}
	for _, opt := range []uint32{optInfo, optGo} {
		// Unknown kinds and repetitions are passed over.
		got := c.option(opt, name("b"), uint16(6), uint16(infoName), uint16(infoDescription), uint16(infoBlockSize), uint16(infoName), uint16(99), uint16(98))
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(reply{})); diff != "" {
			t.Errorf("option %d: %s", opt, diff)
		}
	}
	if data, _, code := c.readAt(100, 5000, 0); code != 0 || !bytes.Equal(data, b.data[100:5100]) {
		t.Errorf("error %d", code)
	}

	// A context is chosen for one export, and asking for another one is choosing none.
	c = dial(t, path).greet(flagFixedNewstyle)
	c.must(repAck, optStructuredReply)
	c.must(repAck, optSetMetaContext, name("b"), uint32(1), name(allocationContext))
	c.must(repAck, optGo, name("a"), uint16(0))
	c.request(cmdBlockStatus, 0, 5, 0, 4096)
	if k := c.chunk(); k.kind != chunkError || be.Uint32(k.data) != errInval {
		t.Errorf("block status without a context: %+v", k)
	}

	c = dial(t, path).greet(flagFixedNewstyle)
	c.must(repAck, optAbort)
	c.closed()
}

// What is no NBD, or asks for too much, ends the connection, and only that.
func TestBadClients(t *testing.T) {
	t.Parallel()
	d := newDisk(3, mib)
	var problems atomic.Int32
	path, _ := start(t, &Server{
		Exports: []Export{{"a", "", d}}, Problem: func(error) { problems.Add(1) }, negotiationLimit: 300 * time.Millisecond,
	})
	for _, sent := range [][]byte{
		[]byte("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
		join(uint32(4)),
		join(uint32(3), "not an option...."),
		join(uint32(3), uint64(magicOption), uint32(optGo), uint32(maxOption+1)),
		join(uint32(3), uint64(magicOption), uint32(optExportName), uint32(4), "none"),
		join(uint32(3), uint64(magicOption), uint32(optGo)), // and no more: the time is up
		nil,
	} {
		c := dial(t, path)
		c.get(18)
		_, _ = c.Write(sent) // its time can be up already
		c.closed()
	}
	if got := problems.Load(); got != 7 {
		t.Errorf("%d problems", got)
	}

	// The others have time to negotiate, and to read.
	path, _ = start(t, &Server{Exports: []Export{{"a", "", d}}, sendLimit: 2 * time.Second})
	good := open(t, path, "a")
	for _, bad := range [][]byte{
		[]byte(strings.Repeat("no request!!", 5)),
		join(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(maxPayload+1)),
		join(uint32(magicRequest), uint16(0), uint16(cmdDisc), uint64(1), uint64(0), uint32(0)),
	} {
		c := open(t, path, "a")
		c.send(bad)
		c.closed()
	}
	// Somebody asks and asks, and never listens.
	deaf := open(t, path, "a")
	began := time.Now()
	for time.Since(began) < 25*time.Second {
		b := join(uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(1), uint64(0), uint32(mib))
		if _, err := deaf.Write(b); err != nil {
			break
		}
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("cut off after %s", took)
	}
	if data, _, code := good.readAt(0, mib, 0); code != 0 || !bytes.Equal(data, d.data) {
		t.Errorf("another client's read: error %d", code)
	}
}

func TestCommands(t *testing.T) {
	t.Parallel()
	const size = 2*mib + 512
	d := newDisk(4, size)
	bad := errors.New("a bad sector")
	d.fail = func(off, length int64) error {
		if off <= mib+mib/2 && mib+mib/2 < off+length {
			return bad
		}
		return nil
	}
	d.data[mib+mib/2], d.zero = 1, func(zero func(int64) bool) func(int64) bool {
		return func(off int64) bool { return off != mib+mib/2 && zero(off) }
	}(d.zero)
	told := make(chan error, 100)
	path, _ := start(t, &Server{Exports: []Export{{"a", "", d}}, Problem: func(err error) { told <- err }})
	c := open(t, path, "a")
	for _, r := range []struct {
		off    uint64
		length uint32
		flags  uint16
		code   uint32
	}{
		{0, mib, 0, 0},
		{mib, mib / 4, 0, 0},
		{1, 1, 0, 0},
		{page - 1, 3 * page, 0, 0},
		{size - 512, 512, 0, 0},
		{size, 0, 0, 0},
		{0, 0, 0, 0},
		{0, pieceBytes, cmdFlagDF, 0},
		{0, pieceBytes + 1, cmdFlagDF, errOverflow},
		{size - 512, 513, 0, errInval},
		{size + 1, 0, 0, errInval},
		{1<<64 - 1, 2, 0, errInval},
		{0, 1<<32 - 1, 0, errInval},
		{0, 512, 1, errInval}, // NBD_CMD_FLAG_FUA
		{mib, mib, 0, errIO},
		{mib, mib / 2, 0, 0},
	} {
		data, holes, code := c.readAt(r.off, r.length, r.flags)
		if code != r.code {
			t.Errorf("read %+v: error %d", r, code)
		} else if code == 0 && !bytes.Equal(data, d.data[r.off:r.off+uint64(r.length)]) {
			t.Errorf("read %+v: wrong data", r)
		}
		if r.length >= mib/4 && code == 0 && (holes > 0) != (r.flags == 0) {
			t.Errorf("read %+v: %d holes", r, holes)
		}
	}
	if err := <-told; !errors.Is(err, bad) {
		t.Errorf("told of %v", err)
	}
	for kind, code := range map[uint16]uint32{cmdWrite: errPerm, cmdTrim: errPerm, cmdWriteZeroes: errPerm, 3: errInval, 5: errInval, 99: errInval} {
		c.request(kind, 0, 9, 0, 512)
		if kind == cmdWrite {
			c.send(make([]byte, 512))
		}
		if k := c.chunk(); k.kind != chunkError || k.flags != chunkFlagDone || k.cookie != 9 || be.Uint32(k.data) != code || len(k.data) != 6+int(be.Uint16(k.data[4:])) {
			t.Errorf("command %d: %+v", kind, k)
		}
	}

	// Block status, from piece to piece.
	for off := uint64(0); off < size; {
		c.request(cmdBlockStatus, 0, 3, off, uint32(size-off))
		k := c.chunk()
		if k.kind != chunkBlockStatus || k.flags != chunkFlagDone || k.cookie != 3 || be.Uint32(k.data) != allocationID || len(k.data) < 12 {
			t.Fatalf("status at %d: %+v", off, k)
		}
		for b := k.data[4:]; len(b) > 0; b = b[8:] {
			zero := be.Uint32(b[4:]) == stateHole|stateZero
			for range be.Uint32(b) {
				if zero != d.zero(int64(off)/page*page) {
					t.Fatalf("status at %d", off)
				}
				off++
			}
		}
	}
	c.request(cmdBlockStatus, cmdFlagReqOne, 3, 0, mib)
	if k := c.chunk(); k.kind != chunkBlockStatus || len(k.data) != 12 {
		t.Errorf("one status: %+v", k)
	}
	for _, r := range []struct {
		off    uint64
		length uint32
		flags  uint16
	}{{0, 0, 0}, {size, 1, 0}, {0, 512, cmdFlagDF}} {
		c.request(cmdBlockStatus, r.flags, 3, r.off, r.length)
		if k := c.chunk(); k.kind != chunkError || be.Uint32(k.data) != errInval {
			t.Errorf("status %+v: %+v", r, k)
		}
	}
}

// The way of old clients: NBD_OPT_EXPORT_NAME and simple replies.
func TestSimpleReplies(t *testing.T) {
	t.Parallel()
	d := newDisk(5, mib)
	d.fail = func(off, length int64) error {
		if off+length > mib-page {
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	var problems atomic.Int32
	path, _ := start(t, &Server{Exports: []Export{{"a", "", d}}, Problem: func(error) { problems.Add(1) }})
	for _, flags := range []uint32{0, flagFixedNewstyle, flagFixedNewstyle | flagNoZeroes} {
		c := dial(t, path).greet(flags)
		c.send(uint64(magicOption), uint32(optExportName), uint32(0)) // the default export
		want := join(uint64(mib), uint16(flagHasFlags|flagReadOnly|flagCanMultiConn))
		if flags&flagNoZeroes == 0 {
			want = append(want, make([]byte, 124)...)
		}
		if got := c.get(len(want)); !bytes.Equal(got, want) {
			t.Errorf("flags %d: %x", flags, got)
		}
		head := func(code uint32) []byte { return join(uint32(magicSimple), code, uint64(42)) }
		c.request(cmdRead, 0, 42, 3, 3*pieceBytes)
		if got := c.get(16 + 3*pieceBytes); !bytes.Equal(got[:16], head(0)) || !bytes.Equal(got[16:], d.data[3:3+3*pieceBytes]) {
			t.Error("wrong data")
		}
		for _, r := range []struct {
			kind, flags uint16
			length      uint32
			code        uint32
		}{{cmdRead, 0, mib + 1, errInval}, {cmdRead, cmdFlagDF, 5, errInval}, {cmdTrim, 0, 512, errPerm}, {cmdBlockStatus, 0, 512, errInval}} {
			c.request(r.kind, r.flags, 42, 0, r.length)
			if got := c.get(16); !bytes.Equal(got, head(r.code)) {
				t.Errorf("%+v: %x", r, got)
			}
		}
		c.request(cmdRead, 0, 42, mib-page, page)
		if got := c.get(16); !bytes.Equal(got, head(errIO)) {
			t.Errorf("unreadable: %x", got)
		}
		// When the error comes after the answer has begun, what is left is to end it.
		c.request(cmdRead, 0, 42, 0, mib)
		c.get(16 + 3*pieceBytes)
		c.closed()
	}
	if got := problems.Load(); got != 3*2 {
		t.Errorf("%d problems", got)
	}
}

// Many clients with many requests each under way.
func TestConcurrency(t *testing.T) {
	t.Parallel()
	d := newDisk(6, 4*mib)
	path, stop := start(t, &Server{Exports: []Export{{"a", "", d}}, Problem: func(err error) { t.Error(err) }, maxClients: 3})
	var wait sync.WaitGroup
	for i := range 8 {
		wait.Go(func() {
			rnd := rand.New(rand.NewPCG(7, uint64(i)))
			c := open(t, path, "a")
			defer c.Close()
			type asked struct {
				off    uint64
				length uint32
				seen   uint32
			}
			open := map[uint64]*asked{}
			for next := uint64(0); next < 150 || len(open) > 0; {
				for len(open) < 40 && next < 150 {
					off := rnd.Uint64N(4 * mib)
					a := &asked{off: off, length: uint32(1 + rnd.Uint64N(min(4*mib-off, 1<<(1+rnd.Uint64N(21)))))}
					open[next] = a
					c.request(cmdRead, 0, next, a.off, a.length)
					next++
				}
				k := c.chunk()
				a := open[k.cookie]
				if a == nil {
					t.Errorf("an answer to nobody: %+v", k)
					return
				}
				off := be.Uint64(k.data)
				switch k.kind {
				case chunkOffsetData:
					if !bytes.Equal(k.data[8:], d.data[off:off+uint64(len(k.data))-8]) {
						t.Errorf("wrong data at %d", off)
						return
					}
					a.seen += uint32(len(k.data) - 8)
				case chunkOffsetHole:
					a.seen += be.Uint32(k.data[8:])
				default:
					t.Errorf("chunk %+v", k)
					return
				}
				if k.flags&chunkFlagDone != 0 {
					if a.seen != a.length {
						t.Errorf("%d bytes of %d", a.seen, a.length)
					}
					delete(open, k.cookie)
				}
			}
		})
	}
	wait.Wait()
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// At the end, what is under way is answered, and who is in the middle of something else is not waited for.
func TestShutdown(t *testing.T) {
	t.Parallel()
	d := newDisk(8, mib)
	reading, goOn := make(chan struct{}), make(chan struct{})
	d.fail = func(int64, int64) error {
		close(reading)
		<-goOn
		return nil
	}
	path, stop := start(t, &Server{Exports: []Export{{"a", "", d}}, Problem: func(err error) { t.Error(err) }, graceLimit: time.Minute})
	idle, greeting := open(t, path, "a"), dial(t, path)
	busy := open(t, path, "a")
	d.zero = nil
	busy.request(cmdRead, 0, 1, 0, 512)
	<-reading
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	idle.closed()
	greeting.get(18)
	greeting.closed()
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		t.Error("still accepting")
	}
	close(goOn)
	if k := busy.chunk(); k.kind != chunkOffsetData || !bytes.Equal(k.data[8:], d.data[:512]) {
		t.Errorf("%+v", k)
	}
	busy.closed()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// A read that hangs does not keep the server from ending.
func TestShutdownWithHangingImage(t *testing.T) {
	t.Parallel()
	d := newDisk(9, mib)
	reading, goOn := make(chan struct{}), make(chan struct{})
	d.fail = func(int64, int64) error {
		close(reading)
		<-goOn
		return nil
	}
	d.zero = nil
	told := make(chan error, 10)
	path, stop := start(t, &Server{Exports: []Export{{"a", "", d}}, Problem: func(err error) { told <- err }, graceLimit: 50 * time.Millisecond})
	c := open(t, path, "a")
	c.request(cmdRead, 0, 1, 0, 512)
	<-reading
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := <-told; !strings.Contains(err.Error(), "still being read") {
		t.Error(err)
	}
	close(goOn)
	d.reads.Wait()
}

func TestListen(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	path := filepath.Join(dir, "a socket, + & more")
	l, err := Listen(ctx, "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if got, want := URI(l.Addr(), "scsi0"), "nbd+unix:///scsi0?socket="+dir+"/a%20socket,%20%2B%20%26%20more"; got != want {
		t.Errorf("URI %s, not %s", got, want)
	}
	if _, err := Listen(ctx, "unix:"+path); !errors.Is(err, ErrAddressInUse) {
		t.Errorf("a socket in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	if l, err = Listen(ctx, "unix:"+path); err != nil {
		t.Fatalf("a socket without a listener: %v", err)
	}
	_ = l.Close()
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is left")
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(ctx, "unix:"+file); !errors.Is(err, ErrAddressInUse) {
		t.Errorf("a file: %v", err)
	}
	if text, _ := os.ReadFile(file); string(text) != "precious" {
		t.Error("the file was changed")
	}
	for _, bad := range []string{"", "unix:", "tcp:", "tcp:localhost", "/run/x", "http://example.org", "unix:" + strings.Repeat("x", 108)} {
		if _, err := Listen(ctx, bad); !errors.Is(err, ErrAddress) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	l, err = Listen(ctx, "tcp:127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	if got, want := URI(l.Addr(), "scsi 0"), fmt.Sprintf("nbd://127.0.0.1:%d/scsi%%200", port); got != want {
		t.Errorf("URI %s, not %s", got, want)
	}
	if _, err := Listen(ctx, fmt.Sprintf("tcp:127.0.0.1:%d", port)); !errors.Is(err, ErrAddressInUse) {
		t.Errorf("a port in use: %v", err)
	}
}
