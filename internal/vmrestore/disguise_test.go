package vmrestore_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"qmchain/internal/testenv"
	"qmchain/internal/vmrestore"
)

// TestDisguise asks qemu-img what it takes each beginning for.
func TestDisguise(t *testing.T) {
	t.Parallel()
	padded := func(at int, text string) []byte {
		data := make([]byte, 64<<10)
		copy(data[at:], text)
		return data
	}
	made := func(format string) []byte {
		path := filepath.Join(t.TempDir(), "image")
		testenv.Output(t, "qemu-img", "create", "-q", "-f", format, path, "1M")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	disks := map[string][]byte{
		"zeroes":      padded(0, ""),
		"a boot code": padded(0, "\xeb\x63\x90"),
		"almost":      padded(0, "QFI\xfa"),
		"text":        padded(0, "# version=1\nno VMDK\n"),
		"vmdk text":   padded(0, "# Disk DescriptorFile\nversion=1\n"),
		"COWD":        padded(0, "COWD\x01\x00\x00\x00"),
		"luks":        padded(0, "LUKS\xba\xbe\x00\x01"), // qemu-img makes one only where it can measure the processor
		"not at 0":    padded(512, "LUKS\xba\xbe"),
		"tiny":        make([]byte, 512),
	}
	for _, format := range []string{"qcow", "qcow2", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels"} {
		disks[format] = made(format)
	}
	for name, data := range disks {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "qemu-img", "info", "--output=json", path).Output()
		var info struct{ Format string }
		if err == nil {
			err = json.Unmarshal(out, &info)
		}
		got, readErr := vmrestore.Disguise(bytes.NewReader(data))
		if readErr != nil {
			t.Errorf("%s: %v", name, readErr)
		}
		// What qemu-img can't open it has taken for something.
		if other := err != nil || info.Format != "raw"; other != (got != "") {
			t.Errorf("%s: %q, qemu-img says %q, %v", name, got, info.Format, err)
		}
	}
}
