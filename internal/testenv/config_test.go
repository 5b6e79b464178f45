package testenv

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func decode(t *testing.T, text string, result any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), result); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
}

// What `qm showcmd` of PVE 9 prints for a disk, with other paths.
const (
	pve9Object   = `{"id":"throttle-drive-scsi0","limits":{},"qom-type":"throttle-group"}`
	pve9Blockdev = `{"detect-zeroes":"unmap","discard":"unmap","driver":"throttle","file":{"cache":{"direct":true,"no-flush":false},` +
		`"detect-zeroes":"unmap","discard":"unmap","driver":"qcow2","file":{"aio":"io_uring","cache":{"direct":true,"no-flush":false},` +
		`"detect-zeroes":"unmap","discard":"unmap","driver":"file","filename":"/vm/a,b.qcow2","node-name":"eHASH","read-only":false},` +
		`"node-name":"fHASH","read-only":false},"node-name":"drive-scsi0","read-only":false,"throttle-group":"throttle-drive-scsi0"}`
	// The shape of a name: a letter and 30 hexadecimal digits.
	pve9Name = `"([ef])[0-9a-f]{30}"`
)

func TestThrottleIsPVE9s(t *testing.T) {
	t.Parallel()
	args, err := driveArgs(Config{Style: Throttle}, Disk{ID: "scsi0", Path: "/vm/a,b.qcow2", Format: "qcow2", Cache: "none", Discard: "unmap", DetectZeroes: "unmap"}, "io_uring")
	if err != nil {
		t.Fatal(err)
	}
	if len(args) != 4 || args[0] != "-object" || args[2] != "-blockdev" {
		t.Fatalf("%q", args)
	}
	args[3] = regexp.MustCompile(pve9Name).ReplaceAllString(args[3], `"${1}HASH"`)
	for i, want := range map[int]string{1: pve9Object, 3: pve9Blockdev} {
		var g, w any
		decode(t, args[i], &g)
		decode(t, want, &w)
		if diff := cmp.Diff(w, g); diff != "" {
			t.Errorf("%s: (-PVE +here)\n%s", args[i-1], diff)
		}
	}
}

func TestDriveIsPVE8s(t *testing.T) {
	t.Parallel()
	const (
		scsi   = "file=/vm/a,,b.qcow2,if=none,id=drive-scsi0,discard=on,format=qcow2,cache=none,aio=io_uring,detect-zeroes=unmap"
		virtio = "file=/vm/b.raw,if=none,id=drive-virtio1,format=raw,cache=none,aio=io_uring,detect-zeroes=on"
	)
	for want, d := range map[string]Disk{
		scsi:   {ID: "scsi0", Path: "/vm/a,b.qcow2", Format: "qcow2", Cache: "none", Discard: "unmap", DetectZeroes: "unmap"},
		virtio: {ID: "virtio1", Path: "/vm/b.raw", Format: "raw", Cache: "none", Discard: "ignore", DetectZeroes: "on"},
	} {
		args, err := driveArgs(Config{Style: Drive}, d, "io_uring")
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(options(want), options(args[1])); args[0] != "-drive" || diff != "" {
			t.Errorf("%s: (-PVE +here)\n%s", args[0], diff)
		}
	}
}

func TestDevicesArePVEs(t *testing.T) {
	t.Parallel()
	for want, d := range map[string]Disk{
		"scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,write-cache=on": {ID: "scsi0", Path: "x"},
		"virtio-blk-pci,drive=drive-virtio1,id=virtio1,write-cache=on":                                  {ID: "virtio1", Path: "x"},
		"ide-hd,bus=ahci0.2,drive=drive-sata2,id=sata2,write-cache=on":                                  {ID: "sata2", Path: "x"},
		"ide-cd,bus=ide.0,unit=0,id=ide0":                                                               {ID: "ide0", Device: "ide-cd"},
	} {
		got, err := deviceArgs(Config{Style: Throttle}, d)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(options(want), options(got.device)); diff != "" {
			t.Errorf("(-PVE +here)\n%s", diff)
		}
	}
}

// options splits an option string: their order does not matter to QEMU.
func options(s string) []string {
	parts := strings.Split(s, ",")
	slices.Sort(parts)
	return parts
}

func TestIOOutcome(t *testing.T) {
	t.Parallel()
	const ops = "\n64 KiB, 1 ops; 00.00 sec (2.3 MiB/sec and 602.0 ops/sec)\n"
	for _, c := range []struct {
		command, out string
		ok           bool
	}{
		{"write -P 1 0 64k", "wrote 65536/65536 bytes at offset 0" + ops, true},
		{"write -P 1 0 64k", "wrote 4096/65536 bytes at offset 0" + ops, false},
		{"write -P 1 0 64k", "write failed: No space left on device\n", false},
		{"write -P 1 0 64k", "", false},
		{"read -P 1 0 64k", "read 65536/65536 bytes at offset 0" + ops, true},
		{"read -P 1 0 64k", "Pattern verification failed at offset 0, 65536 bytes\nread 65536/65536 bytes at offset 0" + ops, false},
		{"discard 0 64k", "discard 65536/65536 bytes at offset 0" + ops, true},
		{"discard 0 64k", "discard failed: Input/output error\n", false},
		{"flush", "", true},
		{"flush", "flush failed: Input/output error\n", false},
		{"frobnicate", `command "frobnicate" not found` + "\n", false},
	} {
		if err := ioOutcome(c.command, c.out); (err == nil) != c.ok {
			t.Errorf("%s: %q: %v", c.command, c.out, err)
		}
	}
}
