package mountinfo

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// escaped is what the kernel makes of a path or a source (mangle in fs/proc_namespace.c).
func escaped(s string) string {
	return strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace(s)
}

// Names in the list are users', as those of FUSE mounts: whatever they are, they are read as they were, and make no other entry.
// Any other text is entries of its lines, or an error.
func FuzzParse(f *testing.F) {
	const line = "36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 shared:2 - ext3 /dev/root rw\n"
	f.Add([]byte(line+line), "/mnt/a b", `fuse - x\134`, "fuse.qmchain")
	f.Add([]byte("1 2 3 4 5 6 - 7 8 9"), "/", "", "x")
	f.Add([]byte("1 2 3 4 5 6 - 7 8\n"), "\n1 2 3:4 / / rw - a b c", `\`, "")
	f.Add([]byte("\n"), `\04`, `\400`, `-`)
	f.Fuzz(func(t *testing.T, text []byte, point, source, fsType string) {
		entries, err := parse(strings.NewReader(string(text)))
		if err != nil {
			if !strings.HasPrefix(err.Error(), Path+": ") {
				t.Errorf("an error that does not say what of: %v", err)
			}
		} else if lines := slices.Collect(strings.Lines(string(text))); len(entries) != len(lines) {
			t.Errorf("%d entries of %d lines", len(entries), len(lines))
		}
		for _, e := range entries {
			if top, ok := Top(entries, e.Point); !ok || top.Point != e.Point {
				t.Errorf("%q is not found", e.Point)
			}
		}

		if strings.ContainsAny(point+source+fsType, "\x00\r") || strings.ContainsAny(fsType, " \n\t") {
			return // the kernel has none of these, but for a CR, which ends no line for it
		}
		made := fmt.Sprintf("7 1 0:5 / %s ro,nosuid shared:7 - %s %s rw\n", escaped(point), fsType, escaped(source))
		want := Entry{"7", "0:5", point, fsType, source, "ro,nosuid,rw"}
		if got, err := parse(strings.NewReader(line + made + line)); err != nil || len(got) != 3 || got[1] != want {
			t.Errorf("%q: %+v, %v", made, got, err)
		}
	})
}
