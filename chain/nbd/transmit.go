package nbd

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"qmchain/chain/image"
)

const (
	// maxInFlight is how many requests of one connection are worked on at a time; further ones wait in the socket.
	maxInFlight = 8
	// pieceBytes is how much of the image is read and sent at a time.
	pieceBytes = 256 << 10
)

// request is a client's request.
type request struct {
	flags, kind uint16
	cookie      uint64
	off         uint64
	length      uint32
}

// readRequest reads the head of a request. io.EOF: the client has gone.
func readRequest(r io.Reader) (request, error) {
	var b [requestBytes]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return request{}, err
	}
	if be.Uint32(b[0:]) != magicRequest {
		return request{}, errors.New("not a request")
	}
	return request{
		flags: be.Uint16(b[4:]), kind: be.Uint16(b[6:]), cookie: be.Uint64(b[8:]), off: be.Uint64(b[16:]), length: be.Uint32(b[24:]),
	}, nil
}

// transmission is the second phase of a connection.
type transmission struct {
	session
	r       io.Reader
	stop    func()     // has reads from r fail
	buffers *sync.Pool // of *buffer
	problem func(error)

	// mu lets one answer, or one chunk of it, go out at a time.
	mu sync.Mutex
	w  io.Writer
	// failed is why nothing can be sent any more.
	failed atomic.Pointer[error]
}

// run answers requests until the client ends the connection, or it breaks; what is under way then is finished.
func (t *transmission) run() error {
	err := t.requests()
	if failed := t.failed.Load(); failed != nil {
		return *failed
	}
	return err
}

func (t *transmission) requests() error {
	var wait sync.WaitGroup
	defer wait.Wait()
	places := make(chan struct{}, maxInFlight)
	for {
		req, err := readRequest(t.r)
		if err != nil {
			return err
		}
		if req.kind == cmdDisc {
			return errDone
		}
		if req.kind == cmdWrite {
			// What it wants to write comes before the next request.
			if req.length > maxPayload {
				return fmt.Errorf("a write of %d bytes", req.length)
			}
			if _, err := io.CopyN(io.Discard, t.r, int64(req.length)); err != nil {
				return err
			}
		}
		places <- struct{}{}
		wait.Go(func() {
			defer func() { <-places }()
			if t.failed.Load() != nil {
				return
			}
			if err := t.answer(req); err != nil && t.failed.CompareAndSwap(nil, &err) {
				t.stop()
			}
		})
	}
}

// answer answers one request. An error is one of sending.
func (t *transmission) answer(req request) error {
	size := uint64(t.export.Image.Size())
	within := req.off <= size && uint64(req.length) <= size-req.off
	switch req.kind {
	case cmdRead:
		allowed := uint16(0)
		if t.structured {
			allowed = cmdFlagDF
		}
		switch {
		case !within, req.length > maxPayload, req.flags&^allowed != 0:
			return t.fail(req, errInval, "out of bounds, or with unknown flags")
		case t.structured:
			return t.read(req)
		}
		return t.readSimple(req)
	case cmdBlockStatus:
		if !t.allocation || !within || req.length == 0 || req.flags&^cmdFlagReqOne != 0 {
			return t.fail(req, errInval, "no such context, out of bounds, or with unknown flags")
		}
		return t.blockStatus(req)
	case cmdWrite, cmdTrim, cmdWriteZeroes:
		return t.fail(req, errPerm, "the export is read-only")
	}
	return t.fail(req, errInval, "no such command")
}

// send sends an answer, or a chunk of one.
func (t *transmission) send(b []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, err := t.w.Write(b)
	return err
}

// fail answers with an error.
func (t *transmission) fail(req request, code uint32, why string) error {
	if !t.structured {
		return t.send(simpleHead(req, code))
	}
	b := chunkHead(req, chunkFlagDone, chunkError, 6+len(why))
	b = be.AppendUint32(b, code)
	b = be.AppendUint16(b, uint16(len(why)))
	return t.send(append(b, why...))
}

// unreadable tells the client that the image could not be read, and somebody here why.
func (t *transmission) unreadable(req request, err error) error {
	t.problem(fmt.Errorf("export %s: %w", t.export.Name, err))
	return t.fail(req, errIO, "the image can't be read")
}

func simpleHead(req request, code uint32) []byte {
	b := be.AppendUint32(make([]byte, 0, 16), magicSimple)
	b = be.AppendUint32(b, code)
	return be.AppendUint64(b, req.cookie)
}

// chunkHead is the head of a chunk with length bytes of content.
func chunkHead(req request, flags, kind uint16, length int) []byte {
	b := be.AppendUint32(make([]byte, 0, 32), magicStructured)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, kind)
	b = be.AppendUint64(b, req.cookie)
	return be.AppendUint32(b, uint32(length))
}

// buffer is where a piece of data is read to, with room before it for the head that goes out with it in one write.
type buffer [headRoom + pieceBytes]byte

const headRoom = 32

// read reads from the image at off; the result has length bytes.
func (b *buffer) read(img image.Image, off, length int64) ([]byte, error) {
	data := b[headRoom : headRoom+length]
	if _, err := img.ReadAt(data, off); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return data, nil
}

// with is the head, and the data that was read.
func (b *buffer) with(head, data []byte) []byte {
	start := headRoom - len(head)
	copy(b[start:], head)
	return b[start : headRoom+len(data)]
}

// read answers a read by chunks of data and holes.
func (t *transmission) read(req request) error {
	buf := t.buffers.Get().(*buffer)
	defer t.buffers.Put(buf)
	at, end := int64(req.off), int64(req.off)+int64(req.length)
	flags := func(to int64) uint16 {
		if to == end {
			return chunkFlagDone
		}
		return 0
	}
	whole := req.flags&cmdFlagDF != 0
	switch {
	case at == end:
		return t.send(chunkHead(req, chunkFlagDone, chunkNone, 0))
	case whole && req.length > pieceBytes:
		return t.fail(req, errOverflow, "too long for one chunk")
	}
	for at < end {
		list := []image.Extent{{Off: at, Len: end - at}}
		if !whole {
			var err error
			if list, err = t.export.Image.Extents(at, end-at); err != nil {
				return t.unreadable(req, err)
			}
		}
		for _, e := range list {
			if e.Zero {
				at = e.End()
				b := be.AppendUint64(chunkHead(req, flags(at), chunkOffsetHole, 12), uint64(e.Off))
				if err := t.send(be.AppendUint32(b, uint32(e.Len))); err != nil {
					return err
				}
				continue
			}
			for at < e.End() {
				data, err := buf.read(t.export.Image, at, min(pieceBytes, e.End()-at))
				if err != nil {
					return t.unreadable(req, err)
				}
				to := at + int64(len(data))
				head := be.AppendUint64(chunkHead(req, flags(to), chunkOffsetData, 8+len(data)), uint64(at))
				if err := t.send(buf.with(head, data)); err != nil {
					return err
				}
				at = to
			}
		}
	}
	return nil
}

// readSimple answers a read by a simple reply, whose head must say that all goes well before it has. Where it does not
// after all, the connection ends, as the protocol has it.
func (t *transmission) readSimple(req request) error {
	buf := t.buffers.Get().(*buffer)
	defer t.buffers.Put(buf)
	at, end := int64(req.off), int64(req.off)+int64(req.length)
	data, err := buf.read(t.export.Image, at, min(pieceBytes, end-at))
	if err != nil {
		return t.unreadable(req, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, err := t.w.Write(buf.with(simpleHead(req, 0), data)); err != nil {
		return err
	}
	for at += int64(len(data)); at < end; at += int64(len(data)) {
		if data, err = buf.read(t.export.Image, at, min(pieceBytes, end-at)); err != nil {
			t.problem(fmt.Errorf("export %s: %w", t.export.Name, err))
			return errDone
		}
		if _, err := t.w.Write(data); err != nil {
			return err
		}
	}
	return nil
}

// blockStatus tells which parts of a range are zeroes. An answer can be shorter than the range.
func (t *transmission) blockStatus(req request) error {
	list, err := t.export.Image.Extents(int64(req.off), int64(req.length))
	if err != nil {
		return t.unreadable(req, err)
	}
	if req.flags&cmdFlagReqOne != 0 {
		list = list[:1]
	}
	b := chunkHead(req, chunkFlagDone, chunkBlockStatus, 4+8*len(list))
	b = be.AppendUint32(b, allocationID)
	for _, e := range list {
		state := uint32(0)
		if e.Zero {
			state = stateHole | stateZero
		}
		b = be.AppendUint32(b, uint32(e.Len))
		b = be.AppendUint32(b, state)
	}
	return t.send(b)
}
