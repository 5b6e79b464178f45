package proxmox_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

func TestHookscript(t *testing.T) {
	t.Parallel()
	n := pvetest.Install(t)
	host := proxmox.Host{Etc: n.Etc, Run: n.Run, Events: n.Events, VzdumpLock: n.VzdumpLock, Program: n.Program}
	ctx := t.Context()
	n.AddStorage("nfs", "share")
	volume := n.AddSnippet("x.sh", "#!/bin/sh\n")
	if path, err := host.SnippetPath(ctx, volume); err != nil || path != filepath.Join(n.Storage, "snippets/x.sh") {
		t.Errorf("%s, %v", path, err)
	}
	for _, bad := range []string{"", "x.sh", "/x.sh", "local:", "local:snippets/", "local:snippets/../x", "local:snippets/a/b", "local:iso/x.iso", "local:110/vm-110-disk-0.raw", "none:snippets/x.sh"} {
		if path, err := host.SnippetPath(ctx, bad); err == nil {
			t.Errorf("%q: %s", bad, path)
		}
	}
	storages, err := host.Storages()
	if err != nil || storages["local"].Shared || !storages["share"].Shared {
		t.Errorf("%v, %v", storages, err)
	}

	n.AddVM(110)
	n.AddVM(111, "hookscript: "+volume)
	n.AddVM(112, "[PENDING]", "hookscript: local:snippets/x.sh2")
	n.WriteConfig(113, "memory: 64\n\n[old]\nhookscript:  "+volume+" \n")
	n.AddVM(114, "description: hookscript: "+volume)
	n.MoveAway(113, "pve2")
	if users, err := host.HookscriptUsers(volume); err != nil || !slices.Equal(users, []string{"111", "113"}) {
		t.Errorf("%v, %v", users, err)
	}
	if nodes, err := host.Nodes(); err != nil || !slices.Equal(nodes, []string{"pve1", "pve2"}) {
		t.Errorf("%v, %v", nodes, err)
	}
	for _, want := range []string{volume, ""} {
		c, err := host.Config(110)
		if err != nil {
			t.Fatal(err)
		}
		if err := host.SetHookscript(ctx, c, want); err != nil {
			t.Error(err)
		}
		if err := host.SetHookscript(ctx, c, want); !errors.Is(err, proxmox.ErrChanged) {
			t.Errorf("with an old configuration: %v", err)
		}
		if c, err = host.Config(110); err != nil || c.Hookscript() != want {
			t.Errorf("%q, %v", c.Hookscript(), err)
		}
	}
	if (proxmox.Host{Etc: "/nowhere"}).Rebooting(110) || host.Rebooting(110) {
		t.Error("it is not rebooting")
	}
}

func TestRemoveStale(t *testing.T) {
	t.Parallel()
	// A socket's path holds 107 bytes.
	dir, err := os.MkdirTemp("", "stale")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := proxmox.Host{Run: dir}.Socket(110)
	step := func(what string, wantRemoved bool, wantErr error, left bool) {
		t.Helper()
		removed, err := socket.RemoveStale(t.Context())
		if removed != wantRemoved || (wantErr == nil) != (err == nil) || !errors.Is(err, wantErr) && !errors.Is(wantErr, errAny) {
			t.Errorf("%s: %t, %v", what, removed, err)
		}
		if _, err := os.Lstat(socket.Path()); (err == nil) != left {
			t.Errorf("%s: left: %v", what, err)
		}
	}
	step("nothing", false, nil, false)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket.Path()})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	step("somebody listens", false, proxmox.ErrBusy, true)
	_ = l.Close()
	step("nobody listens", true, nil, false)
	if err := os.WriteFile(socket.Path(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	step("a file", false, errAny, true)
	if err := os.Remove(socket.Path()); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("elsewhere", socket.Path()); err != nil {
		t.Fatal(err)
	}
	step("a link", false, errAny, true)
}

var errAny = errors.New("any")
