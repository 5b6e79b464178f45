package pvetest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qmchain/internal/testenv"
)

// recorded is an output of the real qm.
func recorded(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../testdata/pve", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestRecorded compares what qm prints with what the real one printed for the same configuration.
func TestRecorded(t *testing.T) {
	t.Parallel()
	const args = "-chardev 'socket,id=qmp-backup,path=/var/run/qemu-server/120-backup.qmp,server=on,wait=off' -mon 'chardev=qmp-backup,mode=control'"
	n := Install(t)
	n.WriteConfig(110, "memory: 256\nname: t110\nboot: order=scsi0\nscsi0: local:110/vm-110-disk-0.qcow2,size=1G\n")
	n.WriteConfig(111, "memory: 128\nname: t111\nboot: order=scsi0\nscsi0: local:111/vm-111-disk-0.qcow2,size=1G\n")
	stopped, pending := recorded(t, "120.conf"), recorded(t, "120-pending.conf")
	for _, test := range []struct {
		file, config string
		args         []string
	}{
		{"qm-config.txt", stopped, []string{"config", "120"}},
		{"qm-config-current.txt", pending, []string{"config", "120", "--current"}},
		{"qm-pending.txt", pending, []string{"pending", "120"}},
		{"qm-list.txt", stopped, []string{"list"}},
		{"qm-status.txt", stopped, []string{"status", "120"}},
		{"err-missing.txt", stopped, []string{"config", "999"}},
		{"err-locked.txt", stopped + "lock: backup\n", []string{"set", "120", "--onboot", "1"}},
		{"delete-absent.txt", strings.Replace(stopped, "args: ", "#", 1), []string{"set", "120", "--delete", "args"}},
	} {
		n.WriteConfig(120, test.config)
		code, out, errs := n.TryQM(test.args...)
		got := errs + out
		if strings.Contains(recorded(t, test.file), "rc=") {
			got += fmt.Sprintf("rc=%d\n", code)
		} else if code != 0 {
			t.Errorf("%s: exit code %d: %s", test.file, code, errs)
		}
		if diff := cmp.Diff(recorded(t, test.file), got); diff != "" {
			t.Errorf("%s (-real +ours):\n%s", test.file, diff)
		}
	}
	if got := parseConf(pending).next()["args"]; got != args+" -k de" {
		t.Errorf("pending args are %q", got)
	}
	if got := parseConf(pending).String(); got != pending {
		t.Errorf("written again it is not the same: %s", cmp.Diff(pending, got))
	}
}

func TestShowcmd(t *testing.T) {
	t.Parallel()
	pve := layout{
		run: "/var/run/qemu-server", events: "/var/run/qmeventd.sock", storage: "/var/lib/vz",
		firmware: "/usr/share/pve-edk2-firmware//OVMF_CODE_4M.secboot.fd",
	}
	for _, test := range []struct {
		file, machine, more string
	}{
		{"showcmd-pve9.txt", "q35", ""},
		{"showcmd-pve8.txt", "pc-q35-9.2+pve1", " -k de"},
	} {
		c := parseConf(recorded(t, "120.conf"))
		c.main["machine"] = test.machine
		words, err := shellwords(t.Context(), c.main["args"]+test.more)
		if err != nil {
			t.Fatal(err)
		}
		args := append([]string{"/usr/bin/kvm"}, commandLine("120", c, pve, 9)...)
		if diff := cmp.Diff(recorded(t, test.file), show(append(args, words...), true)+"\n"); diff != "" {
			t.Errorf("%s (-real +ours):\n%s", test.file, diff)
		}
	}
}

// TestGraphs compares QEMU's block graph with that of the real PVE's VM 120, in both of its forms.
func TestGraphs(t *testing.T) {
	t.Parallel()
	type device struct {
		Device, Qdev string
		Inserted     *struct {
			Drv      string
			NodeName string `json:"node-name"`
		}
	}
	type node struct {
		Drv      string
		NodeName string `json:"node-name"`
		ReadOnly bool   `json:"ro"`
	}
	for _, test := range []struct {
		machine        string
		devices, nodes string
	}{
		{"q35", "pve9-query-block.json", "pve9-query-named-block-nodes.json"},
		{"pc-q35-9.2+pve1", "pve8-query-block.json", ""}, // its nodes have names of the moment
	} {
		t.Run(test.machine, func(t *testing.T) {
			t.Parallel()
			n := Install(t)
			n.QEMU = testenv.Version(t, "10.0")
			n.AddVM(120, append(strings.Split(recorded(t, "120.conf"), "\n"), "machine: "+test.machine, "args: -rtc base=utc")...)
			n.QM("start", "120")

			var want struct{ Return []device }
			var got []device
			if err := json.Unmarshal([]byte(recorded(t, test.devices)), &want); err != nil {
				t.Fatal(err)
			}
			n.VM(120).Execute("query-block", nil, &got)
			for _, devices := range [][]device{want.Return, got} {
				for i := range devices {
					if d := devices[i].Inserted; d != nil && strings.HasPrefix(d.NodeName, "#") {
						d.NodeName = ""
					}
				}
				slices.SortFunc(devices, func(a, b device) int { return strings.Compare(a.Device+a.Qdev, b.Device+b.Qdev) })
			}
			if diff := cmp.Diff(want.Return, got); diff != "" {
				t.Errorf("devices (-real +ours):\n%s", diff)
			}
			if test.nodes == "" {
				return
			}
			var wantNodes struct{ Return []node }
			var gotNodes []node
			if err := json.Unmarshal([]byte(recorded(t, test.nodes)), &wantNodes); err != nil {
				t.Fatal(err)
			}
			n.VM(120).Execute("query-named-block-nodes", nil, &gotNodes)
			for _, nodes := range []*[]node{&wantNodes.Return, &gotNodes} {
				// The firmware is not PVE's.
				*nodes = slices.DeleteFunc(*nodes, func(n node) bool { return strings.HasPrefix(n.NodeName, "#") })
				slices.SortFunc(*nodes, func(a, b node) int { return strings.Compare(a.NodeName, b.NodeName) })
			}
			if diff := cmp.Diff(wantNodes.Return, gotNodes); diff != "" {
				t.Errorf("nodes (-real +ours):\n%s", diff)
			}
		})
	}
}
