package proxmox

import "testing"

func TestHAManaged(t *testing.T) {
	t.Parallel()
	const text = `vm: 110
	group two
	max_restart 2
	state started

ct: 111
	state started

vm: 112
	state ignored
	comment state started

vm: 113

vm: 114
	state stopped
`
	for vmid, want := range map[VMID]bool{110: true, 111: false, 112: false, 113: true, 114: true, 11: false, 115: false} {
		if got := haManaged(text, vmid); got != want {
			t.Errorf("VM %s: %t", vmid, got)
		}
	}
	if haManaged("", 110) || haManaged("vm 110\n\tstate started\n", 110) {
		t.Error("there is none")
	}
}
