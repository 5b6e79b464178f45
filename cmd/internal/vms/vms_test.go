package vms

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"qmchain/cmd/internal/cli"
	"qmchain/internal/ui"
	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

func node(t *testing.T) proxmox.Host {
	t.Helper()
	n := pvetest.Install(t)
	n.AddVM(110, "scsi0: local:110/vm-110-disk-0.qcow2,size=1G", "ide2: none,media=cdrom", "efidisk0: local:110/vm-110-disk-1.qcow2,size=1M")
	n.AddVM(111)
	n.AddVM(210)
	n.MoveAway(210, "pve2")
	return proxmox.Host{Etc: n.Etc, Run: n.Run, Events: n.Events, VzdumpLock: n.VzdumpLock, Program: n.Program}
}

func TestMeant(t *testing.T) {
	t.Parallel()
	host := node(t)
	for id, want := range map[proxmox.VMID]string{
		112: "did you mean 110 or 111?",
		101: "did you mean 110 or 111?",
		999: "`qm list` shows the VMs of this node",
		210: "run it on that node",
	} {
		_, err := host.Config(id)
		if err = Explain(Meant(err, host, id)); ui.ExitCode(err) != ui.ExitNotFound || ui.HintOf(err) != want {
			t.Errorf("%s: %v, %q, want %q", id, err, ui.HintOf(err), want)
		}
	}
	if other := errors.New("other"); !errors.Is(Meant(other, host, 112), other) || ui.HintOf(Meant(other, host, 112)) != "" {
		t.Error("an error that has nothing to do with it got a hint")
	}
}

func TestGroups(t *testing.T) {
	t.Parallel()
	host := node(t)
	hints := func(s proxmox.Selection) string {
		_, _, err := Select(host, s)
		if err = Explain(err); ui.ExitCode(err) != ui.ExitNotFound {
			t.Errorf("%+v: %v", s, err)
		}
		return ui.HintOf(err)
	}
	for want, s := range map[string]proxmox.Selection{"there are no pools": {Pool: "web"}, "there are no tags": {Tag: "web"}} {
		if hint := hints(s); hint != want {
			t.Errorf("%+v: %q, want %q", s, hint, want)
		}
	}
	users := "pool:web::110,111::\npool:db::210::\n"
	if err := os.WriteFile(filepath.Join(host.Etc, "user.cfg"), []byte(users), 0o600); err != nil {
		t.Fatal(err)
	}
	storages := "nfs: nas\n\tcontent images,snippets\n\nlvmthin: fast\n\tcontent images\n\ndir: isos\n\tpath /iso\n\tcontent iso\n"
	if err := os.WriteFile(filepath.Join(host.Etc, "storage.cfg"), []byte(storages), 0o600); err != nil {
		t.Fatal(err)
	}
	config, err := os.OpenFile(host.ConfigPath(111), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = config.WriteString("tags: Prod;web\n")
	}
	if err := errors.Join(err, config.Close()); err != nil {
		t.Fatal(err)
	}
	for want, s := range map[string]proxmox.Selection{
		"did you mean web?": {Pool: "wbe"}, "pools are db, web": {Pool: "elsewhere"}, "did you mean prod?": {Tag: "prd"}, "tags are prod, web": {Tag: "nightly"},
	} {
		if hint := hints(s); hint != want {
			t.Errorf("%+v: %q, want %q", s, hint, want)
		}
	}
	if ids, _, err := Select(host, proxmox.Selection{Tag: "PROD"}); err != nil || !slices.Equal(ids, []proxmox.VMID{111}) {
		t.Errorf("%v, %v", ids, err)
	}
	for what, want := range map[string][]cli.Offer{
		"pool": {{Word: "db", Help: "VM 210"}, {Word: "web", Help: "2 VMs"}}, "tag": {{Word: "prod", Help: "VM 111"}, {Word: "web", Help: "VM 111"}},
		"storage": {{Word: "fast", Help: "lvmthin"}, {Word: "local", Help: "dir"}, {Word: "nas", Help: "nfs"}}, "snippets": {{Word: "local", Help: "dir"}, {Word: "nas", Help: "nfs"}},
	} {
		if offers := Sources(host)[what](cli.NewLine("", "")); !slices.Equal(offers, want) {
			t.Errorf("%s: %v", what, offers)
		}
	}
	if offers := Sources(host)["storage"](cli.NewLine("", "scsi0=f")); len(offers) != 3 || offers[0].Word != "scsi0=fast" {
		t.Errorf("storages of a disk: %v", offers)
	}
}

func TestSources(t *testing.T) {
	t.Parallel()
	host := node(t)
	offers := Sources(host)["vmid"](cli.NewLine("", ""))
	if len(offers) != 2 || offers[0] != (cli.Offer{Word: "110", Help: "vm110"}) || offers[1].Word != "111" {
		t.Errorf("VMs: %v", offers)
	}
	words := ""
	for _, o := range Disks(host, "110") {
		words += o.Word + " "
	}
	if words != "efidisk0 scsi0 " {
		t.Errorf("disks: %q", words)
	}
	for _, vmid := range []string{"", "web", "999"} {
		if offers := Disks(host, vmid); offers != nil {
			t.Errorf("disks of %q: %v", vmid, offers)
		}
	}
	if offers := Sources(proxmox.Host{Etc: t.TempDir()})["vmid"](cli.NewLine("", "")); offers != nil {
		t.Errorf("no node: %v", offers)
	}
}
