package main

import (
	"testing"

	"qmchain/proxmox"
)

// What shells are offered for a phase is what Proxmox VE calls with.
func TestOffers(t *testing.T) {
	t.Parallel()
	sources := offers(proxmox.Host{Etc: t.TempDir()})
	for what, want := range map[string][2]string{"phase": {"pre-start", "post-stop"}, "vzdump-phase": {"job-init", "post-restart"}, "mode": {"snapshot", "stop"}} {
		found := sources[what](nil)
		if found[0].Word != want[0] || found[len(found)-1].Word != want[1] {
			t.Errorf("%s: %v", what, found)
		}
	}
	if found := sources["vmid"](nil); found != nil {
		t.Errorf("VMs without a node: %v", found)
	}
}
