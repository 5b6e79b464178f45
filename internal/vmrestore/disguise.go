package vmrestore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
)

// marks are what QEMU's programs recognise image formats by, where they are not told: the format's name, an offset, and the
// bytes there. From the probe functions of QEMU's block drivers (2.x to 11).
var marks = []struct {
	format string
	at     int
	text   string
}{
	{"qcow or qcow2", 0, "QFI\xfb"},
	{"qed", 0, "QED\x00"},
	{"vmdk", 0, "KDMV"},
	{"vmdk", 0, "COWD"},
	{"vdi", 0x40, "\x7f\x10\xda\xbe"},
	{"vpc", 0, "conectix"},
	{"vhdx", 0, "vhdxfile"},
	{"parallels", 0, "WithoutFreeSpace"},
	{"parallels", 0, "WithouFreSpacExt"},
	{"luks", 0, "LUKS\xba\xbe"},
	{"bochs", 0, "Bochs Virtual HD Image"},
	{"cloop", 0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"},
}

// probed is how much of a file QEMU's programs look at, in bytes.
const probed = 2048

// vmdkText is a VMDK's description: comments and empty lines, and then its version.
var vmdkText = regexp.MustCompile(`^(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n`)

// Disguise tells whether a raw disk would be taken for an image of another format, and of which: a disk that is all LUKS, say,
// or one that a guest has written such a header to. The result is "" for most.
func Disguise(disk io.ReaderAt) (format string, err error) {
	head := make([]byte, probed)
	n, err := disk.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("its beginning: %w", err)
	}
	head = head[:n]
	for _, m := range marks {
		if len(head) > m.at && bytes.HasPrefix(head[m.at:], []byte(m.text)) {
			return m.format, nil
		}
	}
	if vmdkText.Match(head) {
		return "vmdk", nil
	}
	return "", nil
}
