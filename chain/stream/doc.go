// Package stream carries points from one repository to another through a pipe: to a file, to tape, to another host.
//
// The words:
//
//   - stream: points of a repository, one after the other. It only goes one way.
//   - sender, receiver: the one who writes a stream, and the one who makes points of it in another repository.
//   - have: a list of the points that a receiver has, made before. With it a sender leaves those out.
//
// # What is sent
//
// A point is sent with all that it is read from, parents first: points, and bases (points that were removed, but are still
// needed; they come with those of their disks whose images are still there). Where a have says that the receiver has a
// parent, that one and what it is made on is left out. A point is known by its id and its uuid alone: what its disks read
// as never changes, though a merge can change in which images that is stored, here and there independently. So a point that
// both have need not have the same images.
//
// What is sent is held meanwhile, so that nobody merges it. A base that is in the middle of a merge which was cut off
// can't be sent (ErrUnsettled).
//
// # What is received
//
// Each point becomes one of the receiver's by one rename, as soon as it is whole, on disk, and found to be what it says:
//
//   - its manifest has the right seal, and is of this guest and this point;
//   - each block of its images has the check sum that the manifest seals, before it is written;
//   - each image carries the point's uuid and the disk's name in its header, and names no other file but its parent's
//     image as the manifest says;
//   - its parents are there, by id and uuid, and can be read.
//
// So what is interrupted leaves whole points, and the same transfer again goes on after them: points that are there
// already are read past. A point that was half there is begun again: the stream has no way back for telling the sender
// what to leave out of an image, and to keep a part of one would take reading it again to trust it. Who has to move a first
// full over a bad line does so with rsync.
//
// Nothing that is there is ever replaced. Another point under the same id is refused (ErrOtherPoint), and so is, unless
// the caller says otherwise, another guest under the same name, which the SMBIOS UUID tells (repo.ErrOtherGuest). What the
// receiver has removed, and a sender without a have sends again, becomes a point again; but where its images are still
// needed there, as a base, it is left so.
//
// The receiver's repository has an id of its own, so that no tracking bitmap of the sender's guests counts there: should
// a guest's backups go on in the received copy, the first is a full. Who wants them to go on as increments copies the
// repository's folder as a whole instead.
//
// # The format, version 1
//
// A stream is a tar archive (POSIX.1-2001, "pax") of regular files alone, in this order:
//
//	qmchain-stream.json                            the head
//	110/20261120T101523Z-3f9c/point.json           the manifest of the first point
//	110/20261120T101523Z-3f9c/scsi0.sums           check sums of each disk's image, in the order of the manifest
//	110/20261120T101523Z-3f9c/guest/110.conf       files that belong to the guest, sorted by name, if there are any
//	110/images/20261120T101523Z-3f9c.scsi0.qcow2   each disk's image, in the order of the manifest
//	110/.20261120T111523Z-81aa.base/point.json     the next one, here a base
//	…
//
// The names are those in a repository, so that `tar -x` in an empty folder makes images that qemu-img reads. The head is a
// JSON object:
//
//	{"format": 1, "repository": the sender's id, "points": how many there are, "bytes": of all images}
//
// There are exactly as many points: a stream that ends before was cut off. Manifests have no merge under way ("next",
// "merging"). Of pax's extended headers there are but path, size and mtime. Time stamps are those of the points, and mean
// nothing. All else is refused: links, folders, devices, sparse files, names with "..", sizes other than the manifest's.
//
// A have is a JSON object:
//
//	{"format": 1, "repository": the receiver's id or "", "points": [{"guest": "110", "id": "2026…", "uuid": "0123…"}, …]}
package stream
