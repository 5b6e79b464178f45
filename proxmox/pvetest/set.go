package pvetest

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sort"
	"strings"
)

// config prints the configuration of the next start, or the current one.
func (c *call) config() error {
	cf, err := c.load()
	if err != nil {
		return err
	}
	all := cf.next()
	if c.flag("current") {
		all = maps.Clone(cf.main)
	}
	if cf.description != "" {
		all["description"] = cf.shownDescription()
	}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(c.stdout, "%s: %s\n", key, all[key])
	}
	return nil
}

func (c *conf) shownDescription() string {
	return strings.ReplaceAll(strings.TrimSuffix(c.description, "\n"), "\n", "%0A")
}

// showPending prints what is and what will be.
func (c *call) pending() error {
	cf, err := c.load()
	if err != nil {
		return err
	}
	if cf.description != "" {
		cf.main["description"] = cf.shownDescription()
	}
	keys := map[string]bool{}
	for key := range cf.main {
		keys[key] = true
	}
	for key := range cf.pending {
		keys[key] = key != "delete"
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if !keys[key] {
			continue
		}
		current, has := cf.main[key]
		coming, changes := cf.pending[key]
		switch {
		case has && slices.Contains(cf.deletes(), key):
			fmt.Fprintf(c.stdout, "del %s: %s\n", key, current)
			continue
		case has:
			fmt.Fprintf(c.stdout, "cur %s: %s\n", key, current)
		}
		if changes {
			fmt.Fprintf(c.stdout, "new %s: %s\n", key, coming)
		}
	}
	return nil
}

// Options that are not the VM's but say how to set them.
var settings = []string{"delete", "digest", "force", "skiplock", "revert"}

// Options that take effect on a running VM at once, without anything to plug.
var fast = []string{
	"lock", "name", "onboot", "shares", "startup", "description", "protection", "vmstatestorage", "hookscript", "tags",
}

// set changes the configuration; on a running VM it leaves pending what QEMU would have to be started anew for.
func (c *call) set() error {
	if len(c.options) == 0 {
		return &failure{255, "no options specified"}
	}
	if _, err := c.load(); err != nil {
		return err
	}
	if err := c.checkDrives(); err != nil {
		return err
	}
	if hook := c.option("hookscript"); hook != "" {
		if _, err := c.hookPath(hook); err != nil {
			return err
		}
	}
	return c.loaded(func(cf *conf) error {
		if digest := c.option("digest"); digest != "" && digest != cf.digest {
			return die("checksum mismatch (file change by other user?)")
		}
		if err := c.checkLock(cf); err != nil {
			return err
		}
		if err := c.checkBoot(cf); err != nil {
			return err
		}
		var shown []string
		for _, key := range split(c.option("delete")) {
			if key == "description" && cf.description != "" {
				cf.description = ""
				continue
			}
			if _, ok := cf.main[key]; !ok && cf.pending[key] == "" {
				fmt.Fprintf(c.stderr, "cannot delete '%s' - not set in current configuration!\n", key)
				continue
			}
			c.unuse(cf, key)
			delete(cf.pending, key)
			c.deleteUnused(cf, key)
			cf.setDeletes(append(slices.DeleteFunc(cf.deletes(), func(k string) bool { return k == key }), key))
		}
		options := slices.Clone(c.options)
		sort.SliceStable(options, func(i, j int) bool { return options[i].name < options[j].name })
		for _, o := range options {
			if o.name != "digest" && o.name != "skiplock" {
				shown = append(shown, "-"+o.name+" "+o.value)
			}
			if slices.Contains(settings, o.name) {
				continue
			}
			if o.name == "description" {
				cf.description = strings.ReplaceAll(o.value, ":", "%3A") + "\n"
				continue
			}
			value, err := stored(o.name, o.value)
			if err == nil {
				err = c.fault("option " + o.name)
			}
			if err == nil {
				value, err = c.newVolume(o.name, value)
			}
			if err != nil {
				cf.forgetUsed()
				return errors.Join(err, c.save(cf)) // what came before stays pending
			}
			c.replace(cf, o.name, value)
			cf.pending[o.name] = value
			cf.setDeletes(slices.DeleteFunc(cf.deletes(), func(k string) bool { return k == o.name }))
		}
		fmt.Fprintf(c.stdout, "update VM %s: %s\n", c.vmid, strings.Join(shown, " "))
		running := c.running(c.vmid)
		cf.apply(func(key string) bool { return !running || slices.Contains(fast, key) })
		cf.cleanup()
		cf.forgetUsed()
		return c.save(cf)
	})
}

func split(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune(",; ", r) })
}

// unlock takes away any lock.
func (c *call) unlock() error {
	return c.loaded(func(cf *conf) error {
		delete(cf.main, "lock")
		delete(cf.pending, "lock")
		return c.save(cf)
	})
}

// list prints the node's VMs.
func (c *call) list() error {
	entries, err := os.ReadDir(c.configDir(c.Name))
	if err != nil {
		return err
	}
	var ids []string
	for _, e := range entries {
		if id, found := strings.CutSuffix(e.Name(), ".conf"); found && validVMID.MatchString(id) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	slices.SortFunc(ids, func(a, b string) int { return len(a)*1000 + strings.Compare(a, b) - len(b)*1000 })
	const row = "%10s %-20s %-10s %-10s %12.2f %-10d\n"
	fmt.Fprintf(c.stdout, "%10s %-20s %-10s %-10s %12s %-10s\n", "VMID", "NAME", "STATUS", "MEM(MB)", "BOOTDISK(GB)", "PID")
	for _, id := range ids {
		c.vmid = id
		cf, err := c.load()
		if err != nil {
			return err
		}
		name, memory, pid := cf.main["name"], cf.main["memory"], 0
		if name == "" {
			name = "VM " + id
		}
		if memory == "" {
			memory = "512"
		}
		if c.running(id) {
			pid = c.vm(id).Pid()
		}
		fmt.Fprintf(c.stdout, row, id, name, c.state(), memory, cf.bootDiskGiB(), pid)
	}
	return nil
}

// bootDiskGiB is the size of the disk that the VM boots from first, in GiB, or 0.
func (c *conf) bootDiskGiB() float64 {
	order, _ := strings.CutPrefix(c.main["boot"], "order=")
	for _, id := range strings.Split(order, ";") {
		if !driveID.MatchString(id) {
			continue
		}
		if d := parseDrive(id, c.main[id]); !d.cdrom() {
			size, _ := d.size() // as in PVE, none is 0
			return float64(size) / (1 << 30)
		}
	}
	return 0
}

// status prints the VM's state.
func (c *call) status() error {
	if _, err := c.load(); err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "status: %s\n", c.state())
	return nil
}

// state is stopped, or QEMU's run state.
func (c *call) state() string {
	if !c.running(c.vmid) {
		return "stopped"
	}
	var s struct{ Status string }
	if err := c.vm(c.vmid).Try("query-status", nil, &s); err != nil {
		return "stopped" // it has just gone
	}
	return s.Status
}
