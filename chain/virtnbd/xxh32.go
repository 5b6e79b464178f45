package virtnbd

import (
	"encoding/binary"
	"math/bits"
)

// xxh32 is the check sum of LZ4 frames: XXH32 with seed 0 (github.com/Cyan4973/xxHash,
// doc/xxhash_spec.md).
func xxh32(b []byte) uint32 {
	const (
		p1 = 0x9e3779b1
		p2 = 0x85ebca77
		p3 = 0xc2b2ae3d
		p4 = 0x27d4eb2f
		p5 = 0x165667b1
	)
	le := binary.LittleEndian
	n := uint32(len(b))
	h := uint32(p5)
	if len(b) >= 16 {
		// p1+p2 and -p1 don't fit as constants.
		one := uint32(p1)
		a := [4]uint32{one + p2, p2, 0, -one}
		for ; len(b) >= 16; b = b[16:] {
			for i := range a {
				a[i] = bits.RotateLeft32(a[i]+le.Uint32(b[4*i:])*p2, 13) * p1
			}
		}
		h = bits.RotateLeft32(a[0], 1) + bits.RotateLeft32(a[1], 7) + bits.RotateLeft32(a[2], 12) + bits.RotateLeft32(a[3], 18)
	}
	h += n
	for ; len(b) >= 4; b = b[4:] {
		h = bits.RotateLeft32(h+le.Uint32(b)*p3, 17) * p4
	}
	for _, c := range b {
		h = bits.RotateLeft32(h+uint32(c)*p5, 11) * p1
	}
	h = (h ^ h>>15) * p2
	h = (h ^ h>>13) * p3
	return h ^ h>>16
}
