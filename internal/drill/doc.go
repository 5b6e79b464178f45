// Package drill proves that a backup boots: it starts a throw-away guest on the disks of a point and waits for a sign of life.
//
// The words:
//
//   - drill: one start, with its verdict.
//   - sign: what the guest must show to pass: an answer of its guest agent, a login prompt or a given text on its serial
//     console.
//
// The guest is isolated: it has no network card, and QEMU's sandbox keeps it from starting programs. It can't change the
// backup: the disks are served read-only (package nbd), and what it writes goes into overlays in a private folder, which is
// removed with everything else when the drill ends, however it ends.
package drill
