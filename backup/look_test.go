package backup

import (
	"errors"
	"strings"
	"testing"

	"qmchain/qmp"
)

// graph builds a view of one device over a stack of nodes, "driver:name" from the top down, each the file of the one before.
func graph(device, qdev string, size int64, stack ...string) *view {
	v := &view{nodes: make(map[string]*node), passthrough: make(map[string]bool)}
	above := ""
	for _, s := range stack {
		driver, name, _ := strings.Cut(s, ":")
		info := &qmp.BlockDeviceInfo{NodeName: name, Driver: driver}
		info.Image.VirtualSize, info.Image.Filename = size, "/images/"+name
		if driver == "throttle" {
			info.Image.Filename = `json:{"throttle-group": "throttle-` + name + `", "driver": "throttle", "file": {"driver": "qcow2"}}`
		}
		n := &node{name: name, driver: driver, filename: info.Image.Filename, size: size, info: info, children: make(map[string]string)}
		v.nodes[name] = n
		if above == "" {
			n.parents = append(n.parents, parent{graphBackend, device, "root"})
			v.devices = append(v.devices, qmp.BlockInfo{Device: device, QDev: qdev, Inserted: info})
		} else {
			n.parents = append(n.parents, parent{graphNode, above, "file"})
			v.nodes[above].children["file"] = name
		}
		above = name
	}
	return v
}

func TestDisksOfEveryStack(t *testing.T) {
	for what, test := range map[string]struct {
		view       *view
		name       string
		format     string // the node with the bitmaps
		below      string // where the filter goes
		driver     string
		switchable bool
		left       string
		busy       string
	}{
		"PVE 9": {
			view: graph("", "/machine/peripheral/virtio1/virtio-backend", 512, "throttle:drive-virtio1", "qcow2:f1", "file:e1"),
			name: "virtio1", format: "f1", below: "f1", driver: "qcow2", switchable: true,
		},
		"PVE 9 after a mirror": {
			view: graph("", "scsi0", 512, "throttle:drive-scsi0", "zeroinit:z1", "raw:f1", "host_device:e1"),
			name: "scsi0", format: "f1", below: "z1", driver: "raw", switchable: true,
		},
		"PVE 9 in a live restore": {
			view: graph("", "scsi0", 512, "throttle:drive-scsi0", "alloc-track:a1", "qcow2:f1", "file:e1"),
			name: "scsi0", format: "f1", below: "a1", driver: "qcow2", switchable: true,
		},
		"PVE 8": {
			view: graph("drive-scsi0", "scsi0", 512, "qcow2:#block101", "file:#block002"),
			name: "scsi0", format: "#block101", below: "#block101", driver: "qcow2",
		},
		"PVE 8 with RBD": {
			view: graph("drive-scsi0", "scsi0", 512, "raw:#block101", "rbd:#block002"),
			name: "scsi0", format: "#block101", below: "#block101", driver: "raw",
		},
		"a bare protocol node": {
			view: graph("", "/machine/peripheral/vda/virtio-backend", 512, "rbd:ceph0"),
			name: "vda", format: "ceph0", below: "ceph0", driver: "raw",
		},
		"copy on read": {
			view: graph("drive-ide0", "ide0", 512, "copy-on-read:#cor", "qcow2:#b"),
			name: "ide0", format: "#b", below: "#cor", driver: "qcow2",
		},
		"UEFI variables": {
			view: graph("", "/machine/system.flash1", 540672, "throttle:drive-efidisk0", "qcow2:f1"),
			name: "efidisk0", format: "f1", below: "f1", driver: "qcow2", switchable: true,
		},
		"a device without an id": {
			view: graph("", "/machine/peripheral-anon/device[1]/virtio-backend", 512, "qcow2:disk0"),
			name: "disk0", format: "disk0", below: "disk0", driver: "qcow2",
		},
		"nothing has a name":       {view: graph("", "/machine/peripheral-anon/device[1]/virtio-backend", 512, "qcow2:#b"), left: "no usable name"},
		"a format of another kind": {view: graph("drive-scsi0", "scsi0", 512, "vmdk:#b"), name: "scsi0", left: "vmdk"},
		"an empty disk":            {view: graph("drive-scsi0", "scsi0", 0, "qcow2:#b"), name: "scsi0", left: "no bytes"},
		"another backup":           {view: graph("drive-scsi0", "scsi0", 512, "copy-before-write:#cbw", "qcow2:#b"), name: "scsi0", busy: "another job"},
		"a mirror":                 {view: graph("drive-scsi0", "scsi0", 512, "mirror_top:#m", "qcow2:#b"), name: "scsi0", busy: "another job"},
	} {
		disks, err := test.view.disks()
		if err != nil || len(disks) != 1 {
			t.Errorf("%s: %+v, %v", what, disks, err)
			continue
		}
		d := disks[0]
		if d.Name != test.name || !strings.Contains(d.Left, test.left) || (d.Left == "") != (test.left == "") {
			t.Errorf("%s: name %q, left out %q", what, d.Name, d.Left)
		}
		if test.busy != "" {
			if !errors.Is(d.busy, ErrBusy) || !strings.Contains(d.busy.Error(), test.busy) {
				t.Errorf("%s: %v", what, d.busy)
			}
			continue
		}
		if test.left == "" && (d.busy != nil || d.format != test.format || d.below != test.below || d.Driver != test.driver || d.switchable != test.switchable) {
			t.Errorf("%s: format node %q, filter onto %q, %s, switchable %v, %v", what, d.format, d.below, d.Driver, d.switchable, d.busy)
		}
	}
}

// A job's filter that query-block does not show is found by who uses the disk's node.
func TestHiddenJob(t *testing.T) {
	v := graph("drive-scsi0", "scsi0", 512, "qcow2:#b")
	v.nodes["#b"].parents = append(v.nodes["#b"].parents, parent{graphNode, "#mirror", "file"})
	disks, err := v.disks()
	if err != nil || !errors.Is(disks[0].busy, ErrBusy) {
		t.Errorf("%+v, %v", disks, err)
	}
}

func TestPassthrough(t *testing.T) {
	v := graph("drive-scsi0", "scsi0", 512, "raw:#b", "host_device:#c")
	v.passthrough["scsi0"] = true
	disks, err := v.disks()
	if err != nil || !disks[0].unsupported || !strings.Contains(disks[0].Left, "SCSI") {
		t.Errorf("%+v, %v", disks, err)
	}
}
