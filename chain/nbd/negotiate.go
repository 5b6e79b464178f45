package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

var be = binary.BigEndian

// errDone ends a connection about which nothing more is to be told.
var errDone = errors.New("done")

// session is what a negotiation comes to.
type session struct {
	export     *Export
	structured bool // replies
	allocation bool // the client can ask for base:allocation
}

// negotiation is the first phase of a connection.
type negotiation struct {
	exports []Export
	r       io.Reader
	w       io.Writer

	noZeroes   bool
	structured bool
	// contextOf is the export for which base:allocation was chosen, nil if none.
	contextOf *Export
}

// negotiate goes through the first phase of a connection. Whatever ends it but the choice of an export is an error.
func negotiate(exports []Export, r io.Reader, w io.Writer) (session, error) {
	n := &negotiation{exports: exports, r: r, w: w}
	var greeting [18]byte
	be.PutUint64(greeting[0:], magicInit)
	be.PutUint64(greeting[8:], magicOption)
	be.PutUint16(greeting[16:], flagFixedNewstyle|flagNoZeroes)
	if _, err := w.Write(greeting[:]); err != nil {
		return session{}, err
	}
	var flags [4]byte
	if _, err := io.ReadFull(r, flags[:]); err != nil {
		return session{}, err
	}
	client := be.Uint32(flags[:])
	if client&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return session{}, fmt.Errorf("unknown client flags %#x", client)
	}
	n.noZeroes = client&flagNoZeroes != 0
	for {
		export, err := n.option()
		if err != nil {
			return session{}, err
		}
		if export != nil {
			return session{export, n.structured, n.structured && n.contextOf == export}, nil
		}
	}
}

// option answers one option. It returns the export, if that was chosen.
func (n *negotiation) option() (*Export, error) {
	var head [16]byte
	if _, err := io.ReadFull(n.r, head[:]); err != nil {
		return nil, err
	}
	if be.Uint64(head[0:]) != magicOption {
		return nil, errors.New("not an option")
	}
	opt, length := be.Uint32(head[8:]), be.Uint32(head[12:])
	if length > maxOption {
		return nil, fmt.Errorf("option %d with %d bytes", opt, length)
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(n.r, data); err != nil {
		return nil, err
	}
	switch opt {
	case optExportName:
		return n.exportName(string(data))
	case optAbort:
		_ = n.reply(opt, repAck, nil)
		return nil, errDone
	case optList:
		return nil, n.list(data)
	case optInfo, optGo:
		return n.info(opt, data)
	case optStructuredReply:
		if len(data) > 0 {
			return nil, n.refuse(opt, repErrInvalid, "NBD_OPT_STRUCTURED_REPLY takes no data")
		}
		n.structured = true
		return nil, n.reply(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		return nil, n.metaContext(opt, data)
	}
	return nil, n.refuse(opt, repErrUnsup, "not supported")
}

func (n *negotiation) reply(opt, kind uint32, data []byte) error {
	b := make([]byte, 20, 20+len(data))
	be.PutUint64(b[0:], magicOptionReply)
	be.PutUint32(b[8:], opt)
	be.PutUint32(b[12:], kind)
	be.PutUint32(b[16:], uint32(len(data)))
	_, err := n.w.Write(append(b, data...))
	return err
}

func (n *negotiation) refuse(opt, kind uint32, why string) error {
	return n.reply(opt, kind, []byte(why))
}

// find returns the export of that name. The empty name is the default export, which there is if there is but one.
func (n *negotiation) find(name string) *Export {
	for i := range n.exports {
		if n.exports[i].Name == name || name == "" && len(n.exports) == 1 {
			return &n.exports[i]
		}
	}
	return nil
}

// exportName is the oldest way to choose an export: there is no answer that says no.
func (n *negotiation) exportName(name string) (*Export, error) {
	e := n.find(name)
	if e == nil {
		return nil, fmt.Errorf("no export %.100q", name)
	}
	b := be.AppendUint64(nil, uint64(e.Image.Size()))
	b = be.AppendUint16(b, n.flags())
	if !n.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	if _, err := n.w.Write(b); err != nil {
		return nil, err
	}
	return e, nil
}

// flags are the transmission flags. Images don't change, so that what one connection reads any other does too.
func (n *negotiation) flags() uint16 {
	flags := uint16(flagHasFlags | flagReadOnly | flagCanMultiConn)
	if n.structured {
		flags |= flagSendDF
	}
	return flags
}

func (n *negotiation) list(data []byte) error {
	if len(data) > 0 {
		return n.refuse(optList, repErrInvalid, "NBD_OPT_LIST takes no data")
	}
	for _, e := range n.exports {
		b := be.AppendUint32(nil, uint32(len(e.Name)))
		b = append(b, e.Name...)
		b = append(b, e.Description...)
		if err := n.reply(optList, repServer, b); err != nil {
			return err
		}
	}
	return n.reply(optList, repAck, nil)
}

// info tells of an export, and chooses it if opt is NBD_OPT_GO.
func (n *negotiation) info(opt uint32, data []byte) (*Export, error) {
	p := payload{data: data}
	name := p.string()
	wanted := make([]uint16, 0, 4)
	for range p.uint16() {
		if p.bad {
			break
		}
		wanted = append(wanted, p.uint16())
	}
	if !p.complete() {
		return nil, n.refuse(opt, repErrInvalid, "malformed")
	}
	e := n.find(name)
	if e == nil {
		return nil, n.refuse(opt, repErrUnknown, "no such export")
	}
	b := be.AppendUint16(nil, infoExport)
	b = be.AppendUint64(b, uint64(e.Image.Size()))
	b = be.AppendUint16(b, n.flags())
	if err := n.reply(opt, repInfo, b); err != nil {
		return nil, err
	}
	told := map[uint16]bool{infoExport: true}
	for _, kind := range wanted {
		if told[kind] {
			continue
		}
		told[kind] = true
		b := be.AppendUint16(nil, kind)
		switch kind {
		case infoName:
			b = append(b, e.Name...)
		case infoDescription:
			b = append(b, e.Description...)
		case infoBlockSize:
			b = be.AppendUint32(b, 1)
			b = be.AppendUint32(b, preferredSize)
			b = be.AppendUint32(b, maxPayload)
		default: // the client gets by without
			continue
		}
		if err := n.reply(opt, repInfo, b); err != nil {
			return nil, err
		}
	}
	if err := n.reply(opt, repAck, nil); err != nil || opt != optGo {
		return nil, err
	}
	return e, nil
}

// metaContext lists or sets metadata contexts.
func (n *negotiation) metaContext(opt uint32, data []byte) error {
	p := payload{data: data}
	name := p.string()
	count := p.uint32()
	queries := make([]string, 0, 4)
	for range count {
		if p.bad {
			break
		}
		queries = append(queries, p.string())
	}
	if !p.complete() {
		return n.refuse(opt, repErrInvalid, "malformed")
	}
	if !n.structured {
		return n.refuse(opt, repErrInvalid, "structured replies were not negotiated")
	}
	if opt == optSetMetaContext {
		n.contextOf = nil // a new choice takes the place of the one before, a failed one too
	}
	e := n.find(name)
	if e == nil {
		return n.refuse(opt, repErrUnknown, "no such export")
	}
	if matches(opt, queries) {
		b := be.AppendUint32(nil, allocationID)
		if err := n.reply(opt, repMetaContext, append(b, allocationContext...)); err != nil {
			return err
		}
		if opt == optSetMetaContext {
			n.contextOf = e
		}
	}
	return n.reply(opt, repAck, nil)
}

// matches reports whether base:allocation is among what was asked for. A list of nothing, or of a whole namespace, asks
// for all contexts; to choose one takes its name.
func matches(opt uint32, queries []string) bool {
	if opt == optListMetaContext && len(queries) == 0 {
		return true
	}
	for _, q := range queries {
		if q == allocationContext || opt == optListMetaContext && q != "" && strings.TrimSuffix(allocationContext, "allocation") == q {
			return true
		}
	}
	return false
}

// payload takes an option's data apart. What is not there reads as zero, and makes it bad.
type payload struct {
	data []byte
	bad  bool
}

// take returns the next size bytes.
func (p *payload) take(size uint32) []byte {
	if p.bad || size > uint32(len(p.data)) {
		p.bad = true
		return make([]byte, 4)
	}
	b := p.data[:size]
	p.data = p.data[size:]
	return b
}

func (p *payload) uint16() uint16 { return be.Uint16(p.take(2)) }
func (p *payload) uint32() uint32 { return be.Uint32(p.take(4)) }

// string returns a string with its length before it.
func (p *payload) string() string {
	size := p.uint32()
	if size > maxString {
		p.bad = true
	}
	if p.bad {
		return ""
	}
	return string(p.take(size))
}

// complete reports whether all was there, and nothing more.
func (p *payload) complete() bool { return !p.bad && len(p.data) == 0 }
