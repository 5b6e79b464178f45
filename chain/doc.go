// Package chain holds the words of backup chains and the rules between them; it does no input or output.
//
// A guest is a virtual machine. A point is all chosen disks of one guest at one instant. The image of a disk in a point
// is full, or it holds what changed since the image of an earlier point, its parent; a full image and all that descends
// from it is a chain. Descent is told by the ids in manifests, never by time stamps, file names or what an image's
// header says. A tracking bitmap is the QEMU dirty bitmap that has recorded on a disk since one point; its name says
// which point, of which repository, and under which name the disk was stored there.
package chain
