package virtnbd

import "testing"

func TestXXH32(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint32{
		"":    0x02cc5d05,
		"a":   0x550d7456,
		"abc": 0x32d153ff,
		"Nobody inspects the spammish repetition": 0xe2293b2f,
	} {
		if got := xxh32([]byte(text)); got != want {
			t.Errorf("%q: %#08x, not %#08x", text, got, want)
		}
	}
}
