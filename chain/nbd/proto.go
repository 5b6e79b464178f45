package nbd

// The numbers of the protocol that a read-only server needs, under the protocol's own names.

const (
	magicInit        = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply = 0x0003e889045565a9
	magicRequest     = 0x25609513
	magicSimple      = 0x67446698
	magicStructured  = 0x668e33ef
)

// Handshake flags; the client's have the same values.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	flagHasFlags     = 1 << 0
	flagReadOnly     = 1 << 1
	flagSendDF       = 1 << 7
	flagCanMultiConn = 1 << 8
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErr        = 1 << 31
	repErrUnsup   = repErr | 1
	repErrInvalid = repErr | 3
	repErrUnknown = repErr | 6
)

// Kinds of information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Flags of commands.
const (
	cmdFlagDF     = 1 << 2
	cmdFlagReqOne = 1 << 3
)

// Chunks of a structured reply.
const (
	chunkFlagDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 | 1
)

// Errors of commands.
const (
	errPerm     = 1
	errIO       = 5
	errInval    = 22
	errOverflow = 75
)

// States of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

const (
	allocationContext = "base:allocation"
	allocationID      = 1 // our choice
)

// Sizes in bytes.
const (
	maxString     = 4096     // the protocol's own bound
	maxOption     = 64 << 10 // payload of an option
	maxPayload    = 32 << 20 // of one request: what clients may assume that they can read or write at once
	requestBytes  = 28
	preferredSize = 64 << 10 // a cluster: asking for less costs as much
)
