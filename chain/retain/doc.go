// Package retain removes points that are not to be kept, without hurting those that are.
//
// The words:
//
//   - policy: how many points to keep of which periods, in Proxmox VE's words (keep-last, keep-daily, …).
//   - tracking parent: a point that the next increment of a disk goes on from. It is never removed by a policy.
//   - base: a point that was removed but whose images are still there, hidden, because points that are kept are read through
//     them, or because somebody reads it just now.
//   - merge: a base's image takes in what that of its only child holds, and takes its place. The child is then what the base
//     was, a full for instance, and still reads as before. So a chain never needs a second full.
//
// A merge writes what the child's image holds into the base's, cluster by cluster (qemu-img commit), however large the base
// is. That is safe for those who read the child or what descends from it, as what is written is hidden from them by the
// child's own image. Only the base itself reads as something else then, and with it a second child: such a base waits.
//
// The steps of a merge, each of which can be the last before a crash; the next Sweep goes on:
//
//  1. The base's manifest says that its image is being merged. Readers take it at any size from now on.
//  2. If the child's disk is larger the base's image is grown, while nobody reads what descends from it. If the base's
//     clusters are larger, nobody may do so until step 6: what is written then is not all hidden.
//  3. qemu-img commit, sync, the child's identity.
//  4. The child's manifest says what its next image will be. Readers look which one is there.
//  5. One rename puts the base's file in the place of the child's.
//  6. The child's manifest says what is there.
package retain
