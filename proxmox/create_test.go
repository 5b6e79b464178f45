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

	"github.com/google/go-cmp/cmp"

	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

func TestStorages(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	local := proxmox.Storage{Type: "dir", Path: "/var/lib/vz", Content: []string{"images", "rootdir", "vztmpl", "iso", "snippets", "backup"}}
	cfg := filepath.Join(n.Etc, "storage.cfg")
	if err := os.RemoveAll(cfg); err != nil {
		t.Fatal(err)
	}
	got, err := h.Storages()
	if diff := cmp.Diff(map[string]proxmox.Storage{"local": local}, got); err != nil || diff != "" {
		t.Errorf("without a file: %v, %s", err, diff)
	}
	text := `# a comment
dir: local
	path /srv/vz
	content iso,snippets

lvmthin: local-lvm
	thinpool data
	vgname pve
	content rootdir,images

nfs: nas
	server 10.0.0.1
	export /x
	content images,iso
	nodes pve1,pve3

zfspool: tank
	pool tank
	nodes pve2

rbd: ceph
	disable
	content images
`
	if err := os.WriteFile(cfg, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err = h.Storages()
	want := map[string]proxmox.Storage{
		"local":     {Type: "dir", Path: "/srv/vz", Content: []string{"iso", "snippets"}},
		"local-lvm": {Type: "lvmthin", Content: []string{"rootdir", "images"}},
		"nas":       {Type: "nfs", Path: "/mnt/pve/nas", Content: []string{"images", "iso"}, Shared: true},
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v, %s", err, diff)
	}
	for volume, path := range map[string]string{
		"local:iso/a.iso": "/srv/vz/template/iso/a.iso", "nas:snippets/y.sh": "/mnt/pve/nas/snippets/y.sh", "nas:snippets/x/y.sh": "",
		"local:110/vm-110-disk-0.raw": "", "local-lvm:iso/a.iso": "", "gone:iso/a.iso": "", "none": "", "local:iso/../../../etc/passwd": "",
	} {
		if got := proxmox.VolumeFile(want, volume); got != path {
			t.Errorf("%s is %q, want %q", volume, got, path)
		}
	}
	h.Etc = t.TempDir()
	if _, err := h.Storages(); !errors.Is(err, proxmox.ErrNoHost) {
		t.Errorf("without PVE: %v", err)
	}
}

func TestCheckFree(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	n.AddVM(110)
	n.AddVM(111)
	n.MoveAway(111, "pve2")
	n.AddContainer(112)
	for vmid, text := range map[proxmox.VMID]string{
		110: "VM 110 on node pve1: there is one already", 111: "VM 111 on node pve2: there is one already", 112: "container 112 on node pve1: there is one already",
	} {
		if err := h.CheckFree(vmid); !errors.Is(err, proxmox.ErrTaken) || err.Error() != text {
			t.Errorf("%s: %v", vmid, err)
		}
	}
	if err := h.CheckFree(113); err != nil {
		t.Error(err)
	}
}

// Task tells of the progress, and qm to end, which then has its time to undo what it has begun.
func TestTask(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	program := func(script string) {
		h.Program = filepath.Join(n.Dir, "fake-qm")
		if err := os.WriteFile(h.Program, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	program("echo x; echo 'transferred 1.0 GiB of 4.0 GiB (25.00%)'; echo 'transferred 4.0 GiB of 4.0 GiB (100.00%)'; head -c 200000 /dev/zero\n")
	var parts []float64
	if err := h.Task(t.Context(), func(part float64) { parts = append(parts, part) }, "set", "110"); err != nil || fmt.Sprint(parts) != "[0.25 1]" {
		t.Errorf("%v, %v", parts, err)
	}
	program("echo wrong >&2; exit 2")
	if err := h.Task(t.Context(), nil, "set", "110"); err == nil || err.Error() != "qm set 110: exit status 2: wrong" {
		t.Errorf("%v", err)
	}
	done := filepath.Join(n.Dir, "done")
	program(fmt.Sprintf("trap 'sleep 0.2; touch %s; exit 1' TERM\ntouch %[1]s.begun\nwhile :; do sleep 0.05; done\n", done))
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for {
			if _, err := os.Stat(done + ".begun"); err == nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		cancel()
	}()
	if err := h.Task(ctx, nil, "set", "110"); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if _, err := os.Stat(done); err != nil {
		t.Errorf("qm had no time to end: %v", err)
	}
	h.Program = filepath.Join(n.Dir, "no-such-qm")
	if err := h.Task(t.Context(), nil, "set", "110"); err == nil || !strings.Contains(err.Error(), "no-such-qm") {
		t.Errorf("without a program: %v", err)
	}
}

func TestFirewall(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	h := hostOf(n)
	if err := os.RemoveAll(filepath.Join(n.Etc, "firewall")); err != nil {
		t.Fatal(err)
	}
	for _, rules := range []string{"", "[RULES]\n", "[OPTIONS]\n", "", ""} {
		if err := h.WriteFirewall(110, []byte(rules)); err != nil {
			t.Error(err)
		}
		if got, err := h.Firewall(110); err != nil || string(got) != rules {
			t.Errorf("%q, want %q, %v", got, rules, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(n.Etc, "firewall")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
