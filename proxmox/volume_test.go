package proxmox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

func TestVolume(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddStorage("lvmthin", "thin")
	n.AddStorage("rbd", "ceph")
	n.AddStorage("lvm", "vg")
	n.AddStorage("nfs", "share")
	n.AddStorage("esxi", "old")
	file := func(path string) string {
		path = filepath.Join(n.Storage, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	qcow2, raw := file("images/110/vm-110-disk-0.qcow2"), file("images/110/vm-110-disk-1.raw")
	thin, vg := file("volumes/thin/vm-110-disk-0"), file("volumes/vg/vm-110-disk-1.qcow2")
	file("volumes/old/vm-110-disk-0")
	file("volumes/share/vm-110-disk-0.vmdk")
	for _, test := range []struct {
		drive, path, format, text string
	}{
		{"local:110/vm-110-disk-0.qcow2,size=1M", qcow2, "qcow2", ""},
		{"local:110/vm-110-disk-1.raw", raw, "raw", ""},
		{"file=thin:vm-110-disk-0,size=1M", thin, "raw", ""},
		{"vg:vm-110-disk-1.qcow2", vg, "qcow2", ""},
		{"local:110/vm-110-disk-0.qcow2,format=raw", qcow2, "raw", ""}, // as PVE takes it
		{raw, raw, "raw", ""},
		{qcow2 + ",format=qcow2", qcow2, "qcow2", ""},
		{"/dev/null", "", "", "neither a file nor a block device"},
		{"ceph:vm-110-disk-0", "", "", "neither a file nor a block device"},
		{"old:vm-110-disk-0", "", "", "is not certain"},
		{"share:vm-110-disk-0.vmdk", "", "", "is not certain"},
		{"share:vm-110-disk-0.vmdk,format=vmdk", "", "", "of format vmdk"},
		{"thin:vm-110-disk-7", "", "", "not active on this node"},
		{"local:110/vm-110-disk-7.qcow2", "", "", "is not there"},
		{"none", "", "", "is no volume"},
		{"gone:vm-110-disk-0", "", "", "storage 'gone' does not exist"},
	} {
		c := proxmox.ParseConfig(110, []byte("scsi0: "+test.drive+"\n"))
		v, err := h.Volume(t.Context(), c.Drives()[0])
		if v.Path != test.path || v.Format != test.format || (err == nil) != (test.text == "") || err != nil && !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: %+v, %v", test.drive, v, err)
		}
		if got, want := errors.Is(err, proxmox.ErrInactive), strings.HasPrefix(test.drive, "thin:vm-110-disk-7"); got != want {
			t.Errorf("%s: inactive: %v", test.drive, got)
		}
	}
}

// TestFreezeLimits: an agent that hangs is given up in time, whatever was asked of it, and what may be frozen is known.
func TestFreezeLimits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	qm := filepath.Join(dir, "qm")
	freeze := func(ping, freeze, thaw, status string) proxmox.FSFreeze {
		t.Helper()
		script := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in\n'guest cmd 110 ping') %s;;\n*-freeze) %s;;\n*-thaw) %s;;\n*-status) %s;;\n*) exit 99;;\nesac\n", ping, freeze, thaw, status)
		if err := os.WriteFile(qm, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		return proxmox.FSFreeze{Host: proxmox.Host{Program: qm}, VMID: 110}
	}
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // long enough for what does not hang
		t.Cleanup(cancel)
		return ctx
	}
	const hang = "exec sleep 60"
	for _, test := range []struct {
		what           string
		agent          func() proxmox.FSFreeze
		asked, good    bool
		thawed, hanged bool
	}{
		{"sound", func() proxmox.FSFreeze { return freeze(":", "echo 2", "echo 2", "echo thawed") }, true, true, true, false},
		{"dead", func() proxmox.FSFreeze { return freeze("exit 255", "echo 2", "exit 255", "exit 255") }, false, false, false, false},
		{"hangs at once", func() proxmox.FSFreeze { return freeze(hang, "echo 2", hang, hang) }, false, false, false, true},
		{"hangs while it freezes", func() proxmox.FSFreeze { return freeze(":", hang, "echo 1", "echo thawed") }, true, false, true, true},
		{"nothing to freeze", func() proxmox.FSFreeze { return freeze(":", "echo 0", "echo 0", "echo thawed") }, true, false, true, false},
		{"still frozen", func() proxmox.FSFreeze { return freeze(":", "echo 1", "echo 0", "echo frozen") }, true, true, false, false},
	} {
		f := test.agent()
		ctx := t.Context()
		if test.hanged {
			ctx = short()
		}
		began := time.Now()
		asked, err := f.Freeze(ctx)
		if asked != test.asked || (err == nil) != test.good {
			t.Errorf("%s: asked %v, %v", test.what, asked, err)
		}
		if test.hanged {
			ctx = short()
		}
		if err := f.Thaw(ctx); (err == nil) != test.thawed {
			t.Errorf("%s: thaw: %v", test.what, err)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("%s: took %s", test.what, took)
		}
	}
	if _, err := (proxmox.Host{Program: qm}).Volume(t.Context(), proxmox.Drive{ID: "scsi0"}); !errors.Is(err, proxmox.ErrVolume) {
		t.Errorf("no volume: %v", err)
	}
}
