package importer

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
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
	// startLimit is how long qemu-nbd may take to be there, stopLimit to go.
	startLimit = 30 * time.Second
	stopLimit  = time.Minute
	// requestLimit is how long a write may take: what takes longer hangs.
	requestLimit = 10 * time.Minute
)

// target is a qcow2 image that is being written by a qemu-nbd. It speaks the NBD protocol
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md) as far as that takes: one request at a time, answered
// by simple replies.
type target struct {
	dir    string // of the socket
	daemon *child.Process
	conn   net.Conn
	in     *bufio.Reader
	cookie uint64
	stop   func() bool // the context's watch
}

// Numbers of the protocol, under its own names.
const (
	nbdMagic      = 0x4e42444d41474943
	optMagic      = 0x49484156454f5054
	replyMagic    = 0x0003e889045565a9
	requestMagic  = 0x25609513
	responseMagic = 0x67446698

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
	flagReadOnly      = 1 << 1
	flagSendFlush     = 1 << 2
	flagSendZeroes    = 1 << 6

	optGo      = 7
	repAck     = 1
	repInfo    = 3
	infoExport = 0

	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdWriteZeroes = 6
)

const exportName = "disk"

var be = binary.BigEndian

// openTarget opens an image of size bytes for writing, without what lies below it.
func openTarget(ctx context.Context, program, path string, size int64) (t *target, err error) {
	t = &target{stop: func() bool { return true }}
	defer func() {
		if err != nil {
			t.abort()
			t = nil
		}
	}()
	// The socket's folder is closed to others, and short: a socket's path can't be long.
	if t.dir, err = os.MkdirTemp("", "qmchain-"); err != nil {
		return t, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return t, err
	}
	node, err := json.Marshal(map[string]any{
		"driver": "qcow2", "backing": nil, "file": map[string]any{"driver": "file", "filename": path},
	})
	if err != nil {
		return t, err
	}
	socket := filepath.Join(t.dir, "nbd")
	if t.daemon, err = child.Start(program, "--socket", socket, "--export-name", exportName, "json:"+string(node)); err != nil {
		return t, err
	}
	if t.conn, err = t.dial(ctx, socket); err != nil {
		return t, err
	}
	t.stop = context.AfterFunc(ctx, func() { _ = t.conn.SetDeadline(time.Unix(1, 0)) })
	t.in = bufio.NewReader(t.conn)
	if err := t.handshake(size); err != nil {
		return t, t.explain(ctx, fmt.Errorf("%s: handshake: %w", program, err))
	}
	return t, nil
}

func (t *target) dial(ctx context.Context, socket string) (net.Conn, error) {
	for began := time.Now(); ; {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-t.daemon.Done():
			return nil, fmt.Errorf("qemu-nbd: %w", errors.Join(t.daemon.Err(), errors.New("it has ended")))
		case <-time.After(5 * time.Millisecond):
		}
		if time.Since(began) > startLimit {
			return nil, fmt.Errorf("qemu-nbd does not answer within %s: %w", startLimit, err)
		}
	}
}

func (t *target) handshake(size int64) error {
	if err := t.conn.SetDeadline(time.Now().Add(startLimit)); err != nil {
		return err
	}
	var greeting struct {
		Magic, Option uint64
		Flags         uint16
	}
	if err := binary.Read(t.in, be, &greeting); err != nil {
		return err
	}
	if greeting.Magic != nbdMagic || greeting.Option != optMagic || greeting.Flags&flagFixedNewstyle == 0 {
		return errors.New("not an NBD server that is understood")
	}
	b := be.AppendUint32(nil, uint32(greeting.Flags)&(flagFixedNewstyle|flagNoZeroes))
	b = be.AppendUint64(b, optMagic)
	b = be.AppendUint32(b, optGo)
	b = be.AppendUint32(b, uint32(4+len(exportName)+2))
	b = be.AppendUint32(b, uint32(len(exportName)))
	b = append(b, exportName...)
	b = be.AppendUint16(b, 0)
	if _, err := t.conn.Write(b); err != nil {
		return err
	}
	for seen := false; ; {
		var reply struct {
			Magic                uint64
			Option, Kind, Length uint32
		}
		if err := binary.Read(t.in, be, &reply); err != nil {
			return err
		}
		if reply.Magic != replyMagic || reply.Option != optGo || reply.Length > 64<<10 {
			return errors.New("not a reply")
		}
		data := make([]byte, reply.Length)
		if _, err := io.ReadFull(t.in, data); err != nil {
			return err
		}
		switch {
		case reply.Kind == repAck && seen:
			return nil
		case reply.Kind != repInfo:
			return fmt.Errorf("reply %#x: %.200q", reply.Kind, data)
		case len(data) >= 12 && be.Uint16(data) == infoExport:
			seen = true
			const needed = flagSendFlush | flagSendZeroes
			if flags := be.Uint16(data[10:]); be.Uint64(data[2:]) != uint64(size) || flags&flagReadOnly != 0 || flags&needed != needed {
				return fmt.Errorf("an export of %d bytes, not %d, with flags %#x", be.Uint64(data[2:]), size, flags)
			}
		}
	}
}

// request does one request and waits for its answer.
func (t *target) request(ctx context.Context, kind uint16, off int64, length int, data []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := t.conn.SetDeadline(time.Now().Add(requestLimit)); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil { // it may have ended before the deadline was set
		return err
	}
	t.cookie++
	b := be.AppendUint32(make([]byte, 0, 28), requestMagic)
	b = be.AppendUint16(b, 0)
	b = be.AppendUint16(b, kind)
	b = be.AppendUint64(b, t.cookie)
	b = be.AppendUint64(b, uint64(off))
	b = be.AppendUint32(b, uint32(length))
	buffers := net.Buffers{b, data}
	if _, err := buffers.WriteTo(t.conn); err != nil {
		return t.explain(ctx, err)
	}
	if kind == cmdDisconnect {
		return nil
	}
	var reply struct {
		Magic, Error uint32
		Cookie       uint64
	}
	if err := binary.Read(t.in, be, &reply); err != nil {
		return t.explain(ctx, err)
	}
	if reply.Magic != responseMagic || reply.Cookie != t.cookie {
		return errors.New("qemu-nbd: not an answer to what was asked")
	}
	if reply.Error != 0 {
		// The protocol's numbers are Linux's.
		return fmt.Errorf("qemu-nbd: %w", syscall.Errno(reply.Error))
	}
	return nil
}

// explain adds what qemu-nbd says, if it has ended.
func (t *target) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select {
	case <-t.daemon.Done():
		if t.daemon.Err() != nil {
			return fmt.Errorf("qemu-nbd: %w", t.daemon.Err())
		}
	case <-time.After(time.Second):
	}
	return fmt.Errorf("qemu-nbd: %w", err)
}

func (t *target) write(ctx context.Context, p []byte, off int64) error {
	return t.request(ctx, cmdWrite, off, len(p), p)
}

// zero has a range read as zeroes, whatever is below it.
func (t *target) zero(ctx context.Context, off, length int64) error {
	return t.request(ctx, cmdWriteZeroes, off, int(length), nil)
}

// finish has qemu-nbd write all that it keeps in memory, say whether it could, and end.
func (t *target) finish(ctx context.Context) error {
	if err := t.request(ctx, cmdFlush, 0, 0, nil); err != nil {
		return err
	}
	if err := t.request(ctx, cmdDisconnect, 0, 0, nil); err != nil {
		return err
	}
	t.stop()
	_ = t.conn.Close()
	// It ends with its last client.
	select {
	case <-t.daemon.Done():
	case <-time.After(stopLimit):
		return errors.Join(errors.New("qemu-nbd does not end"), t.daemon.Stop(time.Second))
	}
	if err := t.daemon.Err(); err != nil {
		return fmt.Errorf("qemu-nbd: %w", err)
	}
	t.daemon = nil
	return nil
}

// abort ends what is not finished.
func (t *target) abort() {
	t.stop()
	if t.conn != nil {
		_ = t.conn.Close()
	}
	if t.daemon != nil {
		_ = t.daemon.Stop(stopLimit)
		t.daemon = nil
	}
	if t.dir != "" {
		_ = os.RemoveAll(t.dir)
	}
}
