package nbd

import (
	"bytes"
	"sync"
	"testing"
)

// Whatever a client sends, the server neither crashes nor hangs, and what it answers is well-formed.
func FuzzClient(f *testing.F) {
	option := func(opt uint32, data ...any) []byte {
		b := join(data...)
		return join(uint64(magicOption), opt, uint32(len(b)), b)
	}
	request := func(kind, flags uint16, off uint64, length uint32) []byte {
		return join(uint32(magicRequest), flags, kind, uint64(7), off, length)
	}
	f.Add(join(uint32(3), option(optStructuredReply), option(optSetMetaContext, name("a"), uint32(1), name(allocationContext)),
		option(optGo, name("a"), uint16(2), uint16(infoBlockSize), uint16(infoName)),
		request(cmdRead, 0, 0, 3*page), request(cmdBlockStatus, 0, 100, page), request(cmdWrite, 0, 0, 5), "write", request(cmdDisc, 0, 0, 0)))
	f.Add(join(uint32(1), option(optList), option(optInfo, name("b"), uint16(0)), option(optExportName, "b"),
		request(cmdRead, 0, 0, 3*page), request(cmdRead, 0, 3*page, 1), request(99, 0, 0, 0)))
	f.Add(join(uint32(2), option(optListMetaContext, name("a"), uint32(0)), option(optStructuredReply),
		option(optListMetaContext, name("a"), uint32(1), name("base:")), option(77), option(optAbort)))

	d := newDisk(10, 3*page)
	exports := []Export{{"a", "the first", d}, {"b", "", d}}
	f.Fuzz(func(t *testing.T, sent []byte) {
		r := bytes.NewReader(sent)
		var answers bytes.Buffer
		chosen, err := negotiate(exports, r, &answers)
		if err == nil && chosen.export.Name == "" {
			t.Fatal("neither an export nor an error")
		}
		checkNegotiation(t, answers.Bytes())
		if err != nil {
			return
		}
		answers.Reset()
		buffers := &sync.Pool{New: func() any { return new(buffer) }}
		tr := &transmission{session: chosen, r: r, stop: func() {}, w: &answers, buffers: buffers, problem: func(err error) { t.Error(err) }}
		if err := tr.run(); err == nil {
			t.Fatal("it ended without a reason")
		}
		checkTransmission(t, answers.Bytes(), chosen.structured)
	})
}

// take cuts n bytes off b.
func take(t *testing.T, b *[]byte, n int) []byte {
	t.Helper()
	if n > len(*b) {
		t.Fatalf("%d bytes where %d are due: %x", len(*b), n, *b)
	}
	part := (*b)[:n]
	*b = (*b)[n:]
	return part
}

func checkNegotiation(t *testing.T, b []byte) {
	take(t, &b, 18)
	for len(b) >= 8 && be.Uint64(b) == magicOptionReply {
		take(t, &b, int(be.Uint32(take(t, &b, 20)[16:])))
	}
	if n := len(b); n != 0 && n != 10 && n != 10+124 { // the answer to NBD_OPT_EXPORT_NAME
		t.Fatalf("%d bytes at the end: %x", n, b)
	}
}

func checkTransmission(t *testing.T, b []byte, structured bool) {
	if !structured {
		// How much data follows depends on the request.
		if len(b) > 0 && be.Uint32(b) != magicSimple {
			t.Fatalf("not a simple reply: %x", b[:min(16, len(b))])
		}
		return
	}
	for len(b) > 0 {
		head := take(t, &b, 20)
		content := take(t, &b, int(be.Uint32(head[16:])))
		kind := be.Uint16(head[6:])
		ok := map[uint16]bool{
			chunkNone:        len(content) == 0,
			chunkOffsetData:  len(content) > 8 && len(content) <= 8+pieceBytes,
			chunkOffsetHole:  len(content) == 12,
			chunkBlockStatus: len(content) >= 12 && len(content)%8 == 4,
			chunkError:       len(content) >= 6 && len(content) == 6+int(be.Uint16(content[4:])),
		}[kind]
		if be.Uint32(head) != magicStructured || be.Uint16(head[4:])&^chunkFlagDone != 0 || !ok {
			t.Fatalf("chunk %x with %d bytes", head, len(content))
		}
	}
}
