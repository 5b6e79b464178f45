// Package nbd serves disk images, read-only, to whatever speaks the NBD protocol: qemu-img and QEMU, nbd-client, nbdcopy.
//
// The words are those of the protocol (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md):
//
//   - export: an image under a name. A client chooses one and then reads it.
//   - negotiation: the first phase of a connection, made of options that the client asks for, one after the other. Here it
//     is "fixed newstyle", without TLS.
//   - transmission: the second phase. Many requests can be under way at once, and are answered in any order.
//   - structured reply: an answer in chunks, of data, of holes, of an error. Older clients get simple ones.
//   - metadata context: what a client can ask of ranges; "base:allocation", the only one here, is whether they are zeroes.
//
// Clients are not trusted. Lengths are bounded before anything is allocated, and a client takes no more memory than
// maxInFlight buffers, however much it asks for: data goes out in pieces. A client that does not get to the end of its
// negotiation, or takes no answers, is cut off after a time. No client makes another one wait.
package nbd
