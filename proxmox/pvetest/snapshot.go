package pvetest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"qmchain/internal/testenv"
)

// snapshot takes a snapshot, in the qcow2 images. The state of the memory is never taken.
func (c *call) snapshot() error {
	if len(c.more) != 1 {
		return &failure{255, "400 not enough arguments\nqm snapshot <vmid> <snapname> [OPTIONS]"}
	}
	name := c.more[0]
	return c.loaded(func(cf *conf) error {
		if cf.main["template"] == "1" {
			return die("you can't take a snapshot if it's a template")
		}
		if err := c.checkLock(cf); err != nil {
			return err
		}
		if cf.snapshots[name] != nil {
			return die("snapshot name '%s' already used", name)
		}
		for _, d := range cf.drives() {
			if !d.cdrom() && d.format() != "qcow2" {
				return die("snapshot feature is not available")
			}
		}
		snap := maps.Clone(cf.main)
		maps.DeleteFunc(snap, func(key, _ string) bool { return key == "lock" || strings.HasPrefix(key, "unused") })
		snap["snaptime"] = strconv.FormatInt(time.Now().Unix(), 10)
		if text := c.option("description"); text != "" {
			snap["#"] = text + "\n"
		}
		for _, d := range cf.drives() {
			if d.cdrom() {
				continue
			}
			if err := c.snapshotDrive(d, name); err != nil {
				return err
			}
		}
		cf.snapshots[name] = snap
		cf.main["parent"] = name
		return c.save(cf)
	})
}

func (c *call) snapshotDrive(d drive, name string) error {
	if !c.running(c.vmid) {
		if _, err := c.run(c.QEMU.Img, "snapshot", "-c", name, c.layout().volume(d.volume)); err != nil {
			return die("%v", err)
		}
		return nil
	}
	err := c.vm(c.vmid).Try("blockdev-snapshot-internal-sync", map[string]any{"device": "drive-" + d.id, "name": name}, nil)
	if err != nil {
		return die("VM %s qmp command 'blockdev-snapshot-internal-sync' failed - %v", c.vmid, err)
	}
	return nil
}

// rollback takes the VM back to a snapshot. A failure leaves its lock behind.
func (c *call) rollback() error {
	if len(c.more) != 1 {
		return &failure{255, "400 not enough arguments\nqm rollback <vmid> <snapname> [OPTIONS]"}
	}
	name := c.more[0]
	return c.loaded(func(cf *conf) error {
		snap := cf.snapshots[name]
		if snap == nil {
			return die("snapshot '%s' does not exist", name)
		}
		if err := c.checkLock(cf); err != nil {
			return err
		}
		if c.running(c.vmid) {
			if err := c.quit(); err != nil {
				return err
			}
		}
		cf.main["lock"] = "rollback"
		if err := c.save(cf); err != nil {
			return err
		}
		for _, d := range (&conf{main: snap}).drives() {
			if d.cdrom() {
				continue
			}
			if _, err := c.run(c.QEMU.Img, "snapshot", "-a", name, c.layout().volume(d.volume)); err != nil {
				return die("%v", err)
			}
		}
		unused := maps.Clone(cf.main)
		maps.DeleteFunc(unused, func(key, _ string) bool { return !strings.HasPrefix(key, "unused") })
		cf.main = maps.Clone(snap)
		maps.Copy(cf.main, unused)
		delete(cf.main, "#")
		delete(cf.main, "snaptime")
		cf.main["parent"] = name
		if cf.main["vmgenid"] != "" {
			cf.main["vmgenid"] = testenv.RandomUUID()
		}
		clear(cf.pending)
		return c.save(cf)
	})
}

func (c *call) delSnapshot() error {
	if len(c.more) != 1 {
		return &failure{255, "400 not enough arguments\nqm delsnapshot <vmid> <snapname> [OPTIONS]"}
	}
	name := c.more[0]
	return c.loaded(func(cf *conf) error {
		snap := cf.snapshots[name]
		if snap == nil {
			return die("snapshot '%s' does not exist", name)
		}
		if err := c.checkLock(cf); err != nil {
			return err
		}
		var errs []error
		for _, d := range (&conf{main: snap}).drives() {
			switch {
			case d.cdrom():
			case c.running(c.vmid):
				errs = append(errs, c.vm(c.vmid).Try("blockdev-snapshot-delete-internal-sync", map[string]any{"device": "drive-" + d.id, "name": name}, nil))
			default:
				_, err := c.run(c.QEMU.Img, "snapshot", "-d", name, c.layout().volume(d.volume))
				errs = append(errs, err)
			}
		}
		if err := errors.Join(errs...); err != nil && !c.flag("force") {
			return die("%v", err)
		}
		// Those that came after it, and the present, descend from its parent now.
		for _, section := range append(slices.Collect(maps.Values(cf.snapshots)), cf.main) {
			if section["parent"] != name {
				continue
			}
			delete(section, "parent")
			if parent := snap["parent"]; parent != "" {
				section["parent"] = parent
			}
		}
		delete(cf.snapshots, name)
		return c.save(cf)
	})
}

// listSnapshot prints the snapshots, oldest first, and where the VM is now.
func (c *call) listSnapshot() error {
	cf, err := c.load()
	if err != nil {
		return err
	}
	names := slices.SortedFunc(maps.Keys(cf.snapshots), func(a, b string) int {
		return strings.Compare(cf.snapshots[a]["snaptime"]+a, cf.snapshots[b]["snaptime"]+b)
	})
	for i, name := range names {
		fmt.Fprintf(c.stdout, "%s`-> %s\n", strings.Repeat("  ", i), name)
	}
	fmt.Fprintf(c.stdout, "%s`-> current\n", strings.Repeat("  ", len(names)))
	return nil
}
