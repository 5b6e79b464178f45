package proxmox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Hookscript is the volume of the VM's hook script, such as local:snippets/hook.pl; or "".
func (c *Config) Hookscript() string {
	volume, _ := c.Next("hookscript") // PVE leaves it pending nowhere, but an editor can
	return volume
}

// SnippetPath is the file of a snippet, by `pvesm path`. It need not be there.
func (h Host) SnippetPath(ctx context.Context, volume string) (string, error) {
	_, name, named := strings.Cut(volume, ":")
	// PVE has no folders in there.
	if base, found := strings.CutPrefix(name, "snippets/"); !named || !found || base == "" || strings.Contains(base, "/") {
		return "", fmt.Errorf("%q is no snippet, such as local:snippets/hook.pl", volume)
	}
	text, err := h.pvesm(ctx, "path", volume)
	if err != nil {
		return "", err
	}
	path := strings.TrimSuffix(text, "\n")
	if !filepath.IsAbs(path) || filepath.Base(path) != strings.TrimPrefix(name, "snippets/") {
		return "", fmt.Errorf("%s is not in a folder of this host: %q", volume, path)
	}
	return path, nil
}

// SetHookscript sets the VM's hook script, or takes it away if volume is empty, for the configuration that was read as c. It is
// in effect at once. Its errors are those of Set.
func (h Host) SetHookscript(ctx context.Context, c *Config, volume string) error {
	changes := []string{"--hookscript", volume}
	if volume == "" {
		changes = []string{"--delete", "hookscript"}
	}
	if err := h.Set(ctx, c, changes...); err != nil {
		return err
	}
	after, err := h.Config(c.VMID)
	if err == nil && after.Hookscript() != volume {
		err = fmt.Errorf("VM %s: its hook script is not what was asked of qm: %q", c.VMID, after.Hookscript())
	}
	return err
}

// HookscriptUsers are the VMs and containers of the whole cluster with that hook script, now or in a snapshot, by number.
func (h Host) HookscriptUsers(volume string) ([]string, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	var users []string
	for _, kind := range []string{"qemu-server", "lxc"} {
		files, err := h.glob("nodes", "*", kind, "*.conf")
		if err != nil {
			return nil, fmt.Errorf("users of %s: %w", volume, err)
		}
		for _, file := range files {
			text, err := h.readFile(file)
			if errors.Is(err, fs.ErrNotExist) {
				continue // destroyed, or moved to where it is listed too
			}
			if err != nil {
				return nil, fmt.Errorf("users of %s: %w", volume, err)
			}
			for line := range strings.Lines(string(text)) {
				value, found := strings.CutPrefix(line, "hookscript:")
				if found && strings.TrimSpace(value) == volume {
					users = append(users, strings.TrimSuffix(filepath.Base(file), ".conf"))
					break
				}
			}
		}
	}
	slices.Sort(users)
	return slices.Compact(users), nil
}

// Nodes are the names of the cluster's nodes, this one included.
func (h Host) Nodes() ([]string, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	entries, err := h.readDir(filepath.Join(h.Etc, "nodes"))
	if err != nil {
		return nil, fmt.Errorf("nodes of the cluster: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// Rebooting tells whether a VM that is being stopped is about to be started again: `qm reboot` leaves a note of that.
func (h Host) Rebooting(vmid VMID) bool {
	_, err := os.Stat(filepath.Join(h.Run, vmid.String()+".reboot"))
	return err == nil
}

// RemoveStale removes the backup socket that a killed QEMU has left. It is for a VM that does not run: whoever listens then is
// somebody else, and the error is ErrBusy.
func (s Socket) RemoveStale(ctx context.Context) (removed bool, err error) {
	fi, err := os.Lstat(s.Path())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("backup socket of VM %s: %w", s.VMID, err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return false, fmt.Errorf("backup socket of VM %s: %s is no socket, and stays", s.VMID, s.Path())
	}
	answer, err := s.Ask(ctx, nil)
	if err != nil {
		return false, err
	}
	if answer != AnswerNone {
		return false, fmt.Errorf("backup socket of VM %s: another process listens there, such as a clone with the same args: %w", s.VMID, ErrBusy)
	}
	if err := os.Remove(s.Path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("backup socket of VM %s: %w", s.VMID, err)
	}
	return true, nil
}
