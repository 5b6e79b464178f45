package proxmox

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
)

// HAManaged tells whether PVE's high availability starts and stops the VM: it is one of its resources, and not one that is to be
// ignored. What HA can't start at once, such as a VM with a lock, it starts elsewhere, or gives up with an error.
func (h Host) HAManaged(vmid VMID) (bool, error) {
	text, err := h.readFile(filepath.Join(h.Etc, "ha", "resources.cfg"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("HA's resources: %w", err)
	}
	return haManaged(string(text), vmid), nil
}

// haManaged reads resources.cfg: a line "vm: VMID" for each, and below it its properties, indented. Its state is "started" if
// nothing else is said.
func haManaged(text string, vmid VMID) bool {
	ours, managed := false, false
	for line := range strings.Lines(text) {
		kind, id, section := strings.Cut(line, ":")
		switch fields := strings.Fields(line); {
		case len(fields) == 0 || strings.HasPrefix(fields[0], "#"):
		case strings.TrimLeft(line, whitespace) == line:
			ours = section && kind == "vm" && strings.TrimSpace(id) == vmid.String()
			managed = managed || ours
		case ours && len(fields) == 2 && fields[0] == "state":
			managed = fields[1] != "ignored"
		}
	}
	return managed
}
