package standard

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"qmchain/internal/child"
)

const (
	startLimit = 30 * time.Second // for qemu-nbd to listen
	endLimit   = 5 * time.Minute  // for it to end, when all is written already
	// replyLimit is how long one request may take: a slow share swallows a MiB in it, a dead one does not hold us for ever.
	replyLimit = 5 * time.Minute
)

// Of the NBD protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
const (
	nbdMagic        = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOptionMagic  = 0x49484156454f5054 // "IHAVEOPT"
	nbdFixed        = 1                  // flags of the handshake: fixed newstyle, no zeroes
	nbdNoZeroes     = 2
	nbdExportName   = 1
	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698

	nbdWrite       = 1
	nbdDisconnect  = 2
	nbdFlush       = 3
	nbdWriteZeroes = 6
)

// writer writes to a qcow2 image, by a qemu-nbd that has it open without its backing file: what is written must be whole
// clusters, up to the end of the disk.
type writer struct {
	nbd  *child.Process
	conn net.Conn
	r    *bufio.Reader
	dir  string // of the socket
	id   uint64 // of the last request
	stop func() bool
}

// openWriter begins to write to an image. The writer must be closed.
func (j *Job) openWriter(ctx context.Context, path string) (_ *writer, err error) {
	// A socket's path can't be long.
	dir, err := os.MkdirTemp("", "qmchain-")
	if err != nil {
		return nil, err
	}
	w := &writer{dir: dir, stop: func() bool { return true }}
	defer func() {
		if err != nil {
			_ = w.abort()
		}
	}()
	target := node(path)
	target["discard"] = "unmap"
	// The tables are written at the flush, and errors told; what brings all to stable storage is our own sync.
	target["cache"] = map[string]any{"direct": false, "no-flush": true}
	socket := filepath.Join(dir, "nbd")
	if w.nbd, err = child.Start(j.req.QemuNBD, "--socket="+socket, named(target)); err != nil {
		return nil, err
	}
	if err := w.connect(ctx, socket); err != nil {
		return nil, err
	}
	conn := w.conn
	w.stop = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	return w, w.handshake(ctx)
}

// connect waits for qemu-nbd to listen.
func (w *writer) connect(ctx context.Context, socket string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	var d net.Dialer
	for {
		if w.conn, err = d.DialContext(ctx, "unix", socket); err == nil {
			w.r = bufio.NewReader(w.conn)
			return nil
		}
		select {
		case <-w.nbd.Done():
			return fmt.Errorf("qemu-nbd: %w", errors.Join(w.nbd.Err(), errEnded))
		case <-ctx.Done():
			return fmt.Errorf("qemu-nbd: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

var errEnded = errors.New("it has ended")

// handshake chooses the only export, in the way that every version has.
func (w *writer) handshake(ctx context.Context) error {
	if err := w.within(ctx, startLimit); err != nil {
		return err
	}
	var hello struct {
		Magic, Option uint64
		Flags         uint16
	}
	if err := binary.Read(w.r, binary.BigEndian, &hello); err != nil {
		return w.failed(ctx, err)
	}
	if hello.Magic != nbdMagic || hello.Option != nbdOptionMagic || hello.Flags&nbdFixed == 0 || hello.Flags&nbdNoZeroes == 0 {
		return errors.New("qemu-nbd: another protocol")
	}
	choice := binary.BigEndian.AppendUint32(nil, nbdFixed|nbdNoZeroes)
	choice = binary.BigEndian.AppendUint64(choice, nbdOptionMagic)
	choice = binary.BigEndian.AppendUint32(choice, nbdExportName)
	choice = binary.BigEndian.AppendUint32(choice, 0) // length of the name
	if _, err := w.conn.Write(choice); err != nil {
		return w.failed(ctx, err)
	}
	var export struct {
		Size  uint64
		Flags uint16
	}
	if err := binary.Read(w.r, binary.BigEndian, &export); err != nil {
		return w.failed(ctx, err)
	}
	return nil
}

// within bounds what comes next. The context may have ended before, and its own deadline be replaced by this one.
func (w *writer) within(ctx context.Context, limit time.Duration) error {
	_ = w.conn.SetDeadline(time.Now().Add(limit)) // fails on a closed connection alone
	return ctx.Err()
}

func (w *writer) write(ctx context.Context, p []byte, off int64) error {
	return w.request(ctx, nbdWrite, off, len(p), p)
}

func (w *writer) zero(ctx context.Context, off int64, n int) error {
	return w.request(ctx, nbdWriteZeroes, off, n, nil)
}

// request sends one and waits for the reply.
func (w *writer) request(ctx context.Context, kind uint16, off int64, n int, data []byte) error {
	w.id++
	if err := w.send(ctx, kind, off, n, data); err != nil {
		return w.failed(ctx, err)
	}
	var reply struct {
		Magic, Error uint32
		ID           uint64
	}
	if err := binary.Read(w.r, binary.BigEndian, &reply); err != nil {
		return w.failed(ctx, err)
	}
	if reply.Magic != nbdReplyMagic || reply.ID != w.id {
		return errors.New("qemu-nbd: another reply than asked for")
	}
	if reply.Error != 0 {
		return fmt.Errorf("qemu-nbd: at %d: %w", off, syscall.Errno(reply.Error))
	}
	return nil
}

func (w *writer) send(ctx context.Context, kind uint16, off int64, n int, data []byte) error {
	if err := w.within(ctx, replyLimit); err != nil {
		return err
	}
	head := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	head = binary.BigEndian.AppendUint16(head, 0)
	head = binary.BigEndian.AppendUint16(head, kind)
	head = binary.BigEndian.AppendUint64(head, w.id)
	head = binary.BigEndian.AppendUint64(head, uint64(off))
	head = binary.BigEndian.AppendUint32(head, uint32(n))
	buffers := net.Buffers{head, data}
	_, err := buffers.WriteTo(w.conn)
	return err
}

// failed says why a connection failed: because we were to stop, or because of how qemu-nbd has ended.
func (w *writer) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		select {
		case <-w.nbd.Done():
			err = errors.Join(err, w.nbd.Err())
		case <-time.After(time.Second):
		}
	}
	return fmt.Errorf("qemu-nbd: %w", err)
}

// close writes all that qemu-nbd still has in memory, and waits for it to end.
func (w *writer) close(ctx context.Context) error {
	err := w.request(ctx, nbdFlush, 0, 0, nil)
	if err == nil {
		w.id++
		err = w.send(ctx, nbdDisconnect, 0, 0, nil)
	}
	if err != nil {
		return errors.Join(err, w.abort())
	}
	select {
	case <-w.nbd.Done(): // it ends by itself with its only client
	case <-ctx.Done():
		return errors.Join(ctx.Err(), w.abort())
	case <-time.After(endLimit):
	}
	return w.abort()
}

// abort ends it all.
func (w *writer) abort() error {
	w.stop()
	var err error
	if w.conn != nil {
		_ = w.conn.Close()
	}
	if w.nbd != nil {
		err = w.nbd.Stop(10 * time.Second)
	}
	return errors.Join(err, os.RemoveAll(w.dir))
}
