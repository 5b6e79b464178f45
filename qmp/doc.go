// Package qmp talks to one QEMU process over its QMP socket.
//
// The words:
//
//   - QMP, the QEMU Machine Protocol: JSON objects over a stream socket. The server greets, the client
//     negotiates capabilities, and from then on sends commands.
//   - A command has a name, arguments and an id; QEMU answers each with a reply that carries the same id:
//     a return value, or an error with a class and a description.
//   - An event comes at any time and belongs to no command.
//   - A job is work that QEMU does in the background, such as a backup. It outlives the command that
//     started it and is known by its id.
//
// [Client] is the transport and holds what it promises: replies of any size, found by id; every command
// bounded in time; no event lost and none that blocks a command; every waiter told when the connection
// ends. On top of it stands one method per command that is used, with only the fields that are used:
// fields that QEMU adds later are ignored, and enumerations stay strings, so that a value unknown to this
// package is no error. [Client.WaitJob] awaits a job to its true end.
//
// A QMP socket serves one client at a time: whoever connects while it is taken gets no greeting until the
// other leaves. That is [ErrBusy].
//
// Nothing that the peer sends is trusted: what is not valid QMP ends the connection with an error.
//
// The protocol is specified in QEMU's docs/interop/qmp-spec, the commands in its QAPI schema (qapi/*.json).
package qmp
