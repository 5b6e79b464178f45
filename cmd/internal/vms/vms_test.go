package vms

import (
	"errors"
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
