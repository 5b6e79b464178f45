package proxmox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Selection says which VMs: some by number, or all of this node, those of a pool, or those with a tag.
type Selection struct {
	VMIDs   []VMID
	All     bool
	Pool    string
	Tag     string
	Exclude []VMID // of All, Pool and Tag
}

// Many tells whether the selection names a group and not single VMs.
func (s Selection) Many() bool { return s.All || s.Pool != "" || s.Tag != "" }

// Select finds the VMs of a selection, each once, and in ascending order where it names a group. VMs that are named by
// number need not exist. Of a group, only this node's VMs are chosen: on the others, it is their node's part; notes tell
// of those. The error is ErrNotFound for a pool that is not there or a tag that no VM here has, or ErrNoHost.
func (h Host) Select(s Selection) (vmids []VMID, notes []string, err error) {
	switch {
	case !s.Many():
		for _, id := range s.VMIDs {
			if !slices.Contains(vmids, id) {
				vmids = append(vmids, id)
			}
		}
		return vmids, nil, nil
	case s.All:
		vmids, err = h.VMIDs()
	case s.Pool != "":
		vmids, notes, err = h.pool(s.Pool)
	default:
		vmids, err = h.tagged(s.Tag)
	}
	vmids = slices.DeleteFunc(vmids, func(id VMID) bool { return slices.Contains(s.Exclude, id) })
	return vmids, notes, err
}

// Pools returns what is in each pool of the cluster, as PVE's user configuration has it: pool:NAME:comment:guests:storages:
func (h Host) Pools() (map[string][]VMID, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	text, err := h.readFile(filepath.Join(h.Etc, "user.cfg"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	pools := map[string][]VMID{}
	for line := range strings.Lines(string(text)) {
		part := strings.Split(strings.TrimSpace(line), ":")
		if len(part) < 4 || part[0] != "pool" {
			continue
		}
		if _, twice := pools[part[1]]; twice {
			continue
		}
		var vmids []VMID
		for _, member := range fields(part[3]) {
			if id, err := ParseVMID(member); err == nil {
				vmids = append(vmids, id)
			}
		}
		slices.Sort(vmids)
		pools[part[1]] = slices.Compact(vmids)
	}
	return pools, nil
}

// pool finds this node's VMs of a pool.
func (h Host) pool(name string) (vmids []VMID, notes []string, err error) {
	pools, err := h.Pools()
	if err != nil {
		return nil, nil, fmt.Errorf("pool %s: %w", name, err)
	}
	members, found := pools[name]
	if !found {
		return nil, nil, fmt.Errorf("pool %s: %w", name, ErrNotFound)
	}
	for _, id := range members {
		if _, err := h.Config(id); errors.Is(err, ErrElsewhere) || errors.Is(err, ErrNotFound) {
			notes = append(notes, err.Error())
			continue
		}
		vmids = append(vmids, id)
	}
	return vmids, notes, nil
}

// Tags returns this node's VMs with each tag. Capitals don't matter: PVE shows one tag for both.
func (h Host) Tags() (map[string][]VMID, error) {
	all, err := h.VMIDs()
	if err != nil {
		return nil, err
	}
	tags := map[string][]VMID{}
	for _, id := range all {
		c, err := h.Config(id)
		switch {
		case errors.Is(err, ErrNotFound) || errors.Is(err, ErrElsewhere):
			continue // gone since it was listed
		case err != nil:
			return nil, err
		}
		for _, tag := range c.Tags() {
			tag = strings.ToLower(tag)
			if !slices.Contains(tags[tag], id) {
				tags[tag] = append(tags[tag], id)
			}
		}
	}
	return tags, nil
}

// tagged finds this node's VMs with a tag.
func (h Host) tagged(tag string) ([]VMID, error) {
	tags, err := h.Tags()
	if err != nil {
		return nil, err
	}
	vmids := tags[strings.ToLower(tag)]
	if len(vmids) == 0 {
		return nil, fmt.Errorf("tag %s: no VM of this node has it: %w", tag, ErrNotFound)
	}
	return vmids, nil
}
