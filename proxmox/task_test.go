package proxmox_test

import (
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"qmchain/proxmox"
)

func TestTaskAbove(t *testing.T) {
	t.Parallel()
	const upid = "task UPID:pve1:0000A1B2:00C3D4E5:692F0000:"
	for _, test := range []struct{ title, want string }{
		{upid + "qmstop:110:root@pam:", "qmstop"},
		{upid + "qmshutdown:110:user@pve!token:", "qmshutdown"},
		{upid + "qmstop:1100:root@pam:", ""},
		{upid + "vzdump::root@pam:", "vzdump"},
		{upid + "vzdump:110:root@pam:", "vzdump"},
		{upid + "vzdump:111:root@pam:", ""},
		{upid + "qmstop::root@pam:", ""},
		{"UPID:pve1:0000A1B2:00C3D4E5:692F0000:qmstop:110:root@pam:", ""},
		{"qm stop 110", ""},
	} {
		// As PVE does it, with Perl's $0; a shell is in between, as a hook script is.
		cmd := exec.Command("perl", "-e", `$0 = shift; $| = 1; exit(system("sh", "-c", "sleep 1000 & echo \$!; read x; kill \$!") >> 8)`, test.title)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 32)
		n, err := out.Read(line)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(line[:n])))
		if err != nil {
			t.Fatal(err)
		}
		if got := proxmox.TaskAbove(pid, 110); got != test.want {
			t.Errorf("%s: %q", test.title, got)
		}
		_ = in.Close()
		_ = cmd.Wait() // it is killed with its child
	}
	if got := proxmox.TaskAbove(1, 110) + proxmox.TaskAbove(0, 110) + proxmox.TaskAbove(-1, 110); got != "" {
		t.Error(got)
	}
}
