package proxmox

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
)

// taskTitle is what PVE calls the process of a task: its UPID has the task's kind and, for most, the VM.
var taskTitle = regexp.MustCompile(`^task UPID:[^:]+:[0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f]+:([a-z]+):([^:]*):`)

// maxAncestors bounds the way up to init.
const maxAncestors = 64

// TaskAbove is the kind of the task of PVE's that a process was started by, directly or not, if it is one about that VM, such as
// qmstop, or a vzdump, which can be about several; "" if there is none. It is how a hook script can tell a stop from a shutdown.
func TaskAbove(pid int, vmid VMID) string {
	for range maxAncestors {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return ""
		}
		// The name, in parentheses, can have any characters; the state and the parent follow it.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 2 {
			return ""
		}
		if pid, _ = strconv.Atoi(fields[1]); pid <= 1 {
			return ""
		}
		title, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			return ""
		}
		if m := taskTitle.FindStringSubmatch(string(title)); m != nil && (m[2] == vmid.String() || m[1] == "vzdump" && m[2] == "") {
			return m[1]
		}
	}
	return ""
}
